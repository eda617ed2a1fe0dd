"""The mean over all positions of a depthwise convolution, and its gradients."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.maps import STAGES, address, tile


@triton.jit
def _first_last_tap(position, length, SIZE: tl.constexpr, SPACING: tl.constexpr):
    """Return the first and the last tap along one side of a kernel that reach a position while its centre is inside."""
    RADIUS: tl.constexpr = SIZE // 2
    first = RADIUS - tl.minimum((length - 1 - position) // SPACING, RADIUS)
    return first, RADIUS + tl.minimum(position // SPACING, RADIUS)


@triton.jit
def _border_class(position, length, SIZE: tl.constexpr, SPACING: tl.constexpr):
    """Return the class of a position along one side of the map; without an interior, each position is its own class."""
    first, last = _first_last_tap(position, length, SIZE, SPACING)
    return tl.where(length > SPACING * (SIZE - 1), first + last - SIZE // 2, position)


@triton.jit
def _class_representative(border_class, length, SIZE: tl.constexpr, SPACING: tl.constexpr):
    """Return a position of that class."""
    mirrored = length - 1 - (SIZE - 1 - border_class) * SPACING
    position = tl.where(border_class <= SIZE // 2, border_class * SPACING, mirrored)
    return tl.where(length > SPACING * (SIZE - 1), position, border_class)


@triton.jit
def mfdf_coverage_kernel(
    kernel_ptr,
    table_ptr,
    height,
    width,
    columns,
    scale,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find `scale` times the coverage of one class; there are `columns` classes along the width."""
    row = _class_representative(tl.program_id(0) // columns, height, SIZE, SPACING)
    column = _class_representative(tl.program_id(0) % columns, width, SIZE, SPACING)
    top, bottom = _first_last_tap(row, height, SIZE, SPACING)
    left, right = _first_last_tap(column, width, SIZE, SPACING)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_TAPS, BLOCK_C], tl.float32)
    for start in range(0, SIZE * SIZE, BLOCK_TAPS):
        tap = start + tl.arange(0, BLOCK_TAPS)
        u = tap // SIZE
        v = tap % SIZE
        reaches = (u >= top) & (u <= bottom) & (v >= left) & (v <= right)
        mask = reaches[:, None] & (c < C)[None, :]
        total += tl.load(kernel_ptr + c[None, :] * (SIZE * SIZE) + tap[:, None], mask=mask, other=0.0)
    tl.store(table_ptr + tl.program_id(0) * C + c, scale * tl.sum(total, axis=0), mask=c < C)


@triton.jit
def _coverage_of(
    table_ptr, p, c, mask, height, width, columns, C: tl.constexpr, SIZE: tl.constexpr, SPACING: tl.constexpr
):
    """Return the coverage of positions p and channels c, [BLOCK_HW, BLOCK_C]."""
    row = _border_class(p // width, height, SIZE, SPACING)
    column = _border_class(p % width, width, SIZE, SPACING)
    return tl.load(table_ptr + (row * columns + column)[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def mfdf_mean_kernel(
    x_ptr,
    table_ptr,
    p_ptr,
    batch,
    height,
    width,
    hw_units,
    columns,
    chunk,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum x times its coverage over one chunk of the positions, for SAMPLES samples, which share the coverage."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS * SAMPLES
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    offsets = tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    sums = ()
    for _ in tl.static_range(SAMPLES):
        sums += (tl.zeros([BLOCK_HW, BLOCK_C], tl.float32),)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    for start in tl.range(begin, end, BLOCK_HW):
        p = start + tl.arange(0, BLOCK_HW)
        mask = (p < end)[:, None] & (c < C)[None, :]
        coverage = _coverage_of(table_ptr, p, c, mask, height, width, columns, C, SIZE, SPACING)
        updated = ()
        for s in tl.static_range(SAMPLES):
            at = address(n + s, first, 0, start, 1, hw, C, CHANNELS_LAST) + offsets
            x = tl.load(x_ptr + at, mask=mask & (n + s < batch), other=0.0).to(tl.float32)
            updated += (sums[s] + x * coverage,)
        sums = updated
    for s in tl.static_range(SAMPLES):
        out = ((n + s).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
        tl.store(p_ptr + out, tl.sum(sums[s], axis=0), mask=(c < C) & (n + s < batch))


@triton.jit
def mfdf_mean_backward_kernel(
    dp_ptr,
    x_ptr,
    table_ptr,
    dx_ptr,
    dcoverage_ptr,
    batch,
    height,
    width,
    hw_units,
    columns,
    samples,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find the gradient of x on one tile of the positions, and the sum of dp times x over `samples` samples.

    A pointer that is None leaves out what it would get.
    """
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    start = tl.program_id(0) // BLOCKS * BLOCK_HW
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    p = start + tl.arange(0, BLOCK_HW)
    c = first + tl.arange(0, BLOCK_C)
    mask = (p < hw)[:, None] & (c < C)[None, :]
    offsets = tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    coverage = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    if dx_ptr is not None:
        coverage = _coverage_of(table_ptr, p, c, mask, height, width, columns, C, SIZE, SPACING)
    dcoverage = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    part = tl.program_id(1)
    for s in tl.range(0, tl.minimum(batch - part * samples, samples), num_stages=STAGES):
        n = part * samples + s
        at = address(n, first, 0, start, 1, hw, C, CHANNELS_LAST) + offsets
        dp = tl.load(dp_ptr + n * C + c, mask=c < C, other=0.0)[None, :]
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dp * coverage, mask=mask)
        if dcoverage_ptr is not None:
            dcoverage += dp * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if dcoverage_ptr is not None:
        out = address(part, first, 0, start, 1, hw, C, CHANNELS_LAST)
        tl.store(dcoverage_ptr + out + offsets, dcoverage, mask=mask)


@triton.jit
def mfdf_window_kernel(
    in_ptr,
    out_ptr,
    length,
    groups,
    stride_ig,
    stride_ia,
    stride_il,
    stride_ic,
    stride_oa,
    stride_ot,
    stride_oc,
    scale,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find `scale` times the sum over the groups and over the positions of one line that one tap reaches."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // BLOCKS % SIZE
    line = tl.program_id(0) // (BLOCKS * SIZE)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    distance = (tap - SIZE // 2) * SPACING  # from the centre
    begin = tl.maximum(distance, 0)
    end = tl.minimum(length + distance, length)
    total = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    line_ptr = in_ptr + line.to(tl.int64) * stride_ia
    for _ in range(groups):
        for start in tl.range(begin, end, BLOCK_L):
            position = start + tl.arange(0, BLOCK_L)
            mask = (position < end)[:, None] & (c < C)[None, :]
            inner = position[:, None] * stride_il + c[None, :].to(tl.int64) * stride_ic  # [BLOCK_L, BLOCK_C]
            total += tl.load(line_ptr + inner, mask=mask, other=0.0)
        line_ptr += stride_ig
    out = line * stride_oa + tap * stride_ot + c * stride_oc
    tl.store(out_ptr + out, scale * tl.sum(total, axis=0), mask=c < C)
