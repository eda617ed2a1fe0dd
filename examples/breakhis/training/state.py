"""The state of a run on disk. Reading it never runs code that the file contains."""

from pathlib import Path
from typing import Any

import torch

from breakhis.files import write_atomically


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, nested in dicts and lists."""
    write_atomically(path, lambda part: torch.save(state, part))


def load_state(path: Path) -> dict[str, Any] | None:
    """Read a state that `save_state` wrote, to the CPU. Return None if there is no file.

    Only tensors and plain values are read; a file that would run code is refused.
    """
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
