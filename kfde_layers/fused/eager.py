"""Whether an operator may be left out: PyTorch's dispatcher and its rules in Python take longer than a small map."""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor  # of torch.autograd.grad(is_grads_batched=True)

from kfde_layers._impl import tracing, transforming

_PLAIN = (Tensor, nn.Parameter)


def nobody_looks(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are plain ones with elements, on CPU, and no mode of the dispatcher is active.

    Then nobody can tell an operator from the function that implements it: neither a subclass of `Tensor`, nor a counter
    of operations, nor a tracer.
    """
    if tracing() or transforming() or torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportPrivateUsage]
        return False
    for tensor in tensors:  # no generator, which would take half of the time of a call
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cpu or is_legacy_batchedtensor(tensor) or not tensor.numel():
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd has to record what is done to the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
