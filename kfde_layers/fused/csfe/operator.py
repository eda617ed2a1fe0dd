"""The operator of the fused CFE, SFE and CSFE: its schema, its implementation for each device, its gradients.

The backward pass takes the inputs and three numbers per channel, and computes everything else again.
"""

from typing import Any

import torch
from torch import Tensor

from kfde_layers._impl import exporting, tracing
from kfde_layers.fused.csfe import cpu
from kfde_layers.fused.csfe.moments import Moments, csfe_from_moments
from kfde_layers.fused.csfe.options import OPTIONS_SCHEMA, CsfeOptions
from kfde_layers.fused.second_order import differentiable_gradients
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: CsfeOptions) -> Tensor:
    """Return `scale * (CFE(x) + SFE(x))` in the dtype and memory format of `x`.

    A tracer sees the plain PyTorch equations instead of the operator: an exporter, because other software must run the
    file that it writes; the compiler on CPU, because Inductor fuses them better.
    """
    if exporting() or (tracing() and not x.is_cuda):
        return as_input(csfe_from_moments(upcast(x), weight, bias, options), x)
    return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]


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
    schema=f"(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor m2, {OPTIONS_SCHEMA}) -> Tensor[]",
)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor, *options: Any
) -> list[Tensor]:
    x = dense(x)
    dy = dy.contiguous(memory_format=memory_format(x))
    if x.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in (x, weight, bias) if tensor is not None]
    moments = Moments(mean[:, 0], mean[:, 1], m2, x.shape[2] * x.shape[3])
    gradients = cpu.backward(dy, x, weight, bias, moments, CsfeOptions(*options))
    return [gradient for gradient in gradients if gradient is not None]


def _backward_on_cuda(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, m2: Tensor, *options: Any
) -> list[Tensor]:
    from kfde_layers.fused.csfe.cuda.launch import launch_backward

    gradients = launch_backward(dy, dense(x), weight, bias, mean, m2, CsfeOptions(*options))
    return [gradient for gradient in gradients if gradient is not None]


torch.library.register_kernel(_backward, "cuda", _backward_on_cuda)


@_backward.register_fake
def _fake_backward(_: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *__: Any) -> list[Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    return [dx] if weight is None or bias is None else [dx, torch.empty_like(weight), torch.empty_like(bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *options = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.options = CsfeOptions(*options)


def _gradients(ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, m2 = ctx.saved_tensors
    if torch.is_grad_enabled():  # `create_graph=True`: use the differentiable equations

        def equations(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return as_input(csfe_from_moments(upcast(x), weight, bias, ctx.options), x)

        gradients = differentiable_gradients(equations, (x, weight, bias), dy)
    else:
        gradients = torch.ops.kfde.csfe_fused_backward(dy, x, weight, bias, mean, m2, *ctx.options)
        gradients += [None] * (3 - len(gradients))
    return *gradients, *(None for _ in ctx.options)


_forward.register_autograd(_gradients, setup_context=_setup_context)
