"""Whether what is timed computes what it should: the textbook form in float64 is the judge."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SUM_FACTOR = 10  # of the tolerance, for a parameter's gradient as a whole
MOST_FAR = 1e-3  # share of the elements whose gate rounding may put on the other side of the threshold


def same_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give a layer the parameters of another form; all register them in the order of the equations."""
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)


def in_float64(module: nn.Module) -> nn.Module:
    """A copy that computes in float64 with the same parameters, as they were rounded to the module's format."""
    return copy.deepcopy(module).double()


def forward(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `module` on `x` in inference mode: returns the output."""

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (module(x),)

    return call


def forward_and_backward(module: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `module` on `x` and back: returns the output and the gradients of `x` and of every parameter."""
    inputs = [x.clone().requires_grad_(), *module.parameters()]

    def call() -> tuple[Tensor, ...]:
        y = module(inputs[0])
        return (y, *torch.autograd.grad(y, inputs, cotangent))

    return call


def far_share(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """The share of elements that differ by more than `tolerance`, relative to their size and to the common size."""
    actual, expected = actual.double(), expected.double()
    size = expected.abs() + expected.square().mean().sqrt()
    return (~((actual - expected).abs() <= tolerance * size)).double().mean().item()  # NaN is far from everything


def sum_error(actual: Tensor, expected: Tensor) -> float:
    """The relative error of a parameter's gradient, a sum over the map into which every gate has gone."""
    difference = torch.linalg.vector_norm(actual.double() - expected)
    return (difference / torch.linalg.vector_norm(expected)).item()


def sums_agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two gradients of a parameter are the same to the precision of the format."""
    return sum_error(actual, expected) <= SUM_FACTOR * TOLERANCE[actual.dtype]


def agree(actual: Tensor, expected: Tensor, most_far: float = MOST_FAR) -> bool:
    """Whether `actual` is `expected` to the precision of its format, but for a few gates."""
    if actual.shape != expected.shape:
        return False
    return far_share(actual, expected, TOLERANCE[actual.dtype]) <= most_far
