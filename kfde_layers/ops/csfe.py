"""Channel-spatial feature enhancement: CFE and SFE as the two branches of one module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kfde_layers._checks import check_choice
from kfde_layers._impl import Impl, select, tracing, transforming, unsupported
from kfde_layers.fused.csfe.auto import auto_impl
from kfde_layers.fused.csfe.operator import fused
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.fused.eager import nobody_looks
from kfde_layers.ops.cfe import cfe_equations, check_cfe, check_cfe_tensors
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.ops.scripting import define_operator
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
    r"""Combine CFE and SFE: by default their sum.

    \[ y = \begin{cases}
       \mathrm{CFE}(x) + \mathrm{SFE}(x) & \text{parallel, sum} \\
       \tfrac{1}{2}\,(\mathrm{CFE}(x) + \mathrm{SFE}(x)) & \text{parallel, mean} \\
       \mathrm{SFE}(\mathrm{CFE}(x)) & \text{cfe_sfe} \\
       \mathrm{CFE}(\mathrm{SFE}(x)) & \text{sfe_cfe}
       \end{cases} \]

    with CFE and SFE as in `kfde_layers.functional.cfe` and `kfde_layers.functional.sfe`, whose arguments these are.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (1)-(9). The paper speaks of dual branches and gives no equation for how they are combined: "parallel" with
    "sum" is this library's reading, the others are alternatives.

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

    Numerics: everything between `x` and the result in float32 (float64 for float64 input), also under autocast. |x| may
    be up to 1e15, and its mean up to 1e6 standard deviations. Deterministic: yes.

    Examples:
        >>> x = torch.zeros(1, 2, 3, 3)
        >>> csfe(x, torch.ones(2), torch.zeros(2), num_groups=1).abs().max()  # every weight multiplies x
        tensor(0.)
    """
    check_cfe_tensors("csfe: ", x, weight, bias)
    num_groups, threshold, eps = check_cfe("csfe: ", x.shape[1], num_groups, threshold, eps)
    lambd, beta, correction = check_sfe("csfe: ", lambd, beta, correction)
    check_csfe("csfe: ", arrangement, fusion)
    if select(impl, unsupported(x, lambda: (weight, bias)), auto_impl()) is Impl.FUSED:
        if arrangement == "parallel":
            scale = 0.5 if fusion == "mean" else 1.0
            options = CsfeOptions(num_groups, threshold, lambd, beta, correction, eps, with_sfe=True, scale=scale)
            return fused(x, weight, bias, options)
        cfe_options = CsfeOptions(num_groups=num_groups, threshold=threshold, eps=eps)
        sfe_options = CsfeOptions(lambd=lambd, beta=beta, correction=correction, with_sfe=True)
        return _one_after_the_other(x, weight, bias, cfe_options, sfe_options, arrangement)

    def cfe_branch(x: Tensor) -> Tensor:
        return cfe_equations(x, weight, bias, num_groups, threshold, eps)

    def sfe_branch(x: Tensor) -> Tensor:
        return sfe_equations(x, lambd, beta, correction)

    return as_input(combine(cfe_branch, sfe_branch, upcast(x), arrangement, fusion), x)


def check_csfe(prefix: str, arrangement: str, fusion: str) -> None:
    """Refuse an arrangement or a fusion that CSFE does not have; messages begin with `prefix`."""
    check_choice(f"{prefix}arrangement", arrangement, ARRANGEMENTS)
    check_choice(f"{prefix}fusion", fusion, FUSIONS)


def combine(
    cfe_branch: Callable[[Tensor], Tensor],
    sfe_branch: Callable[[Tensor], Tensor],
    x: Tensor,
    arrangement: str,
    fusion: str,
) -> Tensor:
    """Call the two branches on `x` and on each other, as the arrangement says."""
    if arrangement == "cfe_sfe":
        return sfe_branch(cfe_branch(x))
    if arrangement == "sfe_cfe":
        return cfe_branch(sfe_branch(x))
    y = cfe_branch(x) + sfe_branch(x)
    return y / 2 if fusion == "mean" else y


def _one_after_the_other(
    x: Tensor, weight: Tensor, bias: Tensor, cfe_options: CsfeOptions, sfe_options: CsfeOptions, arrangement: str
) -> Tensor:
    eager = nobody_looks(x, weight, bias)  # a checkpoint must save the same again, whoever looks then

    def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = upcast(x)
        if arrangement == "cfe_sfe":
            y = fused(fused(h, weight, bias, cfe_options, eager), None, None, sfe_options, eager)
        else:
            y = fused(fused(h, None, None, sfe_options, eager), weight, bias, cfe_options, eager)
        return as_input(y, x)

    if tracing() or transforming() or not torch.is_grad_enabled():  # torch.func cannot look into a checkpoint
        return chain(x, weight, bias)
    # Recompute the map between the branches in backward instead of saving it.
    return checkpoint(chain, x, weight, bias, use_reentrant=False, preserve_rng_state=False)


def _recorded_csfe(*arguments: Any) -> Tensor:
    return csfe(*arguments[:-1], impl=arguments[-1])


define_operator(
    "csfe(Tensor x, Tensor weight, Tensor bias, int num_groups, float threshold, float lambd, float beta, "
    "int correction, float eps, str arrangement, str fusion, str impl) -> Tensor",
    _recorded_csfe,
)
