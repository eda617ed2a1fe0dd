"""The gradients of the map and of gamma and beta: the second pass of the backward direction, and a small third."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.gates import SMALLEST_SUM, away_from_zero, coefficients_of_both, gates, sum_of
from kfde_layers.fused.maps import STAGES, address, tile


@triton.jit
def _group_means(
    weight_ptr,
    dz_ptr,
    dzx_ptr,
    gamma_sum,
    c,
    first,
    hw,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return means over the group of the gradient of its normalised map, alone and times that map."""
    group = first // GROUP_SIZE + tl.arange(0, BLOCK_GROUPS)
    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    total_x = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, GROUP_SIZE, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * GROUP_SIZE + member[None, :]
        mask = (member < GROUP_SIZE)[None, :] & (channel < C)
        gamma = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        slope = gamma * (gamma / gamma_sum)
        total += slope * tl.load(dz_ptr + channel, mask=mask, other=0.0)
        total_x += slope * tl.load(dzx_ptr + channel, mask=mask, other=0.0)
    size = 1.0 * GROUP_SIZE * hw
    group_index = c // GROUP_SIZE - first // GROUP_SIZE
    return tl.gather(tl.sum(total, axis=1) / size, group_index, 0), tl.gather(
        tl.sum(total_x, axis=1) / size, group_index, 0
    )


@triton.jit
def _through_moments(
    weight_ptr,
    dz_ptr,
    dzx_ptr,
    deu_ptr,
    deuu_ptr,
    gamma_sum,
    spatial_slope,
    mean_offset,
    inverse_std,
    c,
    first,
    stop: tl.constexpr,
    hw,
    divisor,
    C: tl.constexpr,
    WITH_SFE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return u_slope and constant of each channel: the moments add u_slope * u + constant to the gradient of x."""
    u_slope = tl.zeros_like(spatial_slope)
    constant = tl.zeros_like(spatial_slope)
    if weight_ptr is not None:
        group_mean, group_mean_x = _group_means(
            weight_ptr, dz_ptr, dzx_ptr, gamma_sum, c, first, hw, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS
        )
        u_slope -= inverse_std * inverse_std * group_mean_x
        constant -= inverse_std * (group_mean + inverse_std * group_mean_x * mean_offset)
    if WITH_SFE:
        u_slope -= 8.0 * spatial_slope / divisor * tl.load(deuu_ptr + c, mask=c < stop, other=0.0)
        constant -= 2.0 / hw * tl.load(deu_ptr + c, mask=c < stop, other=0.0)
    return u_slope, constant


@triton.jit
def csfe_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
    dz_ptr,
    dzx_ptr,
    deu_ptr,
    deuu_ptr,
    hw_units,
    chunk,
    eps,
    logit,
    lambd,
    beta,
    divisor,
    scale,
    C: tl.constexpr,
    HW_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WITH_SFE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Find the gradient of one chunk of a block of channels and of the block that it exchanges with."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    WITH_CFE: tl.constexpr = weight_ptr is not None
    # In reverse order, since the elements that the sums read last are still in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    n = block // BLOCKS
    first = block % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    gamma_sum, half1, half2 = coefficients_of_both(
        mean_ptr, m2_ptr, weight_ptr, bias_ptr, n, first, hw, eps, lambd, divisor,
        C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_SUM, BLOCK_C,
    )  # fmt: skip
    mean1, mean_low1, slope1, intercept1, spatial_slope1, mean_offset1, inverse_std1 = half1
    mean2, mean_low2, slope2, intercept2, spatial_slope2, mean_offset2, inverse_std2 = half2
    if WITH_CFE:
        dz_ptr += n.to(tl.int64) * C
        dzx_ptr += n.to(tl.int64) * C
    if WITH_SFE:
        deu_ptr += n.to(tl.int64) * C
        deuu_ptr += n.to(tl.int64) * C
    u_slope1, constant1 = _through_moments(
        weight_ptr, dz_ptr, dzx_ptr, deu_ptr, deuu_ptr, gamma_sum, spatial_slope1, mean_offset1, inverse_std1,
        c, first, HALF, hw, divisor, C, WITH_SFE, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    u_slope2, constant2 = _through_moments(
        weight_ptr, dz_ptr, dzx_ptr, deu_ptr, deuu_ptr, gamma_sum, spatial_slope2, mean_offset2, inverse_std2,
        c + HALF, first + HALF, C, hw, divisor, C, WITH_SFE, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip

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
        dy1 = scale * tl.load(dy_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        dy2 = scale * tl.load(dy_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        u1, keep1, weak1, sfe_gate1 = gates(
            x1, mean1, mean_low1, slope1, intercept1, spatial_slope1, logit, beta, WITH_CFE, WITH_SFE
        )
        u2, keep2, weak2, sfe_gate2 = gates(
            x2, mean2, mean_low2, slope2, intercept2, spatial_slope2, logit, beta, WITH_CFE, WITH_SFE
        )
        dx1 = dy1 * keep1 + dy2 * weak1 + u_slope1[None, :] * u1 + constant1[None, :]
        dx2 = dy2 * keep2 + dy1 * weak2 + u_slope2[None, :] * u2 + constant2[None, :]
        if WITH_CFE:
            dy_sum = dy1 + dy2
            dx1 += slope1[None, :] * (weak1 * (1.0 - weak1) * x1 * dy_sum)
            dx2 += slope2[None, :] * (weak2 * (1.0 - weak2) * x2 * dy_sum)
        if WITH_SFE:
            dx1 += 2.0 * spatial_slope1[None, :] * u1 * (sfe_gate1 * (1.0 - sfe_gate1) * x1 * dy1)
            dx2 += 2.0 * spatial_slope2[None, :] * u2 * (sfe_gate2 * (1.0 - sfe_gate2) * x2 * dy2)
        tl.store(dx_ptr + at1, dx1, mask=mask1)
        tl.store(dx_ptr + at2, dx2, mask=mask2)


@triton.jit
def csfe_parameters_kernel(
    weight_ptr, bias_ptr, dz_ptr, dzx_ptr, dweight_ptr, dbias_ptr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the gradients of gamma and beta; one program for all channels, since w_gamma depends on the sum of gamma."""
    total = sum_of(weight_ptr, C, BLOCK)
    gamma_sum = away_from_zero(total)
    through_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        gamma = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + c, mask=c < C, other=0.0)
        dzx = tl.load(dzx_ptr + c, mask=c < C, other=0.0)
        dw_gamma = gamma * dzx + beta * dz
        through_sum += dw_gamma * gamma
    # A sum too near to zero was replaced by a constant, which has no gradient.
    constant = tl.abs(total) < SMALLEST_SUM
    dsum = tl.where(constant, 0.0, tl.sum(through_sum, axis=0) / (gamma_sum * gamma_sum))
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        gamma = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + c, mask=c < C, other=0.0)
        dzx = tl.load(dzx_ptr + c, mask=c < C, other=0.0)
        w_gamma = gamma / gamma_sum
        dw_gamma = gamma * dzx + beta * dz
        tl.store(dweight_ptr + c, w_gamma * dzx + dw_gamma / gamma_sum - dsum, mask=c < C)
        tl.store(dbias_ptr + c, w_gamma * dz, mask=c < C)
