"""Check the `config.json` of a saved model, before timm reads it.

timm takes true for 1, NaN for a number, 0 for an entry that is not there, and an unknown word for its default.
"""

import math
import re
from pathlib import Path
from types import UnionType
from typing import Any

import timm

from breakhis.mappings import read_json
from breakhis.training.argument_types import SIDES
from breakhis.training.blocks import check_inserted

SMALLEST_CROP = 0.5  # the image is enlarged to side / crop_pct, also in memory; the trainer saves 1.0
WORDS = {
    "interpolation": ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"),
    "crop_mode": ("border", "center", "squash"),
}
"""Entries of `pretrained_cfg` that timm has a list for."""
_NOT_WRITABLE = re.compile(r"[\0\ud800-\udfff]")  # NUL, and halves of characters, which UTF-8 has no bytes for


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a saved model.

    Raises:
        OSError: The file cannot be opened.
        ValueError: An entry that predictions depend on is missing or wrong; the message names file and entry.
    """
    config = read_json(path)
    _check_finite(config, path)
    for name, kind in (("architecture", str), ("num_classes", int), ("label_names", list), ("pretrained_cfg", dict)):
        if not isinstance(config.get(name), kind) or isinstance(config[name], bool):
            raise ValueError(f"{path} must have {name} of type {kind.__name__}, got {config.get(name)!r:.60}")
    if not timm.is_model(config["architecture"]):
        raise ValueError(f"{path} must name a model that timm knows, got architecture {config['architecture']!r}")
    labels, count = config["label_names"], config["num_classes"]
    if count < 1:
        raise ValueError(f"{path} must have num_classes of at least 1, got {count}")
    if len(labels) != count or len({name for name in labels if isinstance(name, str)}) != count:
        raise ValueError(f"{path} must have {count} different label_names, as num_classes says, got {labels!r:.200}")
    if any(_NOT_WRITABLE.search(name) for name in labels):
        raise ValueError(f"{path} must have label_names that a CSV file can hold, got {labels!r:.200}")
    _check_input(config["pretrained_cfg"], path)
    if "inserted" in config:
        try:
            check_inserted(config["inserted"])
        except ValueError as error:
            raise ValueError(f"{path} must say what was inserted: {error}") from error
    return config


def _check_input(config: dict[str, Any], path: Path) -> None:
    """Check size, crop and scale of the input images."""
    size, std, crop = config.get("input_size"), config.get("std"), config.get("crop_pct")
    if not _numbers(size, int) or size[0] != 3 or any(side not in SIDES for side in size[1:]):
        limits = f"from {SIDES[0]} px to {SIDES[-1]} px"
        raise ValueError(f"{path} must have input_size [3, height, width], {limits}, got {size!r:.60}")
    if not _numbers(config.get("mean")):
        raise ValueError(f"{path} must have mean of 3 numbers, got {config.get('mean')!r:.60}")
    if not _numbers(std) or min(std) <= 0:
        raise ValueError(f"{path} must have std of 3 positive numbers, got {std!r:.60}")
    if crop is not None and not (_is_number(crop) and SMALLEST_CROP <= crop <= 1):
        raise ValueError(f"{path} must have crop_pct from {SMALLEST_CROP} to 1, got {crop!r:.60}")
    for name, words in WORDS.items():
        if config.get(name) not in (None, *words):
            raise ValueError(f"{path} must have {name} of {', '.join(words)}, got {config[name]!r:.60}")


def _numbers(value: Any, kind: type | UnionType = int | float) -> bool:
    """Return whether a value is a list of three numbers of a kind."""
    return isinstance(value, list) and len(value) == 3 and all(_is_number(entry, kind) for entry in value)


def _is_number(value: Any, kind: type | UnionType = int | float) -> bool:
    """Return whether a value is a number of a kind, within bounds. In Python, true and false are integers."""
    return isinstance(value, kind) and not isinstance(value, bool) and -1e9 < value < 1e9


def _check_finite(config: dict[str, Any], path: Path) -> None:
    """Refuse NaN and infinity, which no JSON has but Python reads, at any depth."""
    pending: list[tuple[str, Any]] = list(config.items())  # no recursion: a file can be nested as deep as Python allows
    for name, value in pending:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} must have finite numbers, got {value} in {name:.60}")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(name, entry) for entry in inner]
