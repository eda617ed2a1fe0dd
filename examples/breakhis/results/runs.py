"""Read the files of a finished run. What is wrong with one is said in one sentence that names it."""

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Any

from breakhis.files import read_csv
from breakhis.mappings import read_json


def read_metrics(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Read the `metrics.json` of a run.

    Args:
        folder: Folder of the run.
        keys: Names of entries that must be there.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is damaged, or an entry is missing.
    """
    path = folder / "metrics.json"
    metrics = read_json(path)
    if missing := [key for key in keys if key not in metrics]:
        raise ValueError(f"{path} must be written by train_breakhis.py, got no {missing[0]}")
    return metrics


def read_predictions(folder: Path, classes: Collection[str]) -> list[dict[str, str]]:
    """Read the `predictions.csv` of a run.

    Args:
        folder: Folder of the run.
        classes: Names of the classes, each with a column of probabilities.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is damaged, has no row, or a row without a value that must be there.
    """
    path = folder / "predictions.csv"
    try:
        rows = read_csv(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} must be a table that train_breakhis.py wrote, got {error}") from error
    columns = ("file", "patient", "case", "target", *(f"prob_{name}" for name in classes))
    for number, row in enumerate(rows or [{}], start=2):  # line 1 names the columns
        if missing := [column for column in columns if not row.get(column)]:
            raise ValueError(f"{path} must have a value for {missing[0]} in each line, got none in line {number}")
    return rows
