"""Calls of a module: forward, and forward with backward. They are timed, and their results are compared."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[], tuple[Tensor, ...]]


def forward(module: nn.Module, x: Tensor) -> Call:
    """Make a call of `module` on `x` in inference mode. It returns the output."""

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (module(x),)

    return call


def forward_and_backward(module: nn.Module, x: Tensor, cotangent: Tensor) -> Call:
    """Make a call of `module` on `x` and back. It returns the output and the gradients of `x` and every parameter."""
    inputs = [x.clone().requires_grad_(), *module.parameters()]

    def call() -> tuple[Tensor, ...]:
        y = module(inputs[0])
        gradients = torch.autograd.grad(y, inputs, cotangent)
        return (y.detach(), *gradients)  # a graph that lives on would keep its stream, and a CUDA graph needs another

    return call


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters between implementations of a layer; all register them in the order of the equations."""
    with torch.no_grad():
        for target_parameter, source_parameter in zip(target.parameters(), source.parameters(), strict=True):
            target_parameter.copy_(source_parameter)


def in_float64(module: nn.Module) -> nn.Module:
    """Copy a module to float64. The parameters keep the values that they have in the module's dtype."""
    return copy.deepcopy(module).double()
