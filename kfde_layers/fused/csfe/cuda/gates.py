"""The gates of CFE and SFE, and the coefficients of each channel that they need."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

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
def _group_moments(
    mean_ptr,
    m2_ptr,
    mean,
    mean_low,
    c,
    first,
    hw,
    eps,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return mean_offset and inverse_std of the channels `c`, of which `first` is the first.

    Their means are `mean` + `mean_low`. The pointers are those of the sample, as `store_moments` fills them.
    """
    group = first // GROUP_SIZE + tl.arange(0, BLOCK_GROUPS)
    # Means are taken relative to the group's first channel, since a large group mean would itself be rounded.
    first_mean = tl.load(mean_ptr + group * GROUP_SIZE, mask=group * GROUP_SIZE < C, other=0.0)
    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, GROUP_SIZE, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * GROUP_SIZE + member[None, :]
        mask = (member < GROUP_SIZE)[None, :] & (channel < C)
        member_low = tl.load(mean_ptr + C + channel, mask=mask, other=0.0)
        total += tl.where(
            mask, tl.load(mean_ptr + channel, mask=mask, other=0.0) - first_mean[:, None] + member_low, 0.0
        )
    group_mean = tl.sum(total, axis=1) / GROUP_SIZE  # relative to first_mean, [BLOCK_GROUPS]

    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, GROUP_SIZE, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * GROUP_SIZE + member[None, :]
        mask = (member < GROUP_SIZE)[None, :] & (channel < C)
        member_low = tl.load(mean_ptr + C + channel, mask=mask, other=0.0)
        mean_offset = tl.load(mean_ptr + channel, mask=mask, other=0.0) - first_mean[:, None] + member_low
        mean_offset -= group_mean[:, None]
        m2 = tl.load(m2_ptr + channel, mask=mask, other=0.0)
        total += tl.where(mask, m2 + mean_offset * mean_offset * hw, 0.0)
    inverse_std = tl.rsqrt(tl.sum(total, axis=1) / (1.0 * GROUP_SIZE * hw) + eps)

    # A gather: a sum over a mask would tie the layout of these small tiles to that of the map's tiles.
    group_index = c // GROUP_SIZE - first // GROUP_SIZE
    mean_offset = mean - tl.gather(first_mean, group_index, 0) + mean_low - tl.gather(group_mean, group_index, 0)
    return mean_offset, tl.gather(inverse_std, group_index, 0)


@triton.jit
def _coefficients(
    mean_ptr,
    m2_ptr,
    weight_ptr,
    bias_ptr,
    gamma_sum,
    c,
    first,
    stop: tl.constexpr,
    hw,
    eps,
    lambd,
    divisor,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Return mean, mean_low, slope, intercept, spatial_slope, mean_offset and inverse_std of the channels `c`.

    With u = x - mean - mean_low: z = slope * u + intercept, and SFE's score is spatial_slope * u^2 + beta. Channels
    from `stop` on are not read.
    """
    mean = tl.load(mean_ptr + c, mask=c < stop, other=0.0)
    mean_low = tl.load(mean_ptr + C + c, mask=c < stop, other=0.0)
    spatial_slope = 0.25 / (tl.load(m2_ptr + c, mask=c < stop, other=0.0) / divisor + lambd)
    slope, intercept, mean_offset, inverse_std = mean, mean, mean, mean  # not used without CFE
    if weight_ptr is not None:
        mean_offset, inverse_std = _group_moments(
            mean_ptr, m2_ptr, mean, mean_low, c, first, hw, eps, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS
        )
        gamma = tl.load(weight_ptr + c, mask=c < stop, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < stop, other=0.0).to(tl.float32)
        w_gamma = gamma / gamma_sum
        slope = gamma * w_gamma * inverse_std
        intercept = w_gamma * (beta + gamma * inverse_std * mean_offset)
    return mean, mean_low, slope, intercept, spatial_slope, mean_offset, inverse_std


@triton.jit
def coefficients_of_both(
    mean_ptr,
    m2_ptr,
    weight_ptr,
    bias_ptr,
    n,
    first,
    hw,
    eps,
    lambd,
    divisor,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the sum of gamma, and the coefficients of a block of channels and of the block that it exchanges with."""
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    c = first + tl.arange(0, BLOCK_C)
    mean_ptr += n.to(tl.int64) * 2 * C
    m2_ptr += n.to(tl.int64) * C
    gamma_sum = 1.0
    if weight_ptr is not None:
        gamma_sum = away_from_zero(sum_of(weight_ptr, C, BLOCK_SUM))
    half1 = _coefficients(
        mean_ptr, m2_ptr, weight_ptr, bias_ptr, gamma_sum, c, first, HALF, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    half2 = _coefficients(
        mean_ptr, m2_ptr, weight_ptr, bias_ptr, gamma_sum, c + HALF, first + HALF, C, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    return gamma_sum, half1, half2


@triton.jit
def _sigmoid(z):
    # 1 / (1 + exp(-z)) in four instructions instead of eleven, which would make the kernel compute-bound. Where exp2
    # overflows to infinity, rsqrt returns the right value, zero.
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def gates(
    x, mean, mean_low, slope, intercept, spatial_slope, logit, beta, WITH_CFE: tl.constexpr, WITH_SFE: tl.constexpr
):
    """Return the deviation u, keep = w1 + sfe_gate, weak = w2 of eq. (3), and sfe_gate; all [BLOCK_HW, BLOCK_C]."""
    u = (x - mean[None, :]) - mean_low[None, :]
    keep, weak, sfe_gate = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    if WITH_CFE:
        z = slope[None, :] * u + intercept[None, :]
        r = _sigmoid(z)
        is_open = z > logit
        keep = tl.where(is_open, 1.0, r)
        weak = tl.where(is_open, 0.0, r)
    if WITH_SFE:
        sfe_gate = _sigmoid(spatial_slope[None, :] * u * u + beta)
        keep += sfe_gate
    return u, keep, weak, sfe_gate
