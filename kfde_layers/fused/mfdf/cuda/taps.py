"""The gradients of the merged taps, of alpha and of the branches' kernels."""

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
def _sum_of_lanes(values, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sum over the lanes of each channel, [BLOCK_C]."""
    if BLOCK_P == 1:
        return values
    if CHANNELS_LAST:
        return tl.sum(tl.reshape(values, [BLOCK_P, BLOCK_C]), axis=0)
    return tl.sum(tl.reshape(values, [BLOCK_C, BLOCK_P]), axis=1)


@triton.jit
def mfdf_taps_kernel(
    dy_ptr,
    x_ptr,
    dtaps_ptr,
    sums_ptr,
    height,
    width,
    rows,
    across,
    strips,
    strips_per_program,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SIZE: tl.constexpr,
    SPACING: tl.constexpr,
    SIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find the gradient of SIDE x SIDE of a sample's merged taps, and the sum of dy, over some of its strips."""
    RADIUS: tl.constexpr = SIZE // 2
    NEXT: tl.constexpr = C if CHANNELS_LAST else 1  # distance between two columns
    SQUARES: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    n, c, place = lanes(C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    top = tl.program_id(2) // SQUARES * SIDE
    left = tl.program_id(2) % SQUARES * SIDE
    up = top - RADIUS  # the first of these taps multiplies the row of x that is so many lattice rows below that of dy
    down = width * (SPACING * NEXT)
    active = c < C

    zero = tl.zeros_like(c).to(tl.float32)
    total = zero
    dtaps = ()
    for _ in tl.static_range(SIDE * SIDE):
        dtaps += (zero,)
    begin_strip = tl.program_id(1) * strips_per_program
    for strip in tl.range(begin_strip, tl.minimum(begin_strip + strips_per_program, strips)):
        lattice_row, count, begin, end, column = strip_of(strip, place, height, rows, across, SPACING, SEGMENT, BLOCK_P)
        first = tl.maximum(begin + up, 0)
        last = tl.minimum(end + up + SIDE - 1, count)
        dy_at = address(n, c, lattice_row + (first - up) * SPACING, column, height, width, C, CHANNELS_LAST)
        x_column = column + (left - RADIUS) * SPACING
        x_at = address(n, c, lattice_row + first * SPACING, x_column, height, width, C, CHANNELS_LAST)
        dy_rows = ()  # the rows of dy from i - up - SIDE + 1 to i - up - 1
        for r in tl.static_range(SIDE - 1):
            o = first - up - SIDE + 1 + r
            part = (o >= begin) & (o < end)
            row = load_row(dy_ptr + dy_at + (r + 1 - SIDE) * down, column, width, active & part, NEXT, SPACING, SEGMENT)
            for s in tl.static_range(SEGMENT):
                total += row[s]
            dy_rows += row
        for i in tl.range(first, last):
            part = (i - up >= begin) & (i - up < end)
            row = load_row(dy_ptr + dy_at, column, width, active & part, NEXT, SPACING, SEGMENT)
            for s in tl.static_range(SEGMENT):
                total += row[s]
            all_rows = dy_rows + row
            x_row = load_row(x_ptr + x_at, x_column, width, active, NEXT, SPACING, SEGMENT + SIDE - 1)
            updated = ()
            for u in tl.static_range(SIDE):
                for v in tl.static_range(SIDE):
                    dtap = dtaps[u * SIDE + v]
                    for s in tl.static_range(SEGMENT):
                        dtap += all_rows[(SIDE - 1 - u) * SEGMENT + s] * x_row[s + v]
                    updated += (dtap,)
            dtaps = updated
            dy_rows = all_rows[SEGMENT:]
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
    # Only the programs that have the central tap are sure to read all of dy.
    central = (top <= RADIUS) & (top + SIDE > RADIUS) & (left == 0)
    tl.store(sums_ptr + out * C + c, _sum_of_lanes(total, CHANNELS_LAST, BLOCK_P, BLOCK_C), mask=(c < C) & central)


@triton.jit
def mfdf_contract_kernel(
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
    """Find out[a, k, c], the sum over b and part of dtaps[a, b, part, c] weight[k, b, c].

    Either a is the sample and b the tap, or the other way round.
    """
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
