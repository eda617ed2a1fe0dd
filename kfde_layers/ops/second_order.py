"""What lets the gradients of an operator be differentiated in turn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    mathematics: Callable[..., Tensor], tensors: Sequence[Tensor | None], cotangent: Tensor
) -> list[Tensor | None]:
    """The gradients of `mathematics(*tensors)` as a graph; None for what is absent or needs none."""
    # One tensor may have been made of another, as alpha is of x: aliases keep what reaches each of them apart.
    tensors = [tensor.view_as(tensor) if tensor is not None and tensor.requires_grad else tensor for tensor in tensors]
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(mathematics(*tensors), wanted, cotangent, create_graph=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]
