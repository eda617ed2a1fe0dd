"""MFDF without its branch maps: with depthwise branches, equations (10), (11) and (14) are linear in x."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from kfde_layers.fused.eager import nobody_looks

SMALL_MAP = 256  # positions


def stack_kernels(weights: Sequence[Tensor], dilations: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return the branches' depthwise kernels as one tensor (K, C, k, k), and the spacing of its taps in px."""
    tap_spacing, radii = spacing_and_radii(weights, dilations)
    stacked: list[Tensor] = []
    for weight, dilation, radius in zip(weights, dilations, radii, strict=True):
        kernel, size = weight[:, 0].to(dtype), weight.shape[-1]
        if size < 2 * radius + 1:  # spread the taps; not in place, for torch.vmap
            for dim in (1, 2):
                spread = list(kernel.shape)
                spread[dim] = 2 * radius + 1
                kernel = kernel.new_zeros(spread).slice_scatter(kernel, dim, step=dilation // tap_spacing)
        margin = max(radii) - radius
        stacked.append(F.pad(kernel, [margin] * 4) if margin else kernel)
    return torch.stack(stacked), tap_spacing


def spacing_and_radii(weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[int, list[int]]:
    """Return the widest spacing in px at which a common kernel holds every tap, and each branch's radius in taps."""
    sizes = [weight.shape[-1] for weight in weights]
    tap_spacing = math.gcd(*(dilation for size, dilation in zip(sizes, dilations, strict=True) if size > 1)) or 1
    return tap_spacing, [size // 2 * dilation // tap_spacing for size, dilation in zip(sizes, dilations, strict=True)]


def tap_coverage(kernel: Tensor, tap_spacing: int, height: int, width: int) -> Tensor:
    """Return how much each position of a map adds to the sum over its depthwise convolution: (C, k, k) to (C, H, W).

    A position adds the taps that reach it while the kernel's centre is inside the map.
    """
    size = kernel.shape[-1]
    if nobody_looks(kernel) and height * width <= SMALL_MAP:
        inside = _known_taps_inside(size, tap_spacing, height, width, kernel.dtype)
        return (kernel.flatten(1) @ inside).view(kernel.shape[0], height, width)
    rows, columns = (_taps_inside(size, tap_spacing, length, kernel) for length in (height, width))
    return ((kernel @ columns).mT @ rows).mT


def tap_coverage_backward(dcoverage: Tensor, tap_spacing: int, size: int) -> Tensor:
    """Return the gradient of the kernel of `tap_coverage`: (C, H, W) to (C, k, k)."""
    height, width = dcoverage.shape[1:]
    if nobody_looks(dcoverage) and height * width <= SMALL_MAP:
        inside = _known_taps_inside(size, tap_spacing, height, width, dcoverage.dtype)
        return (dcoverage.flatten(1) @ inside.mT).view(dcoverage.shape[0], size, size)
    rows, columns = (_taps_inside(size, tap_spacing, length, dcoverage) for length in (height, width))
    return ((dcoverage @ columns.mT).mT @ rows.mT).mT


def _taps_inside(size: int, tap_spacing: int, length: int, like: Tensor) -> Tensor:
    """Return which taps along one side of a kernel reach which positions of a side of the map: (k, length), 0 or 1.

    The result has the dtype and the device of `like`.
    """
    distances = tap_spacing * torch.arange(-(size // 2), size // 2 + 1, device=like.device)
    centres = torch.arange(length, device=like.device) - distances[:, None]
    return ((centres >= 0) & (centres < length)).to(like.dtype)


@functools.lru_cache(maxsize=64)
def _known_taps_inside(size: int, tap_spacing: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return which taps of a kernel reach which positions of a map: (k k, H W), 0 or 1, on CPU.

    For a small map, to make it takes as long as the convolution.
    """
    with torch.inference_mode(False):  # autograd must be able to save the result
        like = torch.empty(0, dtype=dtype, device="cpu")
        return torch.kron(*(_taps_inside(size, tap_spacing, length, like) for length in (height, width)))


def mean_by_coverage(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    r"""Return the mean over all positions of x convolved with `kernel`, (N, C), without the convolution.

    \[ p_c = \frac{1}{HW} \sum_{ij} x_{c,ij} \sum_{uv \text{ reaching } ij} W_{c,uv} \]
    """
    height, width = x.shape[2:]
    coverage = tap_coverage(kernel, tap_spacing, height, width)
    return einsum(x, coverage, "n c h w, c h w -> n c") / (height * width)


def merge_kernels(alpha: Tensor, stacked_kernels: Tensor) -> Tensor:
    """Return sum_k alpha_kc W_kc of eq. (14), (N, C, k, k), from alpha (N, K, C) and the stacked kernels (K, C, k, k).

    It is a sum of products, and so are its gradients: a matrix product per channel takes ten times as long on CPU.
    """
    weights = alpha[..., None, None]
    merged_kernels = weights[:, 0] * stacked_kernels[0]
    for k in range(1, len(stacked_kernels)):
        merged_kernels.addcmul_(weights[:, k], stacked_kernels[k])
    return merged_kernels


def convolve_each(x: Tensor, merged_kernels: Tensor, merged_bias: Tensor | None, tap_spacing: int) -> Tensor:
    """Return each sample convolved by its own depthwise kernels, (N, C, k, k), plus its own bias, (N, C)."""
    samples, channels, height, width = x.shape
    size = merged_kernels.shape[-1]
    y = F.conv2d(
        x.reshape(1, samples * channels, height, width),
        merged_kernels.reshape(samples * channels, 1, size, size),
        None if merged_bias is None else merged_bias.flatten(),
        padding=tap_spacing * (size // 2),
        dilation=tap_spacing,
        groups=samples * channels,
    )
    return y.view(samples, channels, height, width)
