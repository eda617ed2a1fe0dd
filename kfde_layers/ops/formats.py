"""The number format in which an operation computes, and the format in which it answers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the format of the statistics: float32, or float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from convolving and multiplying matrices in another format than that of `x`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """Return the result `y` in dtype and memory format of the input `x`."""
    channels_last = x.stride(1) == 1
    return y.to(x.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
