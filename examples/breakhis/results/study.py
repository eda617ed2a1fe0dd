"""Tables of many runs, by variant and magnification, over folds and seeds, together with the paper's numbers.

A study is a set of runs started together. Its tables have the paper's layout, with methods down and magnifications
across. The paper's numbers come last, labelled with their protocol, because it is another one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from breakhis.files import write_atomically, write_csv
from breakhis.names import in_markdown
from breakhis.results import paper
from breakhis.results.intervals import Predictions, bootstrap
from breakhis.results.metrics import auc, balanced_accuracy, image_accuracy
from breakhis.results.report import name_source
from breakhis.results.runs import read_metrics, read_predictions

SCORES = ("image_accuracy", "patient_recognition_rate", "balanced_accuracy", "macro_f1", "auc", "ece")
KEYS = ("dataset", "synthetic", "protocol_in_words", "task", "classes", "variant", "magnification", "fold", "seed")
KEYS += ("scored_on", "n_images", "n_patients", "best_epoch", *SCORES)
"""Entries of `metrics.json` that a study uses."""
COMPARED = {"image_accuracy": image_accuracy, "balanced_accuracy": balanced_accuracy, "auc": auc}
"""Scores that get intervals, and their functions of weighted predictions."""


def write_study(out: Path, folders: Sequence[Path]) -> str:
    """Write `results.json`, `results.csv` and `results.md` from finished runs.

    Args:
        out: Folder for the files.
        folders: Folders of the runs, each with `metrics.json` and `predictions.csv`.

    Returns:
        The content of `results.md`.
    """
    runs = [read_metrics(folder, KEYS) | {"folder": folder} for folder in folders]
    results = {
        "dataset": runs[0]["dataset"],
        "synthetic": runs[0]["synthetic"],
        "protocol": runs[0]["protocol_in_words"],
        "task": runs[0]["task"],
        "classes": runs[0]["classes"],
        "cells": summarise_cells(runs),
        "intervals": compare_variants(runs),
    }
    tables = markdown(results)
    write_atomically(out / "results.json", lambda part: part.write_text(json.dumps(results, indent=2) + "\n", "utf-8"))
    write_csv(out / "results.csv", [_row(run) for run in runs])
    write_atomically(out / "results.md", lambda part: part.write_text(tables + "\n", "utf-8"))
    return tables


def group_runs(runs: Sequence[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    """Group the runs by the values of keys, such as `("KFDE", "40X")`, in the order in which the values first occur."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def summarise_cells(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute mean and standard deviation of each score over folds and seeds, by variant and magnification.

    Returns:
        A cell for each: `variant`, `magnification`, `n_runs`, `n_patients` (distinct scored patients), and for each
        score `mean` and `sd`. `sd` is None for a single run; both are None if no run has the score.
    """
    cells = []
    for (variant, magnification), group in group_runs(runs, "variant", "magnification").items():
        tested = {row["patient"] for run in group for row in read_predictions(run["folder"], run["classes"])}
        cell: dict[str, Any] = {"variant": variant, "magnification": magnification}
        cell |= {"n_runs": len(group), "n_patients": len(tested)}
        for score in SCORES:
            values = [run[score] for run in group if run[score] is not None]
            cell[score] = {
                "mean": mean(values) if values else None,
                "sd": stdev(values) if len(values) > 1 else None,
            }
        cells.append(cell)
    return cells


def compare_variants(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute scores of each variant and their differences to the first variant, with 95 % intervals, by magnification.

    Patients and seeds are resampled. The folds of one seed are pooled, so that each patient is tested once per seed;
    under the official protocol, whose folds share patients, once per fold. The score of the pooled folds can differ
    from the mean of the folds' scores.

    Returns:
        A row for each variant, magnification and score: `variant`, `magnification`, `score`, `n_patients`, `n_seeds`,
        the score's `value`, `value_low` and `value_high`; and for all variants except the first `to` (the first),
        `difference`, `low` and `high`.
    """
    rows = []
    for (magnification,), group in group_runs(runs, "magnification").items():
        arms = {variant: _pool(part) for (variant,), part in group_runs(group, "variant").items()}
        first = next(iter(arms))
        for score, function in COMPARED.items():
            if function(arms[first].targets, arms[first].probabilities[0]) is None:  # one class only
                continue
            for variant, interval, difference in zip(arms, *bootstrap(list(arms.values()), function), strict=True):
                row: dict[str, Any] = {"variant": variant, "magnification": magnification, "score": score}
                row |= {"n_patients": len(set(arms[first].patient_ids.tolist()))}
                row |= {"n_seeds": len(arms[first].probabilities)}
                row |= {"value": interval.value, "value_low": interval.low, "value_high": interval.high}
                if variant != first:
                    row |= {"to": first, "difference": difference.value, "low": difference.low, "high": difference.high}
                rows.append(row)
    return rows


