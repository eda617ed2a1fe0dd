"""Launch the kernels of CFE, SFE and CSFE."""

# pyright: reportMissingTypeStubs=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# Triton's launches take more than the kernel's parameters.

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kfde_layers.fused.csfe.cuda.backward import csfe_backward_kernel
from kfde_layers.fused.csfe.cuda.coefficients import csfe_coefficients_kernel, csfe_moment_gradients_kernel
from kfde_layers.fused.csfe.cuda.forward import csfe_forward_kernel
from kfde_layers.fused.csfe.cuda.gates import COEFFICIENTS
from kfde_layers.fused.csfe.cuda.parameters import csfe_parameters_kernel
from kfde_layers.fused.csfe.cuda.small import csfe_small_backward_kernel, csfe_small_forward_kernel
from kfde_layers.fused.csfe.cuda.statistics import csfe_statistics_kernel
from kfde_layers.fused.csfe.cuda.sums import csfe_sums_kernel
from kfde_layers.fused.csfe.cuda.tiling import Small, cut_into_groups, part_block, small_tiling, tilings
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
    batch, channels = x.shape[:2]
    y = torch.empty_like(x)
    mean = x.new_empty((batch, 2, channels), dtype=torch.float32)
    m2 = x.new_empty((batch, channels), dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, m2
    with torch.cuda.device_of(x):
        small = _small_tiling(x, weight, options)
        if small is None:
            _forward(x, y, weight, bias, mean, m2, options)
        else:
            csfe_small_forward_kernel[small.grid(batch)](
                x, y, weight, bias, mean, m2, **_small_arguments(x, options, small)
            )
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
    batch, channels = x.shape[:2]
    dx = torch.empty_like(x) if with_x else None
    if x.numel() == 0:
        asked = (weight, bias) if with_parameters else (None, None)
        dweight, dbias = (None if parameter is None else torch.zeros_like(parameter) for parameter in asked)
        return dx, dweight, dbias
    with torch.cuda.device_of(x):
        with_parameters = with_parameters and weight is not None
        # Sums of each sample, of dz and of dz times the normalised map.
        sample_sums = mean.new_empty((2, batch, channels)) if with_parameters else (None, None)
        small = _small_tiling(x, weight, options)
        if small is None:
            _backward(dy, x, dx, weight, bias, mean, m2, sample_sums, options)
        else:
            csfe_small_backward_kernel[small.grid(batch)](
                dy, x, dx, weight, bias, mean, m2, *sample_sums, **_small_arguments(x, options, small)
            )
        if weight is None or bias is None or not isinstance(sample_sums, Tensor):
            return dx, None, None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dz, dzx = sample_sums.sum(1)
        block = min(triton.next_power_of_2(channels), BLOCK)
        csfe_parameters_kernel[(1,)](weight, bias, dz, dzx, dweight, dbias, channels, BLOCK=block, num_warps=WARPS)
    return dx, dweight, dbias


def _forward(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor, options: CsfeOptions
) -> None:
    """Fill `y` and the moments, with one launch for each step."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    hw = height * width
    constants = sizes(channels, hw, channels_last)
    statistics, forward, _, _ = tilings(x, channels_last)
    parts = (mean, m2)
    if statistics.chunks > 1:
        shape = (batch, statistics.chunks)
        parts = (mean.new_empty((*shape, 2, channels)), m2.new_empty((*shape, channels)))
    csfe_statistics_kernel[statistics.grid(batch, channels)](
        x, *parts, hw // constants["HW_UNIT"], statistics.chunk, **constants, **statistics.options()
    )
    merged = (mean, m2) if statistics.chunks > 1 else (None, None)
    coefficients = _coefficients(*parts, *merged, weight, bias, options, hw, statistics.chunk, statistics.chunks)
    csfe_forward_kernel[forward.grid(batch, (channels + 1) // 2)](
        x, y, mean, coefficients, hw // constants["HW_UNIT"], forward.chunk, *_exponents(options),
        **constants, WITH_CFE=weight is not None, WITH_SFE=options.with_sfe, SCALE=options.scale, **forward.options(),
    )  # fmt: skip


def _backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    sample_sums: Tensor | tuple[None, None],
    options: CsfeOptions,
) -> None:
    """Fill `dx` and `sample_sums` where they are asked for, with one launch for each step."""
    channels_last = x.stride(1) == 1
    batch, channels, height, width = x.shape
    hw = height * width
    constants = sizes(channels, hw, channels_last)
    _, _, sums, backward = tilings(x, channels_last)
    flags = {"WITH_CFE": weight is not None, "WITH_SFE": options.with_sfe, "SCALE": options.scale}
    coefficients = _coefficients(mean, m2, None, None, weight, bias, options, hw, hw, 1)
    shape = (2, batch, sums.chunks, channels)
    cfe_sums = (None, None) if weight is None else mean.new_empty(shape)
    # The parameters' gradients need the sums of CFE alone.
    sfe_sums = mean.new_empty(shape) if options.with_sfe and dx is not None else (None, None)
    csfe_sums_kernel[sums.grid(batch, (channels + 1) // 2)](
        dy, x, mean, coefficients, *cfe_sums, *sfe_sums, hw // constants["HW_UNIT"], sums.chunk, *_exponents(options),
        **constants, **flags, **sums.options(),
    )  # fmt: skip
    moment_gradients = None if dx is None else mean.new_empty((batch, 2, channels))
    groups = cut_into_groups(channels, channels if weight is None else options.num_groups)
    csfe_moment_gradients_kernel[groups.grid(batch)](
        mean, m2, weight, *cfe_sums, *sfe_sums, *sample_sums, moment_gradients,
        hw, sums.chunks, options.eps, options.lambd, _divisor(options, hw),
        C=channels, **groups.options(), BLOCK_PARTS=part_block(sums.chunks, groups),
    )  # fmt: skip
    if dx is not None:
        csfe_backward_kernel[backward.grid(batch, (channels + 1) // 2)](
            dy, x, dx, mean, coefficients, moment_gradients,
            hw // constants["HW_UNIT"], backward.chunk, *_exponents(options),
            **constants, **flags, **backward.options(),
        )  # fmt: skip


def _coefficients(
    part_mean: Tensor,
    part_m2: Tensor,
    mean: Tensor | None,
    m2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: CsfeOptions,
    hw: int,
    chunk: int,
    parts: int,
) -> Tensor:
    """Return the coefficients of the gates, and fill `mean` and `m2`, from the moments of chunks of positions."""
    batch, channels = part_m2.shape[0], part_m2.shape[-1]
    coefficients = part_m2.new_empty((batch, COEFFICIENTS.value, channels))
    groups = cut_into_groups(channels, channels if weight is None else options.num_groups)
    csfe_coefficients_kernel[groups.grid(batch)](
        part_mean, part_m2, mean, m2, coefficients, weight, bias, hw, chunk, parts,
        options.eps, options.lambd, _divisor(options, hw),
        C=channels, **groups.options(), BLOCK_PARTS=part_block(parts, groups),
    )  # fmt: skip
    return coefficients


def _as_map(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _as_vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _divisor(options: CsfeOptions, hw: int) -> float:
    """Return what SFE's sum of squared deviations is divided by."""
    return float(max(hw - options.correction, 1))


def _exponents(options: CsfeOptions) -> tuple[float, float]:
    """Return the exponents `open_below` of CFE and `sfe_exponent` of SFE at the mean, as gates.py has them."""
    logit = math.log2(options.threshold / (1 - options.threshold))
    return -logit, -math.log2(math.e) * options.beta


def _small_tiling(x: Tensor, weight: Tensor | None, options: CsfeOptions) -> Small | None:
    return small_tiling(x.shape[1], None if weight is None else options.num_groups, x.shape[2] * x.shape[3])


def _small_arguments(x: Tensor, options: CsfeOptions, small: Small) -> dict[str, Any]:
    """Return what both kernels of small maps get after their tensors."""
    hw = x.shape[2] * x.shape[3]
    constants = sizes(x.shape[1], hw, x.stride(1) == 1)
    open_below, sfe_exponent = _exponents(options)
    return {
        **{"hw_units": hw // constants["HW_UNIT"], "eps": options.eps, "lambd": options.lambd},
        **{"divisor": _divisor(options, hw), "open_below": open_below, "sfe_exponent": sfe_exponent},
        **{**constants, "WITH_SFE": options.with_sfe, "SCALE": options.scale, **small.options()},
    }
