"""The convolution of each sample by its merged kernels."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.maps import address
from kfde_layers.fused.mfdf.cuda.strips import lanes, load_row, strip_of


@triton.jit
def _merged_taps(alpha_ptr, stacked_ptr, n, c, branches, C: tl.constexpr, TAPS: tl.constexpr):
    """Return the merged kernel of each lane, TAPS numbers."""
    taps = ()
    for _ in tl.static_range(TAPS):
        taps += (tl.zeros_like(c).to(tl.float32),)
    alpha_ptrs = alpha_ptr + n.to(tl.int64) * branches * C + c
    stacked_ptrs = stacked_ptr + c  # pointers that advance, so that the taps are at constant distances
    for _ in range(branches):
        alpha = tl.load(alpha_ptrs, mask=c < C, other=0.0)
        updated = ()
        for t in tl.static_range(TAPS):
            tap = tl.load(stacked_ptrs + t * C, mask=c < C, other=0.0)
            updated += (taps[t] + alpha * tap,)
        taps = updated
        alpha_ptrs += C
        stacked_ptrs += TAPS * C
    return taps


@triton.jit
def mfdf_merged_kernel(
    x_ptr,
    alpha_ptr,
    stacked_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    branches,
    rows,
    across,
    strips,
    strips_per_program,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Convolve some strips of a sample by its merged kernel."""
    RADIUS: tl.constexpr = SIZE // 2
    TAPS: tl.constexpr = SIZE * SIZE
    NEXT: tl.constexpr = C if CHANNELS_LAST else 1  # distance between two columns
    n, c, place = lanes(C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    taps = _merged_taps(alpha_ptr, stacked_ptr, n, c, branches, C, TAPS)
    bias = tl.zeros_like(c).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n * C + c, mask=c < C, other=0.0)
    zeros = ()
    for _ in tl.static_range(SEGMENT):
        zeros += (tl.zeros_like(bias),)
    down = width * (SPACING * NEXT)

    begin_strip = tl.program_id(1) * strips_per_program
    for strip in tl.range(begin_strip, tl.minimum(begin_strip + strips_per_program, strips)):
        lattice_row, count, begin, end, column = strip_of(strip, place, height, rows, across, SPACING, SEGMENT, BLOCK_P)
        first = tl.maximum(begin - RADIUS, 0)
        last = tl.minimum(end + RADIUS, count)
        at = address(n, c, lattice_row + first * SPACING, column, height, width, C, CHANNELS_LAST)
        sums = ()  # for the rows from i - RADIUS to i + RADIUS
        for _ in tl.static_range(SIZE):
            sums += zeros
        for i in tl.range(first, last):
            row = load_row(
                x_ptr + at - RADIUS * SPACING * NEXT, column - RADIUS * SPACING, width, c < C, NEXT, SPACING,
                SEGMENT + SIZE - 1,
            )  # fmt: skip
            updated = ()
            for r in tl.static_range(SIZE):
                for s in tl.static_range(SEGMENT):
                    total = sums[r * SEGMENT + s]
                    for v in tl.static_range(SIZE):
                        total += taps[(SIZE - 1 - r) * SIZE + v] * row[s + v]
                    updated += (total,)
            for s in tl.static_range(SEGMENT):
                mask = (c < C) & (column + s * SPACING < width) & (i - RADIUS >= begin)
                tl.store(y_ptr + at - RADIUS * down + s * SPACING * NEXT, updated[s] + bias, mask=mask)
            sums = updated[SEGMENT:] + zeros
            at += down
        for r in tl.static_range(SIZE - 1):  # rows that the end of the map completed
            i = last - RADIUS + r
            for s in tl.static_range(SEGMENT):
                mask = (c < C) & (column + s * SPACING < width) & (i >= begin) & (i < end)
                tl.store(y_ptr + at + (r - RADIUS) * down + s * SPACING * NEXT, sums[r * SEGMENT + s] + bias, mask=mask)


@triton.jit
def mfdf_merged_loop_kernel(
    x_ptr,
    alpha_ptr,
    stacked_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    branches,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Convolve one tile of the positions tap by tap, for kernels too large for registers."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    inside = (p < height * width)[:, None] & (c < C)[None, :]
    row = p // width
    column = p % width
    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n * C + c, mask=c < C, other=0.0)[None, :]
    for t in range(SIZE * SIZE):
        tap = tl.zeros([BLOCK_C], tl.float32)
        for k in range(branches):
            alpha = tl.load(alpha_ptr + (n * branches + k) * C + c, mask=c < C, other=0.0)
            tap += alpha * tl.load(stacked_ptr + (k * (SIZE * SIZE) + t) * C + c, mask=c < C, other=0.0)
        i = row + (t // SIZE - SIZE // 2) * SPACING
        j = column + (t % SIZE - SIZE // 2) * SPACING
        mask = inside & ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
        at = address(n, c[None, :], i[:, None], j[:, None], height, width, C, CHANNELS_LAST)
        total += tap[None, :] * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = address(n, c[None, :], row[:, None], column[:, None], height, width, C, CHANNELS_LAST)
    tl.store(y_ptr + at, total, mask=inside)
