"""Outputs, gradients and errors, and the reference that a module is compared with."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# opcheck's tests of an operator, without the static variant of the last one.
OPERATOR_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Return the largest difference over the largest expected magnitude.

    A NaN anywhere makes it NaN, which is below no bound.
    """
    actual, expected = (as_numpy(a) if isinstance(a, Tensor) else a for a in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)) if actual.size else 0.0


def has_memory_format(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=memory_format)


def use_reference(module: nn.Module) -> nn.Module:
    """Make every part of `module` compute the plain PyTorch equations; return `module`."""
    for part in module.modules():
        if hasattr(part, "impl"):
            part.impl = "reference"
    return module


def with_gradients(y: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Return `y` and its gradients, for those inputs that it depends on."""
    gradients = torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


def tensors_of(output: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def outputs_are_equal(output: object, expected: object) -> bool:
    """Return whether two outputs of any structure, which hold as many tensors, are equal to the last bit."""
    pairs = zip(tensors_of(output), tensors_of(expected), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_operations(call: Callable[[], object]) -> Counter[str]:
    """Return how often `call` runs each operation of PyTorch, as `aten::conv2d`, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return Counter(event.name for event in profile.events())
