"""MFDF, the multi-scale feature dynamic fusion."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_dtype, check_factory, check_int, check_made, check_map, check_real
from kfde_layers._impl import Impl, exporting, resolve_impl, select
from kfde_layers.layers.conv_norm_act import NOT_AFFINE, ConvNormAct, call_branch, why_not_one_conv
from kfde_layers.layers.parts import (
    call_linear,
    conv_settings,
    read,
    start_as_noise,
    start_near_identity,
    start_with,
    watched_everywhere,
    why_not_plain,
    why_not_plain_conv,
    why_not_readable,
)
from kfde_layers.ops.formats import computes_in_its_dtype, without_autocast
from kfde_layers.ops.mfdf import (
    branch_mean,
    branch_softmax,
    check_branches,
    convolve,
    mfdf_from_kernels,
    mfdf_from_maps,
    resolve_dilations,
    resolve_groups,
    resolve_kernel_sizes,
)


class MFDF(nn.Module):
    r"""Multi-scale feature dynamic fusion: sum convolutions of several sizes, with weights that depend on the input.

    \[ X_k = \mathrm{conv}_k(x), \qquad
       p = \mathrm{GAP}\Big(\sum_k X_k\Big), \qquad
       \alpha_k = \mathrm{softmax}_k\big(\mathrm{fc2}_k(\mathrm{fc1}(p))\big), \qquad
       F_c = \sum_k \alpha_{kc} X_{kc} \]

    Equations, source and numerics: `kfde_layers.functional.mfdf`. With depthwise branches the layer starts near the
    identity, so that a pretrained network survives its insertion: each kernel starts as a Dirac kernel plus normal
    noise of deviation 0.02. Other kernels, `fc1` and `fc2` start as that noise alone, and every bias at zero. Each part
    also returns to this start by its own `reset_parameters`. A host that draws weights of its own afterwards, as timm's
    ResNet does, undoes it: then call `MFDF.reset_parameters`.

    The submodules `branches`, `fc1` and `fc2` are parts. `fc1` and `fc2` are always called. The branches are merged if
    all are plain; if one has a hook, was replaced or was given other settings, they are called, and impl="fused"
    raises. TorchScript and torch.fx keep the choice of the moment at which they record.

    Args:
        channels: C.
        kernel_sizes: Side of each branch's kernel in px, odd.
        dilation: Dilation of the kernels in px, one for all or one per branch.
        groups: Groups of the convolutions: "depthwise" is C, 1 is dense.
        bias: Whether the convolutions have a bias.
        norm_layer: Makes the norm after each convolution, as `norm_layer(channels)`; the paper's eq. (10) has none.
        act_layer: Makes the activation after that, as `act_layer()`; the paper's eq. (10) has none.
        rd_ratio: Width d between `fc1` and `fc2` as a share of C, at least 32.
        rd_channels: That width itself; overrides `rd_ratio`.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        (N, C, H, W) to the same shape, dtype and memory format.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, such as an even kernel or a wrong number of dilations.
        NotImplementedError: impl="fused" with branches that are not depthwise, or have a norm or an activation.

    Examples:
        >>> layer = MFDF(64)
        >>> x = torch.randn(2, 64, 7, 7)
        >>> layer(x).shape, layer.branch_weights(x).shape
        (torch.Size([2, 64, 7, 7]), torch.Size([2, 4, 64]))
    """

    # TorchScript compiles only the path that applies
    __constants__: tuple[str, ...] = ("all_parts_are_plain", "fc_are_plain")
    __jit_unused_properties__: tuple[str, ...] = ("all_parts_are_plain", "fc_are_plain")

    # declared here: TorchScript refuses such types in __init__, and takes a tuple of any length only as a constant
    kernel_sizes: Final[tuple[int, ...]]
    dilation: list[int]

    def __init__(
        self,
        channels: int,
        kernel_sizes: Sequence[int] = (1, 3, 5, 7),
        dilation: int | Sequence[int] = 1,
        groups: int | str = "depthwise",
        bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        *,
        impl: Impl | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels, minimum=1)
        rd_ratio = check_real("rd_ratio", rd_ratio, above=0)
        hidden = check_int("rd_channels", max(32, int(channels * rd_ratio)) if rd_channels is None else rd_channels, 1)
        check_dtype("dtype", dtype)
        check_bool("bias", bias)
        check_factory("norm_layer", norm_layer)
        check_factory("act_layer", act_layer)
        self.channels = channels
        self.kernel_sizes = resolve_kernel_sizes(kernel_sizes)
        self.dilation = list(resolve_dilations("dilation", dilation, len(self.kernel_sizes)))
        self.groups: int = resolve_groups("groups", channels, groups)
        self.impl = resolve_impl(impl).value
        self.plain_branches: bool = norm_layer is None and act_layer is None  # nothing but convolutions
        depthwise = self.groups == channels
        self.mergeable_in_eval: bool = depthwise and not self.plain_branches and act_layer is None
        if self.impl == Impl.FUSED and not (depthwise and self.plain_branches):
            raise NotImplementedError(
                "impl='fused' needs depthwise branches without norm and activation, got "
                f"groups={groups!r}, norm_layer={norm_layer!r}, act_layer={act_layer!r}"
            )

        def branch(size: int, spacing: int) -> nn.Module:
            padding = spacing * (size // 2)
            convolution = nn.Conv2d(
                channels, channels, size, 1, padding, spacing, self.groups, bias, device=device, dtype=dtype
            )
            start_with(convolution, start_near_identity if depthwise else start_as_noise)
            if self.plain_branches:
                return convolution
            norm = nn.Identity() if norm_layer is None else check_made("norm_layer", norm_layer(channels))
            act = None if act_layer is None else check_made("act_layer", act_layer())
            return ConvNormAct(convolution, norm.to(device=device, dtype=dtype), act)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return start_with(nn.Linear(inputs, outputs, device=device, dtype=dtype), start_as_noise)

        self.branches: nn.ModuleList = nn.ModuleList(map(branch, self.kernel_sizes, self.dilation))
        convolutions = (branch if self.plain_branches else branch.conv for branch in self.branches)
        self._settings = tuple(conv_settings(cast(nn.Module, conv)) for conv in convolutions)
        self.fc1: nn.Linear = linear(channels, hidden)
        self.fc2: nn.Linear = linear(hidden, len(self.kernel_sizes) * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the start described above; a norm returns to its own."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                cast(Callable[[], None], module.reset_parameters)()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._recorded(x)
        else:
            if isinstance(x, torch.fx.Proxy):
                return self._recorded(x)
            check_map("x", x, self.channels)
            kernels = self._kernels(x)
            if isinstance(kernels, str):
                select(self.impl, kernels)  # refuses impl="fused"
                return mfdf_from_maps(x, self._call_branches(x), self._scores)
            return mfdf_from_kernels(x, *kernels, self._scores, self._fc_tensors, self.dilation, self.groups, self.impl)

    def branch_weights(self, x: Tensor) -> Tensor:
        """Compute the weights that the layer gives its branches for `x`.

        Returns:
            alpha of eq. (13), (N, K, C), in float32 (float64 for float64 input); its sum over K is 1.
        """
        check_map("x", x, self.channels)
        kernels = self._kernels(x) if self.plain_branches else "they have a norm or an activation"
        called = isinstance(kernels, str)
        maps = self._call_branches(x) if called else convolve(x, *kernels, self.dilation, self.groups)
        alpha = branch_softmax(self._scores(branch_mean(maps)), x, len(maps))
        return alpha.to(torch.promote_types(x.dtype, torch.float32))

    def _call_branches(self, x: Tensor) -> list[Tensor]:
        return [call_branch(f"branches[{k}]", branch, x) for k, branch in enumerate(self.branches)]

    def _kernels(self, x: Tensor) -> tuple[list[Tensor], list[Tensor] | None] | str:
        """Return the branches' kernels and biases, to be merged, or why the branches must be called."""
        branches: Any = cast(nn.Module, self._modules["branches"])._modules.values()  # faster than an attribute
        if reason := self._why_call(branches):
            return reason
        if self.plain_branches and self.impl != "fused" and exporting() and computes_in_its_dtype(x):
            return "tools that quantise an exported program find convolutions by the module that was called"
        # Read only now: a parametrization, such as spectral_norm, may change each time that its weight is read.
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for k, branch in enumerate(branches):
            kernel = (read(branch, "weight"), read(branch, "bias")) if self.plain_branches else branch.folded()
            if kernel is None:
                return f"branches[{k}] {NOT_AFFINE}"
            weight, bias = kernel
            if reason := why_not_readable(weight):
                return f"branches[{k}] {reason}"
            weights.append(weight)
            if bias is not None:
                biases.append(bias)
        check_branches(x, self.groups, weights, biases or None)
        return weights, biases or None

    def _why_call(self, branches: Iterable[nn.Module]) -> str | None:
        """Return why the branches must be called, as far as it shows before a parameter is read, or None."""
        if not (self.plain_branches or self.mergeable_in_eval):
            return "a branch has an activation, or a norm after a convolution that is not depthwise"
        why_not_merged = why_not_plain_conv if self.plain_branches else why_not_one_conv
        settings = self._settings
        for k, branch in enumerate(branches):
            if reason := why_not_merged(branch, settings[k]):
                return f"branches[{k}] {reason}"
        if self.impl != "fused" and watched_everywhere():
            return "a hook on all modules of the process must see the branches"
        return None

    def _scores(self, p: Tensor) -> Tensor:
        """Return the scores of eq. (13), (N, K C), from p, (N, C)."""
        with without_autocast(p):
            return call_linear("fc2", self.fc2, call_linear("fc1", self.fc1, p))

    def _fc_tensors(self) -> list[Tensor]:
        attributes = [getattr(fc, key, None) for fc in (self.fc1, self.fc2) for key in ("weight", "bias")]
        return [attribute for attribute in attributes if isinstance(attribute, Tensor)]

    def _recorded(self, x: Tensor) -> Tensor:
        """Compute the same in steps that TorchScript and torch.fx can record.

        Both keep the choice of the moment. So a norm is called, never folded, and is right in training too.
        """
        fc1, fc2 = self.fc1, self.fc2
        if self.all_parts_are_plain:
            weights: list[Tensor] = []
            biases: list[Tensor] = []
            for branch in self.branches:
                weight, bias = branch.weight, branch.bias
                weights.append(weight)  # pyright: ignore[reportArgumentType]
                if bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    biases.append(bias)  # pyright: ignore[reportArgumentType]
            return torch.ops.kfde.mfdf(
                x,
                weights,
                biases,
                fc1.weight,
                fc1.bias,
                fc2.weight,
                fc2.bias,
                self.dilation,
                self.groups,
                self.impl,
            )
        if self.impl == "fused":
            raise NotImplementedError("impl='fused' cannot run: to be recorded, all parts must be plain")
        maps: list[Tensor] = []
        for branch in self.branches:
            maps.append(branch(x))
        if self.fc_are_plain:
            return torch.ops.kfde.mfdf_fuse(x, maps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        p = torch.ops.kfde.mfdf_branch_mean(maps)
        return torch.ops.kfde.mfdf_sum_branches(x, maps, self.fc2(self.fc1(p.to(x.dtype))))

    @property
    def all_parts_are_plain(self) -> bool:
        """Return whether all parameters may be read. TorchScript asks when it compiles the layer."""
        branches = zip(self.branches, self._settings, strict=True)
        return self.plain_branches and self.fc_are_plain and not any(why_not_plain_conv(*branch) for branch in branches)

    @property
    def fc_are_plain(self) -> bool:
        """Return whether the parameters of `fc1` and `fc2` may be read."""
        return not any(why_not_plain(fc, nn.Linear) or getattr(fc, "bias", None) is None for fc in (self.fc1, self.fc2))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_sizes={self.kernel_sizes}, dilation={tuple(self.dilation)}, "
            f"groups={self.groups}, impl={self.impl!r}"
        )
