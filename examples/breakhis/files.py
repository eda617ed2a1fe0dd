"""Files that are written completely or not at all, and CSV tables: a row is a dict, the first row names the columns."""

import csv
from collections.abc import Callable, Mapping, Sequence
from os import fsync
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and then rename it, so that it is never seen half written, even after a kill.

    Args:
        path: The file.
        write: Writes to the path that it is called with.
    """
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb+") as file:
        fsync(file.fileno())  # without it a power cut could keep the new name and lose the content
    part.replace(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write at least one row; None becomes an empty cell."""

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, in their order."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
