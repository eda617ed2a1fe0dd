"""The sums over the map that its gradient needs: the first pass of the backward direction."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.gates import coefficients_of_both, gates
from kfde_layers.fused.maps import STAGES, address, tile


@triton.jit
def csfe_sums_kernel(
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
    WITH_SFE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the gradients of the moments over one chunk of the positions, for two blocks of channels.

    dz is the gradient of CFE's logit: its sum, and its sum times the normalised map. de is spatial_slope times the
    gradient of SFE's score, which alone could overflow: its sums times the deviation u and times u^2.
    """
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    WITH_CFE: tl.constexpr = weight_ptr is not None
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    _gamma_sum, half1, half2 = coefficients_of_both(
        mean_ptr, m2_ptr, weight_ptr, bias_ptr, n, first, hw, eps, lambd, divisor,
        C, GROUP_SIZE, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_SUM, BLOCK_C,
    )  # fmt: skip
    mean1, mean_low1, slope1, intercept1, spatial_slope1, mean_offset1, inverse_std1 = half1
    mean2, mean_low2, slope2, intercept2, spatial_slope2, mean_offset2, inverse_std2 = half2

    dz1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dz2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dzu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dzu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deuu1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    deuu2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    offsets = tile(hw, C, CHANNELS_LAST, BLOCK_HW, BLOCK_C)
    rows = tl.arange(0, BLOCK_HW)
    begin = tl.program_id(1) * chunk
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
        u1, _, weak1, sfe_gate1 = gates(
            x1, mean1, mean_low1, slope1, intercept1, spatial_slope1, logit, beta, WITH_CFE, WITH_SFE
        )
        u2, _, weak2, sfe_gate2 = gates(
            x2, mean2, mean_low2, slope2, intercept2, spatial_slope2, logit, beta, WITH_CFE, WITH_SFE
        )
        if WITH_CFE:
            dy_sum = dy1 + dy2
            t1 = weak1 * (1.0 - weak1) * x1 * dy_sum  # dz; where the gate is open, weak is zero, and so is dz
            t2 = weak2 * (1.0 - weak2) * x2 * dy_sum
            dz1 += t1
            dz2 += t2
            dzu1 += t1 * u1
            dzu2 += t2 * u2
        if WITH_SFE:
            t1 = sfe_gate1 * (1.0 - sfe_gate1) * x1 * dy1 * (spatial_slope1[None, :] * u1)
            t2 = sfe_gate2 * (1.0 - sfe_gate2) * x2 * dy2 * (spatial_slope2[None, :] * u2)
            deu1 += t1
            deu2 += t2
            deuu1 += t1 * u1
            deuu2 += t2 * u2

    out = (n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
    mask1 = c < HALF
    mask2 = c + HALF < C
    if WITH_CFE:
        s1 = scale * tl.sum(dz1, axis=0)
        s2 = scale * tl.sum(dz2, axis=0)
        tl.store(dz_ptr + out, s1, mask=mask1)
        tl.store(dz_ptr + out + HALF, s2, mask=mask2)
        tl.store(dzx_ptr + out, inverse_std1 * (scale * tl.sum(dzu1, axis=0) + mean_offset1 * s1), mask=mask1)
        tl.store(dzx_ptr + out + HALF, inverse_std2 * (scale * tl.sum(dzu2, axis=0) + mean_offset2 * s2), mask=mask2)
    if WITH_SFE:
        tl.store(deu_ptr + out, scale * tl.sum(deu1, axis=0), mask=mask1)
        tl.store(deu_ptr + out + HALF, scale * tl.sum(deu2, axis=0), mask=mask2)
        tl.store(deuu_ptr + out, scale * tl.sum(deuu1, axis=0), mask=mask1)
        tl.store(deuu_ptr + out + HALF, scale * tl.sum(deuu2, axis=0), mask=mask2)
