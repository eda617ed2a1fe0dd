"""Channel-spatial feature enhancement: CFE and SFE as the two branches of one module."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kfde_layers._checks import check_choice
from kfde_layers._impl import Impl, select, tracing, unsupported
from kfde_layers.ops.cfe import cfe_equations, check_cfe, check_cfe_tensors
from kfde_layers.ops.csfe_fused import fused, preferred
from kfde_layers.ops.csfe_moments import Enhancement
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.ops.sfe import check_sfe, sfe_equations

ARRANGEMENTS = ("parallel", "cfe_sfe", "sfe_cfe")
FUSIONS = ("sum", "mean")


def csfe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    threshold: float = 0.5,
    lambd: float = 1e-4,
    beta: float = 0.5,
    correction: int = 0,
    eps: float = 1e-5,
    arrangement: str = "parallel",
    fusion: str = "sum",
    *,
    impl: Impl | str = "auto",
) -> Tensor:
    r"""Enhance a feature map by channel and by position at once.

    \[ y = \begin{cases}
       \mathrm{CFE}(x) + \mathrm{SFE}(x) & \text{parallel, sum} \\
       \tfrac{1}{2}\,(\mathrm{CFE}(x) + \mathrm{SFE}(x)) & \text{parallel, mean} \\
       \mathrm{SFE}(\mathrm{CFE}(x)) & \text{cfe_sfe} \\
       \mathrm{CFE}(\mathrm{SFE}(x)) & \text{sfe_cfe}
       \end{cases} \]

    with CFE and SFE as in `kfde_layers.functional.cfe` and `kfde_layers.functional.sfe`, whose arguments these are.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (1)-(9). The paper speaks of dual branches and gives no equation for how they join: "parallel" with "sum" is
    this library's reading, the rest are its alternatives.

    Args:
        x: Feature map, (N, C, H, W), floating point, C even.
        weight: \(\gamma\) of CFE, (C,).
        bias: \(\beta\) of CFE's normalisation, (C,).
        num_groups: Groups of CFE's normalisation; divides C.
        threshold: T of CFE, a probability in (0, 1).
        lambd: \(\lambda\) of SFE, in units of x squared; positive.
        beta: \(\beta\) of SFE, dimensionless.
        correction: Subtracted from H W in the divisor of SFE's variance.
        eps: Added to the variance of CFE's normalisation, in units of x squared.
        arrangement: "parallel", "cfe_sfe" or "sfe_cfe".
        fusion: "sum" or "mean"; used by "parallel" only.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.

    Returns:
        Same shape, dtype, device and memory format as `x`.

    Raises:
        TypeError: An argument has the wrong type, or `x` is no floating-point tensor.
        ValueError: A shape or a value is out of range; the message names it.
        NotImplementedError: impl="fused" cannot run here; the message says why.

    Numerics: everything between `x` and the result in float32 (float64 for float64 input), also under autocast.
    Deterministic: yes.

    Examples:
        >>> x = torch.zeros(1, 2, 3, 3)
        >>> csfe(x, torch.ones(2), torch.zeros(2), num_groups=1).abs().max()  # every weight multiplies x
        tensor(0.)
    """
    check_cfe_tensors(x, weight, bias)
    check_cfe(x.shape[1], num_groups, threshold, eps)
    check_sfe(lambd, beta, correction)
    check_csfe(arrangement, fusion)
    if select(impl, unsupported(x), preferred(x, channel=True)) is Impl.FUSED:
        if arrangement == "parallel":
            scale = 0.5 if fusion == "mean" else 1.0
            return fused(x, weight, bias, Enhancement(num_groups, threshold, eps, True, lambd, beta, correction, scale))
        channel = Enhancement(num_groups, threshold, eps)
        spatial = Enhancement(spatial=True, lambd=lambd, beta=beta, correction=correction)
        return _in_turn(x, weight, bias, channel, spatial, arrangement)

    def channel_branch(x: Tensor) -> Tensor:
        return cfe_equations(x, weight, bias, num_groups, threshold, eps)

    def spatial_branch(x: Tensor) -> Tensor:
        return sfe_equations(x, lambd, beta, correction)

    h = upcast(x)
    if arrangement == "cfe_sfe":
        y = spatial_branch(channel_branch(h))
    elif arrangement == "sfe_cfe":
        y = channel_branch(spatial_branch(h))
    else:
        y = channel_branch(h) + spatial_branch(h)
        y = y / 2 if fusion == "mean" else y
    return as_input(y, x)


def _in_turn(
    x: Tensor, weight: Tensor, bias: Tensor, channel: Enhancement, spatial: Enhancement, arrangement: str
) -> Tensor:
    def both(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = upcast(x)
        if arrangement == "cfe_sfe":
            y = fused(fused(h, weight, bias, channel), None, None, spatial)
        else:
            y = fused(fused(h, None, None, spatial), weight, bias, channel)
        return as_input(y, x)

    if tracing() or not torch.is_grad_enabled():
        return both(x, weight, bias)
    # What passes between the branches is computed again, not kept: the backward pass is given no more than x.
    return checkpoint(both, x, weight, bias, use_reentrant=False, preserve_rng_state=False)


def check_csfe(arrangement: str, fusion: str) -> None:
    """Refuse ways of joining the branches that CSFE does not know."""
    check_choice("arrangement", arrangement, ARRANGEMENTS)
    check_choice("fusion", fusion, FUSIONS)


torch.library.define(
    "kfde::csfe",
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float lambd, float beta, int correction, "
    "float eps, str arrangement, str fusion, str impl) -> Tensor",
)


@torch.library.impl("kfde::csfe", "CompositeImplicitAutograd")
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    threshold: float,
    lambd: float,
    beta: float,
    correction: int,
    eps: float,
    arrangement: str,
    fusion: str,
    impl: str,
) -> Tensor:
    return csfe(x, weight, bias, num_groups, threshold, lambd, beta, correction, eps, arrangement, fusion, impl=impl)
