"""Multi-scale feature dynamic fusion, equations (10)-(14)."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfde_layers._checks import check_device, check_dims, check_int, check_map, check_sequence, check_shape
from kfde_layers._impl import Impl, exporting, select, tracing, unsupported
from kfde_layers.fused.mfdf.auto import auto_impl
from kfde_layers.fused.mfdf.operator import fused
from kfde_layers.ops.formats import as_input, split_channels, upcast, without_autocast
from kfde_layers.ops.scripting import define_operator


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
    r"""Convolve at several scales, and sum the results with weights that depend on their means.

    \[ X_k = \mathrm{conv}_k(x), \qquad \hat{X} = \sum_k X_k, \qquad
       p_c = \frac{1}{HW}\sum_{ij}\hat{X}_{c,ij}, \qquad c = \mathrm{fc1}(p) \]

    \[ \alpha_k = \mathrm{softmax}_k(\mathrm{fc2}_k(c)), \qquad F_c = \sum_k \alpha_{kc} X_{kc} \]

    with \(\mathrm{conv}_k\) given by `branch_weights[k]` and `branch_biases[k]`, at stride 1 and "same" zero padding.

    Source: Cui et al., "Key Feature Dynamic Enhancement Network for Breast Cancer Pathological Image Classification",
    eqs. (10)-(14); they are those of Selective Kernel networks (Li et al., CVPR 2019) without the batch norm and the
    activation after fc1. Differs from the paper nowhere; it leaves kernels, dilations and groups open, and the caller
    chooses them.

    The fused implementation never makes the K maps \(X_k\). With depthwise kernels, everything up to F is linear in x.
    The mean of \(\mathrm{conv}_k(x)\) is a sum of filter taps times sums of x over shifted windows. And
    \(\sum_k \alpha_{kc} W_{kc}\) is one kernel per sample and channel, so that one convolution replaces K.

    Args:
        x: Feature map, (N, C, H, W), floating point.
        branch_weights: K kernels, each (C, C / groups, k, k) with k odd.
        branch_biases: K biases, each (C,), or None.
        fc1_weight: (d, C), reduces the C means to d values.
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
        NotImplementedError: impl="fused" cannot run here, as with dense branches; the message says why.

    Numerics: everything between `x` and the result in float32 (float64 for float64 input), also under autocast. |x| may
    be up to 1e15, and for the output alone up to 1e30. Deterministic: yes.

    Examples:
        >>> x, one = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
        >>> fc1, fc2 = (torch.zeros(1, 1), torch.zeros(1)), (torch.zeros(2, 1), torch.zeros(2))
        >>> mfdf(x, [one, 3 * one], None, *fc1, *fc2)  # equal weights: (1 + 3) / 2
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    branch_weights = check_sequence("mfdf: branch_weights", branch_weights, "tensors")
    channels = int(check_dims("mfdf: fc1_weight", fc1_weight, ("d", "C"))[1])  # torch.jit.trace has tensors for sizes
    check_map("mfdf: x", x, channels)
    groups = resolve_groups("mfdf: groups", channels, groups)
    dilations = resolve_dilations("mfdf: dilation", dilation, len(branch_weights))
    if branch_biases is not None:
        branch_biases = check_sequence("mfdf: branch_biases", branch_biases, "tensors")
    check_branches(x, groups, branch_weights, branch_biases)
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check_fc(x, len(branch_weights), *fc)

    def scores(p: Tensor) -> Tensor:
        return branch_scores(p, *fc)

    return mfdf_from_kernels(x, branch_weights, branch_biases, scores, lambda: fc, dilations, groups, impl)


def mfdf_from_kernels(
    x: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor] | None,
    scores: Callable[[Tensor], Tensor],
    fc: Callable[[], Iterable[Tensor]],
    dilations: Sequence[int],
    groups: int,
    impl: Impl | str,
) -> Tensor:
    """Return equations (10)-(14) from the kernels of the branches.

    `scores` maps p (N, C) to the scores (N, K C), with the parameters that `fc()` returns.
    """
    reason = _unsupported(x, groups, lambda: (*branch_weights, *(branch_biases or ()), *fc()))
    auto = Impl.REFERENCE if reason else auto_impl(x, branch_weights, dilations)
    if select(impl, reason, auto) is Impl.FUSED:
        num_branches = len(branch_weights)
        return fused(x, branch_weights, branch_biases, lambda p: branch_softmax(scores(p), x, num_branches), dilations)
    return mfdf_from_maps(x, convolve(x, branch_weights, branch_biases, dilations, groups), scores)


