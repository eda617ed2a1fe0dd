"""The gates of CFE and SFE."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803  (constants of a kernel are in capitals)

import math

import triton
import triton.language as tl

# The gate of CFE is 1 / (1 + 2^(slope u + intercept)), that of SFE is 1 / (1 + 2^(spatial_slope u^2 + sfe_exponent)),
# where u = x - mean - mean_low. A power of two is one instruction. So the numbers are -log2(e) times those of sigmoids.
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
COEFFICIENTS = tl.constexpr(3)  # of each channel, stored as (N, COEFFICIENTS, C): slope, intercept and spatial_slope


@triton.jit
def load_coefficients(mean_ptr, coefficients_ptr, n, c, mask, C: tl.constexpr):
    """Return mean, mean_low, slope, intercept and spatial_slope of the channels `c` of a sample."""
    mean_ptr += n.to(tl.int64) * (2 * C) + c
    coefficients_ptr += n.to(tl.int64) * (COEFFICIENTS * C) + c
    mean = tl.load(mean_ptr, mask=mask, other=0.0)
    mean_low = tl.load(mean_ptr + C, mask=mask, other=0.0)
    slope = tl.load(coefficients_ptr, mask=mask, other=0.0)
    intercept = tl.load(coefficients_ptr + C, mask=mask, other=0.0)
    spatial_slope = tl.load(coefficients_ptr + 2 * C, mask=mask, other=0.0)
    return mean, mean_low, slope, intercept, spatial_slope


@triton.jit
def _inverse_of_one_plus_power(exponent):
    # In four instructions instead of nine. Where the power overflows to infinity, rsqrt returns the right value, zero.
    root = tl.rsqrt(1.0 + tl.exp2(exponent))
    return root * root


@triton.jit
def gates(coefficients, x, open_below, sfe_exponent, WITH_CFE: tl.constexpr, WITH_SFE: tl.constexpr):
    """Return u, spatial_slope u, keep = w1 + sfe_gate, weak = w2 of eq. (3), and sfe_gate; all [BLOCK_HW, BLOCK_C].

    CFE's gate is open where its exponent is below `open_below`.
    """
    mean, mean_low, slope, intercept, spatial_slope = coefficients
    u = (x - mean[None, :]) - mean_low[None, :]
    su = spatial_slope[None, :] * u
    keep, weak, sfe_gate = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    if WITH_CFE:
        exponent = slope[None, :] * u + intercept[None, :]
        r = _inverse_of_one_plus_power(exponent)
        is_open = exponent < open_below
        keep = tl.where(is_open, 1.0, r)
        weak = tl.where(is_open, 0.0, r)
    if WITH_SFE:
        sfe_gate = _inverse_of_one_plus_power(su * u + sfe_exponent)
        keep += sfe_gate
    return u, su, keep, weak, sfe_gate


@triton.jit
def results(
    half1, half2, x1, x2, open_below, sfe_exponent, WITH_CFE: tl.constexpr, WITH_SFE: tl.constexpr, SCALE: tl.constexpr
):
    """Return the results of two blocks of channels that exchange; `half1` and `half2` are their coefficients."""
    _, _, keep1, weak1, _ = gates(half1, x1, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
    _, _, keep2, weak2, _ = gates(half2, x2, open_below, sfe_exponent, WITH_CFE, WITH_SFE)
    y1 = x1 * keep1
    y2 = x2 * keep2
    if WITH_CFE:  # without it, a NaN must stay in its channel
        y1 += x2 * weak2
        y2 += x1 * weak1
    if SCALE != 1.0:
        y1 *= SCALE
        y2 *= SCALE
    return y1, y2
