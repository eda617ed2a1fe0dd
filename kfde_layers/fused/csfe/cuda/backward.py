"""The gradient of the map: the second pass of the backward direction."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.gates import LN_2, gates, load_coefficients
from kfde_layers.fused.maps import STAGES, address, tile


@triton.jit
def _load_moment_gradients(moment_gradients_ptr, n, c, mask, C: tl.constexpr):
    """Return u_slope and constant of each channel: the moments add u_slope * u + constant to the gradient of x."""
    moment_gradients_ptr += n.to(tl.int64) * (2 * C) + c
    return tl.load(moment_gradients_ptr, mask=mask, other=0.0), tl.load(moment_gradients_ptr + C, mask=mask, other=0.0)


@triton.jit
def input_gradient(
    half, u_slope, constant, x, dy, dy_partner, open_below, sfe_exponent, WITH_CFE: tl.constexpr, WITH_SFE: tl.constexpr
):
    """Return the gradient of x from those of its own result and of the result that it is exchanged into."""
    u, su, keep, weak, sfe_gate = gates(half, x, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
    dx = dy * keep + (u_slope[None, :] * u + constant[None, :])
    if WITH_CFE:
        _, _, slope, _, _ = half
        logit_slope = slope * -LN_2  # slope is that of the exponent
        dx += dy_partner * weak + (weak - weak * weak) * (logit_slope[None, :] * (dy + dy_partner)) * x
    if WITH_SFE:
        dx += (sfe_gate - sfe_gate * sfe_gate) * (dy * (-2.0 * LN_2) * su) * x
    return dx


@triton.jit
def csfe_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    coefficients_ptr,
    moment_gradients_ptr,
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
    """Find the gradient of one chunk of a block of channels and of the block that it exchanges with."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    # In reverse order, since the elements that the sums read last are still in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    n = block // BLOCKS
    first = block % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    half1 = load_coefficients(mean_ptr, coefficients_ptr, n, c, c < HALF, C)
    half2 = load_coefficients(mean_ptr, coefficients_ptr, n, c + HALF, c + HALF < C, C)
    u_slope1, constant1 = _load_moment_gradients(moment_gradients_ptr, n, c, c < HALF, C)
    u_slope2, constant2 = _load_moment_gradients(moment_gradients_ptr, n, c + HALF, c + HALF < C, C)

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
        dy1 = tl.load(dy_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        if SCALE != 1.0:
            dy1 *= SCALE
            dy2 *= SCALE
        dx1 = input_gradient(half1, u_slope1, constant1, x1, dy1, dy2, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        dx2 = input_gradient(half2, u_slope2, constant2, x2, dy2, dy1, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        tl.store(dx_ptr + at1, dx1, mask=mask1)
        tl.store(dx_ptr + at2, dx2, mask=mask2)
