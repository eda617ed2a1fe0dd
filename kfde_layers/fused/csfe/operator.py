"""The operator of the fused CFE, SFE and CSFE: its schema, its implementation for each device, its gradients.

The backward pass takes the inputs and three numbers per channel, and computes everything else again.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kfde_layers._impl import exporting, tracing, transforming
from kfde_layers.fused.batching import batch_one_by_one, batch_over_samples
from kfde_layers.fused.csfe import blocks, cpu
from kfde_layers.fused.csfe.moments import csfe_from_moments
from kfde_layers.fused.csfe.options import OPTIONS_SCHEMA, CsfeOptions
from kfde_layers.fused.eager import needs_gradient, nobody_looks
from kfde_layers.fused.needed import drop, fill
from kfde_layers.fused.second_order import differentiable_gradients
from kfde_layers.fused.transforms import Rules, apply_transformed
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast

_ALL = (True, True)  # gradients: those of x and of the parameters


def fused(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions, eager: bool | None = None
) -> Tensor:
    """Return `scale * (CFE(x) + SFE(x))` in the dtype and memory format of `x`.

    `eager` leaves the operator out or takes it, by default as nobody or somebody looks.

    A tracer sees the plain PyTorch equations instead of the operator: an exporter, because other software must run the
    file that it writes; the compiler on CPU, because Inductor fuses them better.
    """
    if exporting() or (tracing() and not x.is_cuda):
        return _equations(options, x, weight, bias)
    if transforming():
        parameters = () if weight is None or bias is None else (weight, bias)
        return apply_transformed(_rules(options, with_cfe=bool(parameters)), x, *parameters)
    if nobody_looks(x, weight, bias) if eager is None else eager:
        if needs_gradient(x, weight, bias):
            return cast(Tensor, _Eager.apply(x, weight, bias, options))
        return cpu.forward(dense(x), weight, bias, options)[0]
    return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]


def _equations(options: CsfeOptions, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the same in plain PyTorch."""
    return as_input(csfe_from_moments(upcast(x), weight, bias, options), x)


def _rules(options: CsfeOptions, with_cfe: bool) -> Rules:
    absent = () if with_cfe else (None, None)

    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.kfde.csfe_fused(x, *parameters, *absent, *options)

    def backward(dy: Tensor, x: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        *parameters, mean, m2 = saved
        gradients = torch.ops.kfde.csfe_fused_backward(dy, x, *parameters, *absent, mean, m2, *options, *_ALL)
        return gradients[: 1 + len(parameters)]

    return Rules(forward, backward, partial(_equations, options))


@torch.library.custom_op(
    "kfde::csfe_fused",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor? weight, Tensor? bias, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _fake_forward(x)
    x = dense(x)
    y, *moments = cpu.forward(x, weight, bias, CsfeOptions(*options))
    mean, m2 = moments or blocks.moments_of(x)
    return y, mean, m2


def _forward_on_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from kfde_layers.fused.csfe.cuda.launch import launch_forward  # Triton loads here, at first use

    return launch_forward(dense(x), weight, bias, CsfeOptions(*options))


torch.library.register_kernel(_forward, "cuda", _forward_on_cuda)


@_forward.register_fake
def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, channels = x.shape[:2]
    mean, m2 = x.new_empty((batch, 2, channels), dtype=dtype), x.new_empty((batch, channels), dtype=dtype)
    return torch.empty_like(x, memory_format=memory_format(x)), mean, m2


@torch.library.custom_op(
    "kfde::csfe_fused_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor m2, {OPTIONS_SCHEMA}, "
    "bool with_x, bool with_parameters) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, with_x, with_parameters = rest
    if x.numel() == 0:
        asked = (x if with_x else None, *((weight, bias) if with_parameters else (None, None)))
        return fill(x, (tensor if tensor is None else torch.zeros_like(tensor) for tensor in asked))
    return fill(x, _backward_on_cpu(dy, x, weight, bias, (mean, m2), CsfeOptions(*options), with_x, with_parameters))


def _backward_on_cpu(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return cpu.backward(dy.contiguous(memory_format=memory_format(x)), dense(x), *rest)


def _backward_on_cuda(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    from kfde_layers.fused.csfe.cuda.launch import launch_backward

    *options, with_x, with_parameters = rest
    gradients = launch_backward(dy, dense(x), weight, bias, mean, m2, CsfeOptions(*options), with_x, with_parameters)
    return fill(x, gradients)


torch.library.register_kernel(_backward, "cuda", _backward_on_cuda)


@_backward.register_fake
def _fake_backward(_: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    with_x, with_parameters = rest[-2:]
    dx = torch.empty_like(x, memory_format=memory_format(x)) if with_x else None
    parameters = (weight, bias) if with_parameters else (None, None)
    return fill(x, (dx, *(tensor if tensor is None else torch.empty_like(tensor) for tensor in parameters)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *options = inputs
    ctx.set_materialize_grads(False)  # the moments have no gradient, and zeros would cost a launch each
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.options = CsfeOptions(*options)


def _gradients(ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor | None, ...]]) -> Iterable[Tensor | None]:
    """Return the gradients of x, weight and bias that are asked for, from what `ctx` has saved."""
    x, weight, bias, *saved = ctx.saved_tensors
    if torch.is_grad_enabled():  # `create_graph=True`: use the differentiable equations
        return differentiable_gradients(partial(_equations, ctx.options), (x, weight, bias), dy)
    with_x, with_weight, with_bias = ctx.needs_input_grad[:3]
    return drop(ctx, backward(dy, x, weight, bias, saved, ctx.options, with_x, with_weight or with_bias))


def _operator_gradients(ctx: Any, dy: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    return *_gradients(ctx, dy, _backward_by_operator), *(None for _ in ctx.options)


def _backward_by_operator(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, saved, options, with_x, with_parameters = rest
    saved = saved or blocks.moments_of(dense(x))
    return torch.ops.kfde.csfe_fused_backward(dy, x, *parameters, *saved, *options, with_x, with_parameters)


_forward.register_autograd(_operator_gradients, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without an operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> Tensor:
        y, *saved = cpu.forward(dense(x), weight, bias, options)
        ctx.save_for_backward(x, weight, bias, *saved)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = upstream
        backward = _backward_on_cpu if nobody_looks(dy) else _backward_by_operator  # vmap knows the operator's rule
        return *_gradients(ctx, dy, backward), None


batch_over_samples(_forward, per_sample=(0,))  # x
batch_one_by_one(_backward)


@register_flop_formula([torch.ops.kfde.csfe_fused, torch.ops.kfde.csfe_fused_backward])
def _flops(*_: Any, **__: Any) -> int:
    """Count nothing: PyTorch counts convolutions and products of matrices alone, also in the reference."""
    return 0
