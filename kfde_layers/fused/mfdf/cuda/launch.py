"""Launch the kernels of MFDF."""

# pyright: reportMissingTypeStubs=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Triton's launches take more than the kernel's parameters.

import math

import torch
import triton
from torch import Tensor

from kfde_layers.fused.maps import FILL, WARPS, sizes
from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.cuda.convolution import mfdf_merged_kernel, mfdf_merged_loop_kernel
from kfde_layers.fused.mfdf.cuda.mean import (
    mfdf_coverage_kernel,
    mfdf_mean_backward_kernel,
    mfdf_mean_kernel,
    mfdf_window_kernel,
)
from kfde_layers.fused.mfdf.cuda.taps import mfdf_contract_kernel, mfdf_taps_kernel
from kfde_layers.fused.mfdf.cuda.tiling import SAMPLES, SCRATCH, UNROLLED, block_rows, cut_into_strips, cut_into_tiles


def launch_mean(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    """Return the mean over all positions of x convolved with `kernel`: (N, C, H, W) and (C, k, k) to (N, C)."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return kernel.new_zeros((batch, channels))
    constants = sizes(channels, height * width, channels_last)
    tiling = cut_into_tiles(batch, channels, height * width, channels_last, x.element_size())
    p = kernel.new_empty((batch, tiling.chunks, channels))
    with torch.cuda.device_of(x):
        table, columns = _coverage(kernel, tap_spacing, height, width)
        blocks = triton.cdiv(channels, tiling.block_c)
        mfdf_mean_kernel[(triton.cdiv(batch, tiling.samples) * blocks, tiling.chunks)](
            x, table, p, batch, height, width, height * width // constants["HW_UNIT"], columns, tiling.chunk,
            **constants, SIZE=kernel.shape[-1], SPACING=tap_spacing, SAMPLES=tiling.samples, **tiling.options(),
        )  # fmt: skip
        return p.sum(1) if tiling.chunks > 1 else p[:, 0]


def launch_mean_backward(
    dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int, with_x: bool, with_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x`, in its dtype and memory format, and of `kernel` that are asked for, else None."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x) if with_x else None
    if x.numel() == 0:
        return dx, kernel.new_zeros(kernel.shape) if with_kernel else None
    constants = sizes(channels, height * width, channels_last)
    hw, size, itemsize = height * width, kernel.shape[-1], x.element_size()
    tiling = cut_into_tiles(batch, channels, hw, channels_last, itemsize)
    tiles = triton.cdiv(hw, tiling.block_hw) * triton.cdiv(channels, tiling.block_c)
    # Each part of the samples writes a map of its own, so there must not be too many parts.
    parts = max(min(FILL // tiles, batch // SAMPLES), 1)
    samples = triton.cdiv(batch, parts)
    parts = triton.cdiv(batch, samples)
    dcoverage = kernel.new_empty((parts, channels * hw)) if with_kernel else None
    with torch.cuda.device_of(x):
        table, columns = _coverage(kernel, tap_spacing, height, width) if with_x else (None, 1)
        mfdf_mean_backward_kernel[(tiles, parts)](
            dp.contiguous(), x, table, dx, dcoverage, batch, height, width,
            hw // constants["HW_UNIT"], columns, samples,
            **constants, SIZE=size, SPACING=tap_spacing, **tiling.options(),
        )  # fmt: skip
        if dcoverage is None:
            return dx, None
        block_c = min(triton.next_power_of_2(channels), 32)
        blocks = triton.cdiv(channels, block_c)
        window = {"C": channels, "SIZE": size, "SPACING": tap_spacing, "BLOCK_C": block_c, "num_warps": WARPS}
        strides = (width * channels, channels, 1) if channels_last else (width, 1, hw)
        # First along the width, from the map of each part to (height, k, channels), then along the height.
        lines = kernel.new_empty((height, size, channels))
        mfdf_window_kernel[(height * size * blocks,)](
            dcoverage, lines, width, parts, channels * hw, *strides, size * channels, channels, 1, 1.0,
            **window, BLOCK_L=block_rows(width, block_c),
        )  # fmt: skip
        dkernel = kernel.new_empty(kernel.shape)
        mfdf_window_kernel[(size * size * blocks,)](
            lines, dkernel, height, 1, 0, channels, size * channels, 1, 1, size, size * size, 1 / hw,
            **window, BLOCK_L=block_rows(height, block_c),
        )  # fmt: skip
    return dx, dkernel


def launch_merged(x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int) -> Tensor:
    """Convolve each sample by its own kernels sum_k alpha_nkc W_kc, and add its own bias.

    Args:
        x: (N, C, H, W), dense in either memory format.
        alpha: (N, K, C).
        stacked_kernels: (K, C, k, k) with k odd.
        merged_bias: (N, C).
        tap_spacing: Spacing of the taps in px.

    Returns:
        The result in dtype and memory format of `x`.
    """
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _convolve(x, alpha.contiguous(), _taps_first(stacked_kernels), merged_bias.contiguous(), y, tap_spacing)
    return y


def launch_merged_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, tap_spacing: int, asked: Asked
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `x` (in its dtype and memory format), `alpha`, `stacked_kernels` and `merged_bias`.

    Those that are not asked for are None.

    The gradient of the merged taps is written to memory for some samples at a time. The gradient of `alpha` sums it
    over the taps and that of `stacked_kernels` over the samples; no program has both.
    """
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    branches, size = stacked_kernels.shape[0], stacked_kernels.shape[-1]
    dx = torch.empty_like(x) if asked.x else None
    alpha, taps = alpha.contiguous(), _taps_first(stacked_kernels)
    if dx is not None and x.numel():
        with torch.cuda.device_of(x):
            _convolve(dy, alpha, taps.flip(1), None, dx, tap_spacing)
    dalpha = alpha.new_empty(alpha.shape) if asked.alpha else None
    dstacked = stacked_kernels.new_zeros(stacked_kernels.shape) if asked.kernels else None
    dbias = alpha.new_empty((batch, channels)) if asked.bias else None
    if x.numel() == 0 or not (asked.alpha or asked.kernels or asked.bias):
        return dx, dalpha, dstacked, dbias
    squares = triton.cdiv(size, UNROLLED)
    side = triton.cdiv(size, squares)
    cut = cut_into_strips(
        batch, channels, height, width, channels_last, x.element_size(), tap_spacing,
        neighbours=1, warps=FILL, least=4 * side,
    )  # fmt: skip
    parts = cut.parts()
    chunks = triton.cdiv(batch * parts * channels * size * size, max(x.numel(), SCRATCH))
    samples = triton.cdiv(batch, chunks)
    block_c = min(triton.next_power_of_2(channels), 32)
    blocks = triton.cdiv(channels, block_c)
    options = {"C": channels, "BLOCK_C": block_c, "num_warps": WARPS}
    with torch.cuda.device_of(x):
        for start in range(0, batch, samples):
            chunk = slice(start, start + samples)
            count = len(alpha[chunk])
            dtaps = alpha.new_empty((count, parts, size * size, channels))
            sums = alpha.new_empty((count, parts, channels))
            mfdf_taps_kernel[(count * triton.cdiv(channels, cut.block_c), parts, squares * squares)](
                dy[chunk], x[chunk], dtaps, sums, height, width,
                **cut.arguments(), C=channels, CHANNELS_LAST=channels_last, SIZE=size, SPACING=tap_spacing, SIDE=side,
                **cut.options(),
            )  # fmt: skip
            if dbias is not None:
                torch.sum(sums, 1, out=dbias[chunk])
            per_sample, per_part, per_tap = dtaps.stride()[:3]
            if dalpha is not None:
                mfdf_contract_kernel[(count * blocks, branches)](
                    dtaps, taps, dalpha[chunk], size * size, parts, per_sample, per_tap, per_part,
                    taps.stride(0), channels, branches * channels, channels, 1,
                    **options, BLOCK_B=block_rows(size * size, block_c),
                )  # fmt: skip
            if dstacked is not None:
                dstacked_chunk = torch.empty_like(dstacked)
                mfdf_contract_kernel[(size * size * blocks, branches)](
                    dtaps, alpha[chunk], dstacked_chunk, count, parts, per_tap, per_sample, per_part,
                    channels, branches * channels, 1, dstacked.stride(0), size * size,
                    **options, BLOCK_B=block_rows(count, block_c),
                )  # fmt: skip
                dstacked += dstacked_chunk
    return dx, dalpha, dstacked, dbias


def _convolve(x: Tensor, alpha: Tensor, taps: Tensor, merged_bias: Tensor | None, y: Tensor, tap_spacing: int) -> None:
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    branches, size = taps.shape[0], math.isqrt(taps.shape[1])
    constants = {"C": channels, "CHANNELS_LAST": channels_last, "SIZE": size, "SPACING": tap_spacing}
    if size <= UNROLLED:
        cut = cut_into_strips(
            batch, channels, height, width, channels_last, x.element_size(), tap_spacing,
            neighbours=4, warps=4 * FILL, least=size,
        )  # fmt: skip
        mfdf_merged_kernel[(batch * triton.cdiv(channels, cut.block_c), cut.parts())](
            x, alpha, taps, merged_bias, y, height, width, branches, **cut.arguments(), **constants, **cut.options()
        )
    else:
        tiling = cut_into_tiles(batch, channels, height * width, channels_last, x.element_size())
        blocks = batch * triton.cdiv(channels, tiling.block_c)
        mfdf_merged_loop_kernel[(blocks, triton.cdiv(height * width, tiling.block_hw))](
            x, alpha, taps, merged_bias, y, height, width, branches, **constants, **tiling.options()
        )


def _taps_first(stacked_kernels: Tensor) -> Tensor:
    """Return the branches' kernels as (K, k * k, C), so that lanes of adjacent channels read adjacent values."""
    return stacked_kernels.flatten(2).transpose(1, 2).contiguous()


def _coverage(kernel: Tensor, tap_spacing: int, height: int, width: int) -> tuple[Tensor, int]:
    """Return the coverage of each border class, divided by H W, and the number of classes along the width."""
    channels, size = kernel.shape[:2]
    rows, columns = (size if length > tap_spacing * (size - 1) else length for length in (height, width))
    table = kernel.new_empty((rows * columns, channels))
    block_c = min(triton.next_power_of_2(channels), 32)
    mfdf_coverage_kernel[(rows * columns, triton.cdiv(channels, block_c))](
        kernel.contiguous(), table, height, width, columns, 1 / (height * width),
        C=channels, SIZE=size, SPACING=tap_spacing, BLOCK_TAPS=block_rows(size * size, block_c), BLOCK_C=block_c,
        num_warps=WARPS,
    )  # fmt: skip
    return table, columns
