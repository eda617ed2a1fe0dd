"""The operator behind the fused forms of CFE, SFE and CSFE: its schema, a kernel for each device, its gradients.

Each of them is the scaled sum of the branches that the options leave in. The backward pass is given the inputs and two
moments per channel, and computes everything else again.
"""

from typing import Any

import torch
from torch import Tensor

from kfde_layers._impl import Impl, exporting, tracing
from kfde_layers.ops import csfe_blocked
from kfde_layers.ops.csfe_moments import Enhancement, Moments, enhance
from kfde_layers.ops.formats import as_input, dense, memory_format, upcast
from kfde_layers.ops.second_order import differentiable_gradients

_ENOUGH = {True: 2**15, False: 2**21}  # elements with CFE in it, and without


def preferred(x: Tensor, *, channel: bool) -> Impl:
    """What "auto" takes where both forms can run; `channel` says whether CFE is in it.

    Measured on CPU: a small map is done before the steps of the schedule are dispatched, and the reference of SFE alone
    is slower only where it leaves the cache.
    """
    small = not tracing() and x.device.type == "cpu" and x.numel() < _ENOUGH[channel]
    return Impl.REFERENCE if small else Impl.FUSED


def fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Enhancement) -> Tensor:
    """The sum of the branches in `options`, in dtype and memory format of `x`.

    A tracer is shown the mathematics instead of the operator: an exporter because others must be able to run what it
    writes, the compiler on CPU because it fuses them better by itself.
    """
    if exporting() or (tracing() and not x.is_cuda):
        return as_input(enhance(upcast(x), weight, bias, options), x)
    return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]


@torch.library.custom_op("kfde::csfe_fused", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    threshold: float,
    eps: float,
    spatial: bool,
    lambd: float,
    beta: float,
    correction: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Enhancement(num_groups, threshold, eps, spatial, lambd, beta, correction, scale)
    if x.numel() == 0:
        return _fake_forward(x)
    return csfe_blocked.forward(dense(x), weight, bias, options)


def _forward_on_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from kfde_layers.kernels.csfe import launch_forward  # Triton loads here, at first use

    return launch_forward(dense(x), weight, bias, *options)


torch.library.register_kernel(_forward, "cuda", _forward_on_cuda)


@_forward.register_fake
def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    moment = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=memory_format(x)), moment, torch.empty_like(moment)


@torch.library.custom_op("kfde::csfe_fused_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    m2: Tensor,
    num_groups: int,
    threshold: float,
    eps: float,
    spatial: bool,
    lambd: float,
    beta: float,
    correction: int,
    scale: float,
) -> list[Tensor]:
    options = Enhancement(num_groups, threshold, eps, spatial, lambd, beta, correction, scale)
    x = dense(x)
    dy = dy.contiguous(memory_format=memory_format(x))
    if x.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in (x, weight, bias) if tensor is not None]
    moments = Moments(mean, m2, x.shape[2] * x.shape[3])
    gradients = csfe_blocked.backward(dy, x, weight, bias, moments, options)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_on_cuda(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    from kfde_layers.kernels.csfe import launch_backward

    return [gradient for gradient in launch_backward(dy, dense(x), *rest) if gradient is not None]


torch.library.register_kernel(_backward, "cuda", _backward_on_cuda)


@_backward.register_fake
def _fake_backward(_: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *__: Any) -> list[Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    return [dx] if weight is None or bias is None else [dx, torch.empty_like(weight), torch.empty_like(bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *options = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.options = Enhancement(*options)


def _gradients(ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, m2 = ctx.saved_tensors
    if torch.is_grad_enabled():  # these gradients are to be differentiated in turn: the mathematics can be

        def mathematics(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return as_input(enhance(upcast(x), weight, bias, ctx.options), x)

        gradients = differentiable_gradients(mathematics, (x, weight, bias), dy)
    else:
        gradients = torch.ops.kfde.csfe_fused_backward(dy, x, weight, bias, mean, m2, *ctx.options)
        gradients += [None] * (3 - len(gradients))
    return *gradients, *(None for _ in ctx.options)


_forward.register_autograd(_gradients, setup_context=_setup_context)
