"""The state of a run on disk. Reading it never runs code that the file contains, and never takes a damaged file."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from breakhis.files import write_atomically
from breakhis.training.weights import reason

STATE = "state.pt"
_DIGEST_BYTES = hashlib.sha256().digest_size


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, nested in dicts and lists, and then the SHA-256 of all bytes before it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # to memory, because torch hides the error of a full disk
    content = buffer.getbuffer()

    def write(part: Path) -> None:
        with part.open("wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())

    write_atomically(path, write)


def load_state(path: Path, keys: Iterable[str] = ()) -> dict[str, Any] | None:
    """Read a state that `save_state` wrote, to the CPU. Return None if there is no file.

    Only tensors and plain values are read; a file that would run code is refused.

    Args:
        path: The file.
        keys: Names that the state must have.

    Raises:
        ValueError: The file is damaged, or lacks a key; the message names it.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path} must be a state as this script wrote it, got bytes with another SHA-256")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types
        raise ValueError(f"{path} must be a state as this script wrote it, got {reason(error)}") from error
    missing = ", ".join(key for key in keys if not isinstance(state, dict) or key not in state)
    if missing:
        raise ValueError(f"{path} must be a state of this run, got none of {missing}")
    return state
