"""MFDF without its branch maps: the mean of a depthwise convolution, and a convolution by merged kernels.

The mean needs no convolution: an element adds to it by the sum of the taps that meet it, its cover. Elements that the
same taps meet form a class, most of them that of the map's interior, and a small table holds the cover of each class.

A convolution with a step is one with neighbouring taps on each of step x step lattices. There a lane keeps the merged
taps of its channel in registers and walks down a strip of columns. A row is read once, and adds to all rows of the
result that it reaches: these wait in registers until they are complete. The gradient of the taps is found in the same
way, with the taps' sums and some rows of the other map in registers.

Arithmetic is in float32 and no sum depends on the order in which programs run. All kernels see dense maps in either
memory format.
"""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_STAGES = tl.constexpr(3)  # tiles on their way from memory while one is worked on, and that one


@triton.jit
def _element(n, c, row, column, height, width, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where an element of the map lies; this can pass 2^31."""
    if CHANNELS_LAST:
        return ((n.to(tl.int64) * height + row) * width + column) * C + c
    return ((n.to(tl.int64) * C + c) * height + row) * width + column


@triton.jit
def _meeting(at, length, SIZE: tl.constexpr, STEP: tl.constexpr):
    """The first and the last of the taps along one side of a kernel that meet position `at` from inside the map."""
    RADIUS: tl.constexpr = SIZE // 2
    return RADIUS - tl.minimum((length - 1 - at) // STEP, RADIUS), RADIUS + tl.minimum(at // STEP, RADIUS)


@triton.jit
def _class_of(at, length, SIZE: tl.constexpr, STEP: tl.constexpr):
    """The class of a position along one side of the map; on a map too small for an interior each is its own."""
    first, last = _meeting(at, length, SIZE, STEP)
    return tl.where(length > STEP * (SIZE - 1), first + last - SIZE // 2, at)


@triton.jit
def _member_of(kind, length, SIZE: tl.constexpr, STEP: tl.constexpr):
    """A position in that class."""
    mirrored = length - 1 - (SIZE - 1 - kind) * STEP
    at = tl.where(kind <= SIZE // 2, kind * STEP, mirrored)
    return tl.where(length > STEP * (SIZE - 1), at, kind)


@triton.jit
def _mfdf_cover_kernel(
    kernel_ptr,
    table_ptr,
    height,
    width,
    columns,
    scale,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`scale` times the sum of the taps that meet the elements of one class; `columns` classes along the width."""
    row = _member_of(tl.program_id(0) // columns, height, SIZE, STEP)
    column = _member_of(tl.program_id(0) % columns, width, SIZE, STEP)
    top, bottom = _meeting(row, height, SIZE, STEP)
    left, right = _meeting(column, width, SIZE, STEP)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_TAPS, BLOCK_C], tl.float32)
    for start in range(0, SIZE * SIZE, BLOCK_TAPS):
        tap = start + tl.arange(0, BLOCK_TAPS)
        u = tap // SIZE
        v = tap % SIZE
        meets = (u >= top) & (u <= bottom) & (v >= left) & (v <= right)
        mask = meets[:, None] & (c < C)[None, :]
        total += tl.load(kernel_ptr + c[None, :] * (SIZE * SIZE) + tap[:, None], mask=mask, other=0.0)
    tl.store(table_ptr + tl.program_id(0) * C + c, scale * tl.sum(total, axis=0), mask=c < C)


