"""Operators under `torch.func`, which does not know the gradients that `torch.library` has for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rules(NamedTuple):
    """An operator as functions of tensors alone, with everything else bound."""

    forward: Callable[..., tuple[Tensor, ...]]
    """Maps the tensors to the output, and to what the backward pass needs besides."""
    backward: Callable[..., tuple[Tensor, ...]]
    """Maps the gradient of the output, the tensors and what `forward` has added to the gradients of the tensors."""
    equations: Callable[..., Tensor]
    """Maps the tensors to the output, in steps that PyTorch can differentiate again and again."""


def apply_transformed(rules: Rules, *tensors: Tensor) -> Tensor:
    """Return the output of an operator for some tensors, under transforms of `torch.func` other than jvp."""
    return _Operator.apply(rules, len(tensors), *tensors)[0]


class _Operator(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rules: Rules, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return rules.forward(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rules, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return None, None, *_Gradients.apply(ctx.rules, ctx.count, upstream[0], *ctx.saved_tensors)


class _Gradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rules: Rules, count: int, upstream: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        return rules.backward(upstream, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rules, count, *tensors = inputs
        ctx.equations, ctx.unused = rules.equations, len(tensors) - 1 - count
        ctx.save_for_backward(*tensors[: 1 + count])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        def gradients(dy: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(ctx.equations, *tensors)[1](dy)

        # What the forward pass has added depends on the tensors: the equations hold its part of the gradient too.
        of_second_order = torch.func.vjp(gradients, *ctx.saved_tensors)[1](upstream)
        return None, None, *of_second_order, *(None for _ in range(ctx.unused))
