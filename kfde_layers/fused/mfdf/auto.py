"""The rule by which impl="auto" chooses for MFDF."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfde_layers._impl import Impl, transforming
from kfde_layers.fused.mfdf.merging import SMALL_MAP, spacing_and_radii


def auto_impl(x: Tensor, branch_weights: Sequence[Tensor], dilations: Sequence[int]) -> Impl:
    """Return the implementation that "auto" takes where both can run."""
    if transforming():  # the equations run batched, the operators' gradients one by one
        return Impl.REFERENCE
    merge = _merging_pays(branch_weights, dilations) and not _branches_compile_better(x)
    return Impl.FUSED if merge else Impl.REFERENCE


def _merging_pays(weights: Sequence[Tensor], dilations: Sequence[int]) -> bool:
    """Return whether one merged convolution is expected to take less time than the branches.

    Measured on CPU, forward and with backward: there must be three branches or more, and the merged kernel must not be
    mostly zeros, as dilation can make it.
    """
    _, radii = spacing_and_radii(weights, dilations)
    merged_taps = (2 * max(radii) + 1) ** 2
    return len(weights) >= 3 and merged_taps <= 3 * sum(weight.shape[-1] ** 2 for weight in weights)


def _branches_compile_better(x: Tensor) -> bool:
    """Return whether the call is compiled inference on a small channels_last map, on CPU.

    The operator must copy such maps, and Inductor was measured to run the branches faster. With a backward pass the
    operator still wins.
    """
    small = x.stride(1) == 1 and x.shape[2] * x.shape[3] <= SMALL_MAP
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_grad_enabled() and small
