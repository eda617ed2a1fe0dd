"""The two operators of the fused MFDF: their schemas, their implementations for each device, their gradients, and
their rules for `torch.vmap` and for counters of operations.

`mean_of_convolution` is the mean over all positions of a depthwise convolution. `merged_convolution` is a depthwise
convolution by merged kernels, one per sample and channel. Neither makes the map of a branch, and the backward passes
take the inputs alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kfde_layers._impl import transforming
from kfde_layers.fused.batching import batch_one_by_one, batch_over_samples
from kfde_layers.fused.eager import needs_gradient, nobody_looks
from kfde_layers.fused.mfdf import cpu, flops
from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.merging import convolve_each, mean_by_coverage, merge_kernels, stack_kernels
from kfde_layers.fused.needed import drop, fill
from kfde_layers.fused.second_order import differentiable_gradients
from kfde_layers.fused.transforms import Rules, apply_transformed
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast, without_autocast


def fused(
    x: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor] | None,
    attention: Callable[[Tensor], Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """Return MFDF of `x` in its dtype and memory format; `attention` maps p (N, C) to alpha (N, K, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    stacked_kernels, tap_spacing = stack_kernels(branch_weights, dilations, dtype)
    p = _mean(x, stacked_kernels.sum(dim=0), tap_spacing)
    if branch_biases is None:
        alpha = attention(p)
        merged_bias = torch.zeros_like(p)
    else:
        biases = torch.stack(list(branch_biases)).to(dtype)
        alpha = attention(p + biases.sum(dim=0))
        merged_bias = (alpha * biases).sum(dim=1)
    return _convolution(x, alpha, stacked_kernels, merged_bias, tap_spacing)


def _mean(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    if transforming():
        return apply_transformed(_mean_rules(tap_spacing), x, kernel)
    if nobody_looks(x, kernel):
        if needs_gradient(x, kernel):
            return cast(Tensor, _EagerMean.apply(x, kernel, tap_spacing))
        return cpu.mean_of_convolution(x, kernel, tap_spacing)
    return mean_of_convolution(x, kernel, tap_spacing)


def _convolution(x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int) -> Tensor:
    tensors = x, alpha, stacked_kernels, merged_bias
    if transforming():
        return apply_transformed(_merged_rules(tap_spacing), *tensors)
    if nobody_looks(*tensors):
        if needs_gradient(*tensors):
            return cast(Tensor, _EagerConvolution.apply(*tensors, tap_spacing))
        return cpu.merged_convolution(*tensors, tap_spacing)
    return merged_convolution(x, alpha, stacked_kernels, merged_bias, tap_spacing)


@torch.library.custom_op("kfde::mean_of_convolution", mutates_args=(), device_types="cpu")
def mean_of_convolution(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    """Return the mean over all positions of x convolved with `kernel` (C, k, k), whose taps are some px apart."""
    return cpu.mean_of_convolution(x, kernel, tap_spacing)


@torch.library.custom_op(
    "kfde::mean_of_convolution_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dp, Tensor x, Tensor kernel, int tap_spacing, bool with_x, bool with_kernel) -> (Tensor, Tensor)",
)
def _mean_backward(
    dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int, with_x: bool, with_kernel: bool
) -> tuple[Tensor, ...]:
    return fill(x, cpu.mean_of_convolution_backward(dp, x, kernel, tap_spacing, with_x, with_kernel))


@torch.library.custom_op("kfde::merged_convolution", mutates_args=(), device_types="cpu")
def merged_convolution(
    x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int
) -> Tensor:
    """Return each sample convolved by its kernels sum_k alpha_kc W_kc, plus its bias (N, C)."""
    return cpu.merged_convolution(x, alpha, stacked_kernels, merged_bias, tap_spacing)


@torch.library.custom_op(
    "kfde::merged_convolution_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor x, Tensor alpha, Tensor stacked_kernels, int tap_spacing, bool with_x, "
    "bool with_alpha, bool with_kernels, bool with_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _merged_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, tap_spacing: int, *asked: bool
) -> tuple[Tensor, ...]:
    return fill(x, cpu.merged_convolution_backward(dy, x, alpha, stacked_kernels, tap_spacing, Asked(*asked)))


def _mean_on_cuda(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    from kfde_layers.fused.mfdf.cuda.launch import launch_mean  # Triton loads here, at first use

    return launch_mean(dense(x), kernel, tap_spacing)


def _mean_backward_on_cuda(
    dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int, with_x: bool, with_kernel: bool
) -> tuple[Tensor, ...]:
    from kfde_layers.fused.mfdf.cuda.launch import launch_mean_backward

    return fill(x, launch_mean_backward(dp, dense(x), kernel, tap_spacing, with_x, with_kernel))


def _merged_on_cuda(x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int) -> Tensor:
    from kfde_layers.fused.mfdf.cuda.launch import launch_merged

    return launch_merged(dense(x), alpha, stacked_kernels, merged_bias, tap_spacing)


def _merged_backward_on_cuda(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, tap_spacing: int, *asked: bool
) -> tuple[Tensor, ...]:
    from kfde_layers.fused.mfdf.cuda.launch import launch_merged_backward

    dy = dy.contiguous(memory_format=memory_format(x))
    return fill(x, launch_merged_backward(dy, dense(x), alpha, stacked_kernels, tap_spacing, Asked(*asked)))


torch.library.register_kernel(mean_of_convolution, "cuda", _mean_on_cuda)
torch.library.register_kernel(_mean_backward, "cuda", _mean_backward_on_cuda)
torch.library.register_kernel(merged_convolution, "cuda", _merged_on_cuda)
torch.library.register_kernel(_merged_backward, "cuda", _merged_backward_on_cuda)


def _fake_map(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@mean_of_convolution.register_fake
def _fake_mean(x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
    return kernel.new_empty(x.shape[:2])


@_mean_backward.register_fake
def _fake_mean_backward(
    dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int, with_x: bool, with_kernel: bool
) -> tuple[Tensor, ...]:
    return fill(x, (_fake_map(x) if with_x else None, kernel.new_empty(kernel.shape) if with_kernel else None))


@merged_convolution.register_fake
def _fake_merged(x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int) -> Tensor:
    return _fake_map(x)


@_merged_backward.register_fake
def _fake_merged_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, tap_spacing: int, *asked: bool
) -> tuple[Tensor, ...]:
    dalpha, dstacked = alpha.new_empty(alpha.shape), stacked_kernels.new_empty(stacked_kernels.shape)
    gradients = _fake_map(x), dalpha, dstacked, alpha.new_empty(x.shape[:2])
    return fill(x, (gradient if wanted else None for gradient, wanted in zip(gradients, asked, strict=True)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: object = None) -> None:
    *tensors, ctx.tap_spacing = inputs
    ctx.save_for_backward(*tensors)


def _mean_equations(tap_spacing: int, x: Tensor, kernel: Tensor) -> Tensor:
    """Return the same as `mean_of_convolution` in plain PyTorch."""
    with without_autocast(x):
        return mean_by_coverage(upcast(x), kernel, tap_spacing)


def _merged_equations(
    tap_spacing: int, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor
) -> Tensor:
    """Return the same as `merged_convolution` in plain PyTorch."""
    with without_autocast(x):
        merged_kernels = merge_kernels(alpha, stacked_kernels)
        return as_input(convolve_each(upcast(x), merged_kernels, merged_bias, tap_spacing), x)


def _mean_gradients(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel = ctx.saved_tensors
    if torch.is_grad_enabled():  # `create_graph=True`: use the differentiable equations
        return *differentiable_gradients(partial(_mean_equations, ctx.tap_spacing), (x, kernel), dp), None
    with_x, with_kernel, _ = ctx.needs_input_grad
    backward = (
        cpu.mean_of_convolution_backward if nobody_looks(dp, x, kernel) else torch.ops.kfde.mean_of_convolution_backward
    )
    return *drop(ctx, backward(dp, x, kernel, ctx.tap_spacing, with_x, with_kernel)), None


def _merged_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *differentiable_gradients(partial(_merged_equations, ctx.tap_spacing), tensors, dy), None
    x, alpha, stacked_kernels, _ = tensors
    *asked, _ = ctx.needs_input_grad
    if nobody_looks(dy, *tensors):
        found = cpu.merged_convolution_backward(dy, x, alpha, stacked_kernels, ctx.tap_spacing, Asked(*asked))
    else:
        backward = torch.ops.kfde.merged_convolution_backward
        found = backward(dy, x, alpha, stacked_kernels, ctx.tap_spacing, *asked)
    return *drop(ctx, found), None


class _EagerMean(torch.autograd.Function):
    """The mean of a convolution without its operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, tap_spacing: int) -> Tensor:
        _save(ctx, (x, kernel, tap_spacing))
        return cpu.mean_of_convolution(x, kernel, tap_spacing)

    backward = staticmethod(_mean_gradients)  # pyright: ignore[reportAssignmentType]


class _EagerConvolution(torch.autograd.Function):
    """The convolution by merged kernels without its operator."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor, tap_spacing: int
    ) -> Tensor:
        _save(ctx, (x, alpha, stacked_kernels, merged_bias, tap_spacing))
        return cpu.merged_convolution(x, alpha, stacked_kernels, merged_bias, tap_spacing)

    backward = staticmethod(_merged_gradients)  # pyright: ignore[reportAssignmentType]


def _mean_rules(tap_spacing: int) -> Rules:
    def forward(x: Tensor, kernel: Tensor) -> tuple[Tensor]:
        return (torch.ops.kfde.mean_of_convolution(x, kernel, tap_spacing),)

    def backward(dp: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.kfde.mean_of_convolution_backward(dp, x, kernel, tap_spacing, True, True)

    return Rules(forward, backward, partial(_mean_equations, tap_spacing))


def _merged_rules(tap_spacing: int) -> Rules:
    def forward(x: Tensor, alpha: Tensor, stacked_kernels: Tensor, merged_bias: Tensor) -> tuple[Tensor]:
        return (torch.ops.kfde.merged_convolution(x, alpha, stacked_kernels, merged_bias, tap_spacing),)

    def backward(dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.kfde.merged_convolution_backward(dy, x, alpha, stacked_kernels, tap_spacing, *Asked())

    return Rules(forward, backward, partial(_merged_equations, tap_spacing))


mean_of_convolution.register_autograd(_mean_gradients, setup_context=_save)
merged_convolution.register_autograd(_merged_gradients, setup_context=_save)

batch_over_samples(mean_of_convolution, per_sample=(0,))  # x
batch_one_by_one(_mean_backward)
batch_over_samples(merged_convolution, per_sample=(0, 1, 3))  # x, alpha, merged_bias
batch_one_by_one(_merged_backward)

register_flop_formula(torch.ops.kfde.mean_of_convolution)(flops.mean_of_convolution)
register_flop_formula(torch.ops.kfde.mean_of_convolution_backward)(flops.mean_of_convolution_backward)
register_flop_formula(torch.ops.kfde.merged_convolution)(flops.merged_convolution)
register_flop_formula(torch.ops.kfde.merged_convolution_backward)(flops.merged_convolution_backward)
