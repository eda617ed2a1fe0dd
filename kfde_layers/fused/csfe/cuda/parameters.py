"""The gradients of gamma and beta, a small last pass of the backward direction."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803  (constants of a kernel are in capitals)

import triton
import triton.language as tl

from kfde_layers.fused.csfe.cuda.coefficients import SMALLEST_SUM, away_from_zero, sum_of


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
