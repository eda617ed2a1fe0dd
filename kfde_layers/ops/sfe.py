"""Spatial-level feature enhancement, equations (6)-(9)."""

import torch
from torch import Tensor

from kfde_layers._checks import check_int, check_map, check_real
from kfde_layers._impl import Impl, select, unsupported
from kfde_layers.ops.csfe_fused import fused, preferred
from kfde_layers.ops.csfe_moments import Enhancement
from kfde_layers.ops.formats import as_input, upcast


def sfe(x: Tensor, lambd: float = 1e-4, beta: float = 0.5, correction: int = 0, *, impl: Impl | str = "auto") -> Tensor:
    r"""Weight each position by how far it stands out from the mean of its channel.

    \[ d_{c,ij} = (x_{c,ij} - \mu_c)^2, \qquad
       \sigma_c^2 = \frac{1}{n}\sum_{ij} d_{c,ij}, \qquad
       \hat{x} = x\,\sigma\!\left(\frac{d_{c,ij}}{4(\sigma_c^2 + \lambda)} + \beta\right) \]

    with \(\mu_c\) the mean over the n = H W positions of channel c, \(\lambda\) = `lambd` and \(\beta\) = `beta`.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (6)-(9). Differs from the paper in nothing; `correction=1` gives the divisor n - 1 of SimAM (Yang et al.,
    ICML 2021), and where that divisor would be zero (a map of one position) it is 1, so that the output is
    x sigma(beta) where SimAM gives NaN.

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

    Numerics: statistics and gate in float32 (float64 for float64 input), also under autocast; the square of what
    stands out furthest must be finite there. Deterministic: yes.

    Examples:
        >>> sfe(torch.full((1, 1, 2, 2), 3.0), beta=0.0)  # nothing stands out: x * sigmoid(0)
        tensor([[[[1.5000, 1.5000],
                  [1.5000, 1.5000]]]])
    """
    check_map("x", x)
    check_sfe(lambd, beta, correction)
    if select(impl, unsupported(x), preferred(x, channel=False)) is Impl.FUSED:
        return fused(x, None, None, Enhancement(spatial=True, lambd=lambd, beta=beta, correction=correction))
    return as_input(sfe_equations(upcast(x), lambd, beta, correction), x)


def check_sfe(lambd: float, beta: float, correction: int) -> None:
    """Refuse hyper-parameters that SFE cannot use."""
    check_real("lambd", lambd, above=0)
    check_real("beta", beta)
    check_int("correction", correction, minimum=0)


def sfe_equations(x: Tensor, lambd: float, beta: float, correction: int) -> Tensor:
    """Equations (6)-(9) in the number format of `x`."""
    n = x.shape[2] * x.shape[3]
    d = (x - x.mean(dim=(2, 3), keepdim=True)).square()  # (6)
    variance = d.sum(dim=(2, 3), keepdim=True) / max(n - correction, 1)  # (7)
    score = d / (4 * (variance + lambd)) + beta  # (8)
    return x * score.sigmoid()  # (9)


torch.library.define("kfde::sfe", "(Tensor x, float lambd, float beta, int correction, str impl) -> Tensor")


@torch.library.impl("kfde::sfe", "CompositeImplicitAutograd")
def _operator(x: Tensor, lambd: float, beta: float, correction: int, impl: str) -> Tensor:
    return sfe(x, lambd, beta, correction, impl=impl)
