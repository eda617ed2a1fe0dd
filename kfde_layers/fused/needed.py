"""Only the gradients that somebody asked for: operators return an empty tensor for the others.

PyTorch batches no operator that returns a list or None.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def fill(x: Tensor, gradients: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Return the gradients, with an empty tensor in the place of each None."""
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def drop(ctx: Any, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first inputs of an operator, with None for those that need none."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
