"""The operator of the fused CFE, SFE and CSFE: its schema, its implementation for each device, its gradients.

The backward pass takes the inputs and three numbers per channel, and computes everything else again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kfde_layers._impl import exporting, tracing, transforming
from kfde_layers.fused.batching import batch_one_by_one, batch_over_samples
from kfde_layers.fused.csfe import cpu
from kfde_layers.fused.csfe.moments import Moments, csfe_from_moments
from kfde_layers.fused.csfe.options import OPTIONS_SCHEMA, CsfeOptions
from kfde_layers.fused.needed import drop, fill
from kfde_layers.fused.second_order import differentiable_gradients
from kfde_layers.fused.transforms import Rules, apply_transformed
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast

_ALL = (True, True)  # gradients: those of x and of the parameters


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> Tensor:
    """Return `scale * (CFE(x) + SFE(x))` in the dtype and memory format of `x`.

    A tracer sees the plain PyTorch equations instead of the operator: an exporter, because other software must run the
    file that it writes; the compiler on CPU, because Inductor fuses them better.
    """
    if exporting() or (tracing() and not x.is_cuda):
        return _equations(options, x, weight, bias)
    if transforming():
        parameters = () if weight is None or bias is None else (weight, bias)
        return apply_transformed(_rules(options, with_cfe=bool(parameters)), x, *parameters)
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
    return cpu.forward(dense(x), weight, bias, CsfeOptions(*options))


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
    x = dense(x)
    dy = dy.contiguous(memory_format=memory_format(x))
    if x.numel() == 0:
        asked = (x if with_x else None, *((weight, bias) if with_parameters else (None, None)))
        return fill(x, (tensor if tensor is None else torch.zeros_like(tensor) for tensor in asked))
    moments = Moments(mean[:, 0], mean[:, 1], m2, x.shape[2] * x.shape[3])
    return fill(x, cpu.backward(dy, x, weight, bias, moments, CsfeOptions(*options), with_x, with_parameters))


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


def _gradients(ctx: Any, dy: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, m2 = ctx.saved_tensors
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # `create_graph=True`: use the differentiable equations
        gradients = differentiable_gradients(partial(_equations, ctx.options), (x, weight, bias), dy)
    else:
        with_x, with_weight, with_bias = ctx.needs_input_grad[:3]
        asked = with_x, with_weight or with_bias
        found = torch.ops.kfde.csfe_fused_backward(dy, x, weight, bias, mean, m2, *ctx.options, *asked)
        gradients = drop(ctx, found)
    return *gradients, *(None for _ in ctx.options)


_forward.register_autograd(_gradients, setup_context=_setup_context)

batch_over_samples(_forward, per_sample=(0,))  # x
batch_one_by_one(_backward)


@register_flop_formula([torch.ops.kfde.csfe_fused, torch.ops.kfde.csfe_fused_backward])
def _flops(*_: Any, **__: Any) -> int:
    """Count nothing: PyTorch counts convolutions and products of matrices alone, also in the reference."""
    return 0
