"""Layers of timm by name, in options that a file of settings holds."""

from collections.abc import Mapping
from typing import Any

from timm.layers import get_act_layer, get_norm_layer


def with_layers(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, with timm's layer for each `norm_layer` and `act_layer` that is a text.

    Raises:
        ValueError: timm has no layer of this name; the message starts with `name`.
    """
    return {key: _layer(f"{name}[{key!r}]", key, option) for key, option in options.items()}


def _layer(name: str, key: str, option: Any) -> Any:
    find = {"norm_layer": get_norm_layer, "act_layer": get_act_layer}.get(key)
    if find is None or not isinstance(option, str):
        return option
    try:
        return find(option)
    except KeyError:
        raise ValueError(f"{name} must be a layer or timm's name of one, got {option!r}") from None
