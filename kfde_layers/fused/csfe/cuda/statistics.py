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
def add_to_moments(mean, mean_low, m2, x, mask, count):
    """Add x to the moments of each lane (Welford, 1962), which are then those of `count` elements.

    No sum of squares cancels. The mean has two parts, since rounding a large mean would lose more than the deviations
    are.
    """
    inverse_count = 1.0 / count
    u = tl.where(mask, (x - mean) - mean_low, 0.0)
    mean, mean_low = split(mean, mean_low + u * inverse_count)
    return mean, mean_low, m2 + u * u * (1.0 - inverse_count)


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
def merge_moments(mean, mean_low, m2, count, other_mean, other_mean_low, other_m2, other_count):
    """Return the moments of two sets together, of `count` and `other_count` elements; one of them may be empty."""
    share = count / (count + other_count)
    other_share = other_count / (count + other_count)
    first = share * mean + other_share * other_mean
    offset = (mean - first) + mean_low
    other_offset = (other_mean - first) + other_mean_low
    correction = share * offset + other_share * other_offset
    offset -= correction
    other_offset -= correction
    m2 += other_m2 + count * offset * offset + other_count * other_offset * other_offset
    merged, merged_low = split(first, correction)
    return merged, merged_low, m2


@triton.jit
def store_moments(mean_ptr, m2_ptr, mean, mean_low, m2, c, mask, C: tl.constexpr):
    """Store the moments of the channels `c` of one sample: mean and mean_low as (2, C), m2 as (C,)."""
    tl.store(mean_ptr + c, mean, mask=mask)
    tl.store(mean_ptr + C + c, mean_low, mask=mask)
    tl.store(m2_ptr + c, m2, mask=mask)


@triton.jit
def load_moments(mean_ptr, m2_ptr, c, mask, C: tl.constexpr):
    """Return mean, mean_low and m2 of the channels `c` of one sample."""
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    mean_low = tl.load(mean_ptr + C + c, mask=mask, other=0.0)
    return mean, mean_low, tl.load(m2_ptr + c, mask=mask, other=0.0)


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

    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    mean_low, m2, count = mean, mean, 0.0
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    for p in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        mask = (p + rows < end)[:, None] & (c < C)[None, :]
        at = address(n, first, 0, p, 1, hw, C, CHANNELS_LAST) + offsets
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        count += 1.0
        mean, mean_low, m2 = add_to_moments(mean, mean_low, m2, x, mask, count)

    counts = ((end - begin - rows + BLOCK_HW - 1) // BLOCK_HW).to(tl.float32)  # elements of each row
    mean, mean_low, m2 = combine_moments(mean, mean_low, m2, counts[:, None])  # [BLOCK_C]
    chunk_index = n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    store_moments(mean_ptr + 2 * chunk_index * C, m2_ptr + chunk_index * C, mean, mean_low, m2, c, c < C, C)
