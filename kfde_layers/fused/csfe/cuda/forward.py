"""Apply the gates: the second pass of the forward direction."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.gates import load_coefficients, results
from kfde_layers.fused.maps import STAGES, address, tile


@triton.jit
def csfe_forward_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    coefficients_ptr,
    hw_units,
    chunk,
    open_below,
    sfe_exponent,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WITH_CFE: tl.constexpr,
    WITH_SFE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Apply the gates to one chunk of a block of channels and of the block that it exchanges with."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    # In reverse order, since the elements that the statistics read last are still in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    n = block // BLOCKS
    first = block % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    half1 = load_coefficients(mean_ptr, coefficients_ptr, n, c, c < HALF, C)
    half2 = load_coefficients(mean_ptr, coefficients_ptr, n, c + HALF, c + HALF < C, C)

    offsets = tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)
    begin = part * chunk
    end = tl.minimum(begin + chunk, hw)
    for p in tl.range(begin, end, BLOCK_HW, num_stages=STAGES):
        mask1 = (p + rows < end)[:, None] & (c < HALF)[None, :]
        mask2 = (p + rows < end)[:, None] & (c + HALF < C)[None, :]
        at1 = address(n, first, 0, p, 1, hw, C, CHANNELS_LAST) + offsets
        at2 = address(n, first + HALF, 0, p, 1, hw, C, CHANNELS_LAST) + offsets
        x1 = tl.load(x_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        y1, y2 = results(half1, half2, x1, x2, open_below, sfe_exponent, WITH_CFE, WITH_SFE, SCALE)
        tl.store(y_ptr + at1, y1, mask=mask1)
        tl.store(y_ptr + at2, y2, mask=mask2)
