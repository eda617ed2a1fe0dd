"""MFDF without its branch maps: behind depthwise branches, equations (10), (11) and (14) are linear in x."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from kfde_layers.ops.formats import upcast


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
    with torch.autocast(x.device.type, enabled=False):
        sums = einsum(rows, h, columns, "u h, n c h w, v w -> n c u v")
        kernel = _on_grid(weights, dilations, offsets, h.dtype).sum(dim=0)
        p = einsum(kernel, sums, "c u v, n c u v -> n c") / (height * width)
    return p if biases is None else p + torch.stack(list(biases)).to(h.dtype).sum(dim=0)


def merged_convolution(
    x: Tensor, alpha: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int]
) -> Tensor:
    """Equation (14): one depthwise convolution, by the kernel sum_k alpha_kc W_kc of each sample and channel."""
    offsets = _offsets(weights, dilations).to(x.device)
    step = _step(weights, dilations)
    geometry = {"padding": step * (len(offsets) // 2), "dilation": step}
    with torch.autocast(x.device.type, enabled=False):
        grid = _on_grid(weights, dilations, offsets, alpha.dtype)
        kernels = einsum(alpha, grid, "n k c, k c u v -> n c u v").to(x.dtype)
        if biases is None:
            shifts = kernels.new_zeros(kernels.shape[:2])
        else:
            stacked = torch.stack(list(biases)).to(alpha.dtype)
            shifts = einsum(alpha, stacked, "n k c, k c -> n c").to(x.dtype)
        if x.is_contiguous() and len(x) > 0:  # all samples at once, as so many channels
            y = F.conv2d(
                rearrange(x, "n c h w -> 1 (n c) h w"),
                rearrange(kernels, "n c u v -> (n c) 1 u v"),
                rearrange(shifts, "n c -> (n c)"),
                groups=x.shape[0] * x.shape[1],
                **geometry,
            )
            return y.view_as(x)
        # Channels_last, the same would copy x twice. An empty batch is split into one empty part, and the sums over
        # its samples are zeros that keep the parameters in the graph.
        parts = [
            F.conv2d(part, kernel.sum(dim=0).unsqueeze(1), shift.sum(dim=0), groups=x.shape[1], **geometry)
            for part, kernel, shift in zip(x.split(1), kernels.split(1), shifts.split(1), strict=True)
        ]
    return torch.cat(parts)


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
