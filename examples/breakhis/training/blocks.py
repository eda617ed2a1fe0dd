"""Blocks that a run puts into a model of any kind: as flags, and in the files of the model."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from kfde_layers import insert, insertion_points

KFDE = ("csfe", "mfdf")


def insert_blocks(model: nn.Module, inserted: Mapping[str, Any]) -> nn.Module:
    """Put blocks into a model, in place.

    Args:
        model: A timm model whose `pretrained_cfg` has the size of its images.
        inserted: `blocks`, as `kfde_layers.insert` takes them, and `identity_start`; as `config.json` has them.

    Raises:
        TypeError: A block has another form.
        ValueError: A block does not fit; the message names its point.
    """
    return insert(model, inserted["blocks"], identity_start=inserted["identity_start"])


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
    """Return CSFE and MFDF at the last point of a timm model."""
    *_, last = insertion_points(timm.create_model(model))
    return {last: list(KFDE)}


def listed(blocks: Any) -> list[Any]:
    """Return the blocks of a point as a list, also where it has one."""
    return blocks if isinstance(blocks, list) else [blocks]


def name_of(block: Any) -> str:
    """Return the name of a block in lower case: "mfdf" for "MFDF" and for {"MFDF": {"groups": 1}}."""
    return str(next(iter(block), "") if isinstance(block, dict) else block).lower()