@triton.jit
def _cover_of(table_ptr, p, c, mask, height, width, columns, C: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
    """The cover of positions p and channels c, [BLOCK_HW, BLOCK_C]."""
    row = _class_of(p // width, height, SIZE, STEP)
    column = _class_of(p % width, width, SIZE, STEP)
    return tl.load(table_ptr + (row * columns + column)[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def _tile(hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets inside a tile, from its first element."""
    p = tl.arange(0, BLOCK_HW)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return p * C + c if CHANNELS_LAST else p + c * hw  # [BLOCK_HW, BLOCK_C]


@triton.jit
def _mfdf_pool_kernel(
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
    STEP: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of x times its cover over one chunk of the positions, for some samples, which share the cover."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS * SAMPLES
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    sums = ()
    for _ in tl.static_range(SAMPLES):
        sums += (tl.zeros([BLOCK_HW, BLOCK_C], tl.float32),)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    for start in tl.range(begin, end, BLOCK_HW):
        p = start + tl.arange(0, BLOCK_HW)
        mask = (p < end)[:, None] & (c < C)[None, :]
        cover = _cover_of(table_ptr, p, c, mask, height, width, columns, C, SIZE, STEP)
        grown = ()
        for s in tl.static_range(SAMPLES):
            at = _element(n + s, first, 0, start, 1, hw, C, CHANNELS_LAST) + tile
            x = tl.load(x_ptr + at, mask=mask & (n + s < batch), other=0.0).to(tl.float32)
            grown += (sums[s] + x * cover,)
        sums = grown
    for s in tl.static_range(SAMPLES):
        out = ((n + s).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
        tl.store(p_ptr + out, tl.sum(sums[s], axis=0), mask=(c < C) & (n + s < batch))


@triton.jit
def _mfdf_pool_backward_kernel(
    dp_ptr,
    x_ptr,
    table_ptr,
    dx_ptr,
    dcover_ptr,
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
    STEP: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of x on one tile of the positions, sample by sample, and the sum over these of dp times x."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    start = tl.program_id(0) // BLOCKS * BLOCK_HW
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    p = start + tl.arange(0, BLOCK_HW)
    c = first + tl.arange(0, BLOCK_C)
    mask = (p < hw)[:, None] & (c < C)[None, :]
    cover = _cover_of(table_ptr, p, c, mask, height, width, columns, C, SIZE, STEP)
    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    dcover = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    part = tl.program_id(1)
    for s in tl.range(0, tl.minimum(batch - part * samples, samples), num_stages=_STAGES):
        n = part * samples + s
        at = _element(n, first, 0, start, 1, hw, C, CHANNELS_LAST) + tile
        dp = tl.load(dp_ptr + n * C + c, mask=c < C, other=0.0)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dp * cover, mask=mask)
        dcover += dp * x
    tl.store(dcover_ptr + _element(part, first, 0, start, 1, hw, C, CHANNELS_LAST) + tile, dcover, mask=mask)


@triton.jit
def _mfdf_window_kernel(
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
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`scale` times the sum over the groups and over the positions of one line that one tap meets."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // BLOCKS % SIZE
    line = tl.program_id(0) // (BLOCKS * SIZE)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = (tap - SIZE // 2) * STEP
    begin = tl.maximum(offset, 0)
    end = tl.minimum(length + offset, length)
    total = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    line_ptr = in_ptr + line.to(tl.int64) * stride_ia
    for _ in range(groups):
        for start in tl.range(begin, end, BLOCK_L):
            at = start + tl.arange(0, BLOCK_L)
            mask = (at < end)[:, None] & (c < C)[None, :]
            inner = at[:, None] * stride_il + c[None, :].to(tl.int64) * stride_ic  # [BLOCK_L, BLOCK_C]
            total += tl.load(line_ptr + inner, mask=mask, other=0.0)
        line_ptr += stride_ig
    out = line * stride_oa + tap * stride_ot + c * stride_oc
    tl.store(out_ptr + out, scale * tl.sum(total, axis=0), mask=c < C)


@triton.jit
def _lanes(C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, channels and places in the strip of the lanes, which are one to a thread; neighbours in memory order."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    lane = tl.arange(0, BLOCK_P * BLOCK_C)
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    if CHANNELS_LAST:
        return n, first + lane % BLOCK_C, lane // BLOCK_C
    return n, first + lane // BLOCK_P, lane % BLOCK_P


@triton.jit
def _strip(strip, place, height, rows, across, STEP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where a strip lies: the offset of its lattice's rows, their number, its part of them, each lane's first column.

    There are `across` strips side by side, of `rows` rows of the lattice; a lane has every STEP-th of its columns.
    """
    offset = strip // across % STEP
    begin = strip // (across * STEP) * rows
    count = (height - offset + STEP - 1) // STEP
    q = strip % across * BLOCK_P + place
    return offset, count, begin, tl.minimum(begin + rows, count), q % STEP + q // STEP * (SEGMENT * STEP)


@triton.jit
def _load_row(ptr, column, width, live, stride, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT numbers, STEP columns apart, that begin at `column` and `ptr`; zeros outside the map and if not `live`."""
    row = ()
    for j in tl.static_range(COUNT):
        inside = (column + j * STEP >= 0) & (column + j * STEP < width)
        row += (tl.load(ptr + j * STEP * stride, mask=live & inside, other=0.0).to(tl.float32),)
    return row


@triton.jit
def _merged_taps(alpha_ptr, grid_ptr, n, c, branches, C: tl.constexpr, TAPS: tl.constexpr):
    """The merged kernel of each lane, TAPS numbers."""
    taps = ()
    for _ in tl.static_range(TAPS):
        taps += (tl.zeros_like(c).to(tl.float32),)
    alpha_ptrs = alpha_ptr + n.to(tl.int64) * branches * C + c
    grid_ptrs = grid_ptr + c  # pointers that move on, so that the taps lie at constant distances
    for _ in range(branches):
        alpha = tl.load(alpha_ptrs, mask=c < C, other=0.0)
        grown = ()
        for t in tl.static_range(TAPS):
            tap = tl.load(grid_ptrs + t * C, mask=c < C, other=0.0)
            grown += (taps[t] + alpha * tap,)
        taps = grown
        alpha_ptrs += C
        grid_ptrs += TAPS * C
    return taps


@triton.jit
def _mfdf_merged_kernel(
    x_ptr,
    alpha_ptr,
    grid_ptr,
    shifts_ptr,
    y_ptr,
    height,
    width,
    branches,
    rows,
    across,
    strips,
    share,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Convolve some strips of a sample by its merged kernel."""
    RADIUS: tl.constexpr = SIZE // 2
    TAPS: tl.constexpr = SIZE * SIZE
    NEXT: tl.constexpr = C if CHANNELS_LAST else 1  # from one column to the next
    n, c, place = _lanes(C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    taps = _merged_taps(alpha_ptr, grid_ptr, n, c, branches, C, TAPS)
    shift = tl.zeros_like(c).to(tl.float32)
    if shifts_ptr is not None:
        shift = tl.load(shifts_ptr + n * C + c, mask=c < C, other=0.0)
    zeros = ()
    for _ in tl.static_range(SEGMENT):
        zeros += (tl.zeros_like(shift),)
    down = width * (STEP * NEXT)

    begin_strip = tl.program_id(1) * share
    for strip in tl.range(begin_strip, tl.minimum(begin_strip + share, strips)):
        offset, count, begin, end, column = _strip(strip, place, height, rows, across, STEP, SEGMENT, BLOCK_P)
        first = tl.maximum(begin - RADIUS, 0)
        last = tl.minimum(end + RADIUS, count)
        at = _element(n, c, offset + first * STEP, column, height, width, C, CHANNELS_LAST)
        sums = ()  # of the rows from i - RADIUS to i + RADIUS
        for _ in tl.static_range(SIZE):
            sums += zeros
        for i in tl.range(first, last):
            row = _load_row(
                x_ptr + at - RADIUS * STEP * NEXT, column - RADIUS * STEP, width, c < C, NEXT, STEP, SEGMENT + SIZE - 1
            )
            grown = ()
            for r in tl.static_range(SIZE):
                for s in tl.static_range(SEGMENT):
                    total = sums[r * SEGMENT + s]
                    for v in tl.static_range(SIZE):
                        total += taps[(SIZE - 1 - r) * SIZE + v] * row[s + v]
                    grown += (total,)
            for s in tl.static_range(SEGMENT):
                mask = (c < C) & (column + s * STEP < width) & (i - RADIUS >= begin)
                tl.store(y_ptr + at - RADIUS * down + s * STEP * NEXT, grown[s] + shift, mask=mask)
            sums = grown[SEGMENT:] + zeros
            at += down
        for r in tl.static_range(SIZE - 1):  # rows that the end of the map completed
            i = last - RADIUS + r
            for s in tl.static_range(SEGMENT):
                mask = (c < C) & (column + s * STEP < width) & (i >= begin) & (i < end)
                tl.store(y_ptr + at + (r - RADIUS) * down + s * STEP * NEXT, sums[r * SEGMENT + s] + shift, mask=mask)


@triton.jit
def _mfdf_merged_loop_kernel(
    x_ptr,
    alpha_ptr,
    grid_ptr,
    shifts_ptr,
    y_ptr,
    height,
    width,
    branches,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same for kernels too large to be kept in registers: tap by tap, on one tile of the positions."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    inside = (p < height * width)[:, None] & (c < C)[None, :]
    row = p // width
    column = p % width
    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    if shifts_ptr is not None:
        total += tl.load(shifts_ptr + n * C + c, mask=c < C, other=0.0)[None, :]
    for t in range(SIZE * SIZE):
        tap = tl.zeros([BLOCK_C], tl.float32)
        for k in range(branches):
            alpha = tl.load(alpha_ptr + (n * branches + k) * C + c, mask=c < C, other=0.0)
            tap += alpha * tl.load(grid_ptr + (k * (SIZE * SIZE) + t) * C + c, mask=c < C, other=0.0)
        i = row + (t // SIZE - SIZE // 2) * STEP
        j = column + (t % SIZE - SIZE // 2) * STEP
        mask = inside & ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
        at = _element(n, c[None, :], i[:, None], j[:, None], height, width, C, CHANNELS_LAST)
        total += tap[None, :] * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = _element(n, c[None, :], row[:, None], column[:, None], height, width, C, CHANNELS_LAST)
    tl.store(y_ptr + at, total, mask=inside)


@triton.jit
def _sum_of_lanes(values, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum over the lanes of each channel, [BLOCK_C]."""
    if BLOCK_P == 1:
        return values
    if CHANNELS_LAST:
        return tl.sum(tl.reshape(values, [BLOCK_P, BLOCK_C]), axis=0)
    return tl.sum(tl.reshape(values, [BLOCK_C, BLOCK_P]), axis=1)


@triton.jit
def _mfdf_taps_kernel(
    dy_ptr,
    x_ptr,
    dtaps_ptr,
    sums_ptr,
    height,
    width,
    rows,
    across,
    strips,
    share,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    SIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of SIDE x SIDE of a sample's merged taps, and the sum of dy, over some of its strips."""
    RADIUS: tl.constexpr = SIZE // 2
    NEXT: tl.constexpr = C if CHANNELS_LAST else 1  # from one column to the next
    SQUARES: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    n, c, place = _lanes(C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    top = tl.program_id(2) // SQUARES * SIDE
    left = tl.program_id(2) % SQUARES * SIDE
    up = top - RADIUS  # x, when it meets the first of these taps, lies so far below dy, in rows of the lattice
    down = width * (STEP * NEXT)
    live = c < C

    zero = tl.zeros_like(c).to(tl.float32)
    total = zero
    dtaps = ()
    for _ in tl.static_range(SIDE * SIDE):
        dtaps += (zero,)
    begin_strip = tl.program_id(1) * share
    for strip in tl.range(begin_strip, tl.minimum(begin_strip + share, strips)):
        offset, count, begin, end, column = _strip(strip, place, height, rows, across, STEP, SEGMENT, BLOCK_P)
        first = tl.maximum(begin + up, 0)
        last = tl.minimum(end + up + SIDE - 1, count)
        dy_at = _element(n, c, offset + (first - up) * STEP, column, height, width, C, CHANNELS_LAST)
        x_column = column + (left - RADIUS) * STEP
        x_at = _element(n, c, offset + first * STEP, x_column, height, width, C, CHANNELS_LAST)
        held = ()  # of dy the rows from i - up - SIDE + 1 to i - up
        for r in tl.static_range(SIDE - 1):
            o = first - up - SIDE + 1 + r
            part = (o >= begin) & (o < end)
            row = _load_row(dy_ptr + dy_at + (r + 1 - SIDE) * down, column, width, live & part, NEXT, STEP, SEGMENT)
            for s in tl.static_range(SEGMENT):
                total += row[s]
            held += row
        for i in tl.range(first, last):
            part = (i - up >= begin) & (i - up < end)
            row = _load_row(dy_ptr + dy_at, column, width, live & part, NEXT, STEP, SEGMENT)
            for s in tl.static_range(SEGMENT):
                total += row[s]
            filled = held + row
            met = _load_row(x_ptr + x_at, x_column, width, live, NEXT, STEP, SEGMENT + SIDE - 1)
            grown = ()
            for u in tl.static_range(SIDE):
                for v in tl.static_range(SIDE):
                    dtap = dtaps[u * SIDE + v]
                    for s in tl.static_range(SEGMENT):
                        dtap += filled[(SIDE - 1 - u) * SEGMENT + s] * met[s + v]
                    grown += (dtap,)
            dtaps = grown
            held = filled[SEGMENT:]
            dy_at += down
            x_at += down

    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    out = n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for u in tl.static_range(SIDE):
        for v in tl.static_range(SIDE):
            dtap = _sum_of_lanes(dtaps[u * SIDE + v], CHANNELS_LAST, BLOCK_P, BLOCK_C)
            mask = (c < C) & (top + u < SIZE) & (left + v < SIZE)
            tl.store(dtaps_ptr + (out * (SIZE * SIZE) + (top + u) * SIZE + left + v) * C + c, dtap, mask=mask)
    # Only those that have the central tap are sure to see all of dy.
    central = (top <= RADIUS) & (top + SIDE > RADIUS) & (left == 0)
    tl.store(sums_ptr + out * C + c, _sum_of_lanes(total, CHANNELS_LAST, BLOCK_P, BLOCK_C), mask=(c < C) & central)


@triton.jit
def _mfdf_contract_kernel(
    dtaps_ptr,
    weight_ptr,
    out_ptr,
    count,
    parts,
    stride_da,
    stride_db,
    stride_dp,
    stride_wk,
    stride_wb,
    stride_oa,
    stride_ok,
    stride_oc,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[a, k, c] = sum over b and parts of dtaps[a, b, part, c] weight[k, b, c]; a and b are sample and tap."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    a = (tl.program_id(0) // BLOCKS).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        mask = (b < count)[:, None] & (c < C)[None, :]
        dtap = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for part in range(parts):
            at = b.to(tl.int64) * stride_db + part * stride_dp
            dtap += tl.load(dtaps_ptr + a * stride_da + at[:, None] + c[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_ptr + k * stride_wk + b[:, None] * stride_wb + c[None, :], mask=mask, other=0.0)
        total += dtap * weight
    out = a * stride_oa + k * stride_ok + c * stride_oc
    tl.store(out_ptr + out, tl.sum(total, axis=0), mask=c < C)


_WARPS = 4
_THREADS = 32 * _WARPS
_VECTOR, _SECTOR, _LINE = 16, 32, 128  # bytes: the widest load of a thread, what memory moves at least, a cache line
_FILL = 1024  # programs of _THREADS: enough to occupy a large GPU
_BLOCK = 1024  # elements of a block of per-channel values
_UNROLLED = 7  # side of the largest square of taps that is kept in registers
_SEGMENT = 4  # columns of a lane's strip: more of them share more loads and need more registers
_SAMPLES = 8  # least number of samples that share what is written once for all of them
_SCRATCH = 2**22  # elements: what the gradient of the taps may take, if the map is not larger


class _Tiling(NamedTuple):
    """How a kernel cuts a map: into tiles, and the positions into chunks of tiles, one chunk per program."""

    block_hw: int
    block_c: int
    chunk: int
    chunks: int
    samples: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_HW": self.block_hw, "BLOCK_C": self.block_c, "num_warps": _WARPS}


@lru_cache(maxsize=1024)
def _tiling(batch: int, channels: int, hw: int, channels_last: bool, itemsize: int) -> _Tiling:
    """Cut a map whose elements are read once: as wide as loads can be."""
    elements = _VECTOR // itemsize if channels_last else 4
    size = elements * _THREADS
    if channels_last:
        block_c = _width(channels, itemsize, _LINE // itemsize)
        block_hw = min(size // block_c, triton.next_power_of_2(hw))
    else:
        block_hw = min(32 * elements, triton.next_power_of_2(hw))  # a warp to each channel
        block_c = min(size // block_hw, triton.next_power_of_2(channels), 32)
    tiles, blocks = triton.cdiv(hw, block_hw), triton.cdiv(channels, block_c)
    most = max(tiles // 4, 1)  # chunks of fewer tiles leave much to put together
    samples = 4 if triton.cdiv(batch, 4) * blocks * most >= _FILL // 2 else 1
    chunks = min(most, max(_FILL // (triton.cdiv(batch, samples) * blocks), 1))
    chunk = triton.cdiv(tiles, chunks) * block_hw
    return _Tiling(block_hw, block_c, chunk, triton.cdiv(hw, chunk), samples)


def _width(channels: int, itemsize: int, widest: int) -> int:
    """The widest of the blocks of neighbouring channels that waste the fewest lanes on channels that are not there."""
    widths = [width for width in (64, 32, 16, 8) if width * itemsize >= _SECTOR and width <= widest]
    return min(widths, key=lambda width: triton.cdiv(channels, width) * width)


class _Strips(NamedTuple):
    """How the lattices of a map are cut into strips, of which each program takes a share."""

    segment: int
    block_p: int
    block_c: int
    rows: int
    across: int
    strips: int
    share: int

    def parts(self) -> int:
        return triton.cdiv(self.strips, self.share)

    def arguments(self) -> dict[str, int]:
        names = ("rows", "across", "strips", "share")
        return {name: value for name, value in self._asdict().items() if name in names}

    def options(self) -> dict[str, int]:
        warps = max(self.block_p * self.block_c // 32, 1)
        sizes = {"SEGMENT": self.segment, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c}
        return {**sizes, "num_warps": warps}


@lru_cache(maxsize=1024)
def _strips(
    batch: int, channels: int, height: int, width: int, channels_last: bool, itemsize: int, step: int,
    neighbours: int, warps: int, least: int,
) -> _Strips:  # fmt: skip
    """Cut the lattices of a map.

    Args:
        batch: N.
        channels: C.
        height: H.
        width: W.
        channels_last: Whether channels lie next to each other, rather than positions.
        itemsize: Bytes of an element.
        step: Spacing of the taps in px.
        neighbours: Strips of lanes that a program has side by side if channels lie next to each other; their common
            columns are then in the nearest cache, but they end in different warps.
        warps: Wanted number of warps, in all.
        least: Number of rows below which no strip is cut.
    """
    columns = triton.cdiv(width, step)
    segment = min(_SEGMENT, triton.next_power_of_2(columns))
    places = step * triton.cdiv(columns, segment)
    if channels_last:
        block_c = min(_width(channels, itemsize, 32), 32)
        counts = [count for count in (4, 2, 1) if count <= neighbours]
    else:
        most = triton.next_power_of_2(places)
        counts = [count for count in (16, 8, 4) if count <= most] or [most]
        block_c = 0
    block_p = min(counts, key=lambda count: triton.cdiv(places, count) * count)
    if not channels_last:
        block_c = min(64 // block_p, triton.next_power_of_2(channels))
    across = triton.cdiv(places, block_p)
    there = max(batch * triton.cdiv(channels, block_c) * block_p * block_c // 32, 1)  # warps, if each had all strips
    rows = triton.cdiv(height, step)
    # Strips are cut where there are few, since each part of one reads rows of its neighbours once more.
    cuts = min(_FILL // (there * across * step), rows // least)
    rows = triton.cdiv(rows, max(cuts, 1))
    strips = across * step * triton.cdiv(triton.cdiv(height, step), rows)
    share = strips // max(warps // there, 1)
    return _Strips(segment, block_p, block_c, rows, across, strips, max(share, 1))


def launch_pool(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    """The mean over all positions of x convolved with `kernel` (C, k, k), whose taps are `step` px apart: (N, C)."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return kernel.new_zeros((batch, channels))
    sizes = _sizes(x, channels_last)
    tiling = _tiling(batch, channels, height * width, channels_last, x.element_size())
    p = kernel.new_empty((batch, tiling.chunks, channels))
    with torch.cuda.device_of(x):
        table, columns = _cover(kernel, step, height, width)
        blocks = triton.cdiv(channels, tiling.block_c)
        _mfdf_pool_kernel[(triton.cdiv(batch, tiling.samples) * blocks, tiling.chunks)](
            x, table, p, batch, height, width, height * width // sizes["HW_UNIT"], columns, tiling.chunk,
            **sizes, SIZE=kernel.shape[-1], STEP=step, SAMPLES=tiling.samples, **tiling.options(),
        )  # fmt: skip
        return p.sum(1) if tiling.chunks > 1 else p[:, 0]


def launch_pool_backward(dp: Tensor, x: Tensor, kernel: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Gradients of what `launch_pool` computes: that of `x`, in its dtype and memory format, and that of `kernel`."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, kernel.new_zeros(kernel.shape)
    sizes = _sizes(x, channels_last)
    hw, size, itemsize = height * width, kernel.shape[-1], x.element_size()
    tiling = _tiling(batch, channels, hw, channels_last, itemsize)
    tiles = triton.cdiv(hw, tiling.block_hw) * triton.cdiv(channels, tiling.block_c)
    # Each part of the samples makes a map of its own, hence not too many parts.
    parts = max(min(_FILL // tiles, batch // _SAMPLES), 1)
    samples = triton.cdiv(batch, parts)
    parts = triton.cdiv(batch, samples)
    dcover = kernel.new_empty((parts, channels * hw))
    with torch.cuda.device_of(x):
        table, columns = _cover(kernel, step, height, width)
        _mfdf_pool_backward_kernel[(tiles, parts)](
            dp.contiguous(), x, table, dx, dcover, batch, height, width, hw // sizes["HW_UNIT"], columns, samples,
            **sizes, SIZE=size, STEP=step, **tiling.options(),
        )  # fmt: skip
        block_c = min(triton.next_power_of_2(channels), 32)
        blocks = triton.cdiv(channels, block_c)
        constants = {"C": channels, "SIZE": size, "STEP": step, "BLOCK_C": block_c, "num_warps": _WARPS}
        strides = (width * channels, channels, 1) if channels_last else (width, 1, hw)
        # First along the width, from the map of each part to (height, k, channels), then along the height.
        lines = kernel.new_empty((height, size, channels))
        _mfdf_window_kernel[(height * size * blocks,)](
            dcover, lines, width, parts, channels * hw, *strides, size * channels, channels, 1, 1.0,
            **constants, BLOCK_L=_rows(width, block_c),
        )  # fmt: skip
        dkernel = kernel.new_empty(kernel.shape)
        _mfdf_window_kernel[(size * size * blocks,)](
            lines, dkernel, height, 1, 0, channels, size * channels, 1, 1, size, size * size, 1 / hw,
            **constants, BLOCK_L=_rows(height, block_c),
        )  # fmt: skip
    return dx, dkernel


def launch_merged(x: Tensor, alpha: Tensor, grid: Tensor, shifts: Tensor, step: int) -> Tensor:
    """Convolve each sample by its own kernels sum_k alpha_nkc grid_kc, whose taps are `step` px apart, and shift it.

    Args:
        x: (N, C, H, W), dense in either memory format.
        alpha: (N, K, C).
        grid: (K, C, k, k) with k odd.
        shifts: (N, C).
        step: Spacing of the taps in px.

    Returns:
        The result in dtype and memory format of `x`.
    """
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _convolve(x, alpha.contiguous(), _taps_first(grid), shifts.contiguous(), y, step)
    return y


def launch_merged_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, grid: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what `launch_merged` computes: of `x`, in its dtype and memory format, `alpha`, `grid`, `shifts`.

    The gradient of the merged taps is written to memory for some samples at a time: that of `alpha` sums it over the
    taps and that of `grid` over the samples, and no program has both.
    """
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    branches, size = grid.shape[0], grid.shape[-1]
    dx, dalpha, dgrid = torch.empty_like(x), alpha.new_empty(alpha.shape), grid.new_zeros(grid.shape)
    dshifts = alpha.new_empty((batch, channels))
    if x.numel() == 0:
        return dx, dalpha, dgrid, dshifts
    alpha, taps = alpha.contiguous(), _taps_first(grid)
    squares = triton.cdiv(size, _UNROLLED)
    side = triton.cdiv(size, squares)
    cut = _strips(
        batch, channels, height, width, channels_last, x.element_size(), step,
        neighbours=1, warps=_FILL, least=4 * side,
    )  # fmt: skip
    parts = cut.parts()
    chunks = triton.cdiv(batch * parts * channels * size * size, max(x.numel(), _SCRATCH))
    samples = triton.cdiv(batch, chunks)
    block_c = min(triton.next_power_of_2(channels), 32)
    blocks = triton.cdiv(channels, block_c)
    options = {"C": channels, "BLOCK_C": block_c, "num_warps": _WARPS}
    with torch.cuda.device_of(x):
        _convolve(dy, alpha, taps.flip(1), None, dx, step)
        for start in range(0, batch, samples):
            some = slice(start, start + samples)
            count = len(alpha[some])
            dtaps = alpha.new_empty((count, parts, size * size, channels))
            sums = alpha.new_empty((count, parts, channels))
            _mfdf_taps_kernel[(count * triton.cdiv(channels, cut.block_c), parts, squares * squares)](
                dy[some], x[some], dtaps, sums, height, width,
                **cut.arguments(), C=channels, CHANNELS_LAST=channels_last, SIZE=size, STEP=step, SIDE=side,
                **cut.options(),
            )  # fmt: skip
            torch.sum(sums, 1, out=dshifts[some])
            per_sample, per_part, per_tap = dtaps.stride()[:3]
            _mfdf_contract_kernel[(count * blocks, branches)](
                dtaps, taps, dalpha[some], size * size, parts, per_sample, per_tap, per_part,
                taps.stride(0), channels, branches * channels, channels, 1,
                **options, BLOCK_B=_rows(size * size, block_c),
            )  # fmt: skip
            share = torch.empty_like(dgrid)
            _mfdf_contract_kernel[(size * size * blocks, branches)](
                dtaps, alpha[some], share, count, parts, per_tap, per_sample, per_part,
                channels, branches * channels, 1, dgrid.stride(0), size * size,
                **options, BLOCK_B=_rows(count, block_c),
            )  # fmt: skip
            dgrid += share
    return dx, dalpha, dgrid, dshifts


def _convolve(x: Tensor, alpha: Tensor, taps: Tensor, shifts: Tensor | None, y: Tensor, step: int) -> None:
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    branches, size = taps.shape[0], math.isqrt(taps.shape[1])
    constants = {"C": channels, "CHANNELS_LAST": channels_last, "SIZE": size, "STEP": step}
    if size <= _UNROLLED:
        cut = _strips(
            batch, channels, height, width, channels_last, x.element_size(), step,
            neighbours=4, warps=4 * _FILL, least=size,
        )  # fmt: skip
        _mfdf_merged_kernel[(batch * triton.cdiv(channels, cut.block_c), cut.parts())](
            x, alpha, taps, shifts, y, height, width, branches, **cut.arguments(), **constants, **cut.options()
        )
    else:
        tiling = _tiling(batch, channels, height * width, channels_last, x.element_size())
        blocks = batch * triton.cdiv(channels, tiling.block_c)
        _mfdf_merged_loop_kernel[(blocks, triton.cdiv(height * width, tiling.block_hw))](
            x, alpha, taps, shifts, y, height, width, branches, **constants, **tiling.options()
        )


def _taps_first(grid: Tensor) -> Tensor:
    """The branches' kernels as (K, k * k, C), so that lanes with neighbouring channels read neighbours."""
    return grid.flatten(2).transpose(1, 2).contiguous()


def _cover(kernel: Tensor, step: int, height: int, width: int) -> tuple[Tensor, int]:
    """The cover of the classes of positions over the number of positions, and the number of classes along the width."""
    channels, size = kernel.shape[:2]
    rows, columns = (size if length > step * (size - 1) else length for length in (height, width))
    table = kernel.new_empty((rows * columns, channels))
    block_c = min(triton.next_power_of_2(channels), 32)
    _mfdf_cover_kernel[(rows * columns, triton.cdiv(channels, block_c))](
        kernel.contiguous(), table, height, width, columns, 1 / (height * width),
        C=channels, SIZE=size, STEP=step, BLOCK_TAPS=_rows(size * size, block_c), BLOCK_C=block_c, num_warps=_WARPS,
    )  # fmt: skip
    return table, columns


def _rows(count: int, block_c: int) -> int:
    """Rows of a block of values of `block_c` channels each."""
    return min(triton.next_power_of_2(count), max(_BLOCK // block_c, 1))


def _sizes(x: Tensor, channels_last: bool) -> dict[str, int]:
    _, channels, height, width = x.shape
    return {"C": channels, "HW_UNIT": math.gcd(height * width, _VECTOR), "CHANNELS_LAST": channels_last}
