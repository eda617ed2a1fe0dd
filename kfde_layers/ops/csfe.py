"""Channel-spatial feature enhancement: CFE and SFE as the two branches of one module."""

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
from kfde_layers.ops.cfe import cfe_equations, cfe_options, check_cfe_tensors
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.ops.scripting import define_operator
from kfde_layers.ops.sfe import sfe_equations, sfe_options

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
    of_cfe = cfe_options("csfe: ", x.shape[1], num_groups, threshold, eps)
    of_sfe = sfe_options("csfe: ", lambd, beta, correction)
    options = csfe_options("csfe: ", of_cfe, of_sfe, arrangement, fusion)
    return csfe_from_options(x, weight, bias, options, arrangement, impl)


def csfe_options(prefix: str, of_cfe: CsfeOptions, of_sfe: CsfeOptions, arrangement: str, fusion: str) -> CsfeOptions:
    """Return the hyper-parameters of both branches together; refuse an unknown arrangement or fusion."""
    check_choice(f"{prefix}arrangement", arrangement, ARRANGEMENTS)
    check_choice(f"{prefix}fusion", fusion, FUSIONS)
    scale = 0.5 if (arrangement, fusion) == ("parallel", "mean") else 1.0
    num_groups, threshold, eps = of_cfe.num_groups, of_cfe.threshold, of_cfe.eps
    return of_sfe._replace(num_groups=num_groups, threshold=threshold, eps=eps, scale=scale)


def csfe_from_options(
    x: Tensor, weight: Tensor, bias: Tensor, options: CsfeOptions, arrangement: str, impl: Impl | str
) -> Tensor:
    """Return CSFE of checked tensors by checked hyper-parameters."""
    if select(impl, unsupported(x, lambda: (weight, bias)), auto_impl()) is Impl.FUSED:
        if arrangement == "parallel":
            return fused(x, weight, bias, options)
        return _one_after_the_other(x, weight, bias, options, arrangement)

    def cfe_branch(x: Tensor) -> Tensor:
        return cfe_equations(x, weight, bias, options.num_groups, options.threshold, options.eps)

    def sfe_branch(x: Tensor) -> Tensor:
        return sfe_equations(x, options.lambd, options.beta, options.correction)

    h = upcast(x)
    if arrangement == "cfe_sfe":
        y = sfe_branch(cfe_branch(h))
    elif arrangement == "sfe_cfe":
        y = cfe_branch(sfe_branch(h))
    else:
        y = options.scale * (cfe_branch(h) + sfe_branch(h))
    return as_input(y, x)


def _one_after_the_other(x: Tensor, weight: Tensor, bias: Tensor, options: CsfeOptions, arrangement: str) -> Tensor:
    cfe_options = options._replace(with_sfe=False)
    eager = nobody_looks(x, weight, bias)  # a checkpoint must save the same again, whoever looks then

    def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = upcast(x)
        if arrangement == "cfe_sfe":
            y = fused(fused(h, weight, bias, cfe_options, eager), None, None, options, eager)
        else:
            y = fused(fused(h, None, None, options, eager), weight, bias, cfe_options, eager)
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
