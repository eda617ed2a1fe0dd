"""Make a block for a point, from what the caller gave for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfde_layers.layers import CFE, CSFE, MFDF, SFE

Block = nn.Module | Callable[[int], nn.Module] | str | Sequence[Any]
"""A module, what makes one from a number of channels, the name of a layer, or a pair of a name and options."""

_LAYERS: dict[str, Callable[..., nn.Module]] = {"CFE": CFE, "SFE": SFE, "CSFE": CSFE, "MFDF": MFDF}


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
    if isinstance(block, nn.Module):
        made = block
    else:
        make = block if callable(block) else _maker(name, block)
        try:
            with device:
                made = make(channels)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"the block at {name!r} cannot be made for its {channels} channels: {error}") from error
        if not isinstance(made, nn.Module):
            raise TypeError(f"the function for {name!r} must make a module, got {made!r} of type {type(made).__name__}")
    if device.type != "meta" and any(parameter.is_meta for parameter in made.parameters()):
        raise ValueError(f"the block at {name!r} must have values, got parameters on the device meta")
    return made


def _maker(name: str, block: object) -> Callable[[int], nn.Module]:
    """Return what makes the layer that a text, or a pair of a text and options, stands for."""
    layer, options = block, {}
    if isinstance(block, Sequence) and not isinstance(block, str):
        layer, options = block if len(block) == 2 else (None, None)
    if not isinstance(layer, str) or not isinstance(options, Mapping):
        raise TypeError(
            f"the block at {name!r} must be a module, a function that makes one from a number of channels, the name of "
            f"a layer, or a pair of such a name and a dict of options, got {block!r}"
        )
    if layer not in _LAYERS:
        raise ValueError(f"the block at {name!r} must be one of {', '.join(_LAYERS)}, got {layer!r}")
    return lambda channels: _LAYERS[layer](channels, **options)
