"""What a run has reached, on disk: written whole or not at all, and read without running what it holds."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name and then renames it, so that no reader and no kill meets half of it.

    Args:
        path: The file.
        write: Writes to the path that it is given.
    """
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())  # or a power cut could keep the rename and lose the content
    part.replace(path)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values, nested in dicts and lists."""
    write_atomically(path, lambda part: torch.save(state, part))


def load_state(path: Path) -> dict[str, Any] | None:
    """Reads what `save_state` wrote, onto the CPU; None where there is nothing.

    Only tensors and plain values are read; a file that would have code run is refused.
    """
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