def mfdf_from_maps(x: Tensor, maps: Sequence[Tensor], scores: Callable[[Tensor], Tensor]) -> Tensor:
    """Return equations (10)-(14) from the branch maps X_k of `x`; `scores` maps p (N, C) to the scores (N, K C)."""
    for k, branch_map in enumerate(maps):
        check_shape(f"mfdf: the output of branch {k}", branch_map, tuple(x.shape))
    return sum_branches(x, maps, scores(branch_mean(maps)))


def mfdf_from_maps_and_fc(x: Tensor, maps: Sequence[Tensor], *fc: Tensor) -> Tensor:
    """Return equations (10)-(14) from the branch maps X_k of `x` and the parameters of fc1 and fc2."""
    return mfdf_from_maps(x, maps, lambda p: branch_scores(p, *fc))


def branch_mean(maps: Sequence[Tensor]) -> Tensor:
    """Return p of equations (10)-(11), (N, C), from the branch maps."""
    means = [upcast(branch_map).mean(dim=(2, 3)) for branch_map in maps]
    p = functools.reduce(torch.add, means)  # the mean of the sum, without the map of the sum
    return p.nan_to_num() if is_empty(maps[0]) else p


def branch_scores(p: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Return the scores of eq. (13), (N, K C), from p, (N, C), in the dtype of p."""
    with without_autocast(p):
        c = F.linear(p, fc1_weight.to(p.dtype), fc1_bias.to(p.dtype))  # (12)
        return F.linear(c, fc2_weight.to(p.dtype), fc2_bias.to(p.dtype))


def branch_softmax(scores: Tensor, x: Tensor, num_branches: int) -> Tensor:
    """Return alpha of eq. (13), (N, K, C), from the scores, (N, K C), of `x`."""
    check_shape("mfdf: the output of fc2", scores, (x.shape[0], num_branches * x.shape[1]))
    return split_channels(upcast(scores), num_branches).softmax(dim=1)


def sum_branches(x: Tensor, maps: Sequence[Tensor], scores: Tensor) -> Tensor:
    """Return eq. (14), accumulated so that backward keeps neither a stack nor the products."""
    alpha = branch_softmax(scores, x, len(maps))[..., None, None]
    y = alpha[:, 0] * maps[0]
    for k, branch_map in enumerate(maps[1:], start=1):
        # The same sum; Core ML has no addcmul.
        y = y + alpha[:, k] * branch_map if exporting() else torch.addcmul(y, alpha[:, k], branch_map)
    return as_input(y, x)


def resolve_groups(name: str, channels: int, groups: int | str) -> int:
    """Return `groups` as a number of convolution groups."""
    if groups == "depthwise":
        return channels
    if isinstance(groups, str):
        raise ValueError(f"{name} must be an int or 'depthwise', got {groups!r}")
    groups = check_int(name, groups, minimum=1)
    if channels % groups:
        raise ValueError(f"{name} must divide channels = {channels}, got {groups}")
    return groups


def resolve_dilations(name: str, dilation: int | Sequence[int], num_branches: int) -> tuple[int, ...]:
    """Return one dilation per branch."""
    if isinstance(dilation, int) or getattr(dilation, "ndim", 1) == 0:
        dilations = (dilation,) * num_branches
    else:
        dilations = check_sequence(name, dilation, "ints, or an int")
    if len(dilations) != num_branches:
        raise ValueError(f"{name} must be an int or have {num_branches} entries, one per branch, got {dilation!r}")
    return tuple(check_int(name, value, minimum=1) for value in dilations)


def resolve_kernel_sizes(kernel_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the side of each branch's kernel."""
    sizes = check_sequence("kernel_sizes", kernel_sizes, "odd ints")
    if not sizes:
        raise ValueError("kernel_sizes must have at least one entry, got none")
    return tuple(_check_kernel_size("kernel_sizes", size) for size in sizes)


def _check_kernel_size(name: str, size: int) -> int:
    """Return the size as an int; refuse a kernel that has no centre."""
    size = check_int(name, size, minimum=1)
    if size % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the map keeps its size, got {size}")
    return size


def _unsupported(x: Tensor, groups: int, parameters: Callable[[], Iterable[Tensor]]) -> str | None:
    if groups != x.shape[1]:
        return f"the branches must be depthwise, groups = {x.shape[1]}, got {groups}"
    if exporting():
        return "an exporter needs operations that other software has"
    return unsupported(x, parameters)


def convolve(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int], groups: int
) -> list[Tensor]:
    """Return the branch maps X_k of eq. (10), in the dtype of the statistics."""
    h = upcast(x)
    maps: list[Tensor] = []
    with without_autocast(x):
        for k, weight in enumerate(weights):
            bias = None if biases is None else biases[k].to(h.dtype)
            padding = dilations[k] * (weight.shape[-1] // 2)
            if is_empty(h):  # which conv2d refuses; the parameters stay in the graph, with gradients of zero
                maps.append(h + 0 * (weight.sum() if bias is None else weight.sum() + bias.sum()).to(h.dtype))
            else:
                maps.append(F.conv2d(h, weight.to(h.dtype), bias, 1, padding, dilations[k], groups))
    return maps


def is_empty(x: Tensor) -> bool:
    """Return whether the map has no element. A tracer takes it for one that has some."""
    return not tracing() and x.numel() == 0


def check_branches(x: Tensor, groups: int, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
    """Refuse kernels and biases that do not fit the map and each other."""
    channels = int(x.shape[1])  # torch.jit.trace has tensors for sizes
    if not weights:
        raise ValueError("mfdf: branch_weights must have at least one entry, got none")
    for k, weight in enumerate(weights):
        name = f"mfdf: branch_weights[{k}]"
        size = int(check_dims(name, weight, ("C", "C / groups", "k", "k"))[3])
        _check_kernel_size(f"the kernel size of {name}", size)
        check_shape(name, weight, (channels, channels // groups, size, size))
        check_device(name, weight, x)
    if biases is None:
        return
    if len(biases) != len(weights):
        raise ValueError(f"mfdf: branch_biases must be None or have {len(weights)} entries, got {len(biases)}")
    for k, bias in enumerate(biases):
        check_shape(f"mfdf: branch_biases[{k}]", bias, (channels,))
        check_device(f"mfdf: branch_biases[{k}]", bias, x)


def _check_fc(
    x: Tensor, num_branches: int, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> None:
    channels, hidden = int(x.shape[1]), int(fc1_weight.shape[0])
    check_shape("mfdf: fc1_bias", fc1_bias, (hidden,))
    check_shape("mfdf: fc2_weight", fc2_weight, (num_branches * channels, hidden))
    check_shape("mfdf: fc2_bias", fc2_bias, (num_branches * channels,))
    for name, tensor in (
        ("fc1_weight", fc1_weight),
        ("fc1_bias", fc1_bias),
        ("fc2_weight", fc2_weight),
        ("fc2_bias", fc2_bias),
    ):
        check_device(f"mfdf: {name}", tensor, x)


def _recorded_mfdf(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *arguments: Any) -> Tensor:
    return mfdf(x, weights, biases or None, *arguments[:-1], impl=arguments[-1])


define_operator(
    "mfdf(Tensor x, Tensor[] branch_weights, Tensor[] branch_biases, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, int[] dilation, int groups, str impl) -> Tensor",
    _recorded_mfdf,
)
define_operator(
    "mfdf_fuse(Tensor x, Tensor[] maps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias) "
    "-> Tensor",
    mfdf_from_maps_and_fc,
)
define_operator("mfdf_branch_mean(Tensor[] maps) -> Tensor", branch_mean)
define_operator("mfdf_sum_branches(Tensor x, Tensor[] maps, Tensor scores) -> Tensor", sum_branches)
