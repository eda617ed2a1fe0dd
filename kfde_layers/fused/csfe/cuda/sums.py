"""The sums over the map that its gradient needs: the first pass of the backward direction."""

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
def gradient_terms(half, x, dy, dy_sum, open_below, sfe_exponent, WITH_CFE: tl.constexpr, WITH_SFE: tl.constexpr):
    """Return what each element adds to the sums: dz, dz u, de u and de u^2.

    dz is the gradient of CFE's logit; where the gate is open, it is zero, as weak is. de is spatial_slope times the
    gradient of SFE's score, which alone could overflow.
    """
    u, su, _, weak, sfe_gate = gates(half, x, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
    dz = (weak - weak * weak) * (x * dy_sum)
    deu = (sfe_gate - sfe_gate * sfe_gate) * (x * dy) * (su * -LN_2)
    return dz, dz * u, deu, deu * u


@triton.jit
def csfe_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    coefficients_ptr,
    dz_ptr,
    dzu_ptr,
    deu_ptr,
    deuu_ptr,
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
    """Sum the gradients of the moments over one chunk of the positions, for two blocks of channels.

    They are those of `gradient_terms`. Without their pointers, the pair of dz or that of de is left out.
    """
    hw = hw_units * HW_UNIT  # a product, so that the compiler knows what divides it
    HALF: tl.constexpr = (C + 1) // 2  # C is odd for SFE alone, which exchanges nothing
    BLOCKS: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    half1 = load_coefficients(mean_ptr, coefficients_ptr, n, c, c < HALF, C)
    half2 = load_coefficients(mean_ptr, coefficients_ptr, n, c + HALF, c + HALF < C, C)

    dz1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    dz2, dzu1, dzu2, deu1, deu2, deuu1, deuu2 = dz1, dz1, dz1, dz1, dz1, dz1, dz1
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
        dy_sum = dy1 + dy2
        dz, dzu, deu, deuu = gradient_terms(half1, x1, dy1, dy_sum, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        dz1, dzu1, deu1, deuu1 = dz1 + dz, dzu1 + dzu, deu1 + deu, deuu1 + deuu
        dz, dzu, deu, deuu = gradient_terms(half2, x2, dy2, dy_sum, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
        dz2, dzu2, deu2, deuu2 = dz2 + dz, dzu2 + dzu, deu2 + deu, deuu2 + deuu

    out = (n.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * C + c
    mask1 = c < HALF
    mask2 = c + HALF < C
    if dz_ptr is not None:
        tl.store(dz_ptr + out, tl.sum(dz1, axis=0) * SCALE, mask=mask1)
        tl.store(dz_ptr + out + HALF, tl.sum(dz2, axis=0) * SCALE, mask=mask2)
        tl.store(dzu_ptr + out, tl.sum(dzu1, axis=0) * SCALE, mask=mask1)
        tl.store(dzu_ptr + out + HALF, tl.sum(dzu2, axis=0) * SCALE, mask=mask2)
    if deu_ptr is not None:
        tl.store(deu_ptr + out, tl.sum(deu1, axis=0) * SCALE, mask=mask1)
        tl.store(deu_ptr + out + HALF, tl.sum(deu2, axis=0) * SCALE, mask=mask2)
        tl.store(deuu_ptr + out, tl.sum(deuu1, axis=0) * SCALE, mask=mask1)
        tl.store(deuu_ptr + out + HALF, tl.sum(deuu2, axis=0) * SCALE, mask=mask2)
