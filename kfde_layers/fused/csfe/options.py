"""The hyper-parameters of CFE, SFE and CSFE, as they travel from the public functions to the kernels."""

from typing import NamedTuple, get_type_hints


class CsfeOptions(NamedTuple):
    """Hyper-parameters of `scale * (CFE(x) + SFE(x))`; their order is that of `kfde_layers.functional.csfe`.

    The term of CFE is absent where there are no gamma and beta, the term of SFE where `with_sfe` is false.
    """

    num_groups: int = 1
    """Groups of CFE's normalisation."""
    threshold: float = 0.5
    """T of CFE, a probability in (0, 1)."""
    lambd: float = 1e-4
    """Added to SFE's variance, in units of x squared."""
    beta: float = 0.5
    """Added to SFE's score, dimensionless."""
    correction: int = 0
    """Subtracted from H W in the divisor of SFE's variance."""
    eps: float = 1e-5
    """Added to the variance of CFE's normalisation, in units of x squared."""
    with_sfe: bool = False
    """Whether the term of SFE is present."""
    scale: float = 1.0
    """Factor of the sum, dimensionless."""


OPTIONS_SCHEMA = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(CsfeOptions).items())
"""The same fields as arguments in the schema of an operator."""
