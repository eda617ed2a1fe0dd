"""Tables of many runs, by variant and magnification, over folds and seeds, together with the paper's numbers.

A study is a set of runs started together. Its tables have the paper's layout, with methods down and magnifications
across. The paper's numbers come last, labelled with their protocol, because it is another one.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from breakhis.files import write_atomically, write_csv
from breakhis.names import in_markdown
from breakhis.results import paper
from breakhis.results.intervals import Interval, Predictions, Score, bootstrap, verdict
from breakhis.results.metrics import auc, balanced_accuracy, image_accuracy
from breakhis.results.report import name_source
from breakhis.results.runs import read_metrics, read_predictions

SCORES = ("image_accuracy", "patient_recognition_rate", "balanced_accuracy", "macro_f1", "auc", "ece")
KEYS = ("dataset", "synthetic", "protocol_in_words", "task", "classes", "variant", "magnification", "fold", "seed")
KEYS += ("scored_on", "n_images", "n_patients", "n_cases", "n_shared", "best_epoch", "flags", *SCORES)
"""Entries of `metrics.json` that a study uses."""


class Compared(NamedTuple):
    """How a score that gets an interval is computed."""

    function: Score
    """Score of weighted predictions."""
    by_patient: bool = False
    """Whether each patient has the same weight, else each image."""
    by_class: bool = False
    """Whether it is a mean over classes."""


COMPARED = {
    "image_accuracy": Compared(image_accuracy),
    "patient_recognition_rate": Compared(image_accuracy, by_patient=True),
    "balanced_accuracy": Compared(balanced_accuracy, by_class=True),
    "auc": Compared(auc, by_class=True),
}


def write_study(out: Path, folders: Sequence[Path]) -> str:
    """Write `results.json`, `results.csv` and `results.md` from finished runs.

    Args:
        out: Folder for the files.
        folders: Folders of the runs, each with `metrics.json` and `predictions.csv`.

    Returns:
        The content of `results.md`.
    """
    runs = [read_metrics(folder, KEYS) for folder in folders]
    for run, folder in zip(runs, folders, strict=True):
        run["predictions"] = read_predictions(folder, run["classes"])
    flags = runs[0]["flags"]
    if runs[0]["scored_on"] == "val":  # a choice of settings is no test, so its primary score gets no verdict
        flags = flags | {"primary_score": None, "margin": None}
    results = {
        "dataset": runs[0]["dataset"],
        "synthetic": runs[0]["synthetic"],
        "task": runs[0]["task"],
        "classes": runs[0]["classes"],
        **{key: flags.get(key) for key in ("question", "primary_score", "margin")},
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
        A cell for each: `variant`, `protocol`, `magnification`, `n_runs`, `n_cases` (distinct scored cases), `n_tested`
        (test images of all folds) and `n_shared` (those of cases that training or validation has too), and for each
        score `mean` and `sd`. `sd` is None for a single run; both are None if no run has the score.
    """
    cells = []
    for (variant, magnification), group in group_runs(runs, "variant", "magnification").items():
        tested = {row["case"] for run in group for row in run["predictions"]}
        cell: dict[str, Any] = {"variant": variant, "protocol": group[0]["protocol_in_words"]}
        cell["magnification"] = magnification
        cell |= {"n_runs": len(group), "n_cases": len(tested)}
        folds = next(iter(group_runs(group, "seed").values()))
        cell["n_tested"] = sum(run["n_images"]["test"] for run in folds)
        cell["n_shared"] = sum(run["n_shared"] for run in folds)
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

    Cases and seeds are resampled. The folds of one seed are pooled, so that each case is tested once per seed; under
    the official protocol, whose folds share patients, once per fold. The score of the pooled folds can differ from the
    mean of the folds' scores.

    Args:
        runs: The `metrics.json` of each run, with its `predictions`.

    Returns:
        A row for each variant, magnification and score: `variant`, `magnification`, `score`, `n_cases`, `n_seeds`, the
        score's `value`, `value_low` and `value_high`, `too_few` (of what there are too few for an interval), and
        `lacking`, the share of resamples that lack a class that the score needs; and for all variants except the first
        `to` (the first), `difference`, `low` and `high`. Ends of an interval are None where there is none.
    """
    rows = []
    for (magnification,), group in group_runs(runs, "magnification").items():
        arms = {variant: _pool(part) for (variant,), part in group_runs(group, "variant").items()}
        first = next(iter(arms))
        for score, compared in COMPARED.items():
            if compared.function(arms[first].targets, arms[first].probabilities[0], None) is None:  # one class only
                continue
            weighted = [_weighted(arm, compared) for arm in arms.values()]
            found = bootstrap(weighted, compared.function, by_class=compared.by_class)
            for variant, interval, difference in zip(arms, found.scores, found.differences, strict=True):
                row: dict[str, Any] = {"variant": variant, "magnification": magnification, "score": score}
                row |= {"n_cases": len(set(arms[first].case_ids.tolist()))}
                row |= {"n_seeds": len(arms[first].probabilities)}
                row |= {"value": interval.value, "value_low": interval.low, "value_high": interval.high}
                row |= {"too_few": found.too_few, "lacking": found.lacking if compared.by_class else 0.0}
                if variant != first:
                    row |= {"to": first, "difference": difference.value, "low": difference.low, "high": difference.high}
                rows.append(row)
    return rows


def _weighted(arm: Predictions, compared: Compared) -> Predictions:
    """Return the predictions with the weights that the score needs; those that they have are per patient."""
    return arm if compared.by_patient else arm._replace(weights=np.ones(len(arm.targets)))


def _pool(runs: Sequence[dict[str, Any]]) -> Predictions:
    """Pool the predictions of one variant: join the folds of each seed, and stack the seeds. Patients weigh alike."""
    by_seed = [[row for run in folds for row in run["predictions"]] for folds in group_runs(runs, "seed").values()]
    classes, rows = runs[0]["classes"], by_seed[0]
    images = Counter(row["patient"] for row in rows)
    return Predictions(
        targets=np.array([classes.index(row["target"]) for row in rows]),
        case_ids=np.array([row["case"] for row in rows]),
        probabilities=np.array(
            [[[float(row[f"prob_{name}"]) for name in classes] for row in rows] for rows in by_seed]
        ),
        weights=np.array([1 / images[row["patient"]] for row in rows]),
    )


def _row(run: dict[str, Any]) -> dict[str, Any]:
    """Make the row of a run in `results.csv`."""
    part = run["scored_on"]
    row = {key: run[key] for key in ("variant", "magnification", "fold", "seed", *SCORES)}
    sizes = {key: run[key][part] for key in ("n_images", "n_patients", "n_cases")}
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
            [
                variant,
                cell_of[variant, magnifications[0]]["protocol"],
                *(_cell(cell_of[variant, power], score) for power in magnifications),
            ]
            for variant in variants
        ]
        if score == "image_accuracy" and results["dataset"] == "breakhis" and not results["synthetic"]:
            rows += _paper_rows(results["task"], variants, magnifications)
        name = _in_words(score)
        blocks.append(
            f"{name[0].upper()}{name[1:]}, {source}, {results['task']}; "
            "mean ± sd over folds and seeds, n cases that are scored."
        )
        blocks.append(_table(["method", "protocol", *magnifications], rows))
    protocols = "; ".join(dict.fromkeys(cell["protocol"] for cell in cells))
    blocks.append(
        f"All folds together, {source}, {results['task']}, {protocols}; "
        "in brackets 95 % of the bootstrap over cases and seeds."
    )
    blocks[-1] += _shared(cells)
    primary = results["primary_score"]
    if primary is not None:
        blocks[-1] += (
            f" The primary score is {_in_words(primary)}; differences up to {results['margin']:g} do not matter."
        )
    header = ["method", "score", "magnification", "value", f"less {variants[0]}", "over"]
    blocks.append(_table(header, [_interval_row(row, primary, results["margin"]) for row in intervals]))
    return "\n\n".join(blocks)


def _shared(cells: Sequence[dict[str, Any]]) -> str:
    """Say for each protocol how many test images are of cases that training or validation has too, if any are."""
    arms = {cell["protocol"]: cell["variant"] for cell in reversed(cells)}  # the first variant of each protocol
    sentences = []
    for protocol, variant in reversed(arms.items()):
        mine = [cell for cell in cells if cell["variant"] == variant]
        shared, tested = (sum(cell[key] for cell in mine) for key in ("n_shared", "n_tested"))
        if shared:
            images = f"test images of the {protocol}" if len(arms) > 1 else "test images"
            sentences.append(f" {shared} of {tested} {images} are of cases that training or validation has too.")
    return "".join(sentences)


def _interval_row(row: dict[str, Any], primary: str | None, margin: float | None) -> list[str]:
    """Write a row of the table of intervals; the primary score also gets a verdict."""
    difference = ""
    if "difference" in row:
        interval = Interval(row["difference"], row["low"], row["high"])
        difference = _with_interval(interval, "+", row["too_few"])
        if row["score"] == primary and margin is not None:
            difference += f": {verdict(interval, margin)}"
    over = f"{row['n_cases']} cases, {row['n_seeds']} seed{'s' * (row['n_seeds'] != 1)}"
    if row["lacking"]:
        over += f"; {row['lacking']:.0%} of the resamples lack a class"
    value = _with_interval(Interval(row["value"], row["value_low"], row["value_high"]), "", row["too_few"])
    return [row["variant"], _in_words(row["score"]), row["magnification"], value, difference, over]


def _with_interval(interval: Interval, sign: str, too_few: str | None) -> str:
    """Write a value with its interval, or with the reason why it has none."""
    value, low, high = interval
    if low is None or high is None:
        why = f"too few {too_few} for an interval" if too_few else "no interval: the resamples agree"
        return f"{value:{sign}.3f} ({why})"
    digits = next(digits for digits in range(3, 12) if f"{low:.{digits}f}" != f"{high:.{digits}f}")
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _in_words(score: str) -> str:
    """Return the name of a score as it is printed."""
    return {"auc": "AUC", "ece": "ECE", "macro_f1": "macro F1"}.get(score, score.replace("_", " "))


def _cell(cell: dict[str, Any], score: str) -> str:
    """Write mean, standard deviation and number of cases."""
    value, spread = cell[score]["mean"], cell[score]["sd"]
    if value is None:
        return "undefined"
    shown = f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"
    return f"{shown} (n = {cell['n_cases']})"


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