def _pool(runs: Sequence[dict[str, Any]]) -> Predictions:
    """Pool the predictions of one variant: join the folds of each seed, and stack the seeds."""
    by_seed = []
    for (_,), folds in group_runs(runs, "seed").items():
        by_seed.append([row for run in folds for row in read_predictions(run["folder"], run["classes"])])
    classes = runs[0]["classes"]
    return Predictions(
        targets=np.array([classes.index(row["target"]) for row in by_seed[0]]),
        patient_ids=np.array([row["patient"] for row in by_seed[0]]),
        probabilities=np.array(
            [[[float(row[f"prob_{name}"]) for name in classes] for row in rows] for rows in by_seed]
        ),
    )


def _row(run: dict[str, Any]) -> dict[str, Any]:
    """Make the row of a run in `results.csv`."""
    part = run["scored_on"]
    row = {key: run[key] for key in ("variant", "magnification", "fold", "seed", *SCORES)}
    sizes = {"n_images": run["n_images"][part], "n_patients": run["n_patients"][part]}
    return row | sizes | {"best_epoch": run["best_epoch"]}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(in_markdown, line))} |" for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """Write the tables, each after a sentence that explains its numbers."""
    cells, intervals = results["cells"], results["intervals"]
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    magnifications = list(dict.fromkeys(cell["magnification"] for cell in cells))
    cell_of = {(cell["variant"], cell["magnification"]): cell for cell in cells}
    source = name_source(results)
    blocks = []
    for score in SCORES:
        rows = [
            [variant, results["protocol"], *(_cell(cell_of[variant, power], score) for power in magnifications)]
            for variant in variants
        ]
        if score == "image_accuracy" and results["dataset"] == "breakhis" and not results["synthetic"]:
            rows += _paper_rows(results["task"], variants, magnifications)
        name = _in_words(score)
        blocks.append(
            f"{name[0].upper()}{name[1:]}, {source}, {results['task']}; "
            "mean ± sd over folds and seeds, n patients that are scored."
        )
        blocks.append(_table(["method", "protocol", *magnifications], rows))
    blocks.append(
        f"All folds together, {source}, {results['task']}, {results['protocol']}; "
        "in brackets 95 % of the bootstrap over patients and seeds."
    )
    rows = [
        [
            row["variant"],
            _in_words(row["score"]),
            row["magnification"],
            f"{row['value']:.3f} [{row['value_low']:.3f}, {row['value_high']:.3f}]",
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if "difference" in row else "",
            f"{row['n_patients']} patients, {row['n_seeds']} seeds",
        ]
        for row in intervals
    ]
    blocks.append(_table(["method", "score", "magnification", "value", f"less {variants[0]}", "over"], rows))
    return "\n\n".join(blocks)


def _in_words(score: str) -> str:
    """Return the name of a score as it is printed."""
    return {"auc": "AUC", "ece": "ECE", "macro_f1": "macro F1"}.get(score, score.replace("_", " "))


def _cell(cell: dict[str, Any], score: str) -> str:
    """Write mean, standard deviation and number of patients."""
    value, spread = cell[score]["mean"], cell[score]["sd"]
    if value is None:
        return "undefined"
    shown = f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"
    return f"{shown} (n = {cell['n_patients']})"


def _paper_rows(task: str, variants: Sequence[str], magnifications: Sequence[str]) -> list[list[str]]:
    """Make the paper's rows for the task: its ablation if the study has a baseline for it, else all its methods."""
    table = paper.ABLATION if "baseline" in variants and task == "subtype" else paper.TABLES[task]
    return [
        [name, paper.PROTOCOL, *(_share(percents, magnification) for magnification in magnifications)]
        for name, percents in table.items()
    ]


def _share(percents: Sequence[float], magnification: str) -> str:
    """Write the paper's number for a magnification as a share."""
    if magnification not in paper.MAGNIFICATIONS:
        return "not given"
    return f"{percents[paper.MAGNIFICATIONS.index(magnification)] / 100:.4f}"
