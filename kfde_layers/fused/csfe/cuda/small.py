"""Small maps: one program does all for some groups of channels of a sample, and for those that they exchange with.

It reads its channels twice, the second time from the cache nearest to it. So nothing waits for another launch.
"""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.backward import input_gradient
from kfde_layers.fused.csfe.cuda.coefficients import gate_coefficients, lanes, moment_gradients, safe_sum
from kfde_layers.fused.csfe.cuda.gates import results
from kfde_layers.fused.csfe.cuda.statistics import add_to_moments, combine_moments, load_moments, store_moments
from kfde_layers.fused.csfe.cuda.sums import gradient_terms


@triton.jit
def _at(p, c, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the indices of positions and channels in the map of one sample."""
    return p[:, None] * C + c[None, :] if CHANNELS_LAST else p[:, None] + c[None, :] * hw


@triton.jit
def _moments(x_ptr, c, mask, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_HW: tl.constexpr):
    """Return mean, mean_low and m2 of each lane."""
    rows = tl.arange(0, BLOCK_HW)
    mean = tl.zeros([BLOCK_HW, c.shape[0]], tl.float32)
    mean_low, m2, count = mean, mean, 0.0
    for start in tl.range(0, hw, BLOCK_HW):
        tile_mask = (start + rows < hw)[:, None] & mask[None, :]
        x = tl.load(x_ptr + _at(start + rows, c, hw, C, CHANNELS_LAST), mask=tile_mask, other=0.0).to(tl.float32)
        count += 1.0
        mean, mean_low, m2 = add_to_moments(mean, mean_low, m2, x, tile_mask, count)
    counts = ((hw - rows + BLOCK_HW - 1) // BLOCK_HW).to(tl.float32)  # elements of each row
    return combine_moments(mean, mean_low, m2, counts[:, None])


@triton.jit
def _load_both(x_ptr, dy_ptr, p, c, mask, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr):
    """Return x and SCALE times dy at positions and channels of one sample."""
    at = _at(p, c, hw, C, CHANNELS_LAST)
    tile_mask = (p < hw)[:, None] & mask[None, :]
    x = tl.load(x_ptr + at, mask=tile_mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=tile_mask, other=0.0).to(tl.float32)
    return x, dy * SCALE


@triton.jit
def csfe_small_forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    hw_units,
    eps,
    lambd,
    divisor,
    open_below,
    sfe_exponent,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WITH_SFE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    """Find the moments, then apply the gates."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    WITH_CFE: tl.constexpr = weight_ptr is not None
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * C * hw
    y_ptr += n * C * hw
    c1, mask1 = lanes(HALF, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS)
    c2 = c1 + HALF
    mask2 = mask1 & (c2 < C)
    mean1, mean_low1, m2_1 = _moments(x_ptr, c1, mask1, hw, C, CHANNELS_LAST, BLOCK_HW)
    mean2, mean_low2, m2_2 = _moments(x_ptr, c2, mask2, hw, C, CHANNELS_LAST, BLOCK_HW)
    store_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, mean1, mean_low1, m2_1, c1, mask1, C)
    store_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, mean2, mean_low2, m2_2, c2, mask2, C)
    gamma_sum = safe_sum(weight_ptr, C, BLOCK_SUM)
    _, _, slope1, intercept1, spatial_slope1 = gate_coefficients(
        mean1, mean_low1, m2_1, weight_ptr, bias_ptr, gamma_sum, c1, mask1, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    _, _, slope2, intercept2, spatial_slope2 = gate_coefficients(
        mean2, mean_low2, m2_2, weight_ptr, bias_ptr, gamma_sum, c2, mask2, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    half1 = (mean1, mean_low1, slope1, intercept1, spatial_slope1)
    half2 = (mean2, mean_low2, slope2, intercept2, spatial_slope2)

    rows = tl.arange(0, BLOCK_HW)
    for start in tl.range(0, hw, BLOCK_HW):
        p = start + rows
        tile_mask1 = (p < hw)[:, None] & mask1[None, :]
        tile_mask2 = (p < hw)[:, None] & mask2[None, :]
        at1 = _at(p, c1, hw, C, CHANNELS_LAST)
        at2 = _at(p, c2, hw, C, CHANNELS_LAST)
        x1 = tl.load(x_ptr + at1, mask=tile_mask1, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at2, mask=tile_mask2, other=0.0).to(tl.float32)
        y1, y2 = results(half1, half2, x1, x2, open_below, sfe_exponent, WITH_CFE, WITH_SFE, SCALE)
        tl.store(y_ptr + at1, y1, mask=tile_mask1)
        tl.store(y_ptr + at2, y2, mask=tile_mask2)


@triton.jit
def csfe_small_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    dz_ptr,
    dzx_ptr,
    hw_units,
    eps,
    lambd,
    divisor,
    open_below,
    sfe_exponent,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WITH_SFE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    """Sum the gradients of the moments, then find that of the map.

    For the gradients of gamma and beta, the sums of dz and of dz times the normalised map are stored as (N, C).
    """
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    WITH_CFE: tl.constexpr = weight_ptr is not None
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * C * hw
    dy_ptr += n * C * hw
    c1, mask1 = lanes(HALF, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS)
    c2 = c1 + HALF
    mask2 = mask1 & (c2 < C)
    gamma_sum = safe_sum(weight_ptr, C, BLOCK_SUM)
    mean1, mean_low1, m2_1 = load_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, c1, mask1, C)
    mean2, mean_low2, m2_2 = load_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, c2, mask2, C)
    mean_offset1, inverse_std1, slope1, intercept1, spatial_slope1 = gate_coefficients(
        mean1, mean_low1, m2_1, weight_ptr, bias_ptr, gamma_sum, c1, mask1, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    mean_offset2, inverse_std2, slope2, intercept2, spatial_slope2 = gate_coefficients(
        mean2, mean_low2, m2_2, weight_ptr, bias_ptr, gamma_sum, c2, mask2, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    half1 = (mean1, mean_low1, slope1, intercept1, spatial_slope1)
    half2 = (mean2, mean_low2, slope2, intercept2, spatial_slope2)

    rows = tl.arange(0, BLOCK_HW)
    dz1 = tl.zeros([BLOCK_HW, BLOCK_GROUPS * BLOCK_MEMBERS], tl.float32)
    dz2, dzu1, dzu2, deu1, deu2, deuu1, deuu2 = dz1, dz1, dz1, dz1, dz1, dz1, dz1
    for start in tl.range(0, hw, BLOCK_HW):
        x1, dy1 = _load_both(x_ptr, dy_ptr, start + rows, c1, mask1, hw, C, CHANNELS_LAST, SCALE)
        x2, dy2 = _load_both(x_ptr, dy_ptr, start + rows, c2, mask2, hw, C, CHANNELS_LAST, SCALE)
        dy_sum = dy1 + dy2
        dz, dzu, deu, deuu = gradient_terms(half1, x1, dy1, dy_sum, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        dz1, dzu1, deu1, deuu1 = dz1 + dz, dzu1 + dzu, deu1 + deu, deuu1 + deuu
        dz, dzu, deu, deuu = gradient_terms(half2, x2, dy2, dy_sum, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        dz2, dzu2, deu2, deuu2 = dz2 + dz, dzu2 + dzu, deu2 + deu, deuu2 + deuu

    sum1 = tl.sum(dz1, axis=0)
    sum2 = tl.sum(dz2, axis=0)
    sum_x1 = inverse_std1 * (tl.sum(dzu1, axis=0) + mean_offset1 * sum1)
    sum_x2 = inverse_std2 * (tl.sum(dzu2, axis=0) + mean_offset2 * sum2)
    if dz_ptr is not None:
        tl.store(dz_ptr + n * C + c1, sum1, mask=mask1)
        tl.store(dz_ptr + n * C + c2, sum2, mask=mask2)
        tl.store(dzx_ptr + n * C + c1, sum_x1, mask=mask1)
        tl.store(dzx_ptr + n * C + c2, sum_x2, mask=mask2)
    if dx_ptr is not None:
        dx_ptr += n * C * hw
        u_slope1, constant1 = moment_gradients(
            mean_offset1, inverse_std1, spatial_slope1, sum1, sum_x1, tl.sum(deu1, axis=0), tl.sum(deuu1, axis=0),
            weight_ptr, gamma_sum, c1, mask1, hw, divisor, WITH_SFE, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
        )  # fmt: skip
        u_slope2, constant2 = moment_gradients(
            mean_offset2, inverse_std2, spatial_slope2, sum2, sum_x2, tl.sum(deu2, axis=0), tl.sum(deuu2, axis=0),
            weight_ptr, gamma_sum, c2, mask2, hw, divisor, WITH_SFE, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
        )  # fmt: skip
        for start in tl.range(0, hw, BLOCK_HW):
            p = start + rows
            x1, dy1 = _load_both(x_ptr, dy_ptr, p, c1, mask1, hw, C, CHANNELS_LAST, SCALE)
            x2, dy2 = _load_both(x_ptr, dy_ptr, p, c2, mask2, hw, C, CHANNELS_LAST, SCALE)
            dx1 = input_gradient(half1, u_slope1, constant1, x1, dy1, dy2, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
            dx2 = input_gradient(half2, u_slope2, constant2, x2, dy2, dy1, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
            at1 = _at(p, c1, hw, C, CHANNELS_LAST)
            at2 = _at(p, c2, hw, C, CHANNELS_LAST)
            tl.store(dx_ptr + at1, dx1, mask=(p < hw)[:, None] & mask1[None, :])
            tl.store(dx_ptr + at2, dx2, mask=(p < hw)[:, None] & mask2[None, :])
