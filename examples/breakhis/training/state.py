"""The state of a run on disk. Reading it never runs code that the file contains, and never takes a damaged file."""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from breakhis.files import write_atomically
from breakhis.training.weights import reason

STATE = "state.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, nested in dicts and lists."""
    content = io.BytesIO()
    torch.save(state, content)  # to memory, because torch hides the error of a full disk
    write_atomically(path, lambda part: part.write_bytes(content.getbuffer()))


def load_state(path: Path, keys: Iterable[str] = ()) -> dict[str, Any] | None:
    """Read a state that `save_state` wrote, to the CPU. Return None if there is no file.

    Only tensors and plain values are read; a file that would run code is refused. `torch.save` writes a ZIP archive
    with a checksum (CRC-32) of each part. `torch.load` does not compare it, so it is compared here.

    Args:
        path: The file.
        keys: Names that the state must have.

    Raises:
        ValueError: The file is damaged, or lacks a key; the message names it.
    """
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"another checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file, zipfile and torch raise a dozen types
        raise ValueError(f"{path} must be a state that this script wrote, got {reason(error)}") from error
    missing = ", ".join(key for key in keys if not isinstance(state, dict) or key not in state)
    if missing:
        raise ValueError(f"{path} must be a state of this run, got none of {missing}")
    return state
