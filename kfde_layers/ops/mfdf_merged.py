"""MFDF without its branch maps: behind depthwise branches, equations (10), (11) and (14) are linear in x."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor


def common_grid(weights: Sequence[Tensor], dilations: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """The branches' depthwise kernels as one tensor (K, C, k, k), and the spacing of its taps in px."""
    step, reaches = _spacing_and_reaches(weights, dilations)
    radius = max(reaches)
    grid = weights[0].new_zeros((len(weights), len(weights[0]), 2 * radius + 1, 2 * radius + 1), dtype=dtype)
    for k, (weight, dilation, reach) in enumerate(zip(weights, dilations, reaches, strict=True)):
        taps = slice(radius - reach, radius + reach + 1, max(1, dilation // step))
        grid[k, :, taps, taps] = weight[:, 0]
    return grid, step


def merging_pays(weights: Sequence[Tensor], dilations: Sequence[int]) -> bool:
    """Whether the merged convolution can be expected to beat the branches.

    Measured on CPU, forward and with backward: it wants branches enough to repay what it does besides, and a merged
    kernel that is not mostly holes.
    """
    _, reaches = _spacing_and_reaches(weights, dilations)
    merged_taps = (2 * max(reaches) + 1) ** 2
    return len(weights) >= 3 and merged_taps <= 3 * sum(weight.shape[-1] ** 2 for weight in weights)


def _spacing_and_reaches(weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[int, list[int]]:
    """The widest spacing that holds every tap of every branch, in px, and how far each branch reaches, in these."""
    sizes = [weight.shape[-1] for weight in weights]
    step = math.gcd(*(dilation for size, dilation in zip(sizes, dilations, strict=True) if size > 1)) or 1
    return step, [size // 2 * dilation // step for size, dilation in zip(sizes, dilations, strict=True)]


def coverage(kernel: Tensor, step: int, height: int, width: int) -> Tensor:
    r"""How much each position of a map adds to the sum over its depthwise convolution: (C, k, k) to (C, H, W).

    A tap at offset (u, v) meets just the positions that it reaches from inside the map.
    """
    rows, columns = (_met(kernel.shape[-1], step, length).to(kernel) for length in (height, width))
    return ((kernel @ columns).mT @ rows).mT


def coverage_transposed(maps: Tensor, step: int, size: int) -> Tensor:
    """The gradient of `coverage`: (C, H, W) to (C, k, k)."""
    rows, columns = (_met(size, step, length).to(maps) for length in maps.shape[1:])
    return ((maps @ columns.mT).mT @ rows.mT).mT


def _met(size: int, step: int, length: int) -> Tensor:
    """Which positions the taps along one side of a kernel meet as it slides along a map: (k, length) of 0 and 1."""
    offsets = step * torch.arange(-(size // 2), size // 2 + 1)
    slid_by = torch.arange(length) - offsets[:, None]
    return (slid_by >= 0) & (slid_by < length)


def pooled(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    r"""The mean over all positions of x convolved with `kernel`, (N, C), without the convolution.

    \[ p_c = \frac{1}{HW} \sum_{ij} x_{c,ij} \sum_{uv \text{ reaching } ij} W_{c,uv} \]
    """
    height, width = x.shape[2:]
    cover = coverage(kernel, step, height, width)
    return einsum(x, cover, "n c h w, c h w -> n c") / (height * width)


def merged(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor, step: int) -> Tensor:
    """Equation (14): one depthwise convolution of x, by the kernel sum_k alpha_kc W_kc of each sample and channel."""
    return convolve_each(x, merge(alpha, grid), shifts, step)


def convolve_each(x: Tensor, kernels: Tensor, shifts: Tensor | None, step: int) -> Tensor:
    """Each sample convolved by its own depthwise kernels, (N, C, k, k), and shifted by (N, C)."""
    y = F.conv2d(
        rearrange(x, "n c h w -> 1 (n c) h w"),
        rearrange(kernels, "n c u v -> (n c) 1 u v"),
        None if shifts is None else rearrange(shifts, "n c -> (n c)"),
        padding=step * (kernels.shape[-1] // 2),
        dilation=step,
        groups=x.shape[0] * x.shape[1],
    )
    return rearrange(y, "1 (n c) h w -> n c h w", n=x.shape[0])


def merge(alpha: Tensor, grid: Tensor) -> Tensor:
    """The kernel of each sample and channel, (N, C, k, k), from alpha (N, K, C) and the branches' (K, C, k, k).

    A sum of products, as its gradients are: a product of matrices for each channel takes ten times as long on CPU.
    """
    weights = alpha[..., None, None]
    kernels = weights[:, 0] * grid[0]
    for k in range(1, len(grid)):
        kernels.addcmul_(weights[:, k], grid[k])
    return kernels
