"""What lets the gradients of an operator be differentiated in turn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    mathematics: Callable[..., Tensor], tensors: Sequence[Tensor | None], cotangent: Tensor
) -> list[Tensor | None]:
    """The gradients of `mathematics(*tensors)` as a graph; None for what is absent or needs none."""
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(mathematics(*tensors), wanted, cotangent, create_graph=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]
