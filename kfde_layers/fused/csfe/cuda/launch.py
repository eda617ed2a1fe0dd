"""Launch the kernels of CFE, SFE and CSFE."""

# pyright: reportMissingTypeStubs=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Triton's launches take more than the kernel's parameters.

import math

import torch
import triton
from torch import Tensor

from kfde_layers.fused.csfe.cuda.backward import csfe_backward_kernel, csfe_parameters_kernel
from kfde_layers.fused.csfe.cuda.forward import csfe_forward_kernel
from kfde_layers.fused.csfe.cuda.statistics import csfe_combine_kernel, csfe_statistics_kernel
from kfde_layers.fused.csfe.cuda.sums import csfe_sums_kernel
from kfde_layers.fused.csfe.cuda.tiling import group_sizes, tilings
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.fused.maps import BLOCK, WARPS, sizes


def launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Run CFE, SFE (no `weight` and `bias`) or the scaled sum of both.

    Returns:
        The result in dtype and memory format of `x`; then the moments of each channel of each sample, in float32, which
        the backward pass needs: the mean in two parts, (N, 2, C), and the sum of squared deviations, (N, C).
    """
    channels_last = x.stride(1) == 1
    x, weight, bias = _as_map(x, channels_last), _as_vector(weight), _as_vector(bias)
    batch, channels, height, width = x.shape
    hw = height * width
    y = torch.empty_like(x)
    mean = x.new_empty((batch, 2, channels), dtype=torch.float32)
    m2 = x.new_empty((batch, channels), dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, m2
    constants = sizes(channels, hw, channels_last)
    statistics, forward, _, _ = tilings(x, channels_last)
    with torch.cuda.device_of(x):
        parts = (mean, m2)
        if statistics.chunks > 1:
            shape = (batch, statistics.chunks)
            parts = (mean.new_empty((*shape, 2, channels)), m2.new_empty((*shape, channels)))
        csfe_statistics_kernel[statistics.grid(batch, channels)](
            x, *parts, hw // constants["HW_UNIT"], statistics.chunk, **constants, **statistics.options()
        )
        if statistics.chunks > 1:
            block_parts = triton.next_power_of_2(statistics.chunks)
            block_c = max(BLOCK // block_parts, 1)
            csfe_combine_kernel[(batch, triton.cdiv(channels, block_c))](
                *parts, mean, m2, hw, statistics.chunk, statistics.chunks, channels,
                BLOCK_PARTS=block_parts, BLOCK_C=block_c, num_warps=WARPS,
            )  # fmt: skip
        csfe_forward_kernel[forward.grid(batch, (channels + 1) // 2)](
            x, y, weight, bias, mean, m2, hw // constants["HW_UNIT"], forward.chunk, *_numbers(options, hw),
            **constants, WITH_SFE=options.with_sfe,
            **group_sizes(channels, options.num_groups, forward.block_c), **forward.options(),
        )  # fmt: skip
    return y, mean, m2


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    options: CsfeOptions,
    with_x: bool,
    with_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Find the gradients of what `launch_forward` computes, from its arguments and its moments.

    Returns:
        The gradients of `x`, and of `weight` and `bias`, that are asked for, in their dtypes, that of `x` also in its
        memory format; None for the others.
    """
    channels_last = x.stride(1) == 1
    x, dy = _as_map(x, channels_last), _as_map(dy, channels_last)
    weight, bias = _as_vector(weight), _as_vector(bias)
    batch, channels, height, width = x.shape
    hw = height * width
    dx = torch.empty_like(x) if with_x else None
    if x.numel() == 0:
        asked = (weight, bias) if with_parameters else (None, None)
        dweight, dbias = (None if parameter is None else torch.zeros_like(parameter) for parameter in asked)
        return dx, dweight, dbias
    constants = sizes(channels, hw, channels_last)
    _, _, sums, backward = tilings(x, channels_last)
    with torch.cuda.device_of(x):
        cfe_sums = sfe_sums = None
        if weight is not None:
            cfe_sums = x.new_empty((2, batch, sums.chunks, channels), dtype=torch.float32)
        with_sfe = options.with_sfe and with_x  # the parameters' gradients need the sums of CFE alone
        if with_sfe:
            sfe_sums = x.new_empty((2, batch, sums.chunks, channels), dtype=torch.float32)
        csfe_sums_kernel[sums.grid(batch, (channels + 1) // 2)](
            dy, x, weight, bias, mean, m2, *_pair(cfe_sums), *_pair(sfe_sums),
            hw // constants["HW_UNIT"], sums.chunk, *_numbers(options, hw),
            **constants, WITH_SFE=with_sfe,
            **group_sizes(channels, options.num_groups, sums.block_c), **sums.options(),
        )  # fmt: skip
        if sums.chunks > 1:
            cfe_sums = None if cfe_sums is None else cfe_sums.sum(2, keepdim=True)
            sfe_sums = None if sfe_sums is None else sfe_sums.sum(2, keepdim=True)
        if dx is not None:
            csfe_backward_kernel[backward.grid(batch, (channels + 1) // 2)](
                dy, x, dx, weight, bias, mean, m2, *_pair(cfe_sums), *_pair(sfe_sums),
                hw // constants["HW_UNIT"], backward.chunk, *_numbers(options, hw),
                **constants, WITH_SFE=options.with_sfe,
                **group_sizes(channels, options.num_groups, backward.block_c), **backward.options(),
            )  # fmt: skip
        if weight is None or bias is None or cfe_sums is None or not with_parameters:
            return dx, None, None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dz, dzx = cfe_sums.sum((1, 2)).unbind()
        block = min(triton.next_power_of_2(channels), BLOCK)
        csfe_parameters_kernel[(1,)](weight, bias, dz, dzx, dweight, dbias, channels, BLOCK=block, num_warps=WARPS)
    return dx, dweight, dbias


def _as_map(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _as_vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _numbers(options: CsfeOptions, hw: int) -> tuple[float, ...]:
    """Return the kernels' arguments eps, logit, lambd, beta, divisor and scale."""
    logit = math.log(options.threshold / (1 - options.threshold))
    divisor = float(max(hw - options.correction, 1))
    return options.eps, logit, options.lambd, options.beta, divisor, options.scale


def _pair(sums: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if sums is None else sums.unbind()
