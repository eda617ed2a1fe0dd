"""What a program needs of each channel: moments, coefficients of the gates, and the gradient through the moments.

One program handles some groups of channels of one sample. Its lanes are the channels of the groups, each group padded
to a power of two.
"""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.gates import COEFFICIENTS, LN_2, LOG2_E
from kfde_layers.fused.csfe.cuda.statistics import combine_moments, load_moments, merge_moments, store_moments

SMALLEST_SUM = tl.constexpr(1e-6)  # of gamma, as in the reference


@triton.jit
def sum_of(values_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of C values."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def away_from_zero(gamma_sum):
    """Return the sum of gamma, or the nearest number that is safe to divide by."""
    nearest = tl.where(gamma_sum < 0, -SMALLEST_SUM, SMALLEST_SUM)
    return tl.where(tl.abs(gamma_sum) < SMALLEST_SUM, nearest, gamma_sum)


@triton.jit
def safe_sum(weight_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of gamma, kept away from zero, or 1 where there is no gamma."""
    if weight_ptr is None:
        return 1.0
    else:
        return away_from_zero(sum_of(weight_ptr, C, BLOCK))


@triton.jit
def lanes(stop: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr):
    """Return the channel of each lane of the program, and whether it is one below `stop`."""
    lane = tl.arange(0, BLOCK_GROUPS * BLOCK_MEMBERS)
    member = lane % BLOCK_MEMBERS
    c = (tl.program_id(1) * BLOCK_GROUPS + lane // BLOCK_MEMBERS) * GROUP_SIZE + member
    return c, (member < GROUP_SIZE) & (c < stop)


@triton.jit
def _sum_of_group(values, mask, BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr):
    """Return in each lane the sum over the group."""
    grouped = tl.reshape(tl.where(mask, values, 0.0), [BLOCK_GROUPS, BLOCK_MEMBERS])
    total = tl.broadcast_to(tl.sum(grouped, axis=1)[:, None], [BLOCK_GROUPS, BLOCK_MEMBERS])
    return tl.reshape(total, [BLOCK_GROUPS * BLOCK_MEMBERS])


@triton.jit
def _group_moments(
    mean, mean_low, m2, mask, hw, eps, GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr
):
    """Return each channel's mean less that of its group, and the inverse standard deviation of the group."""
    # Means are taken relative to the group's first channel, since a large group mean would itself be rounded.
    first = tl.arange(0, BLOCK_GROUPS * BLOCK_MEMBERS) % BLOCK_MEMBERS == 0
    offset = mean - _sum_of_group(mean, mask & first, BLOCK_GROUPS, BLOCK_MEMBERS) + mean_low
    offset -= _sum_of_group(offset, mask, BLOCK_GROUPS, BLOCK_MEMBERS) / GROUP_SIZE
    m2 = _sum_of_group(m2 + offset * offset * hw, mask, BLOCK_GROUPS, BLOCK_MEMBERS)
    return offset, tl.rsqrt(m2 / (1.0 * GROUP_SIZE * hw) + eps)


@triton.jit
def gate_coefficients(
    mean,
    mean_low,
    m2,
    weight_ptr,
    bias_ptr,
    gamma_sum,
    c,
    mask,
    hw,
    eps,
    lambd,
    divisor,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return mean_offset and inverse_std of the lanes, then slope, intercept and spatial_slope of their gates."""
    mean_offset, inverse_std, slope, intercept = mean, mean, mean, mean  # not used without CFE
    if weight_ptr is not None:
        mean_offset, inverse_std = _group_moments(
            mean, mean_low, m2, mask, hw, eps, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS
        )
        gamma = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
        w_gamma = gamma / gamma_sum * -LOG2_E
        slope = gamma * w_gamma * inverse_std
        intercept = w_gamma * (beta + gamma * inverse_std * mean_offset)
    return mean_offset, inverse_std, slope, intercept, 0.25 / (m2 / divisor + lambd) * -LOG2_E


@triton.jit
def moment_gradients(
    mean_offset,
    inverse_std,
    spatial_slope,
    dz,
    dzx,
    deu,
    deuu,
    weight_ptr,
    gamma_sum,
    c,
    mask,
    hw,
    divisor,
    WITH_SFE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return u_slope and constant of each lane: the moments add u_slope * u + constant to the gradient of x."""
    u_slope = tl.zeros_like(spatial_slope)
    constant = u_slope
    if weight_ptr is not None:
        gamma = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        slope = gamma * (gamma / gamma_sum)
        size = 1.0 * GROUP_SIZE * hw
        group_mean = _sum_of_group(slope * dz, mask, BLOCK_GROUPS, BLOCK_MEMBERS) / size
        group_mean_x = _sum_of_group(slope * dzx, mask, BLOCK_GROUPS, BLOCK_MEMBERS) / size
        u_slope -= inverse_std * inverse_std * group_mean_x
        constant -= inverse_std * (group_mean + inverse_std * group_mean_x * mean_offset)
    if WITH_SFE:
        u_slope += spatial_slope * (8.0 * LN_2) / divisor * deuu
        constant -= 2.0 / hw * deu
    return u_slope, constant


@triton.jit
def csfe_coefficients_kernel(
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,
    m2_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    hw,
    chunk,
    parts,
    eps,
    lambd,
    divisor,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Find the moments of all positions from those of the chunks, then the coefficients of the gates."""
    n = tl.program_id(0).to(tl.int64)
    c, mask = lanes(C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS)
    if mean_ptr is None:  # one part is not merged, which would round it again
        mean, mean_low, m2 = load_moments(part_mean_ptr + 2 * n * C, part_m2_ptr + n * C, c, mask, C)
    else:
        mean = tl.zeros_like(c).to(tl.float32)
        mean_low, m2, count = mean, mean, 0.0
        for start in range(0, parts, BLOCK_PARTS):
            part = start + tl.arange(0, BLOCK_PARTS)
            part_mask = (part < parts)[:, None] & mask[None, :]
            row = (n * parts + part[:, None]) * C  # [BLOCK_PARTS, 1]
            part_mean = tl.load(part_mean_ptr + 2 * row + c[None, :], mask=part_mask, other=0.0)
            part_mean_low = tl.load(part_mean_ptr + 2 * row + C + c[None, :], mask=part_mask, other=0.0)
            part_m2 = tl.load(part_m2_ptr + row + c[None, :], mask=part_mask, other=0.0)
            part_count = tl.maximum(tl.minimum(hw - part * chunk, chunk), 0).to(tl.float32)
            block_count = tl.sum(part_count, axis=0)
            mean, mean_low, m2 = merge_moments(
                mean, mean_low, m2, count, *combine_moments(part_mean, part_mean_low, part_m2, part_count[:, None]),
                block_count,
            )  # fmt: skip
            count += block_count
        store_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, mean, mean_low, m2, c, mask, C)

    gamma_sum = safe_sum(weight_ptr, C, BLOCK_SUM)
    _, _, slope, intercept, spatial_slope = gate_coefficients(
        mean, mean_low, m2, weight_ptr, bias_ptr, gamma_sum, c, mask, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    coefficients_ptr += COEFFICIENTS * n * C
    tl.store(coefficients_ptr + c, slope, mask=mask)
    tl.store(coefficients_ptr + C + c, intercept, mask=mask)
    tl.store(coefficients_ptr + 2 * C + c, spatial_slope, mask=mask)


@triton.jit
def _sum_of_parts(sums_ptr, n, c, mask, parts, C: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    total = tl.zeros([BLOCK_PARTS, c.shape[0]], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        part_mask = (part < parts) & mask[None, :]
        total += tl.load(sums_ptr + (n * parts + part) * C + c[None, :], mask=part_mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def csfe_moment_gradients_kernel(
    mean_ptr,
    m2_ptr,
    weight_ptr,
    dz_ptr,
    dzu_ptr,
    deu_ptr,
    deuu_ptr,
    sample_dz_ptr,
    sample_dzx_ptr,
    moment_gradients_ptr,
    hw,
    parts,
    eps,
    lambd,
    divisor,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Find the gradient of x through the moments, u_slope * u + constant.

    Both numbers are stored as (N, 2, C). For the gradients of gamma and beta, the sums of each sample of dz and of dz
    times the normalised map are stored as (N, C). What has no pointer is left out.
    """
    n = tl.program_id(0).to(tl.int64)
    c, mask = lanes(C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS)
    mean, mean_low, m2 = load_moments(mean_ptr + 2 * n * C, m2_ptr + n * C, c, mask, C)
    gamma_sum = safe_sum(weight_ptr, C, BLOCK_SUM)
    # The intercept, which alone needs the bias, is not used.
    mean_offset, inverse_std, _, _, spatial_slope = gate_coefficients(
        mean, mean_low, m2, weight_ptr, weight_ptr, gamma_sum, c, mask, hw, eps, lambd, divisor,
        GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    dz, dzx, deu, deuu = mean, mean, mean, mean  # each is used only where it is found
    if weight_ptr is not None:
        dz = _sum_of_parts(dz_ptr, n, c, mask, parts, C, BLOCK_PARTS)
        dzx = inverse_std * (_sum_of_parts(dzu_ptr, n, c, mask, parts, C, BLOCK_PARTS) + mean_offset * dz)
        if sample_dz_ptr is not None:
            tl.store(sample_dz_ptr + n * C + c, dz, mask=mask)
            tl.store(sample_dzx_ptr + n * C + c, dzx, mask=mask)
    if moment_gradients_ptr is not None:
        if deu_ptr is not None:
            deu = _sum_of_parts(deu_ptr, n, c, mask, parts, C, BLOCK_PARTS)
            deuu = _sum_of_parts(deuu_ptr, n, c, mask, parts, C, BLOCK_PARTS)
        u_slope, constant = moment_gradients(
            mean_offset, inverse_std, spatial_slope, dz, dzx, deu, deuu, weight_ptr, gamma_sum, c, mask, hw, divisor,
            deu_ptr is not None, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
        )  # fmt: skip
        tl.store(moment_gradients_ptr + 2 * n * C + c, u_slope, mask=mask)
        tl.store(moment_gradients_ptr + 2 * n * C + C + c, constant, mask=mask)
