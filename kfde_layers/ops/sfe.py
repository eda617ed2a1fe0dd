"""Spatial-level feature enhancement, equations (6)-(9)."""

from typing import Any

from torch import Tensor

from kfde_layers._checks import check_int, check_map, check_real
from kfde_layers._impl import Impl, select, unsupported
from kfde_layers.fused.csfe.auto import auto_impl
from kfde_layers.fused.csfe.operator import fused
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.ops.gate import deviations
from kfde_layers.ops.scripting import define_operator


def sfe(x: Tensor, lambd: float = 1e-4, beta: float = 0.5, correction: int = 0, *, impl: Impl | str = "auto") -> Tensor:
    r"""Weight each position by its squared distance from the mean of its channel.

    \[ d_{c,ij} = (x_{c,ij} - \mu_c)^2, \qquad
       \sigma_c^2 = \frac{1}{n}\sum_{ij} d_{c,ij}, \qquad
       \hat{x} = x\,\sigma\!\left(\frac{d_{c,ij}}{4(\sigma_c^2 + \lambda)} + \beta\right) \]

    with \(\mu_c\) the mean over the n = H W positions of channel c, \(\lambda\) = `lambd` and \(\beta\) = `beta`.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (6)-(9). Differs from the paper nowhere. `correction=1` gives the divisor n - 1 of SimAM (Yang et al., ICML
    2021). Where that divisor would be zero, on a map of one position, it is 1: the output is then x sigma(beta), and
    that of SimAM is NaN.

    Args:
        x: Feature map, (N, C, H, W), floating point.
        lambd: Added to the variance, in units of x squared; positive.
        beta: Added to the score, dimensionless.
        correction: Subtracted from n in the divisor of the variance: 0 as in the paper, 1 as in SimAM.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.

    Returns:
        Same shape, dtype, device and memory format as `x`.

    Raises:
        TypeError: An argument has the wrong type, or `x` is no floating-point tensor.
        ValueError: A shape or a value is out of range; the message names it.
        NotImplementedError: impl="fused" cannot run here; the message says why.

    Numerics: statistics and gate in float32 (float64 for float64 input), also under autocast. |x| may be up to 1e15,
    and its mean up to 1e6 standard deviations. Deterministic: yes.

    Examples:
        >>> sfe(torch.full((1, 1, 2, 2), 3.0), beta=0.0)  # every distance is 0: x * sigmoid(0)
        tensor([[[[1.5000, 1.5000],
                  [1.5000, 1.5000]]]])
    """
    check_map("sfe: x", x)
    return sfe_from_options(x, sfe_options("sfe: ", lambd, beta, correction), impl)


def sfe_options(prefix: str, lambd: float, beta: float, correction: int) -> CsfeOptions:
    """Return SFE's hyper-parameters as Python numbers; refuse what it cannot use; messages begin with `prefix`."""
    lambd = check_real(f"{prefix}lambd", lambd, above=0)
    beta = check_real(f"{prefix}beta", beta)
    correction = check_int(f"{prefix}correction", correction, minimum=0)
    return CsfeOptions(lambd=lambd, beta=beta, correction=correction, with_sfe=True)


def sfe_from_options(x: Tensor, options: CsfeOptions, impl: Impl | str) -> Tensor:
    """Return SFE of a checked map by checked hyper-parameters."""
    if select(impl, unsupported(x), auto_impl()) is Impl.FUSED:
        return fused(x, None, None, options)
    return as_input(sfe_equations(upcast(x), options.lambd, options.beta, options.correction), x)


def sfe_equations(x: Tensor, lambd: float, beta: float, correction: int) -> Tensor:
    """Return equations (6)-(9) in the dtype of `x`."""
    n = x.shape[2] * x.shape[3]
    d = deviations(x, dim=(2, 3)).square()  # (6)
    variance = d.sum(dim=(2, 3), keepdim=True) / max(n - correction, 1)  # (7)
    score = d / (4 * (variance + lambd)) + beta  # (8)
    return x * score.sigmoid()  # (9)


def _recorded_sfe(*arguments: Any) -> Tensor:
    return sfe(*arguments[:-1], impl=arguments[-1])


define_operator(
    "sfe(Tensor x, float lambd, float beta, int correction, str impl) -> Tensor",
    _recorded_sfe,
)
