"""Which gradients of the convolution by merged kernels somebody asked for."""

from typing import NamedTuple


class Asked(NamedTuple):
    """Gradients that the backward pass computes, by default all, in the order of the operator's arguments."""

    x: bool = True
    """That of the map."""
    alpha: bool = True
    """That of the branches' weights."""
    kernels: bool = True
    """That of the stacked kernels."""
    bias: bool = True
    """That of the merged bias."""
