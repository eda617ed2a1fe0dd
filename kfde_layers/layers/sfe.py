"""SFE, the spatial-level feature enhancement."""

import torch
from torch import Tensor, nn

from kfde_layers._checks import check_int, check_map
from kfde_layers._impl import Impl, resolve_impl
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.sfe import sfe_from_options, sfe_options


class SFE(nn.Module):
    r"""Spatial-level feature enhancement: weight each position by its squared distance from the mean of its channel.

    \[ d_{c,ij} = (x_{c,ij} - \mu_c)^2, \qquad
       \sigma_c^2 = \frac{1}{n}\sum_{ij} d_{c,ij}, \qquad
       \hat{x} = x\,\sigma\!\left(\frac{d_{c,ij}}{4(\sigma_c^2 + \lambda)} + \beta\right) \]

    with \(\lambda\) = `lambd` and \(\beta\) = `beta`. The layer has no parameters. Equations, source and numerics:
    `kfde_layers.functional.sfe`.

    Args:
        channels: Not used: SFE has nothing per channel. `timm.layers.create_attn(SFE, channels)` gives it.
        lambd: Added to the variance, in units of x squared; positive.
        beta: Added to the score, dimensionless.
        correction: Subtracted from n = H W in the divisor of the variance: 0 as in the paper, 1 as in SimAM.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.
        device: Not used, as there are no parameters.
        dtype: Not used, as there are no parameters.

    Shape:
        (N, C, H, W) to the same shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Examples:
        >>> SFE()(torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 3, 7, 7])
    """

    def __init__(
        self,
        channels: int | None = None,
        lambd: float = 1e-4,
        beta: float = 0.5,
        correction: int = 0,
        *,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            check_int("channels", channels, minimum=1)
        self._options = sfe_options("", lambd, beta, correction)
        self.lambd: float = self._options.lambd
        self.beta: float = self._options.beta
        self.correction: int = self._options.correction
        self.impl = resolve_impl(impl).value

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._recorded(x)
        else:
            if isinstance(x, torch.fx.Proxy):
                return self._recorded(x)
            check_map("sfe: x", x)
            return sfe_from_options(x, self._checked_options(), self.impl)

    def _checked_options(self) -> CsfeOptions:
        """Return the hyper-parameters; they are checked only if one was set since the last call."""
        known = self._options
        if (self.lambd, self.beta, self.correction) != (known.lambd, known.beta, known.correction):
            self._options = sfe_options("sfe: ", self.lambd, self.beta, self.correction)
        return self._options

    def _recorded(self, x: Tensor) -> Tensor:
        """Compute the same with one operator, which TorchScript and torch.fx record."""
        return torch.ops.kfde.sfe(x, self.lambd, self.beta, self.correction, self.impl)

    def extra_repr(self) -> str:
        return f"lambd={self.lambd}, beta={self.beta}, correction={self.correction}, impl={self.impl!r}"
