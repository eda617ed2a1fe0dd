"""The mean of a convolution, and the convolution by merged kernels, on CPU, with their gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.merging import (
    SMALL_MAP,
    convolve_each,
    merge_kernels,
    tap_coverage,
    tap_coverage_backward,
)
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast, without_autocast

_CHUNK = 2**19  # elements that stay in the cache between two steps


def mean_of_convolution(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    """Return the mean over all positions of x convolved with `kernel`: (N, C, H, W) and (C, k, k) to (N, C)."""
    if x.numel() == 0:
        return kernel.new_zeros(x.shape[:2])
    with without_autocast(x):
        coverage = _in_layout_of(x, tap_coverage(kernel, tap_spacing, *x.shape[2:]))
    samples = max(1, _CHUNK // coverage.numel())
    if samples >= len(x):
        return (x * coverage).mean(dim=(2, 3))
    means = [(chunk * coverage).mean(dim=(2, 3)) for chunk in x.split(samples)]
    return torch.cat(means)


def mean_of_convolution_backward(
    dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int, with_x: bool, with_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x` and `kernel` that are asked for, and None for the others."""
    height, width = x.shape[2:]
    dmeans = dp[:, :, None, None] / max(height * width, 1)
    dx = dkernel = None
    with without_autocast(x):
        if with_x:
            coverage = _in_layout_of(x, tap_coverage(kernel, tap_spacing, height, width))
            dx = torch.empty_like(x, memory_format=memory_format(x))
            for n, dmean in enumerate(dmeans):
                torch.mul(coverage, dmean, out=dx[n])
        if with_kernel:
            dcoverage = _in_layout_of(x, dp.new_zeros(x.shape[1:]))
            for n, dmean in enumerate(dmeans):
                dcoverage += x[n] * dmean
            dkernel = tap_coverage_backward(dcoverage, tap_spacing, kernel.shape[-1]).contiguous()
    return dx, dkernel


def merged_convolution(
    x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int
) -> Tensor:
    """Return eq. (14): each sample convolved by its merged kernels, in the dtype and memory format of `x`."""
    with without_autocast(x):
        merged_kernels = merge_kernels(alpha, stacked_kernels)
        y = as_input(_convolve(upcast(dense(x)), merged_kernels, merged_bias, tap_spacing), x)
    # Drop the view: autograd forbids in-place activations on views made by a custom operator.
    return y.new_empty(0).set_(y)  # pyright: ignore[reportArgumentType]


def merged_convolution_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, tap_spacing: int, asked: Asked
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x`, `alpha`, `stacked_kernels` and `merged_bias`; None for those not asked for."""
    h, dh = upcast(x), upcast(dy.contiguous(memory_format=memory_format(x)))
    dx = dalpha = dstacked = dbias = None
    with without_autocast(x):
        if asked.x:
            dx = as_input(_convolve(dh, merge_kernels(alpha, stacked_kernels).flip(-2, -1), None, tap_spacing), x)
        if asked.alpha or asked.kernels:
            dmerged = _correlate(h, dh, stacked_kernels.shape[-1], tap_spacing)
            if asked.alpha:
                dalpha = torch.stack([(dmerged * kernel).sum(dim=(2, 3)) for kernel in stacked_kernels], dim=1)
            if asked.kernels:
                dstacked = torch.stack([(dmerged * weight[..., None, None]).sum(dim=0) for weight in alpha.unbind(1)])
        if asked.bias:
            dbias = dh.sum(dim=(2, 3))
    return dx, dalpha, dstacked, dbias


def _convolve(x: Tensor, merged_kernels: Tensor, merged_bias: Tensor | None, tap_spacing: int) -> Tensor:
    """Return each sample convolved by its own kernels, in the memory format of x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    small = x.shape[2] * x.shape[3] <= SMALL_MAP  # copying it takes less time than a call for each sample
    if x.is_contiguous() or small:  # one call: in contiguous memory the channels of all samples follow each other
        y = convolve_each(x, merged_kernels, merged_bias, tap_spacing)
        return y.contiguous(memory_format=memory_format(x))
    y, padding, channels = torch.empty_like(x), tap_spacing * (merged_kernels.shape[-1] // 2), x.shape[1]
    for n, kernel in enumerate(merged_kernels[:, :, None]):
        bias = None if merged_bias is None else merged_bias[n]
        y[n] = F.conv2d(x[n : n + 1], kernel, bias, 1, padding, tap_spacing, channels)[0]
    return y


def _correlate(x: Tensor, dy: Tensor, size: int, tap_spacing: int) -> Tensor:
    """Return the gradient of each sample's kernels, (N, C, k, k): x convolved by dy.

    On CPU that is many times faster than PyTorch's gradient of a depthwise convolution, but only on contiguous maps.
    """
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return x.new_zeros((n, channels, size, size))
    rows = x.contiguous().view(1, n * channels, height, width)
    kernels = dy.contiguous().view(n * channels, 1, height, width)
    taps = F.conv2d(rows, kernels, stride=tap_spacing, padding=tap_spacing * (size // 2), groups=n * channels)
    return taps.view(n, channels, size, size)


def _in_layout_of(x: Tensor, maps: Tensor) -> Tensor:
    """Return `maps` (C, H, W) in the memory layout that a sample of `x` has."""
    return maps[None].contiguous(memory_format=memory_format(x))[0]
