"""Mean and sum of squared deviations of every channel, in one pass over the map."""

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
def split(mean, mean_low):
    """Return a mean in two parts, the first of which is the rounded mean; it must be larger than `mean_low`."""
    rounded = mean + mean_low
    return rounded, mean_low - (rounded - mean)


@triton.jit
def combine_moments(mean, mean_low, m2, count):
    """Return the moments of all rows together, each of `count` elements (Chan et al., 1979)."""
    total = tl.sum(count, axis=0)
    first = tl.sum(mean * count, axis=0) / total
    mean_offset = (mean - first[None, :]) + mean_low
    correction = tl.sum(mean_offset * count, axis=0) / total
    mean_offset -= correction[None, :]
    combined, combined_low = split(first, correction)
    return combined, combined_low, tl.sum(m2 + count * mean_offset * mean_offset, axis=0)


@triton.jit
def store_moments(mean_ptr, m2_ptr, mean, mean_low, m2, c, C: tl.constexpr):
    """Store the moments of the channels `c` of one sample: mean and mean_low as (2, C), m2 as (C,)."""
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(mean_ptr + C + c, mean_low, mask=c < C)
    tl.store(m2_ptr + c, m2, mask=c < C)


@triton.jit
def csfe_statistics_kernel(
    x_ptr,
    mean_ptr,
    m2_ptr,
    hw_units,
    chunk,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find mean and sum of squared deviations of every channel over one chunk of the positions."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    offsets = tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)

    # Every lane of the tile updates the moments of its own elements (Welford), so that no sum of squares cancels. Its
    # mean has two parts, since rounding a large mean would lose more than the deviations are.
    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    mean_low = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    count = 0.0
    for p in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        mask = (p + rows < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + address(n, first, 0, p, 1, hw, C, CHANNELS_LAST) + offsets, mask=mask, other=0.0).to(
            tl.float32
        )
        count += 1.0
        inverse_count = 1.0 / count
        u = tl.where(mask, (x - mean) - mean_low, 0.0)
        mean, mean_low = split(mean, mean_low + u * inverse_count)
        m2 += u * u * (1.0 - inverse_count)

    count = ((end - begin - rows + BLOCK_HW - 1) // BLOCK_HW).to(tl.float32)  # elements of each row
    mean, mean_low, m2 = combine_moments(mean, mean_low, m2, count[:, None])  # [BLOCK_C]
    chunk_index = n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    store_moments(mean_ptr + 2 * chunk_index * C, m2_ptr + chunk_index * C, mean, mean_low, m2, c, C)


@triton.jit
def csfe_combine_kernel(
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    m2_ptr,
    hw,
    chunk,
    parts,
    C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find the moments of all positions from those of the chunks."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & (c < C)[None, :]
    row = (n * parts + part[:, None]) * C  # [BLOCK_PARTS, 1]
    mean = tl.load(part_mean_ptr + 2 * row + c[None, :], mask=mask, other=0.0)
    mean_low = tl.load(part_mean_ptr + 2 * row + C + c[None, :], mask=mask, other=0.0)
    m2 = tl.load(part_m2_ptr + row + c[None, :], mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(hw - part * chunk, chunk), 0).to(tl.float32)
    mean, mean_low, m2 = combine_moments(mean, mean_low, m2, count[:, None])
    store_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, mean, mean_low, m2, c, C)
