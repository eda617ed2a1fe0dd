"""Blocks that a run puts into a model of any kind: as flags, and in the files of the model."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from kfde_layers import insert, insertion_points

KFDE = ("csfe", "mfdf")
NO_EFFECT = "the model's output does not depend on"  # the warning of `insert`


def insert_blocks(model: nn.Module, inserted: Mapping[str, Any]) -> nn.Module:
    """Put blocks into a model, in place.

    Args:
        model: A timm model whose `pretrained_cfg` has the size of its images.
        inserted: `blocks`, as `kfde_layers.insert` takes them, and `identity_start`; as `config.json` has them.

    Raises:
        TypeError: A block has another form.
        ValueError: A block does not fit, or cannot change the output; the message names its point.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", NO_EFFECT)
        try:
            return insert(model, inserted["blocks"], identity_start=inserted["identity_start"])
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


def check_inserted(inserted: Any) -> None:
    """Refuse what cannot be the entry `inserted` of a `config.json`.

    Raises:
        ValueError: It is no mapping, or lacks an entry.
    """
    blocks = inserted.get("blocks") if isinstance(inserted, dict) else None
    if not isinstance(blocks, dict) or not isinstance(inserted.get("identity_start"), bool):
        raise ValueError(f"inserted must have blocks, a mapping, and identity_start, a bool, got {inserted!r:.200}")


def ablate(blocks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Make the variants of an ablation: without blocks, with each block alone, and with all of them.

    Args:
        blocks: A block, or a list of blocks, for each point.

    Returns:
        For each variant, its argument `insert`.

    Raises:
        ValueError: The points have one block together, so that there is nothing to leave out.
    """
    names = list(dict.fromkeys(name_of(block) for point in blocks for block in listed(blocks[point])))
    if len(names) < 2:
        raise ValueError(f"needs at least two blocks in --insert, got {blocks}")
    variants: dict[str, dict[str, Any]] = {"baseline": {"insert": {}}}
    for name in names:
        alone = {point: [block for block in listed(blocks[point]) if name_of(block) == name] for point in blocks}
        variants[name.upper()] = {"insert": {point: chosen for point, chosen in alone.items() if chosen}}
    whole = "KFDE" if tuple(names) == KFDE else "+".join(names).upper()
    return variants | {whole: {"insert": dict(blocks)}}


def kfde_at_the_end(model: str) -> dict[str, Any]:
    """Return CSFE and MFDF at the last point of a timm model at which they can change its output.

    Raises:
        ValueError: There is none.
    """
    network = timm.create_model(model)
    for point in reversed(insertion_points(network)):
        blocks = {point: list(KFDE)}
        try:
            insert_blocks(copy.deepcopy(network), {"blocks": blocks, "identity_start": False})
        except ValueError:
            continue
        return blocks
    raise ValueError(f"needs --insert for {model}, which has no point at which CSFE and MFDF change its output")


def listed(blocks: Any) -> list[Any]:
    """Return the blocks of a point as a list, also where it has one."""
    if not isinstance(blocks, list) or _is_pair(blocks):
        return [blocks]
    return blocks


def _is_pair(blocks: list[Any]) -> bool:
    """Return whether a list is a name and its options, as in [mfdf, {groups: 1}], and no list of two blocks."""
    options = blocks[1] if len(blocks) == 2 else None
    if not isinstance(options, dict):
        return False
    return len(options) != 1 or not all(isinstance(value, dict | None) for value in options.values())


def name_of(block: Any) -> str:
    """Return the name of a block in lower case, whether it stands alone, in a dict or in a pair."""
    return str(next(iter(block), "") if isinstance(block, dict | list) else block).lower()
