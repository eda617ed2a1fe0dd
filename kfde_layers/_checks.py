"""Refusals: each names the argument, the value given and the value wanted."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INF = float("inf")


def check_instance(name: str, value: object, wanted: type) -> None:
    """Refuse anything but an instance of `wanted`."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a {wanted.__name__}, got {value!r} of type {type(value).__name__}")


def check_int(name: str, value: object, minimum: int) -> None:
    """Refuse anything but an int of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_real(name: str, value: object, above: float = -_INF, below: float = _INF) -> None:
    """Refuse anything but a finite number strictly between `above` and `below`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not above < value < below:  # NaN fails every comparison
        wanted = {(0, _INF): "be positive and finite", (-_INF, _INF): "be finite"}
        wish = wanted.get((above, below), f"lie strictly between {above} and {below}")
        raise ValueError(f"{name} must {wish}, got {value}")


def check_sequence(name: str, value: object, entries: str) -> None:
    """Refuse anything but a list, a tuple or the like; the message names its `entries`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a sequence of {entries}, got {shown} of type {type(value).__name__}")


def check_mapping(name: str, value: object, entries: str) -> None:
    """Refuse anything but a dict or the like; the message names its `entries`."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict {entries}, got {value!r} of type {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def check_factory(name: str, value: object) -> None:
    """Refuse anything but None and a class or function that makes a module."""
    if value is not None and (not callable(value) or isinstance(value, nn.Module)):
        raise TypeError(f"{name} must be a class or function that makes a module, or None, got {value!r}")


def check_floating(name: str, tensor: object) -> Tensor:
    """Return `tensor`; refuse anything but a tensor in one of the layers' dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must be a floating-point tensor ({wanted}), got {tensor.dtype}")
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


def check_shape(name: str, tensor: object, shape: tuple[int, ...]) -> None:
    """Refuse anything but a floating-point tensor of `shape`."""
    actual = tuple(check_floating(name, tensor).shape)
    if actual != shape:
        raise ValueError(f"{name} must have shape {shape}, got {actual}")
