"""CSFE, the channel-spatial feature enhancement."""

import torch
from torch import Tensor, nn

from kfde_layers._impl import Impl, resolve_impl
from kfde_layers.layers.cfe import CFE
from kfde_layers.layers.sfe import SFE
from kfde_layers.ops.csfe import check_csfe, csfe


class CSFE(nn.Module):
    r"""Channel-spatial feature enhancement: CFE and SFE as the two branches of one module.

    \[ y = \begin{cases}
       \mathrm{CFE}(x) + \mathrm{SFE}(x) & \text{parallel, sum} \\
       \tfrac{1}{2}\,(\mathrm{CFE}(x) + \mathrm{SFE}(x)) & \text{parallel, mean} \\
       \mathrm{SFE}(\mathrm{CFE}(x)) & \text{cfe_sfe} \\
       \mathrm{CFE}(\mathrm{SFE}(x)) & \text{sfe_cfe}
       \end{cases} \]

    The branches are the submodules `cfe` and `sfe`, which hold parameters and hyper-parameters; the layer computes
    both at once and does not call them one by one. "parallel" with "sum" raises the spread of x by about 1.5, which
    a norm behind it takes back; in earlier stages "mean" keeps the scale. Equations, source and numerics:
    `kfde_layers.functional.csfe`.

    Args:
        channels: C, even.
        num_groups: Groups of CFE's normalisation; None takes the largest divisor of C up to 16.
        threshold: T of CFE, a probability in (0, 1).
        lambd: \(\lambda\) of SFE, in units of x squared; positive.
        beta: \(\beta\) of SFE, dimensionless.
        correction: Subtracted from H W in the divisor of SFE's variance: 0 as in the paper, 1 as in SimAM.
        eps: Added to the variance of CFE's normalisation, in units of x squared.
        arrangement: "parallel", "cfe_sfe" or "sfe_cfe".
        fusion: "sum" or "mean"; used by "parallel" only.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (N, C, H, W) to the same shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, such as an odd C or an unknown arrangement.

    Examples:
        >>> CSFE(64, fusion="mean")(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | None = None,
        threshold: float = 0.5,
        lambd: float = 1e-4,
        beta: float = 0.5,
        correction: int = 0,
        eps: float = 1e-5,
        arrangement: str = "parallel",
        fusion: str = "sum",
        *,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_csfe(arrangement, fusion)
        self.arrangement = arrangement
        self.fusion = fusion
        self.impl = resolve_impl(impl).value
        self.cfe: CFE = CFE(channels, num_groups, threshold, eps, impl=impl, device=device, dtype=dtype)
        self.sfe: SFE = SFE(channels, lambd, beta, correction, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        return _csfe(
            x,
            self.cfe.weight,
            self.cfe.bias,
            self.cfe.num_groups,
            self.cfe.threshold,
            self.sfe.lambd,
            self.sfe.beta,
            self.sfe.correction,
            self.cfe.eps,
            self.arrangement,
            self.fusion,
            self.impl,
        )

    def extra_repr(self) -> str:
        return f"arrangement={self.arrangement!r}, fusion={self.fusion!r}, impl={self.impl!r}"


@torch.fx.wrap
def _csfe(
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
    if torch.jit.is_scripting():
        return torch.ops.kfde.csfe(
            x, weight, bias, num_groups, threshold, lambd, beta, correction, eps, arrangement, fusion, impl
        )
    else:
        return csfe(
            x, weight, bias, num_groups, threshold, lambd, beta, correction, eps, arrangement, fusion, impl=impl
        )
