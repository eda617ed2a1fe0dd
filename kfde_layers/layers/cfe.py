"""CFE, the channel-level feature enhancement."""

import torch
from torch import Tensor, nn

from kfde_layers._checks import check_dtype, check_int
from kfde_layers._impl import Impl, resolve_impl
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.cfe import cfe_from_options, cfe_gate, cfe_options, check_cfe_tensors
from kfde_layers.ops.formats import upcast


class CFE(nn.Module):
    r"""Channel-level feature enhancement: keep values above a gate, cross the others over to the other channel half.

    \[ w_\gamma = \frac{\gamma}{\sum_i \gamma_i}, \qquad
       r = \sigma(\hat{x}\, w_\gamma), \qquad
       (w_1, w_2) = \begin{cases} (1, 0) & r > T \\ (r, r) & r \le T \end{cases} \]

    \[ x_1 = w_1 x, \quad x_2 = w_2 x, \qquad
       y = [x_1^{(1)} + x_2^{(2)},\; x_1^{(2)} + x_2^{(1)}] \]

    with \(\hat{x}\) the group-normalised x and \(\gamma\) = `weight` (starting at 1), \(\beta\) = `bias` (at 0) the
    affine parameters of that normalisation. Equations, source and numerics: `kfde_layers.functional.cfe`. The gate is
    a step: no gradient passes through it. If training changes the sign of the sum of \(\gamma\), every gate flips.

    Args:
        channels: C, even.
        num_groups: Groups of the normalisation; None takes the largest divisor of C up to 16.
        threshold: T, a probability in (0, 1).
        eps: Added to the variance of the normalisation, in units of x squared.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        (N, C, H, W) to the same shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, such as an odd C or a `num_groups` that does not divide it.

    Examples:
        >>> layer = CFE(64)
        >>> layer(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        num_groups: int | None = None,
        threshold: float = 0.5,
        eps: float = 1e-5,
        *,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels: int = check_int("channels", channels, minimum=1)
        check_dtype("dtype", dtype)
        groups = default_num_groups(self.channels) if num_groups is None else num_groups
        options = cfe_options("", self.channels, groups, threshold, eps)
        self.num_groups: int = options.num_groups
        self.threshold: float = options.threshold
        self.eps: float = options.eps
        self._known_options = (self.channels, self.num_groups, self.threshold, self.eps), options
        self.impl = resolve_impl(impl).value
        self.weight: nn.Parameter = nn.Parameter(torch.empty(self.channels, device=device, dtype=dtype))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(self.channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to one and beta to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._recorded(x)
        else:
            if isinstance(x, torch.fx.Proxy):
                return self._recorded(x)
            weight, bias = self.weight, self.bias
            check_cfe_tensors("cfe: ", x, weight, bias)
            return cfe_from_options(x, weight, bias, self._checked_options(weight.numel()), self.impl)

    def _checked_options(self, channels: int) -> CsfeOptions:
        """Return the hyper-parameters; they are checked only if one, or the parameters, changed since the last call."""
        given = channels, self.num_groups, self.threshold, self.eps
        known, options = self._known_options
        if given != known:
            options = cfe_options("cfe: ", *given)
            self._known_options = given, options
        return options

    def _recorded(self, x: Tensor) -> Tensor:
        """Compute the same with one operator, which TorchScript and torch.fx record."""
        return torch.ops.kfde.cfe(x, self.weight, self.bias, self.num_groups, self.threshold, self.eps, self.impl)

    def gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gate that the layer applies to `x`.

        Returns:
            r of eq. (2) in float32 (float64 for float64 input), and the mask of the open elements (r > T, decided in
            logits), both (N, C, H, W).
        """
        check_cfe_tensors("", x, self.weight, self.bias)
        return cfe_gate(upcast(x), self.weight, self.bias, self.num_groups, self.threshold, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, num_groups={self.num_groups}, threshold={self.threshold}, eps={self.eps}, "
            f"impl={self.impl!r}"
        )


def default_num_groups(channels: int) -> int:
    """Return the largest divisor of `channels` up to 16, the number of groups in the SRU of ScConv."""
    return max(groups for groups in range(1, 17) if channels % groups == 0)
