"""CSV files: a row is a dict, and the first row names the columns."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from breakhis.state import write_atomically


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes at least one row; None becomes an empty cell."""

    def write(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, in their order."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
