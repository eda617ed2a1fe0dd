"""Draws why the models of finished runs answer as they do: where they look, and what their KFDE layers decide.

    python examples/explain_breakhis.py --runs OUT

OUT is what `train_breakhis.py` had as its output directory, for a single run or a study. At each magnification the
first run of each variant, by fold and then by seed, stands for the variant. Only images that the run was scored on are
shown, and they are chosen by their names, so that none is there for its looks.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from breakhis.checkpoints import eval_transform, load_model
from breakhis.explain import as_picture, by_class, cam_target, decisions, grad_cam, overlay
from breakhis.figures import CamRow, draw_branch_weights, draw_cam_panels, draw_gates
from breakhis.options import ABLATION, torch_device
from breakhis.records import ImageDataset, Record
from breakhis.report import describe_protocol
from breakhis.study import groups
from breakhis.tables import read_csv, write_csv
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kfde_layers import CFE, MFDF  # the import registers the kfde_* models with timm, too

logger = logging.getLogger("breakhis")

PARTS = {"test": "test", "val": "validation"}
FAILED = 2  # as argparse's exit code


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `argv` stands for it in tests."""
    parser = argparse.ArgumentParser(
        description="Draw where the models of finished runs look, and what their KFDE layers decide.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--runs", **required, help="output directory of train_breakhis.py")
    parser.add_argument("--data-dir", type=Path, help="directory with the images; unset: the one that each run names")
    parser.add_argument("--output-dir", type=Path, help="for every figure; unset: RUNS/explain")
    parser.add_argument("--images-per-class", type=int, default=1, help="rows of each class in the Grad-CAM figures")
    parser.add_argument("--max-gate-images", type=int, help="images for gates and branches, at most; unset: all")
    parser.add_argument("--device", type=torch_device, default="auto", help="such as cpu or cuda:1")
    args = parser.parse_args(argv)
    for name in ("images_per_class", "max_gate_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
    return args


def find_runs(out: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    """Finds the finished runs of an output directory.

    Args:
        out: Of `train_breakhis.py`.
        data_dir: What image files are relative to; None takes the directory that each run names.

    Returns:
        `metrics.json` of each run with `folder`, `data_dir` and `predictions` (the rows of `predictions.csv`) added, by
        the study's order of variants, then by fold, then by seed.

    Raises:
        ValueError: There is no finished run, or a data directory is gone.
    """
    runs = []
    for file in sorted([*out.glob("metrics.json"), *out.glob("runs/*/metrics.json")]):
        run = json.loads(file.read_text())
        images = data_dir or (out / "synthetic" if run["synthetic"] else Path(run["flags"]["data_dir"]))
        if not images.is_dir():
            raise ValueError(f"--data-dir must be a directory with the images of {file.parent}, got {str(images)!r}")
        runs.append(
            run | {"folder": file.parent, "data_dir": images, "predictions": read_csv(file.parent / "predictions.csv")}
        )
    if not runs:
        raise ValueError(f"--runs must be a directory with a finished run, which has metrics.json, got {str(out)!r}")
    study = out / "results.json"  # is there once all runs of a study are finished
    cells = json.loads(study.read_text())["cells"] if study.is_file() else []
    order = [*(cell["variant"] for cell in cells), *ABLATION, *(run["variant"] for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run["variant"]), run["fold"], run["seed"]))


def load_images(run: dict[str, Any], model: nn.Module, rows: Sequence[dict[str, str]]) -> DataLoader:
    """Batches of (image, target, index) for rows of a run's predictions, as its model is to be shown them."""
    records = [
        Record(run["data_dir"] / row["file"], {run["task"]: row["target"]}, row["patient"], row["patient"])
        for row in rows
    ]
    return DataLoader(ImageDataset(records, run["task"], run["classes"], eval_transform(model)), batch_size=16)


def look(
    run: dict[str, Any], model: nn.Module, rows: Sequence[dict[str, str]]
) -> list[tuple[Image.Image, Image.Image, str, float]]:
    """Each image as the model is shown it, its Grad-CAM of the true class, that class and its probability."""
    answers = {row["file"]: row for row in run["predictions"]}
    found = []
    for images, targets, indices in load_images(run, model, rows):
        for image, cam, index in zip(images, grad_cam(model, images, targets), indices, strict=True):
            picture, row = as_picture(model, image), answers[rows[index]["file"]]
            found.append((picture, overlay(picture, cam), row["target"], float(row[f"prob_{row['target']}"])))
    return found


def draw_looks(pairs: Sequence[tuple[dict[str, Any], nn.Module]], count: int, path: Path) -> bool:
    """Draws where models look for the true class: a row for each image, a column for each variant.

    Args:
        pairs: A run and its model for each variant, at one magnification; the first run says what images are tested.
        count: Images of each class, the first by file name, at most.
        path: The file.

    Returns:
        Whether a model has a feature map to look at.
    """
    first, _ = pairs[0]
    ranked = sorted(first["predictions"], key=lambda row: (PurePosixPath(row["file"]).name, row["file"]))
    picked = [row for name in first["classes"] for row in [row for row in ranked if row["target"] == name][:count]]
    looks = {}
    for run, model in pairs:
        try:
            if _tested(run) != _tested(first):
                raise ValueError("it tests other images")
            cam_target(model)
        except ValueError as error:
            logger.warning("%s is left out of %s: %s", run["variant"], path.name, error)
        else:
            looks[run["variant"]] = look(run, model, picked)
    if not looks:
        return False
    panels = []
    for row, *answers in zip(picked, *looks.values(), strict=True):
        picture, *_ = answers[0]
        overlays = {variant: answer[1:] for variant, answer in zip(looks, answers, strict=True)}
        panels.append(CamRow(f"{row['target']}\npatient {row['patient']}", picture, overlays))
    part = PARTS[first["scored_on"]]
    which = f"first {part} image" if count == 1 else f"first {count} {part} images"
    title = f"Grad-CAM of the true class, {which} of each class by file name; {describe_protocol(first)}"
    draw_cam_panels(panels, f"{title}, seed {first['seed']}", path)
    return True


def _tested(run: dict[str, Any]) -> set[tuple[str, str]]:
    return {(row["file"], row["target"]) for row in run["predictions"]}


def draw_decisions(run: dict[str, Any], model: nn.Module, limit: int | None, out: Path) -> list[dict[str, Any]]:
    """Draws what each KFDE layer of a model decides about the images that it was scored on, by class.

    Args:
        run: From `find_runs`.
        model: Of the run.
        limit: Number of images at most, spread evenly over them; None takes them all.
        out: Directory for the figures.

    Returns:
        The numbers behind the figures, rows of `decisions.csv`; a class without images has none.
    """
    tested, where = run["predictions"], f"{run['variant']}-{run['magnification']}"
    shown = tested if limit is None else tested[:: math.ceil(len(tested) / limit)]
    found = decisions(model, tqdm(load_images(run, model, shown), where, unit="batch"))
    table = []
    for kind, layers in (("gate", found.gates), ("branch", found.branches)):
        for module, values in layers.items():
            parts = list(range(values.shape[1]))
            if kind == "branch":
                parts, values = branch_names(model.get_submodule(module)), values.mean(axis=2)
            means, deviations = by_class(values, found.targets, len(run["classes"]))
            title = (
                f"{run['variant']}, {module}, on {len(shown)} of {len(tested)} {PARTS[run['scored_on']]} images; "
                f"{describe_protocol(run)}, seed {run['seed']}"
            )
            name = where if len(layers) == 1 else f"{where}-{module}"
            if kind == "gate":
                draw_gates(means, run["classes"], title, out / f"gates-{name}.png")
            else:
                draw_branch_weights(means, deviations, parts, run["classes"], title, out / f"branches-{name}.png")
            common = {key: run[key] for key in ("variant", "magnification", "fold", "seed")}
            table += [
                common
                | {"module": module, "kind": kind, "class": run["classes"][index]}
                | {"channel_or_branch": part, "mean": mean, "sd": deviation}
                for index in sorted(set(found.targets.tolist()))
                for part, mean, deviation in zip(parts, means[index], deviations[index], strict=True)
            ]
    return table


def branch_names(layer: MFDF) -> list[str]:
    """What tells the branches of an MFDF apart, such as "3 x 3 px"."""
    return [
        f"{size} x {size} px" + (f", dilation {dilation} px" if dilation > 1 else "")
        for size, dilation in zip(layer.kernel_sizes, layer.dilation, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns 0, or 2 where there was nothing to draw."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    out = args.output_dir or args.runs / "explain"
    looks, table = False, []
    try:
        runs = find_runs(args.runs, args.data_dir)
        out.mkdir(parents=True, exist_ok=True)
        for (magnification,), group in groups(runs, "magnification").items():
            firsts = [part[0] for part in groups(group, "variant").values()]
            pairs = [(run, load_model(run["folder"] / "best").to(args.device)) for run in firsts]
            looks |= draw_looks(pairs, args.images_per_class, out / f"cam-{magnification}.png")
            for run, model in pairs:
                if any(isinstance(module, (CFE, MFDF)) for module in model.modules()):
                    table += draw_decisions(run, model, args.max_gate_images, out)
                else:
                    logger.info("%s at %s has no KFDE layer, so no gates and branches", run["variant"], magnification)
        if not looks and not table:
            raise ValueError(f"--runs must have a model with a feature map or KFDE layers, got none in {args.runs}")
    except ValueError as error:
        logger.error("error: %s", error)
        return FAILED
    if table:
        write_csv(out / "decisions.csv", table)
    logger.info("drawn in %s", out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
