"""Second derivatives: the gradients of an operator, as a graph that can be differentiated again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    equations: Callable[..., Tensor], tensors: Sequence[Tensor | None], upstream: Tensor
) -> list[Tensor | None]:
    """Return the gradients of `equations(*tensors)` as a graph; None for a tensor that is absent or needs none."""
    # `alpha` depends on `x`; without these aliases its part of the gradient would be counted twice.
    tensors = [tensor.view_as(tensor) if tensor is not None and tensor.requires_grad else tensor for tensor in tensors]
    inputs = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    gradients = iter(torch.autograd.grad(equations(*tensors), inputs, upstream, create_graph=True))
    return [next(gradients) if tensor is not None and tensor.requires_grad else None for tensor in tensors]
