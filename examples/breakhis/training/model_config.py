"""Check the `config.json` of a saved model, before timm reads it."""

from pathlib import Path
from typing import Any

import timm

from breakhis.mappings import read_json

SIDES = range(32, 4097)  # px; from the smallest --img-size to a size that memory can hold


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a saved model.

    Raises:
        OSError: The file cannot be opened.
        ValueError: An entry that predictions depend on is missing or wrong; the message names file and entry.
    """
    config = read_json(path)
    for name, kind in (("architecture", str), ("num_classes", int), ("label_names", list), ("pretrained_cfg", dict)):
        if not isinstance(config.get(name), kind):
            raise ValueError(f"{path} must have {name} of type {kind.__name__}, got {config.get(name)!r:.60}")
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{path} must name a model that timm knows, got architecture {config['architecture']!r}")
    labels, count = config["label_names"], config["num_classes"]
    if count < 1:
        raise ValueError(f"{path} must have num_classes of at least 1, got {count}")
    if len(labels) != count or len({name for name in labels if isinstance(name, str)}) != count:
        raise ValueError(f"{path} must have {count} different label_names, as num_classes says, got {labels!r:.200}")
    _check_input(config["pretrained_cfg"], path)
    return config


def _check_input(config: dict[str, Any], path: Path) -> None:
    """Check size and scale of the input images."""
    size, std = config.get("input_size"), config.get("std")
    if not _numbers(size) or size[0] != 3 or any(side not in SIDES for side in size[1:]):
        limits = f"from {SIDES[0]} px to {SIDES[-1]} px"
        raise ValueError(f"{path} must have input_size [3, height, width], {limits}, got {size!r:.60}")
    if not _numbers(config.get("mean")):
        raise ValueError(f"{path} must have mean of 3 numbers, got {config.get('mean')!r:.60}")
    if not _numbers(std) or min(std) <= 0:
        raise ValueError(f"{path} must have std of 3 positive numbers, got {std!r:.60}")


def _numbers(value: Any) -> bool:
    """Return whether a value is a list of three finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(entry, int | float) and -1e9 < entry < 1e9 for entry in value)
    )
