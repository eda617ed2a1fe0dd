"""Make a block for a point, from what the caller gave for it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import get_attn
from torch import nn

from kfde_layers._named import with_layers
from kfde_layers.layers import CFE, CSFE, MFDF, SFE

Block = nn.Module | Callable[[int], nn.Module] | str | Sequence[Any] | Mapping[str, Any]
"""A module, what makes one from a number of channels, a named layer with or without options, or a list of these."""

_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "cfe": CFE,
    "sfe": SFE,
    "csfe": CSFE,
    "mfdf": MFDF,
    "simam": partial(SFE, correction=1),
}
_FORMS = (
    "a module, a function that makes one from a number of channels, the name of a layer, a pair of a name and a dict "
    "of options, a dict from one name to options, or a list of these"
)


class _Named(NamedTuple):
    """A layer by name, and its options."""

    name: str
    """The name in lower case."""
    options: Mapping[str, Any]
    """Its options by name."""


def make_block(name: str, block: object, channels: int, device: torch.device) -> nn.Module:
    """Return the block for a point of so many channels.

    Args:
        name: Name of the point, for messages.
        block: A `Block`.
        channels: C.
        device: Device of the parameters of a new block, whatever PyTorch's default device is.

    Raises:
        TypeError: `block` is of another type, or cannot be made from a number of channels.
        ValueError: There is no layer of this name, the block cannot have so many channels, or has no values.
    """
    made = block if isinstance(block, nn.Module) else _make(name, block, channels, device)
    if device.type != "meta" and any(parameter.is_meta for parameter in made.parameters()):
        raise ValueError(f"the block at {name!r} must have values, got parameters on the device meta")
    return made


def _make(name: str, block: object, channels: int, device: torch.device) -> nn.Module:
    make = block if callable(block) else _maker(name, block)
    if isinstance(make, list):
        return _one_after_the_other(name, make, channels, device)
    try:
        with device:
            made = make(channels)
    except (AssertionError, TypeError, ValueError) as error:  # an AssertionError from layers of timm
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the block at {name!r} cannot be made for its {channels} channels: {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"the function for {name!r} must make a module, got {made!r} of type {type(made).__name__}")
    return made


def _one_after_the_other(name: str, blocks: Sequence[object], channels: int, device: torch.device) -> nn.Module:
    """Return the blocks in a sequence, each under the lower-case name of its layer."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for block in blocks:
        part = make_block(name, block, channels, device)
        named = None if callable(block) else _named(block)
        key = type(part).__name__.lower() if named is None else named.name
        parts[f"{key}_{len(parts)}" if key in parts else key] = part
    return nn.Sequential(parts)


def _maker(name: str, block: object) -> Callable[[int], nn.Module] | list[object]:
    """Return what makes the layer that a setting stands for, or the blocks of a list."""
    named = _named(block)
    if named is not None:
        return partial(_make_named, name, named)
    if isinstance(block, Sequence) and not isinstance(block, str | bytes) and block and not _is_pair(block):
        return list(block)
    raise TypeError(f"the block at {name!r} must be {_FORMS}, got {block!r}")


def _named(block: object) -> _Named | None:
    """Return the layer that a name, a pair or a dict stands for, or None if `block` has another form."""
    match block:
        case str():
            return _Named(block.lower(), {})
        case [str() as name, Mapping() as options] if not _is_setting(options):
            return _Named(name.lower(), options)
        case Mapping() if _is_setting(block):
            ((name, options),) = block.items()
            return _Named(name.lower(), options or {})
        case _:
            return None


def _is_setting(block: Mapping[Any, Any]) -> bool:
    """Return whether a dict maps the name of a layer to its options. No layer has an option that is named so."""
    if len(block) != 1:
        return False
    ((name, options),) = block.items()
    return isinstance(name, str) and isinstance(options, Mapping | None) and _layer_of(name.lower()) is not None


def _is_pair(block: Sequence[Any]) -> bool:
    """Return whether a list was meant as a pair of a layer and options, which has another form."""
    return any(isinstance(entry, Mapping) and not _is_setting(entry) for entry in block)


def _layer_of(name: str) -> Callable[..., nn.Module] | None:
    if name in _LAYERS:
        return _LAYERS[name]
    try:
        return cast("Callable[..., nn.Module] | None", get_attn(name))
    except AssertionError:  # timm's answer to a name that it does not know
        return None


def _make_named(name: str, named: _Named, channels: int) -> nn.Module:
    layer = _layer_of(named.name)
    if layer is None:
        raise ValueError(
            f"the name must be one of CFE, SFE, CSFE, MFDF, SimAM or an attention layer of timm, such as 'se', got "
            f"{named.name!r}"
        )
    ours = named.name in _LAYERS
    return layer(channels, **(with_layers(named.name, named.options) if ours else named.options))
