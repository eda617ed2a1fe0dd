"""The images that figures of explanations show: their choice, their labels, and the rows of `decisions.csv`."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from breakhis.data.naming import full_names
from breakhis.results.report import PARTS, count_images

Row = dict[str, str]
"""A row of `predictions.csv`."""


def choose_images(run: dict[str, Any], count: int) -> list[Row]:
    """Choose the first `count` images of each class by file name from a run's predictions."""
    ranked = sorted(run["predictions"], key=lambda row: (PurePosixPath(row["file"]).name, row["file"]))
    return [row for name in run["classes"] for row in [row for row in ranked if row["target"] == name][:count]]


def scored_images(run: dict[str, Any]) -> set[tuple[str, str]]:
    """Return file and target of each image that a run was scored on."""
    return {(row["file"], row["target"]) for row in run["predictions"]}


def groups(rows: Sequence[Row]) -> list[str]:
    """Return the case of each image; its patient in a table without cases, which older versions wrote."""
    return [row.get("case") or row["patient"] for row in rows]


def group_name(rows: Sequence[Row]) -> str:
    """Return what `groups` are: "case" or "patient"."""
    return "case" if "case" in rows[0] else "patient"


def describe_rows(rows: Sequence[Row], run: dict[str, Any]) -> str:
    """Count the shown images of a run, their patients and cases."""
    cases = len(set(groups(rows))) if "case" in rows[0] else None
    text = count_images(len(rows), len({row["patient"] for row in rows}), cases, PARTS[run["scored_on"]])
    total = len(run["predictions"])
    return text if len(rows) == total else f"{text}, taken from {total}"


def label_classes(classes: Sequence[str], rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    """Name each class for a reader, with the number of its images and of their cases.

    Args:
        classes: Names of the classes.
        rows: All images that a run was scored on.
        shown: Those in the figure: a class that they lack can still be among all images.
    """
    labels = []
    for name, full_name in zip(classes, full_names(classes), strict=True):
        here = [row for row in shown if row["target"] == name]
        if here:
            count = len(set(groups(here)))
            text = f"n = {len(here)}, {count} {group_name(here)}{'s' * (count != 1)}"
        else:
            others = sum(row["target"] == name for row in rows)
            text = f"{others} image{'s' * (others != 1)}, none taken" if others else "no image"
        labels.append(f"{full_name}: {text}")
    return labels


def table_rows(
    run: dict[str, Any], module: str, kind: str, parts: Sequence[int | str], means: np.ndarray, deviations: np.ndarray
) -> list[dict[str, Any]]:
    """Make the rows of `decisions.csv` for one layer.

    Args:
        run: The run.
        module: Name of the layer in the model.
        kind: "gate" or "branch".
        parts: Names of the channels or branches.
        means: Mean over the images, (classes, parts); a class without images, which is NaN, gets no row.
        deviations: Standard deviation over the images.
    """
    common = {key: run[key] for key in ("variant", "magnification", "fold", "seed")} | {"module": module, "kind": kind}
    return [
        common | {"class": run["classes"][index], "channel_or_branch": part, "mean": mean, "sd": deviation}
        for index in np.flatnonzero(np.isfinite(means).all(axis=1))
        for part, mean, deviation in zip(parts, means[index], deviations[index], strict=True)
    ]
