"""Refusals: each names the argument, the value given and the value wanted."""

import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INF = float("inf")
_LARGEST_INT = 2**31 - 1  # the kernels compute with 32 bits
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_instance(name: str, value: object, wanted: type) -> None:
    """Refuse anything but an instance of `wanted`."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a {wanted.__name__}, got {value!r} of type {type(value).__name__}")


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int; refuse anything but an integer, NumPy's included, of at least `minimum`."""
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type bool")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > _LARGEST_INT:
        raise ValueError(f"{name} must be at most {_LARGEST_INT}, got {value}")
    return value


def check_real(name: str, value: Any, above: float = -_INF, below: float = _INF) -> float:
    """Return `value` as a float; refuse anything but a number, NumPy's included, strictly between the bounds.

    It must also be finite in float32, and not vanish there if it must be positive: statistics are in float32.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = value if isinstance(value, int) else float(value)
    if not above < number < below:  # NaN fails every comparison
        wanted = {(0, _INF): "be positive and finite", (-_INF, _INF): "be finite"}
        wish = wanted.get((above, below), f"lie strictly between {above} and {below}")
        raise ValueError(f"{name} must {wish}, got {value}")
    if abs(number) > _LARGEST or (above == 0 and number < _SMALLEST):
        lowest = _SMALLEST if above == 0 else -_LARGEST
        raise ValueError(f"{name} must be from {lowest:.3g} to {_LARGEST:.3g}, as float32 has it, got {value}")
    return float(number)


def check_sequence(name: str, value: Any, entries: str) -> tuple[Any, ...]:
    """Return `value` as a tuple; refuse anything but a list, an array of one dimension or the like.

    The message names its `entries`.
    """
    indexed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if not indexed or isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) != 1:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a sequence of {entries}, got {shown} of type {type(value).__name__}")
    return tuple(value)


def check_mapping(name: str, value: object, entries: str) -> None:
    """Refuse anything but a dict or the like; the message names its `entries`."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict {entries}, got {value!r} of type {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def check_factory(name: str, value: object) -> None:
    """Refuse anything but None and a class or function that makes a module."""
    if value is not None and (not callable(value) or isinstance(value, nn.Module)):
        raise TypeError(f"{name} must be a class or function that makes a module, or None, got {value!r}")


def check_made(name: str, made: object) -> nn.Module:
    """Return what the class or function `name` made; refuse anything but a module."""
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must make a module, got {made!r} of type {type(made).__name__}")
    return made


def check_floating(name: str, tensor: object) -> Tensor:
    """Return `tensor`; refuse anything but a tensor in one of the layers' dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must be a floating-point tensor ({wanted}), got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor of layout torch.strided, got {kind}")
    return tensor


def check_dims(name: str, tensor: object, dims: Sequence[str]) -> tuple[int, ...]:
    """Return the shape of `tensor`; refuse anything but a floating-point tensor of these dimensions."""
    shape = tuple(check_floating(name, tensor).shape)
    if len(shape) != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}), got {len(shape)} dimensions: {shape}")
    return shape


def check_map(name: str, tensor: object, channels: int | None = None) -> None:
    """Refuse anything but a floating-point feature map (N, C, H, W) with `channels` channels, if given."""
    shape = check_dims(name, tensor, ("N", "C", "H", "W"))
    if channels is not None and shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels in dimension 1, got {shape[1]}: {shape}")


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse a tensor that is not on the device of the feature map `x`."""
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def check_dtype(name: str, dtype: object) -> None:
    """Refuse anything but None and one of the layers' dtypes."""
    if dtype is not None and dtype not in _DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must be None or one of {wanted}, got {dtype}")


def check_shape(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Refuse anything but a floating-point tensor of `shape`."""
    actual = tuple(check_floating(name, tensor).shape)
    if actual != shape:
        raise ValueError(f"{name} must have shape {shape}, got {actual}")
