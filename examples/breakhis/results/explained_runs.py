"""Read the runs that are to be explained, and refuse what is wrong with their files before a model is loaded."""

from pathlib import Path
from typing import Any

from breakhis.mappings import read_json
from breakhis.results.runs import read_metrics, read_predictions

KINDS = {
    **dict.fromkeys(("dataset", "protocol_in_words", "fold_in_words", "task", "scored_on", "variant"), str),
    **{"magnification": str, "fold": int, "seed": int, "classes": list, "flags": dict, "synthetic": bool},
    "best_sha256": dict,
}
"""Types of the entries of `metrics.json` that are used."""


def read_run(folder: Path) -> dict[str, Any]:
    """Read the `metrics.json` of a run, together with `folder` and `predictions`.

    Raises:
        ValueError: A file, or an entry that is used, is missing or wrong; the message names file and entry.
    """
    run = read_metrics(folder, KINDS)
    for key, kind in KINDS.items():
        if not isinstance(run[key], kind):
            raise ValueError(f"{folder / 'metrics.json'} must have {key} of type {kind.__name__}, got {run[key]!r:.60}")
    if run["scored_on"] not in ("test", "val"):
        raise ValueError(f"{folder / 'metrics.json'} must have scored_on test or val, got {run['scored_on']!r:.60}")
    if not (folder / "predictions.csv").is_file():
        raise ValueError(f"{folder} must be the folder of a finished run, with predictions.csv, got none")
    predictions = read_predictions(folder, run["classes"])
    for line, row in enumerate(predictions, start=2):  # line 1 names the columns
        if row["target"] not in run["classes"]:
            raise ValueError(
                f"{folder / 'predictions.csv'} must have a target of {run['classes']}, got {row['target']!r:.60} "
                f"in line {line}"
            )
        try:
            [float(row[f"prob_{name}"]) for name in run["classes"]]
        except ValueError as error:
            raise ValueError(f"{folder / 'predictions.csv'} must have numbers, got in line {line}: {error}") from error
    return run | {"folder": folder, "predictions": predictions}


def study_variants(path: Path) -> list[str]:
    """Return the variants in the order of a study; none before all its runs are finished.

    Args:
        path: The study's `results.json`, which need not exist.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return []
    try:
        return [cell["variant"] for cell in read_json(path)["cells"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must have cells, each with its variant, as a study writes them") from error
