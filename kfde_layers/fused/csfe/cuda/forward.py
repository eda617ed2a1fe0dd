"""CFE, SFE and their sum in two passes over the map: one for the statistics of each channel, one that applies them.

A program of the applying kernels takes a block of channels together with the block C / 2 channels on, since each lends
to the other: every element is read once and written once. Gates are not stored but computed again in the backward
pass. Arithmetic is in float32 and no sum depends on the order in which programs run.

All kernels see a dense map of N samples, C channels and hw positions, in either memory format.
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

_SMALLEST_SUM = tl.constexpr(1e-6)  # of gamma, as in the reference
_STAGES = tl.constexpr(3)  # tiles on their way from memory while one is worked on, and that one


@triton.jit
def _offset(n, c, p, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where element (n, c, p) of the map lies; this can pass 2^31."""
    if CHANNELS_LAST:
        return (n.to(tl.int64) * hw + p) * C + c
    return (n.to(tl.int64) * C + c) * hw + p


@triton.jit
def _tile(hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets inside a tile, from its first element."""
    p = tl.arange(0, BLOCK_HW)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return p * C + c if CHANNELS_LAST else p + c * hw  # [BLOCK_HW, BLOCK_C]


@triton.jit
def _merge(mean, m2, count):
    """Mean and sum of squared deviations of the union of the rows, each of `count` elements (Chan et al., 1979)."""
    total = tl.sum(count, axis=0)
    merged = tl.sum(mean * count, axis=0) / total
    # once more from there: where the mean is large, the first sum has lost what this one finds
    merged += tl.sum((mean - merged[None, :]) * count, axis=0) / total
    away = mean - merged[None, :]
    return merged, tl.sum(m2 + count * away * away, axis=0)


@triton.jit
def _csfe_stats_kernel(
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
    """Mean and sum of squared deviations of every channel over one chunk of the positions."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)

    # Every lane of the tile keeps the moments of what it has seen (Welford), so that no sum of squares cancels.
    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    turn = 0.0
    for p in tl.range(begin, end, BLOCK_HW, num_stages=_STAGES):
        mask = (p + rows < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + _offset(n, first, p, hw, C, CHANNELS_LAST) + tile, mask=mask, other=0.0).to(tl.float32)
        turn += 1.0
        share = 1.0 / turn
        away = tl.where(mask, x - mean, 0.0)
        mean += away * share
        m2 += away * away * (1.0 - share)

    count = ((end - begin - rows + BLOCK_HW - 1) // BLOCK_HW).to(tl.float32)  # what each row has seen
    mean, m2 = _merge(mean, m2, count[:, None])  # [BLOCK_C]
    out = (n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
    tl.store(mean_ptr + out, mean, mask=c < C)
    tl.store(m2_ptr + out, m2, mask=c < C)


@triton.jit
def _csfe_merge_kernel(
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
    """Moments of all positions from those of the chunks."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & (c < C)[None, :]
    at = (n * parts + part[:, None]) * C + c[None, :]  # [BLOCK_PARTS, BLOCK_C]
    mean = tl.load(part_mean_ptr + at, mask=mask, other=0.0)
    m2 = tl.load(part_m2_ptr + at, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(hw - part * chunk, chunk), 0).to(tl.float32)
    mean, m2 = _merge(mean, m2, count[:, None])
    tl.store(mean_ptr + n * C + c, mean, mask=c < C)
    tl.store(m2_ptr + n * C + c, m2, mask=c < C)


@triton.jit
def _sum_of(values_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _away_from_zero(total):
    return tl.where(tl.abs(total) < _SMALLEST_SUM, tl.where(total < 0, -_SMALLEST_SUM, _SMALLEST_SUM), total)


@triton.jit
def _group_moments(
    mean_ptr,
    m2_ptr,
    mean,
    c,
    first,
    hw,
    eps,
    C: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """How far the mean of each channel lies from that of its group, and the inverse deviation of the group.

    The pointers are those of the sample; `first` is the first of the channels `c`, and `mean` their means.
    """
    group = first // GROUP_SIZE + tl.arange(0, BLOCK_GROUPS)
    # Means count from the first of the group: the mean of the group itself would be rounded at its own size.
    lead = tl.load(mean_ptr + group * GROUP_SIZE, mask=group * GROUP_SIZE < C, other=0.0)
    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, GROUP_SIZE, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * GROUP_SIZE + member[None, :]
        mask = (member < GROUP_SIZE)[None, :] & (channel < C)
        total += tl.where(mask, tl.load(mean_ptr + channel, mask=mask, other=0.0) - lead[:, None], 0.0)
    shift = tl.sum(total, axis=1) / GROUP_SIZE  # [BLOCK_GROUPS]

    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS], tl.float32)
    for start in range(0, GROUP_SIZE, BLOCK_MEMBERS):
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * GROUP_SIZE + member[None, :]
        mask = (member < GROUP_SIZE)[None, :] & (channel < C)
        away = tl.load(mean_ptr + channel, mask=mask, other=0.0) - lead[:, None] - shift[:, None]
        m2 = tl.load(m2_ptr + channel, mask=mask, other=0.0)
        total += tl.where(mask, m2 + away * away * hw, 0.0)
    inv = tl.rsqrt(tl.sum(total, axis=1) / (1.0 * GROUP_SIZE * hw) + eps)

    # A gather, and no sum over a mask: that would tie the layout of these small tiles to that of the map's tiles.
    mine = c // GROUP_SIZE - first // GROUP_SIZE
    return mean - tl.gather(lead, mine, 0) - tl.gather(shift, mine, 0), tl.gather(inv, mine, 0)


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
    """Means over the group of the gradient of its normalised map, alone and times that map."""
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
    mine = c // GROUP_SIZE - first // GROUP_SIZE
    return tl.gather(tl.sum(total, axis=1) / size, mine, 0), tl.gather(tl.sum(total_x, axis=1) / size, mine, 0)


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
    """What the gates need of each channel: with u = x - mean, z = slope * u + offset and e = sharpness * u^2 + beta.

    Beside them the distance of the channel's mean from its group's, and the inverse deviation of the group.
    """
    mean = tl.load(mean_ptr + c, mask=c < stop, other=0.0)
    sharpness = 0.25 / (tl.load(m2_ptr + c, mask=c < stop, other=0.0) / divisor + lambd)
    slope, offset, away, inv = mean, mean, mean, mean  # unused without the channel branch
    if weight_ptr is not None:
        away, inv = _group_moments(
            mean_ptr, m2_ptr, mean, c, first, hw, eps, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS
        )
        gamma = tl.load(weight_ptr + c, mask=c < stop, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < stop, other=0.0).to(tl.float32)
        w = gamma / gamma_sum
        slope = gamma * w * inv
        offset = w * (beta + gamma * inv * away)
    return mean, slope, offset, sharpness, away, inv


@triton.jit
def _sigmoid(z):
    # 1 / (1 + exp(-z)) in four instructions: a division and an exp by the book take eleven, enough to wait for them
    # instead of for memory. Where exp2 overflows, rsqrt makes it the zero that it should be.
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def _gates(x, mean, slope, offset, sharpness, logit, beta, CHANNEL: tl.constexpr, SPATIAL: tl.constexpr):
    """u = x - mean, the weights w1 + q of the element itself and w2 of its loan, and q; all [BLOCK_HW, BLOCK_C]."""
    u = x - mean[None, :]
    keep, lend, q = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    if CHANNEL:
        z = slope[None, :] * u + offset[None, :]
        r = _sigmoid(z)
        is_open = z > logit
        keep = tl.where(is_open, 1.0, r)
        lend = tl.where(is_open, 0.0, r)
    if SPATIAL:
        q = _sigmoid(sharpness[None, :] * u * u + beta)
        keep += q
    return u, keep, lend, q


@triton.jit
def _csfe_forward_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    m2_ptr,
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
    SPATIAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Apply the gates to one chunk of a block of channels and of the block that it exchanges with."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is even but for SFE alone, where nothing is exchanged
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    # Backwards, since what the statistics read last is still in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    n = block // BLOCKS
    first = block % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    row = n.to(tl.int64) * C
    CHANNEL: tl.constexpr = weight_ptr is not None
    gamma_sum = 1.0
    if CHANNEL:
        gamma_sum = _away_from_zero(_sum_of(weight_ptr, C, BLOCK_SUM))
    mean1, slope1, offset1, sharpness1, _away1, _inv1 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c, first, HALF, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    mean2, slope2, offset2, sharpness2, _away2, _inv2 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c + HALF, first + HALF, C, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip

    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)
    begin = part * chunk
    end = tl.minimum(begin + chunk, hw)
    for p in tl.range(begin, end, BLOCK_HW, num_stages=_STAGES):
        mask1 = (p + rows < end)[:, None] & (c < HALF)[None, :]
        mask2 = (p + rows < end)[:, None] & (c + HALF < C)[None, :]
        at1 = _offset(n, first, p, hw, C, CHANNELS_LAST) + tile
        at2 = _offset(n, first + HALF, p, hw, C, CHANNELS_LAST) + tile
        x1 = tl.load(x_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        _u1, keep1, lend1, _q1 = _gates(x1, mean1, slope1, offset1, sharpness1, logit, beta, CHANNEL, SPATIAL)
        _u2, keep2, lend2, _q2 = _gates(x2, mean2, slope2, offset2, sharpness2, logit, beta, CHANNEL, SPATIAL)
        tl.store(y_ptr + at1, scale * (x1 * keep1 + x2 * lend2), mask=mask1)
        tl.store(y_ptr + at2, scale * (x2 * keep2 + x1 * lend1), mask=mask2)


@triton.jit
def _csfe_sums_kernel(
    dy_ptr,
    x_ptr,
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
    SPATIAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over one chunk of the positions that the gradient needs, for two blocks of channels.

    Of the gradient dz of the channel branch's logits: itself, and times the normalised map. Of the gradient de of the
    spatial branch's: times u = x - mean, and times its square.
    """
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is even but for SFE alone, where nothing is exchanged
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    CHANNEL: tl.constexpr = weight_ptr is not None
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    row = n.to(tl.int64) * C
    gamma_sum = 1.0
    if CHANNEL:
        gamma_sum = _away_from_zero(_sum_of(weight_ptr, C, BLOCK_SUM))
    mean1, slope1, offset1, sharpness1, away1, inv1 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c, first, HALF, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    mean2, slope2, offset2, sharpness2, away2, inv2 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c + HALF, first + HALF, C, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip

    dz1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dz2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dzu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dzu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deuu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deuu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, hw)
    for p in tl.range(begin, end, BLOCK_HW, num_stages=_STAGES):
        mask1 = (p + rows < end)[:, None] & (c < HALF)[None, :]
        mask2 = (p + rows < end)[:, None] & (c + HALF < C)[None, :]
        at1 = _offset(n, first, p, hw, C, CHANNELS_LAST) + tile
        at2 = _offset(n, first + HALF, p, hw, C, CHANNELS_LAST) + tile
        x1 = tl.load(x_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        g1 = tl.load(dy_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        g2 = tl.load(dy_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        u1, _, lend1, q1 = _gates(x1, mean1, slope1, offset1, sharpness1, logit, beta, CHANNEL, SPATIAL)
        u2, _, lend2, q2 = _gates(x2, mean2, slope2, offset2, sharpness2, logit, beta, CHANNEL, SPATIAL)
        if CHANNEL:
            both = g1 + g2
            t1 = lend1 * (1.0 - lend1) * x1 * both  # dz, which is zero where the gate is open, since the loan is
            t2 = lend2 * (1.0 - lend2) * x2 * both
            dz1 += t1
            dz2 += t2
            dzu1 += t1 * u1
            dzu2 += t2 * u2
        if SPATIAL:
            t1 = q1 * (1.0 - q1) * x1 * g1 * u1
            t2 = q2 * (1.0 - q2) * x2 * g2 * u2
            deu1 += t1
            deu2 += t2
            deuu1 += t1 * u1
            deuu2 += t2 * u2

    out = (n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
    mask1 = c < HALF
    mask2 = c + HALF < C
    if CHANNEL:
        s1 = scale * tl.sum(dz1, axis=0)
        s2 = scale * tl.sum(dz2, axis=0)
        tl.store(dz_ptr + out, s1, mask=mask1)
        tl.store(dz_ptr + out + HALF, s2, mask=mask2)
        tl.store(dzx_ptr + out, inv1 * (scale * tl.sum(dzu1, axis=0) + away1 * s1), mask=mask1)
        tl.store(dzx_ptr + out + HALF, inv2 * (scale * tl.sum(dzu2, axis=0) + away2 * s2), mask=mask2)
    if SPATIAL:
        tl.store(deu_ptr + out, scale * tl.sum(deu1, axis=0), mask=mask1)
        tl.store(deu_ptr + out + HALF, scale * tl.sum(deu2, axis=0), mask=mask2)
        tl.store(deuu_ptr + out, scale * tl.sum(deuu1, axis=0), mask=mask1)
        tl.store(deuu_ptr + out + HALF, scale * tl.sum(deuu2, axis=0), mask=mask2)


@triton.jit
def _line(
    weight_ptr,
    dz_ptr,
    dzx_ptr,
    deu_ptr,
    deuu_ptr,
    gamma_sum,
    sharpness,
    away,
    inv,
    c,
    first,
    stop: tl.constexpr,
    hw,
    divisor,
    C: tl.constexpr,
    SPATIAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """Of each channel, a and b of the gradient a * u + b that reaches x through the statistics."""
    a = tl.zeros_like(sharpness)
    b = tl.zeros_like(sharpness)
    if weight_ptr is not None:
        k1, k2 = _group_means(
            weight_ptr, dz_ptr, dzx_ptr, gamma_sum, c, first, hw, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS
        )
        a -= inv * inv * k2
        b -= inv * (k1 + inv * k2 * away)
    if SPATIAL:
        a -= 8.0 * sharpness * sharpness / divisor * tl.load(deuu_ptr + c, mask=c < stop, other=0.0)
        b -= 2.0 * sharpness / hw * tl.load(deu_ptr + c, mask=c < stop, other=0.0)
    return a, b


@triton.jit
def _csfe_backward_kernel(
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
    SPATIAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of one chunk of a block of channels and of the block that it exchanges with."""
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is even but for SFE alone, where nothing is exchanged
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    CHANNEL: tl.constexpr = weight_ptr is not None
    # Backwards, since what the sums read last is still in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    n = block // BLOCKS
    first = block % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    row = n.to(tl.int64) * C
    gamma_sum = 1.0
    if CHANNEL:
        gamma_sum = _away_from_zero(_sum_of(weight_ptr, C, BLOCK_SUM))
        dz_ptr += row
        dzx_ptr += row
    if SPATIAL:
        deu_ptr += row
        deuu_ptr += row
    mean1, slope1, offset1, sharpness1, away1, inv1 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c, first, HALF, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    mean2, slope2, offset2, sharpness2, away2, inv2 = _coefficients(
        mean_ptr + row, m2_ptr + row, weight_ptr, bias_ptr, gamma_sum, c + HALF, first + HALF, C, hw,
        eps, lambd, divisor, C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    a1, b1 = _line(
        weight_ptr, dz_ptr, dzx_ptr, deu_ptr, deuu_ptr, gamma_sum, sharpness1, away1, inv1, c, first, HALF, hw,
        divisor, C, SPATIAL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip
    a2, b2 = _line(
        weight_ptr, dz_ptr, dzx_ptr, deu_ptr, deuu_ptr, gamma_sum, sharpness2, away2, inv2, c + HALF, first + HALF,
        C, hw, divisor, C, SPATIAL, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS,
    )  # fmt: skip

    tile = _tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)
    begin = part * chunk
    end = tl.minimum(begin + chunk, hw)
    for p in tl.range(begin, end, BLOCK_HW, num_stages=_STAGES):
        mask1 = (p + rows < end)[:, None] & (c < HALF)[None, :]
        mask2 = (p + rows < end)[:, None] & (c + HALF < C)[None, :]
        at1 = _offset(n, first, p, hw, C, CHANNELS_LAST) + tile
        at2 = _offset(n, first + HALF, p, hw, C, CHANNELS_LAST) + tile
        x1 = tl.load(x_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        g1 = scale * tl.load(dy_ptr + at1, mask=mask1, other=0.0).to(tl.float32)
        g2 = scale * tl.load(dy_ptr + at2, mask=mask2, other=0.0).to(tl.float32)
        u1, keep1, lend1, q1 = _gates(x1, mean1, slope1, offset1, sharpness1, logit, beta, CHANNEL, SPATIAL)
        u2, keep2, lend2, q2 = _gates(x2, mean2, slope2, offset2, sharpness2, logit, beta, CHANNEL, SPATIAL)
        dx1 = g1 * keep1 + g2 * lend1 + a1[None, :] * u1 + b1[None, :]
        dx2 = g2 * keep2 + g1 * lend2 + a2[None, :] * u2 + b2[None, :]
        if CHANNEL:
            both = g1 + g2
            dx1 += slope1[None, :] * (lend1 * (1.0 - lend1) * x1 * both)
            dx2 += slope2[None, :] * (lend2 * (1.0 - lend2) * x2 * both)
        if SPATIAL:
            dx1 += 2.0 * sharpness1[None, :] * u1 * (q1 * (1.0 - q1) * x1 * g1)
            dx2 += 2.0 * sharpness2[None, :] * u2 * (q2 * (1.0 - q2) * x2 * g2)
        tl.store(dx_ptr + at1, dx1, mask=mask1)
        tl.store(dx_ptr + at2, dx2, mask=mask2)


@triton.jit
def _csfe_parameters_kernel(
    weight_ptr, bias_ptr, dz_ptr, dzx_ptr, dweight_ptr, dbias_ptr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of gamma and beta from the sums over all samples; one program, since w divides by the sum of gamma."""
    total = _sum_of(weight_ptr, C, BLOCK)
    gamma_sum = _away_from_zero(total)
    through_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        gamma = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dw = gamma * tl.load(dzx_ptr + c, mask=c < C, other=0.0) + beta * tl.load(dz_ptr + c, mask=c < C, other=0.0)
        through_sum += dw * gamma
    # A sum too near to zero was replaced by a constant, through which nothing flows.
    constant = tl.abs(total) < _SMALLEST_SUM
    dsum = tl.where(constant, 0.0, tl.sum(through_sum, axis=0) / (gamma_sum * gamma_sum))
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        gamma = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + c, mask=c < C, other=0.0)
        dzx = tl.load(dzx_ptr + c, mask=c < C, other=0.0)
        w = gamma / gamma_sum
        dw = gamma * dzx + beta * dz
        tl.store(dweight_ptr + c, w * dzx + dw / gamma_sum - dsum, mask=c < C)
        tl.store(dbias_ptr + c, w * dz, mask=c < C)


_WARPS = 4
_THREADS = 32 * _WARPS
_VECTOR, _SECTOR, _LINE = 16, 32, 128  # bytes: the widest load of a thread, what memory moves at least, a cache line
_FILL = 1024  # programs: enough to occupy a large GPU
_BLOCK = 1024  # elements of a block of per-channel values


class _Tiling(NamedTuple):
    """How a kernel cuts a map: into tiles, and the positions into chunks of tiles, one chunk per program."""

    block_hw: int
    block_c: int
    chunk: int
    chunks: int

    def grid(self, batch: int, channels: int) -> tuple[int, int]:
        return batch * triton.cdiv(channels, self.block_c), self.chunks

    def options(self) -> dict[str, int]:
        return {"BLOCK_HW": self.block_hw, "BLOCK_C": self.block_c, "num_warps": _WARPS}


@lru_cache(maxsize=1024)
def _tiling(
    batch: int, channels: int, hw: int, channels_last: bool, itemsize: int, elements: int, programs: int, turns: int
) -> _Tiling:
    """Cut a map of `channels` channels, or of as many pairs of them.

    Args:
        batch: N.
        channels: Channels of which each program takes a block.
        hw: Positions.
        channels_last: Whether channels lie next to each other, rather than positions.
        itemsize: Bytes of an element.
        elements: Elements of a tile per thread; more of them make wider loads and need more registers.
        programs: Wanted number of programs.
        turns: Least number of tiles in a chunk.
    """
    size = elements * _THREADS
    if channels_last:
        # The widest of the blocks that waste the fewest lanes on channels that are not there.
        widths = [width for width in (64, 32, 16, 8) if _SECTOR <= width * itemsize <= _LINE]
        block_c = min(widths, key=lambda width: triton.cdiv(channels, width) * width)
        block_hw = min(size // block_c, triton.next_power_of_2(hw))
    else:
        block_hw = min(32 * elements, triton.next_power_of_2(hw))  # a warp to each channel
        block_c = min(size // block_hw, triton.next_power_of_2(channels), 32)
    tiles = triton.cdiv(hw, block_hw)
    chunks = min(tiles // turns, programs // (batch * triton.cdiv(channels, block_c)))
    chunk = triton.cdiv(tiles, max(chunks, 1)) * block_hw
    return _Tiling(block_hw, block_c, chunk, triton.cdiv(hw, chunk))


def _tilings(x: Tensor, channels_last: bool) -> tuple[_Tiling, _Tiling, _Tiling, _Tiling]:
    """Tilings of the kernels of the statistics, the result, the sums and the gradient, in this order.

    Those that reduce cut the positions only where each part is long and there are few programs without: the parts have
    to be put together by another launch. Those of the backward pass keep more values per element, hence fewer elements.
    """
    batch, channels, height, width = x.shape
    pairs, hw, itemsize = (channels + 1) // 2, height * width, x.element_size()
    few, many = 4, _VECTOR // itemsize if channels_last else 4
    return (
        _tiling(batch, channels, hw, channels_last, itemsize, many, _FILL, 8),
        _tiling(batch, pairs, hw, channels_last, itemsize, many, 2 * _FILL, 1),
        _tiling(batch, pairs, hw, channels_last, itemsize, few, _FILL, 8),
        _tiling(batch, pairs, hw, channels_last, itemsize, few, 2 * _FILL, 1),
    )


@lru_cache(maxsize=1024)
def _grouping(channels: int, num_groups: int, block_c: int) -> dict[str, int]:
    """Sizes with which a program finds the moments of the groups that its block of channels touches."""
    size, half = channels // num_groups, (channels + 1) // 2
    starts = [start for origin in (0, half) for start in range(origin, origin + half, block_c)]
    groups = triton.next_power_of_2(max((start + block_c - 1) // size - start // size + 1 for start in starts))
    members = min(triton.next_power_of_2(size), max(_BLOCK // groups, 1))
    total = min(triton.next_power_of_2(channels), _BLOCK)
    return {"GROUP_SIZE": size, "BLOCK_GROUPS": groups, "BLOCK_MEMBERS": members, "BLOCK_SUM": total}


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    threshold: float,
    eps: float,
    spatial: bool,
    lambd: float,
    beta: float,
    correction: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run CFE (`spatial` false), SFE (no `weight` and `bias`) or `scale` times their sum.

    Returns:
        The result in dtype and memory format of `x`, and of each channel of each sample the mean and the sum of
        squared deviations, (N, C) in float32, which the backward pass needs.
    """
    channels_last = x.stride(1) == 1
    x, weight, bias = _as_map(x, channels_last), _as_vector(weight), _as_vector(bias)
    batch, channels, height, width = x.shape
    hw = height * width
    y = torch.empty_like(x)
    mean = x.new_empty((batch, channels), dtype=torch.float32)
    m2 = torch.empty_like(mean)  # an operator's results share no storage
    if x.numel() == 0:
        return y, mean, m2
    sizes = _sizes(channels, hw, channels_last)
    tiling, apply_tiling, _, _ = _tilings(x, channels_last)
    with torch.cuda.device_of(x):
        parts = (mean, m2)
        if tiling.chunks > 1:
            parts = x.new_empty((2, batch, tiling.chunks, channels), dtype=torch.float32).unbind()
        _csfe_stats_kernel[tiling.grid(batch, channels)](
            x, *parts, hw // sizes["HW_UNIT"], tiling.chunk, **sizes, **tiling.options()
        )
        if tiling.chunks > 1:
            block_parts = triton.next_power_of_2(tiling.chunks)
            block_c = max(_BLOCK // block_parts, 1)
            _csfe_merge_kernel[(batch, triton.cdiv(channels, block_c))](
                *parts, mean, m2, hw, tiling.chunk, tiling.chunks, channels,
                BLOCK_PARTS=block_parts, BLOCK_C=block_c, num_warps=_WARPS,
            )  # fmt: skip
        _csfe_forward_kernel[apply_tiling.grid(batch, (channels + 1) // 2)](
            x, y, weight, bias, mean, m2, hw // sizes["HW_UNIT"], apply_tiling.chunk,
            *_constants(threshold, eps, lambd, beta, hw - correction), scale,
            **sizes, SPATIAL=spatial, **_grouping(channels, num_groups, apply_tiling.block_c), **apply_tiling.options(),
        )  # fmt: skip
    return y, mean, m2


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    num_groups: int,
    threshold: float,
    eps: float,
    spatial: bool,
    lambd: float,
    beta: float,
    correction: int,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of what `launch_forward` computes, from its arguments and its moments.

    Returns:
        Those of `x`, `weight` and `bias` in their dtypes, that of `x` also in its memory format; None without `weight`
        and `bias`.
    """
    channels_last = x.stride(1) == 1
    x, dy = _as_map(x, channels_last), _as_map(dy, channels_last)
    weight, bias = _as_vector(weight), _as_vector(bias)
    batch, channels, height, width = x.shape
    hw = height * width
    dx = torch.empty_like(x)
    if x.numel() == 0:
        dweight, dbias = (None if parameter is None else torch.zeros_like(parameter) for parameter in (weight, bias))
        return dx, dweight, dbias
    sizes = _sizes(channels, hw, channels_last)
    constants = (*_constants(threshold, eps, lambd, beta, hw - correction), scale)
    _, _, tiling, apply_tiling = _tilings(x, channels_last)
    with torch.cuda.device_of(x):
        channel_sums = spatial_sums = None
        if weight is not None:
            channel_sums = x.new_empty((2, batch, tiling.chunks, channels), dtype=torch.float32)
        if spatial:
            spatial_sums = x.new_empty((2, batch, tiling.chunks, channels), dtype=torch.float32)
        _csfe_sums_kernel[tiling.grid(batch, (channels + 1) // 2)](
            dy, x, weight, bias, mean, m2, *_pair(channel_sums), *_pair(spatial_sums),
            hw // sizes["HW_UNIT"], tiling.chunk, *constants,
            **sizes, SPATIAL=spatial, **_grouping(channels, num_groups, tiling.block_c), **tiling.options(),
        )  # fmt: skip
        if tiling.chunks > 1:
            channel_sums = None if channel_sums is None else channel_sums.sum(2, keepdim=True)
            spatial_sums = None if spatial_sums is None else spatial_sums.sum(2, keepdim=True)
        _csfe_backward_kernel[apply_tiling.grid(batch, (channels + 1) // 2)](
            dy, x, dx, weight, bias, mean, m2, *_pair(channel_sums), *_pair(spatial_sums),
            hw // sizes["HW_UNIT"], apply_tiling.chunk, *constants,
            **sizes, SPATIAL=spatial, **_grouping(channels, num_groups, apply_tiling.block_c), **apply_tiling.options(),
        )  # fmt: skip
        if weight is None or bias is None or channel_sums is None:
            return dx, None, None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dz, dzx = channel_sums.sum((1, 2)).unbind()
        block = min(triton.next_power_of_2(channels), _BLOCK)
        _csfe_parameters_kernel[(1,)](weight, bias, dz, dzx, dweight, dbias, channels, BLOCK=block, num_warps=_WARPS)
    return dx, dweight, dbias


def _as_map(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _as_vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _sizes(channels: int, hw: int, channels_last: bool) -> dict[str, int]:
    return {"C": channels, "HW_UNIT": math.gcd(hw, _VECTOR), "CHANNELS_LAST": channels_last}


def _constants(threshold: float, eps: float, lambd: float, beta: float, divisor: int) -> tuple[float, ...]:
    return eps, math.log(threshold / (1 - threshold)), lambd, beta, float(max(divisor, 1))


def _pair(sums: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if sums is None else sums.unbind()
