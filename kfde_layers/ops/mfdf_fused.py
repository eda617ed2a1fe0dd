"""The operators behind the fused form of MFDF: their schemas, kernels for each device, gradients.

`pooled_depthwise` is the mean of a depthwise convolution over all positions; `merged_depthwise` is a depthwise
convolution by a kernel of its own for each sample, put together from those of the branches. Neither makes the map of a
branch, and the backward passes are given the inputs alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfde_layers.ops.formats import as_input, dense, memory_format, upcast, without_autocast
from kfde_layers.ops.mfdf_merged import (
    convolve_each,
    coverage,
    coverage_transposed,
    merge,
    merged,
    pooled,
)
from kfde_layers.ops.second_order import differentiable_gradients

SMALL_MAP = 256  # positions: so few are copied into another layout in less time than a call for each sample takes
_CHUNK = 2**19  # elements that stay in the cache from one step to the next


@torch.library.custom_op("kfde::pooled_depthwise", mutates_args=(), device_types="cpu")
def pooled_depthwise(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    if x.numel() == 0:
        return kernel.new_zeros(x.shape[:2])
    with without_autocast(x):
        cover = _beside(x, coverage(kernel, step, *x.shape[2:]))
    samples = max(1, _CHUNK // cover.numel())
    means = [(chunk * cover).mean(dim=(2, 3)) for chunk in x.split(samples)]
    return torch.cat(means)


@torch.library.custom_op("kfde::pooled_depthwise_backward", mutates_args=(), device_types="cpu")
def _pool_backward(dp: Tensor, x: Tensor, kernel: Tensor, step: int) -> tuple[Tensor, Tensor]:
    height, width = x.shape[2:]
    with without_autocast(x):
        cover = _beside(x, coverage(kernel, step, height, width))
        dx, dcover = _fake_map(x), torch.zeros_like(cover)
        for n, share in enumerate(dp[:, :, None, None] / max(height * width, 1)):
            torch.mul(cover, share, out=dx[n])
            dcover += x[n] * share
        return dx, coverage_transposed(dcover, step, kernel.shape[-1]).contiguous()


@torch.library.custom_op("kfde::merged_depthwise", mutates_args=(), device_types="cpu")
def merged_depthwise(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor, step: int) -> Tensor:
    with without_autocast(x):
        y = as_input(_convolve(upcast(dense(x)), merge(alpha, grid), shifts, step), x)
    # No longer a view, which autograd would not let an activation behind the layer change in place.
    return y.new_empty(0).set_(y)  # pyright: ignore[reportArgumentType]


@torch.library.custom_op("kfde::merged_depthwise_backward", mutates_args=(), device_types="cpu")
def _merge_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, grid: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, dh = upcast(x), upcast(dy.contiguous(memory_format=memory_format(x)))
    with without_autocast(x):
        dx = _convolve(dh, merge(alpha, grid).flip(-2, -1), None, step)
        dkernels = _correlate(h, dh, grid.shape[-1], step)
        dalpha = torch.stack([(dkernels * kernel).sum(dim=(2, 3)) for kernel in grid], dim=1)
        dgrid = torch.stack([(dkernels * weight[..., None, None]).sum(dim=0) for weight in alpha.unbind(1)])
    return as_input(dx, x), dalpha, dgrid, dh.sum(dim=(2, 3))


def _convolve(x: Tensor, kernels: Tensor, shifts: Tensor | None, step: int) -> Tensor:
    """Each sample by its own kernels, in the layout of x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    small = x.shape[2] * x.shape[3] <= SMALL_MAP
    if x.is_contiguous() or small:  # one call: contiguous, the channels of all samples follow each other
        return convolve_each(x, kernels, shifts, step).contiguous(memory_format=memory_format(x))
    y, padding, channels = torch.empty_like(x), step * (kernels.shape[-1] // 2), x.shape[1]
    for n, kernel in enumerate(kernels[:, :, None]):
        shift = None if shifts is None else shifts[n]
        y[n] = F.conv2d(x[n : n + 1], kernel, shift, 1, padding, step, channels)[0]
    return y


def _correlate(x: Tensor, dy: Tensor, size: int, step: int) -> Tensor:
    """The gradient of each sample's kernels, (N, C, k, k): x convolved by dy.

    On CPU that is many times faster than the gradient of a depthwise convolution, and fast contiguous only.
    """
    n, channels, height, width = x.shape
    if x.numel() == 0:
        return x.new_zeros((n, channels, size, size))
    rows = x.contiguous().view(1, n * channels, height, width)
    kernels = dy.contiguous().view(n * channels, 1, height, width)
    taps = F.conv2d(rows, kernels, stride=step, padding=step * (size // 2), groups=n * channels)
    return taps.view(n, channels, size, size)


def _beside(x: Tensor, maps: Tensor) -> Tensor:
    """`maps` (C, H, W) in the layout that a sample of `x` has."""
    return maps[None].contiguous(memory_format=memory_format(x))[0]


def _pool_on_cuda(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    from kfde_layers.kernels.mfdf import launch_pool  # Triton loads here, at first use

    return launch_pool(dense(x), kernel, step)


def _pool_backward_on_cuda(dp: Tensor, x: Tensor, kernel: Tensor, step: int) -> tuple[Tensor, Tensor]:
    from kfde_layers.kernels.mfdf import launch_pool_backward

    return launch_pool_backward(dp, dense(x), kernel, step)


def _merge_on_cuda(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor, step: int) -> Tensor:
    from kfde_layers.kernels.mfdf import launch_merged

    return launch_merged(dense(x), alpha, grid, shifts, step)


def _merge_backward_on_cuda(
    dy: Tensor, x: Tensor, alpha: Tensor, grid: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kfde_layers.kernels.mfdf import launch_merged_backward

    return launch_merged_backward(dy.contiguous(memory_format=memory_format(x)), dense(x), alpha, grid, step)


torch.library.register_kernel(pooled_depthwise, "cuda", _pool_on_cuda)
torch.library.register_kernel(_pool_backward, "cuda", _pool_backward_on_cuda)
torch.library.register_kernel(merged_depthwise, "cuda", _merge_on_cuda)
torch.library.register_kernel(_merge_backward, "cuda", _merge_backward_on_cuda)


def _fake_map(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@pooled_depthwise.register_fake
def _fake_pool(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    return kernel.new_empty(x.shape[:2])


@_pool_backward.register_fake
def _fake_pool_backward(dp: Tensor, x: Tensor, kernel: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return _fake_map(x), kernel.new_empty(kernel.shape)


@merged_depthwise.register_fake
def _fake_merge(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor, step: int) -> Tensor:
    return _fake_map(x)


@_merge_backward.register_fake
def _fake_merge_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, grid: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_map(x), alpha.new_empty(alpha.shape), grid.new_empty(grid.shape), alpha.new_empty(x.shape[:2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.step = inputs
    ctx.save_for_backward(*tensors)


def _pool_gradients(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients are to be differentiated in turn: the mathematics can be

        def mathematics(x: Tensor, kernel: Tensor) -> Tensor:
            with without_autocast(x):
                return pooled(upcast(x), kernel, ctx.step)

        return *differentiable_gradients(mathematics, (x, kernel), dp), None
    return *torch.ops.kfde.pooled_depthwise_backward(dp, x, kernel, ctx.step), None


def _merge_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, alpha, grid, shifts = ctx.saved_tensors
    if torch.is_grad_enabled():

        def mathematics(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor) -> Tensor:
            with without_autocast(x):
                return as_input(merged(upcast(x), alpha, grid, shifts, ctx.step), x)

        return *differentiable_gradients(mathematics, (x, alpha, grid, shifts), dy), None
    return *torch.ops.kfde.merged_depthwise_backward(dy, x, alpha, grid, ctx.step), None


pooled_depthwise.register_autograd(_pool_gradients, setup_context=_save)
merged_depthwise.register_autograd(_merge_gradients, setup_context=_save)
