"""Multi-scale feature dynamic fusion, equations (10)-(14)."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kfde_layers._checks import check_dims, check_int, check_map, check_sequence, check_shape
from kfde_layers._impl import Impl, exporting, select, unsupported
from kfde_layers.ops.formats import as_input, upcast, without_autocast
from kfde_layers.ops.mfdf_fused import SMALL_MAP, merged_depthwise, pooled_depthwise
from kfde_layers.ops.mfdf_merged import common_grid, merging_pays


def mfdf(
    x: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor] | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    dilation: int | Sequence[int] = 1,
    groups: int | str = "depthwise",
    *,
    impl: Impl | str = "auto",
) -> Tensor:
    r"""Convolve at several scales and sum the results, weighted per sample and channel by their own averages.

    \[ X_k = \mathrm{conv}_k(x), \qquad \hat{X} = \sum_k X_k, \qquad
       p_c = \frac{1}{HW}\sum_{ij}\hat{X}_{c,ij}, \qquad c = \mathrm{fc1}(p) \]

    \[ \alpha_k = \mathrm{softmax}_k(\mathrm{fc2}_k(c)), \qquad F_c = \sum_k \alpha_{kc} X_{kc} \]

    with \(\mathrm{conv}_k\) given by `branch_weights[k]` and `branch_biases[k]`, at stride 1 and "same" zero padding.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (10)-(14); the mathematics is that of Selective Kernel networks (Li et al., CVPR 2019) without the batch norm
    and the activation behind fc1. Differs from the paper in nothing; kernels, dilations and groups, which it leaves
    open, are the caller's.

    The fused form never makes the K maps \(X_k\). Depthwise, everything up to F is linear in x: the mean of
    \(\mathrm{conv}_k(x)\) is a sum of filter taps times sums of x over shifted windows, and
    \(\sum_k \alpha_{kc} W_{kc}\) is one kernel per sample and channel, so that one convolution replaces K.

    Args:
        x: Feature map, (N, C, H, W), floating point.
        branch_weights: K kernels, each (C, C / groups, k, k) with k odd.
        branch_biases: K biases, each (C,), or None.
        fc1_weight: (d, C), reduces the pooled channels to d.
        fc1_bias: (d,).
        fc2_weight: (K C, d), branch-major: row k C + c serves channel c of branch k.
        fc2_bias: (K C,).
        dilation: Dilation of the kernels in px, one for all or one per branch.
        groups: Groups of the convolutions: 1 is dense, "depthwise" is C.
        impl: "auto", "fused" or "reference"; "fused" raises instead of falling back.

    Returns:
        Same shape, dtype, device and memory format as `x`.

    Raises:
        TypeError: An argument has the wrong type, or `x` is no floating-point tensor.
        ValueError: A shape or a value is out of range; the message names it.
        NotImplementedError: impl="fused" cannot run here (the branches are dense, say); the message gives the reason.

    Numerics: everything between `x` and the result in float32 (float64 for float64 input), also under autocast.
    Deterministic: yes.

    Examples:
        >>> x, one = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        >>> fc1, fc2 = (torch.zeros(1, 1), torch.zeros(1)), (torch.zeros(2, 1), torch.zeros(2))
        >>> mfdf(x, [one, 3 * one], None, *fc1, *fc2)  # equal attention: (1 + 3) / 2
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    check_sequence("branch_weights", branch_weights, "tensors")
    channels = int(check_dims("fc1_weight", fc1_weight, ("d", "C"))[1])  # torch.jit.trace has tensors for sizes
    check_map("x", x, channels)
    groups = resolve_groups(channels, groups)
    dilations = resolve_dilations(dilation, len(branch_weights))
    _check_branches(channels, groups, branch_weights, branch_biases)
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check_attention(channels, len(branch_weights), *fc)

    reason = _unsupported(x, groups)
    merge = reason is None and merging_pays(branch_weights, dilations) and not _better_compiled(x)
    auto = Impl.FUSED if merge else Impl.REFERENCE
    if select(impl, reason, auto) is Impl.FUSED:
        return _fused(x, branch_weights, branch_biases, fc, dilations)
    return fuse(x, convolve(x, branch_weights, branch_biases, dilations, groups), *fc)


