"""Draws why the models of finished runs answer as they do: where they look, and what their KFDE layers decide.

    python examples/explain_breakhis.py --runs OUT

OUT is what `train_breakhis.py` had as its output directory, of a single run or of a study. At each magnification, the
first run of each variant, by fold and then by seed, stands for the variant. Only test images are shown, and they are
chosen by their names, so that no figure is picked for its looks.
"""

import argparse
import csv
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from breakhis.checkpoints import eval_transform, load_model
from breakhis.explain import as_picture, by_class, cam_target, decisions, grad_cam, overlay
from breakhis.figures import CamRow, draw_branch_weights, draw_cam_panels, draw_gates
from breakhis.options import ABLATION
from breakhis.records import ImageDataset, Record
from breakhis.report import describe_protocol
from breakhis.study import groups, read_predictions
from predict_breakhis import _device
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kfde_layers import CFE, MFDF  # the import registers the kfde_* models with timm, too

logger = logging.getLogger("breakhis")

NOTHING_DRAWN = 2  # as argparse's, so that a script sees that there is no result
BATCH_SIZE = 16  # images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `argv` stands for it in tests."""
    parser = argparse.ArgumentParser(
        description="Draw where the models of finished runs look, and what their KFDE layers decide.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--runs", type=Path, required=True, default=argparse.SUPPRESS, help="output directory of train_breakhis.py"
    )
    parser.add_argument("--data-dir", type=Path, help="directory with the images; unset: the one that runs name")
    parser.add_argument("--output-dir", type=Path, help="for every figure; unset: RUNS/explain")
    parser.add_argument("--images-per-class", type=int, default=1, help="rows of each class in the Grad-CAM figures")
    parser.add_argument(
        "--max-gate-images", type=int, help="most test images, spread over all, for gates and branches; unset: all"
    )
    parser.add_argument("--device", type=_device, default="auto", help="such as cpu or cuda:1")
    args = parser.parse_args(argv)
    if args.data_dir is not None and not args.data_dir.is_dir():
        parser.error(f"argument --data-dir: must be a directory, got {str(args.data_dir)!r}")
    for name in ("images_per_class", "max_gate_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
    args.output_dir = args.output_dir or args.runs / "explain"
    return args


def find_runs(out: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    """Finds the finished runs below an output directory.

    Args:
        out: Of `train_breakhis.py`.
        data_dir: What image files are relative to; None takes the directory that each run names.

    Returns:
        `metrics.json` of each run, with `folder`, `predictions` (the rows of `predictions.csv`) and `data_dir` added,
        by the study's order of variants, then by fold, then by seed.
    """
    folders = [file.parent for file in sorted([*out.glob("metrics.json"), *out.glob("runs/*/metrics.json")])]
    runs = []
    for folder in folders:
        run = json.loads((folder / "metrics.json").read_text())
        named = out / "synthetic" if run["synthetic"] else Path(run["flags"]["data_dir"])
        runs.append(run | {"folder": folder, "predictions": read_predictions(folder), "data_dir": data_dir or named})
    study = out / "results.json"  # missing where there is one run, or not every run is finished
    cells = json.loads(study.read_text())["cells"] if study.is_file() else []
    order = [*(cell["variant"] for cell in cells), *ABLATION, *(run["variant"] for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run["variant"]), run["fold"], run["seed"]))


def pick_images(rows: Sequence[dict[str, str]], classes: Sequence[str], count: int) -> list[dict[str, str]]:
    """The first images of each class by file name.

    Args:
        rows: Of `predictions.csv`.
        classes: In the order wanted.
        count: Images of each class, at most.
    """
    ranked = sorted(rows, key=lambda row: (PurePosixPath(row["file"]).name, row["file"]))
    return [row for name in classes for row in [row for row in ranked if row["target"] == name][:count]]


def load_images(run: dict[str, Any], model: nn.Module, rows: Sequence[dict[str, str]]) -> DataLoader:
    """Batches of (image, target, index) for rows of a run's `predictions.csv`, as the model is to be shown them."""
    records = [
        Record(run["data_dir"] / row["file"], {run["task"]: row["target"]}, row["patient"], row["patient"])
        for row in rows
    ]
    return DataLoader(ImageDataset(records, run["task"], run["classes"], eval_transform(model)), BATCH_SIZE)


def explain_looks(runs: Sequence[dict[str, Any]], models: Sequence[nn.Module], count: int, path: Path) -> bool:
    """Draws Grad-CAMs of the true class, a row for each image and a column for each run that tests them.

    Args:
        runs: Of different variants at one magnification; the first says which images are tested.
        models: Of the runs.
        count: Images of each class, at most.
        path: The file.

    Returns:
        Whether there was anything to draw.
    """
    first = runs[0]
    picked = pick_images(first["predictions"], first["classes"], count)
    columns: dict[str, list] = {}
    for run, model in zip(runs, models, strict=True):
        known = {(row["file"], row["target"]): row for row in run["predictions"]}
        if known.keys() != {(row["file"], row["target"]) for row in first["predictions"]}:
            logger.warning("%s has no Grad-CAM beside %s: it tests other images", run["variant"], first["variant"])
            continue
        try:
            cam_target(model)
        except ValueError as error:
            logger.warning("%s has no Grad-CAM: %s", run["variant"], error)
            continue
        overlays, pictures = [], []
        for images, targets, _ in load_images(run, model, picked):
            for image, cam in zip(images, grad_cam(model, images, targets), strict=True):
                pictures.append(as_picture(model, image))
                overlays.append(overlay(pictures[-1], cam))
        names = [row["target"] for row in picked]
        shares = [float(known[row["file"], name][f"prob_{name}"]) for row, name in zip(picked, names, strict=True)]
        columns[run["variant"]] = list(zip(overlays, names, shares, strict=True))
    if not columns:
        return False
    labels = [f"{row['target']}\npatient {row['patient']}" for row in picked]
    rows = [
        CamRow(label, picture, {variant: column[index] for variant, column in columns.items()})
        for index, (label, picture) in enumerate(zip(labels, pictures, strict=True))
    ]
    which = "first test image" if count == 1 else f"first {count} test images"
    title = f"Grad-CAM of the true class, {which} of each class by file name; {describe_protocol(first)}"
    draw_cam_panels(rows, f"{title}, seed {first['seed']}", path)
    return True


def explain_decisions(run: dict[str, Any], model: nn.Module, limit: int | None, out: Path) -> list[dict[str, Any]]:
    """Draws the gates and the branches of each KFDE layer of a run's model, by class.

    Args:
        run: From `find_runs`.
        model: Of the run.
        limit: Most test images to look at; None looks at all.
        out: Directory for the figures, one for each layer.

    Returns:
        The numbers behind the figures, as rows of `decisions.csv`; an absent class has none.
    """
    tested, where = run["predictions"], f"{run['variant']}-{run['magnification']}"
    shown = tested[:: math.ceil(len(tested) / (limit or len(tested)))]
    found = decisions(model, tqdm(load_images(run, model, shown), f"deciding on {where}", unit="batch"))
    about = f"on {len(shown)} of {len(tested)} test images; {describe_protocol(run)}, seed {run['seed']}"
    table = []

    def tabulate(kind: str, module: str, names: Iterable, values) -> tuple:
        means, deviations = by_class(values, found.targets, len(run["classes"]))
        common = {key: run[key] for key in ("variant", "magnification", "fold", "seed")}
        for index in sorted(set(found.targets)):
            for name, mean, deviation in zip(names, means[index], deviations[index], strict=True):
                table.append(common | {"module": module, "kind": kind, "class": run["classes"][index]})
                table[-1] |= {"channel_or_branch": name, "mean": mean, "sd": deviation}
        return means, deviations

    return table
