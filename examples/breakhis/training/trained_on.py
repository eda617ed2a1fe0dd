"""What a model has been trained on, in its `config.json`: predictions of known cases say little about new ones."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from breakhis.data.records import Record, cases


def describe_training(records: Iterable[Record], magnification: str) -> dict[str, Any]:
    """Describe the images of training and validation.

    Returns:
        `magnification`, and `cases`: a hash of each case, so that the file recognises a case without its name. It
        does not hide it: case numbers are few.
    """
    return {"magnification": magnification, "cases": sorted(map(_hash, cases(records)))}


def warn_of(trained_on: Any, records: Sequence[Record]) -> list[str]:
    """Say how many images the model has known cases of, and how many have another magnification than its own.

    Args:
        trained_on: What `describe_training` returned, or None.
        records: The images to predict whose names say what they are.
    """
    if not isinstance(trained_on, dict):
        return []
    own, known = trained_on.get("magnification"), trained_on.get("cases")
    of_known = sum(_hash(record.case_id) in known for record in records) if isinstance(known, list) else 0
    others = sum(own not in (record.magnification, "pooled", None) for record in records)
    messages = []
    if of_known:
        messages.append(f"{of_known} images are of cases that the model was trained on: its score of them is too good")
    if others:
        messages.append(f"{others} images have another magnification than the {own} that the model was trained on")
    return messages


def _hash(case_id: str) -> str:
    return hashlib.sha256(case_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