def fuse(
    x: Tensor, maps: Sequence[Tensor], fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """Equations (10)-(14) behind the convolutions: the branch maps \\(X_k\\) of `x` become F."""
    for k, branch_map in enumerate(maps):
        check_shape(f"the output of branch {k}", branch_map, tuple(x.shape))
    alpha = attention(pool(maps), fc1_weight, fc1_bias, fc2_weight, fc2_bias)[..., None, None]
    y = alpha[:, 0] * maps[0]
    for k, branch_map in enumerate(maps[1:], start=1):
        y = torch.addcmul(y, alpha[:, k], branch_map)  # (14), where neither a stack nor a product stays
    return as_input(y, x)


def pool(maps: Sequence[Tensor]) -> Tensor:
    """Equations (10)-(11): p, (N, C), from the branch maps."""
    means = [upcast(branch_map).mean(dim=(2, 3)) for branch_map in maps]
    return functools.reduce(torch.add, means)  # the mean of the sum, without the map of the sum


def attention(p: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Equations (12)-(13): alpha, (N, K, C), from p, (N, C)."""
    with without_autocast(p):
        c = F.linear(p, fc1_weight.to(p.dtype), fc1_bias.to(p.dtype))  # (12)
        scores = F.linear(c, fc2_weight.to(p.dtype), fc2_bias.to(p.dtype))
    return rearrange(scores, "n (k c) -> n k c", c=p.shape[1]).softmax(dim=1)  # (13)


def resolve_groups(channels: int, groups: int | str) -> int:
    """Return `groups` as a number of convolution groups."""
    if groups == "depthwise":
        return channels
    if isinstance(groups, str):
        raise ValueError(f"groups must be an int or 'depthwise', got {groups!r}")
    check_int("groups", groups, minimum=1)
    if channels % groups:
        raise ValueError(f"groups must divide channels = {channels}, got {groups}")
    return groups


def resolve_dilations(dilation: int | Sequence[int], num_branches: int) -> tuple[int, ...]:
    """Return one dilation per branch."""
    if isinstance(dilation, int):
        dilation = (dilation,) * num_branches
    check_sequence("dilation", dilation, "ints, or an int")
    dilations = tuple(dilation)
    if len(dilations) != num_branches:
        raise ValueError(f"dilation must be an int or have {num_branches} entries, one per branch, got {dilation!r}")
    for value in dilations:
        check_int("dilation", value, minimum=1)
    return dilations


def check_kernel_size(name: str, size: int) -> None:
    """Refuse a kernel that has no centre."""
    check_int(name, size, minimum=1)
    if size % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the map keeps its size, got {size}")


def _unsupported(x: Tensor, groups: int) -> str | None:
    if groups != x.shape[1]:
        return f"the branches must be depthwise, groups = {x.shape[1]}, got {groups}"
    if exporting():
        return "an exporter must be shown operations that other software has"
    return unsupported(x)


def _better_compiled(x: Tensor) -> bool:
    """Whether the compiler was measured to do better with the branches: inference on small channels_last maps, on CPU.

    These the operator has to copy; with a backward pass it is the faster one all the same.
    """
    small = x.stride(1) == 1 and x.shape[2] * x.shape[3] <= SMALL_MAP
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_grad_enabled() and small


def _fused(
    x: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor] | None,
    fc: tuple[Tensor, Tensor, Tensor, Tensor],
    dilations: Sequence[int],
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    grid, step = common_grid(branch_weights, dilations, compute)
    p = pooled_depthwise(x, grid.sum(dim=0), step)
    if branch_biases is None:
        alpha = attention(p, *fc)
        shifts = torch.zeros_like(p)
    else:
        biases = torch.stack(list(branch_biases)).to(compute)
        alpha = attention(p + biases.sum(dim=0), *fc)
        shifts = (alpha * biases).sum(dim=1)
    return merged_depthwise(x, alpha, grid, shifts, step)


def convolve(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int], groups: int
) -> list[Tensor]:
    """The branch maps X_k of eq. (10), in the format of the statistics."""
    h = upcast(x)
    maps: list[Tensor] = []
    with without_autocast(x):
        for k, weight in enumerate(weights):
            bias = None if biases is None else biases[k].to(h.dtype)
            padding = dilations[k] * (weight.shape[-1] // 2)
            maps.append(F.conv2d(h, weight.to(h.dtype), bias, 1, padding, dilations[k], groups))
    return maps


def _check_branches(channels: int, groups: int, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
    if not weights:
        raise ValueError("branch_weights must have at least one entry, got none")
    for k, weight in enumerate(weights):
        size = int(check_dims(f"branch_weights[{k}]", weight, ("C", "C / groups", "k", "k"))[3])
        check_kernel_size(f"the kernel size of branch_weights[{k}]", size)
        check_shape(f"branch_weights[{k}]", weight, (channels, channels // groups, size, size))
    if biases is None:
        return
    check_sequence("branch_biases", biases, "tensors")
    if len(biases) != len(weights):
        raise ValueError(f"branch_biases must be None or have {len(weights)} entries, got {len(biases)}")
    for k, bias in enumerate(biases):
        check_shape(f"branch_biases[{k}]", bias, (channels,))


def _check_attention(
    channels: int, num_branches: int, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> None:
    hidden = fc1_weight.shape[0]
    check_shape("fc1_bias", fc1_bias, (hidden,))
    check_shape("fc2_weight", fc2_weight, (num_branches * channels, hidden))
    check_shape("fc2_bias", fc2_bias, (num_branches * channels,))


torch.library.define(
    "kfde::mfdf",
    "(Tensor x, Tensor[] branch_weights, Tensor[] branch_biases, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, int[] dilation, int groups, str impl) -> Tensor",
)
torch.library.define(
    "kfde::mfdf_fuse",
    "(Tensor x, Tensor[] maps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias) -> Tensor",
)


@torch.library.impl("kfde::mfdf", "CompositeImplicitAutograd")
def _operator(
    x: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    dilation: Sequence[int],
    groups: int,
    impl: str,
) -> Tensor:
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return mfdf(x, branch_weights, branch_biases or None, *fc, dilation, groups, impl=impl)


torch.library.impl("kfde::mfdf_fuse", "CompositeImplicitAutograd")(fuse)
