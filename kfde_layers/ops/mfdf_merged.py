"""MFDF without its branch maps: behind depthwise branches, equations (10), (11) and (14) are linear in x."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from kfde_layers.ops.formats import upcast, without_autocast


def pooled_branches(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int]
) -> Tensor:
    r"""Equations (10)-(11): p, (N, C), from the sums of x over windows.

    A filter tap at offset (u, v) meets just the window of x that a shift by (u, v) leaves inside the map, so that

    \[ p_c = \frac{1}{HW} \sum_{uv} \Big(\sum_k W_{kc,uv}\Big) \sum_{ij \in \mathrm{window}(u, v)} x_{c,ij}
       + \sum_k b_{kc} \]
    """
    h = upcast(x)
    height, width = h.shape[2:]
    offsets = _offsets(weights, dilations).to(h.device)
    rows, columns = _windows(offsets, height).to(h.dtype), _windows(offsets, width).to(h.dtype)
    with without_autocast(x):
        sums = einsum(rows, h, columns, "u h, n c h w, v w -> n c u v")
        kernel = _on_grid(weights, dilations, offsets, h.dtype).sum(dim=0)
        p = einsum(kernel, sums, "c u v, n c u v -> n c") / (height * width)
    return p if biases is None else p + torch.stack(list(biases)).to(h.dtype).sum(dim=0)


def merged_convolution(
    x: Tensor, alpha: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int]
) -> Tensor:
    """Equation (14): one depthwise convolution, by the kernel sum_k alpha_kc W_kc of each sample and channel."""
    h = upcast(x)
    offsets = _offsets(weights, dilations).to(h.device)
    step = _step(weights, dilations)
    with without_autocast(x):
        grid = _on_grid(weights, dilations, offsets, h.dtype)
        kernels = einsum(alpha, grid, "n k c, k c u v -> n c u v")
        if biases is None:
            shifts = torch.zeros_like(alpha[:, 0])
        else:
            shifts = einsum(alpha, torch.stack(list(biases)).to(h.dtype), "n k c, k c -> n c")
        if len(x) == 0:  # no group to convolve in, yet the parameters stay in the graph
            return h + kernels.sum() + shifts.sum()
        y = F.conv2d(
            rearrange(h, "n c h w -> 1 (n c) h w"),
            rearrange(kernels, "n c u v -> (n c) 1 u v"),
            rearrange(shifts, "n c -> (n c)"),
            padding=step * (len(offsets) // 2),
            dilation=step,
            groups=h.shape[0] * h.shape[1],
        )
        return rearrange(y, "1 (n c) h w -> n c h w", n=h.shape[0])


def merging_pays(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> bool:
    """Whether the merged convolution was measured to be no slower than the branches, forward and with backward.

    Measured on CPU: the window sums want a map large enough and branches enough to repay them (channels_last, also
    the two copies into the layout of the convolution), and the merged kernel wants no holes and clearly fewer taps
    than the branches have together.
    """
    smallest_side = 28 if x.is_contiguous() else 56
    large = x.shape[2] * x.shape[3] >= smallest_side**2
    merged_taps = len(_offsets(weights, dilations)) ** 2
    branch_taps = sum(weight[0, 0].numel() for weight in weights)
    dense = _step(weights, dilations) == 1 and 3 * merged_taps <= 2 * branch_taps
    return x.device.type == "cpu" and large and len(weights) >= 4 and dense


def _step(weights: Sequence[Tensor], dilations: Sequence[int]) -> int:
    """The widest spacing, in px, of a grid that holds the taps of every branch."""
    spaced = [dilation for weight, dilation in zip(weights, dilations, strict=True) if weight.shape[-1] > 1]
    return math.gcd(*spaced) or 1


def _offsets(weights: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """The positions of the taps along one side of that grid, in px from its centre."""
    step = _step(weights, dilations)
    reaches = [dilation * (weight.shape[-1] // 2) for weight, dilation in zip(weights, dilations, strict=True)]
    radius = max(reaches) // step
    return step * torch.arange(-radius, radius + 1)


def _windows(offsets: Tensor, length: int) -> Tensor:
    """Which positions a tap at each offset meets as it slides along a map of `length`: (offsets, length) of 0 and 1."""
    slid_by = torch.arange(length, device=offsets.device) - offsets[:, None]
    return (slid_by >= 0) & (slid_by < length)


def _on_grid(weights: Sequence[Tensor], dilations: Sequence[int], offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The branches' kernels on their common grid: (K, C, offsets, offsets)."""
    grids: list[Tensor] = []
    for weight, dilation in zip(weights, dilations, strict=True):
        size = weight.shape[-1]
        taps = dilation * (torch.arange(size, device=offsets.device) - size // 2)
        place = (offsets[:, None] == taps).to(dtype)
        grids.append(einsum(place, weight.to(dtype), place, "u i, c one i j, v j -> c u v"))
    return torch.stack(grids)
