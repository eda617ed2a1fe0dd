"""The dtype in which an operation computes, and the dtype and memory format of its result."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kfde_layers._impl import tracing, transforming


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the dtype of the statistics: float64 if it has that dtype, else float32."""
    if x.dtype in (torch.float32, torch.float64):  # no call, which would take longer than this comparison
        return x
    return x.to(torch.float32)


def computes_in_its_dtype(x: Tensor) -> bool:
    """Return whether what is computed from `x` has the dtype of `x`, and this is the dtype of the statistics."""
    return x.dtype in (torch.float32, torch.float64) and not autocasts(x)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from running convolutions and matrix products in another dtype than that of `x`."""
    # A tracer records the region; for a small map it would take longer than a convolution.
    needed = autocasts(x) or (tracing() and not x.is_meta)
    return torch.autocast(x.device.type, enabled=False) if needed else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Return whether autocast chooses the dtypes of what is computed on the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format that the result for `x` has."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """Return `x` dense in its own memory format; no copy if it is already."""
    return x.contiguous(memory_format=memory_format(x))


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """Return the result `y` in the dtype and memory format of the input `x`."""
    if transforming():  # under vmap a map has more than four dimensions, and then there are no memory formats
        return y.to(x.dtype)
    return y.to(x.dtype, memory_format=memory_format(x))


def split_channels(values: Tensor, parts: int) -> Tensor:
    """Return (N, parts C) as (N, parts, C)."""
    if torch.jit.is_tracing():  # it records `unflatten` as arithmetic of sizes, in which other tools infer no shape
        return values.view(values.shape[0], parts, -1)
    return values.unflatten(1, (parts, -1))
