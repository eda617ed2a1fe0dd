"""The number format in which an operation computes, and the format in which it answers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kfde_layers._impl import transforming


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the format of the statistics: float32, or float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from convolving and multiplying matrices in another format than that of `x`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which the result for `x` is laid out."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """Return `x` laid out in that memory format, without gaps: itself wherever it is."""
    return x.contiguous(memory_format=memory_format(x))


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """Return the result `y` in dtype and memory format of the input `x`."""
    if transforming():  # under vmap a map has more than four dimensions, for which there are no memory formats
        return y.to(x.dtype)
    return y.to(x.dtype, memory_format=memory_format(x))
