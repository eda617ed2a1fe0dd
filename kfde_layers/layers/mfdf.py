"""MFDF, the multi-scale feature dynamic fusion."""

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfde_layers._checks import check_bool, check_factory, check_int, check_map, check_real, check_sequence
from kfde_layers._impl import Impl, resolve_impl
from kfde_layers.ops.mfdf import (
    attention,
    check_kernel_size,
    convolve,
    fuse,
    mfdf,
    pool,
    resolve_dilations,
    resolve_groups,
)


class MFDF(nn.Module):
    r"""Multi-scale feature dynamic fusion: convolutions of several sizes, summed with weights that the input sets.

    \[ X_k = \mathrm{conv}_k(x), \qquad
       p = \mathrm{GAP}\Big(\sum_k X_k\Big), \qquad
       \alpha_k = \mathrm{softmax}_k\big(\mathrm{fc2}_k(\mathrm{fc1}(p))\big), \qquad
       F_c = \sum_k \alpha_{kc} X_{kc} \]

    Equations, source and numerics: `kfde_layers.functional.mfdf`. The layer starts near the identity where its
    branches are depthwise: each kernel is a Dirac plus normal noise of deviation 0.02, so that a pretrained network
    survives its insertion. Other kernels, `fc1` and `fc2` start as that noise alone, every bias at zero.

    Args:
        channels: C.
        kernel_sizes: Side of each branch's kernel in px, odd.
        dilation: Dilation of the kernels in px, one for all or one per branch.
        groups: Groups of the convolutions: "depthwise" is C, 1 is dense.
        bias: Whether the convolutions have a bias.
        norm_layer: Put behind each convolution as `norm_layer(channels)`; the paper's eq. (10) has none.
        act_layer: Put behind that as `act_layer()`; the paper's eq. (10) has none.
        rd_ratio: Width d between `fc1` and `fc2` as a share of C, at least 32.
        rd_channels: That width itself; overrides `rd_ratio`.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.
        device: Of the parameters.
        dtype: Of the parameters.

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

    # TorchScript compiles only the branches of forward that apply.
    bare: Final[bool]  # nothing but convolutions: the operation runs them itself, and is free to merge them
    linear: Final[bool]  # the same can be had outside training, by folding each batch norm into its convolution

    # declared here, because TorchScript refuses such types in __init__, and a tuple of any length but as a constant
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
        check_int("channels", channels, minimum=1)
        check_real("rd_ratio", rd_ratio, above=0)
        hidden = max(32, int(channels * rd_ratio)) if rd_channels is None else rd_channels
        check_int("rd_channels", hidden, minimum=1)
        check_sequence("kernel_sizes", kernel_sizes, "odd ints")
        check_bool("bias", bias)
        check_factory("norm_layer", norm_layer)
        check_factory("act_layer", act_layer)
        self.channels = channels
        self.kernel_sizes = tuple(kernel_sizes)
        if not self.kernel_sizes:
            raise ValueError("kernel_sizes must have at least one entry, got none")
        for size in self.kernel_sizes:
            check_kernel_size("kernel_sizes", size)
        self.dilation = list(resolve_dilations(dilation, len(self.kernel_sizes)))
        self.groups: int = resolve_groups(channels, groups)
        self.impl = resolve_impl(impl).value
        self.bare = norm_layer is None and act_layer is None
        if self.impl == Impl.FUSED and (self.groups != channels or not self.bare):
            raise NotImplementedError(
                "impl='fused' needs depthwise branches without norm and activation, got "
                f"groups={groups!r}, norm_layer={norm_layer!r}, act_layer={act_layer!r}"
            )

        def branch(size: int, spacing: int) -> nn.Module:
            padding = spacing * (size // 2)
            convolution = nn.Conv2d(
                channels, channels, size, 1, padding, spacing, self.groups, bias, device=device, dtype=dtype
            )
            if self.bare:
                return convolution
            norm = nn.Identity() if norm_layer is None else norm_layer(channels).to(device=device, dtype=dtype)
            return ConvNormAct(convolution, norm, nn.Identity() if act_layer is None else act_layer())

        self.branches: nn.ModuleList = nn.ModuleList(map(branch, self.kernel_sizes, self.dilation))
        self.linear = (
            act_layer is None
            and self.groups == channels
            and all(isinstance(branch, ConvNormAct) and branch.foldable for branch in self.branches)
        )
        self.fc1: nn.Linear = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2: nn.Linear = nn.Linear(hidden, len(self.kernel_sizes) * channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start described above; norms start by their own rule."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            if isinstance(module, nn.Conv2d) and self.groups == self.channels:
                noise = module.weight.detach().clone()
                nn.init.dirac_(module.weight, groups=self.groups)
                with torch.no_grad():
                    module.weight.add_(noise)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if self.bare:
            weights: list[Tensor] = []
            biases: list[Tensor] = []
            for branch in self.branches:
                weight, bias = branch.weight, branch.bias
                weights.append(weight)  # pyright: ignore[reportArgumentType]
                if bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    biases.append(bias)  # pyright: ignore[reportArgumentType]
            return _mfdf(
                x, weights, biases, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.dilation, self.groups, self.impl
            )
        if self.linear:
            folding = True
            for branch in self.branches:
                folding = folding and not branch.norm.training  # pyright: ignore[reportAttributeAccessIssue]
            if folding:
                weights: list[Tensor] = []
                biases: list[Tensor] = []
                for normed in self.branches:
                    weight, bias = normed.folded()  # pyright: ignore[reportCallIssue]
                    weights.append(weight)
                    biases.append(bias)
                return _mfdf(
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
        x = _checked(x, self.channels)
        maps: list[Tensor] = []
        for branch in self.branches:
            maps.append(branch(x))
        return _fuse(x, maps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def branch_weights(self, x: Tensor) -> Tensor:
        """Show how the layer weighs its branches for `x`.

        Returns:
            alpha of eq. (13), (N, K, C), in float32 (float64 for float64 input); its sum over K is 1.
        """
        check_map("x", x, self.channels)
        if self.bare:
            convolutions = [cast(nn.Conv2d, branch) for branch in self.branches]
            biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
            weights = [convolution.weight for convolution in convolutions]
            maps = convolve(x, weights, biases or None, self.dilation, self.groups)
        else:
            maps = [branch(x) for branch in self.branches]
        return attention(pool(maps), self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_sizes={self.kernel_sizes}, dilation={tuple(self.dilation)}, "
            f"groups={self.groups}, impl={self.impl!r}"
        )


class ConvNormAct(nn.Module):
    """A branch with a norm or an activation.

    Outside training a batch norm is a line in its input: its convolution takes it over, and one pass is saved.
    """

    foldable: Final[bool]

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm: Any = norm
        self.act = act
        self.foldable = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats

    def forward(self, x: Tensor) -> Tensor:
        if self.foldable:  # noqa: SIM102 -- a constant, by which TorchScript leaves the rest out or in
            if not self.norm.training:
                conv = self.conv  # one by one: in a tuple TorchScript would lose their constants
                norm = self.norm
                x = _conv_norm(
                    x,
                    conv.weight,
                    conv.bias,
                    norm.weight,
                    norm.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    conv.padding,  # pyright: ignore[reportArgumentType]
                    conv.dilation,  # pyright: ignore[reportArgumentType]
                    conv.groups,
                )
                return self.act(x)
        return self.act(self.norm(self.conv(x)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that equals convolution and norm, in float32 or float64."""
        conv = self.conv
        norm = self.norm
        return _fold(conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


@torch.fx.wrap
def _conv_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    dtype = conv_weight.dtype
    if weight.dtype == dtype and (dtype == torch.float32 or dtype == torch.float64):
        folded_weight, folded_bias = _fold(conv_weight, conv_bias, weight, bias, mean, variance, eps)
        return F.conv2d(x, folded_weight, folded_bias, 1, padding, dilation, groups)
    # In 16 bits the product of weight and scale would be rounded, which the norm by itself does not do.
    h = F.conv2d(x, conv_weight, conv_bias, 1, padding, dilation, groups)
    return F.batch_norm(h, mean, variance, weight, bias, False, 0.0, eps)


@torch.fx.wrap
def _fold(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(conv_weight.dtype, torch.float32)
    scale = weight.to(compute) * torch.rsqrt(variance.to(compute) + eps)
    shift = bias.to(compute) - mean.to(compute) * scale
    if conv_bias is not None:
        shift = shift + conv_bias.to(compute) * scale
    return conv_weight.to(compute) * scale[:, None, None, None], shift


@torch.fx.wrap
def _mfdf(
    x: Tensor,
    branch_weights: list[Tensor],
    branch_biases: list[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    dilation: list[int],
    groups: int,
    impl: str,
) -> Tensor:
    if torch.jit.is_scripting():
        return torch.ops.kfde.mfdf(
            x, branch_weights, branch_biases, fc1_weight, fc1_bias, fc2_weight, fc2_bias, dilation, groups, impl
        )
    else:
        fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return mfdf(x, branch_weights, branch_biases or None, *fc, dilation, groups, impl=impl)


@torch.fx.wrap
def _fuse(
    x: Tensor, maps: list[Tensor], fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    if torch.jit.is_scripting():
        return torch.ops.kfde.mfdf_fuse(x, maps, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    else:
        return fuse(x, maps, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


@torch.fx.wrap
def _checked(x: Tensor, channels: int) -> Tensor:
    if not torch.jit.is_scripting():
        check_map("x", x, channels)
    return x
