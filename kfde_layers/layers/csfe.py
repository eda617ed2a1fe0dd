"""CSFE, the channel-spatial feature enhancement."""

from typing import cast

import torch
from torch import Tensor, nn

from kfde_layers._impl import Impl, resolve_impl, select
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.layers.cfe import CFE
from kfde_layers.layers.parts import read, watched_everywhere, why_not_plain, why_not_readable
from kfde_layers.layers.sfe import SFE
from kfde_layers.ops.cfe import check_cfe_tensors
from kfde_layers.ops.csfe import csfe_from_options, csfe_options


class CSFE(nn.Module):
    r"""Channel-spatial feature enhancement: CFE and SFE as the two branches of one module.

    \[ y = \begin{cases}
       \mathrm{CFE}(x) + \mathrm{SFE}(x) & \text{parallel, sum} \\
       \tfrac{1}{2}\,(\mathrm{CFE}(x) + \mathrm{SFE}(x)) & \text{parallel, mean} \\
       \mathrm{SFE}(\mathrm{CFE}(x)) & \text{cfe_sfe} \\
       \mathrm{CFE}(\mathrm{SFE}(x)) & \text{sfe_cfe}
       \end{cases} \]

    The branches are the submodules `cfe` and `sfe`, which hold parameters and hyper-parameters. While both are plain,
    the layer computes them at once; if one has a hook or was replaced, it calls them one by one, and impl="fused"
    raises. TorchScript and torch.fx keep the choice of the moment at which they record.

    "parallel" with "sum" multiplies the standard deviation of x by about 1.5, which is harmless if a normalisation
    follows. In earlier stages "mean" keeps the scale. Equations, source and numerics: `kfde_layers.functional.csfe`.

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
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        (N, C, H, W) to the same shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, such as an odd C or an unknown arrangement.

    Examples:
        >>> CSFE(64, fusion="mean")(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    __constants__: tuple[str, ...] = ("parts_are_plain",)
    __jit_unused_properties__: tuple[str, ...] = ("parts_are_plain",)

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
        self.arrangement = arrangement
        self.fusion = fusion
        self.impl = resolve_impl(impl).value
        self.cfe: CFE = CFE(channels, num_groups, threshold, eps, impl=impl, device=device, dtype=dtype)
        self.sfe: SFE = SFE(channels, lambd, beta, correction, impl=impl)
        given = *self._options_of_parts(channels), arrangement, fusion
        self._known_options = given, csfe_options("", *given)

    def reset_parameters(self) -> None:
        """Set gamma of CFE to one and beta to zero."""
        self.cfe.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._recorded(x)
        else:
            if isinstance(x, torch.fx.Proxy):
                return self._recorded(x)
            gamma_and_beta = self._gamma_and_beta(x)
            if isinstance(gamma_and_beta, str):
                select(self.impl, gamma_and_beta)  # refuses impl="fused"
                return self._call_parts(x)
            check_cfe_tensors("csfe: ", x, *gamma_and_beta)
            return csfe_from_options(
                x, *gamma_and_beta, self._options(gamma_and_beta[0].numel()), self.arrangement, self.impl
            )

    def _options(self, channels: int) -> CsfeOptions:
        """Return the hyper-parameters; they are checked only if one, or the parameters, changed since the last call."""
        given = *self._options_of_parts(channels), self.arrangement, self.fusion
        known, options = self._known_options
        if given != known:
            options = csfe_options("csfe: ", *given)
            self._known_options = given, options
        return options

    def _options_of_parts(self, channels: int) -> tuple[CsfeOptions, CsfeOptions]:
        cfe, sfe = cast(CFE, self._modules["cfe"]), cast(SFE, self._modules["sfe"])
        return cfe._checked_options(channels), sfe._checked_options()  # pyright: ignore[reportPrivateUsage]

    def _recorded(self, x: Tensor) -> Tensor:
        """Compute the same with one operator, or with the parts, which TorchScript and torch.fx record."""
        if self.parts_are_plain:
            return torch.ops.kfde.csfe(
                x,
                self.cfe.weight,
                self.cfe.bias,
                num_groups=self.cfe.num_groups,
                threshold=self.cfe.threshold,
                lambd=self.sfe.lambd,
                beta=self.sfe.beta,
                correction=self.sfe.correction,
                eps=self.cfe.eps,
                arrangement=self.arrangement,
                fusion=self.fusion,
                impl=self.impl,
            )
        if self.impl == "fused":
            raise NotImplementedError("impl='fused' cannot run: to be recorded, both parts must be plain")
        return self._call_parts(x)

    def _call_parts(self, x: Tensor) -> Tensor:
        if self.arrangement == "cfe_sfe":
            return self.sfe(self.cfe(x))
        if self.arrangement == "sfe_cfe":
            return self.cfe(self.sfe(x))
        y = self.cfe(x) + self.sfe(x)
        return y / 2 if self.fusion == "mean" else y

    def _gamma_and_beta(self, x: Tensor) -> tuple[Tensor, Tensor] | str:
        """Return the parameters of CFE, for the operation to read, or why the parts must be called."""
        cfe, sfe = cast(CFE, self._modules["cfe"]), cast(SFE, self._modules["sfe"])
        if reason := why_not_plain(cfe, CFE):
            return f"cfe {reason}"
        if reason := why_not_plain(sfe, SFE):
            return f"sfe {reason}"
        if self.impl != "fused" and watched_everywhere():
            return "a hook on all modules of the process must see cfe and sfe"
        weight, bias = read(cfe, "weight"), read(cfe, "bias")
        if reason := why_not_readable(weight) or why_not_readable(bias):
            return f"cfe {reason}"
        return weight, bias

    @property
    def parts_are_plain(self) -> bool:
        """Return whether the parts' parameters may be read. TorchScript asks when it compiles the layer."""
        return why_not_plain(self.cfe, CFE) is None and why_not_plain(self.sfe, SFE) is None

    def extra_repr(self) -> str:
        return f"arrangement={self.arrangement!r}, fusion={self.fusion!r}, impl={self.impl!r}"
