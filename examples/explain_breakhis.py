"""Draw where the models of finished runs look, and what their KFDE layers decide.

    python examples/explain_breakhis.py --runs OUT

OUT is the output directory of `train_breakhis.py`, for a single run or a study. At each magnification the first run of
each variant, by fold and then by seed, represents the variant. Only images that the run was scored on are shown, and
they are chosen by their names, so that nobody can choose good-looking ones. No input is ever replaced.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from breakhis.commands import one_line_errors, run_script
from breakhis.data.images import open_rgb
from breakhis.data.naming import full_names
from breakhis.data.records import ImageDataset, Record
from breakhis.files import write_csv
from breakhis.names import file_name, printable
from breakhis.results.canvas import Heading
from breakhis.results.decision_figures import BranchWeights, draw_branch_weights, draw_gates
from breakhis.results.explain import by_class, cam_target, decisions, grad_cam, intervals_by_class
from breakhis.results.explained_images import (
    choose_images,
    describe_rows,
    group_name,
    groups,
    label_classes,
    scored_images,
    table_rows,
)
from breakhis.results.explained_runs import read_run, study_variants
from breakhis.results.maps import MapPanel, MapRow, SeenMap, describe_maps, draw_map_panels, seen_part
from breakhis.results.outputs import check_not_inputs, check_table
from breakhis.results.report import describe_protocol
from breakhis.results.study import group_runs
from breakhis.training.argument_types import Parser, number, path, torch_device
from breakhis.training.checkpoints import FILES, check_checkpoint, eval_transform, load_model
from breakhis.training.flags import ABLATION
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kfde_layers import CFE, MFDF  # the import also registers the kfde_* models with timm

logger = logging.getLogger("breakhis")

COLUMNS = ("variant", "magnification", "fold", "seed", "module", "kind", "class", "channel_or_branch", "mean", "sd")
FIGURES = ("cam-*.png", "gates-*.png", "branches-*.png")
FIELD_PX = 700  # long side of a drawn field
FAILED = 2  # exit code, the same as argparse's


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or `argv` if it is not None."""
    parser = Parser(
        description="Draw where the models of finished runs look, and what their KFDE layers decide.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {"type": path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--runs", **required, help="output directory of train_breakhis.py")
    parser.add_argument(
        "--data-dir", type=path, help="directory with the images; unset: the one in the flags of each run"
    )
    parser.add_argument("--output-dir", type=path, help="directory for all figures; unset: RUNS/explain")
    count = number(int, 1)
    parser.add_argument(
        "--images-per-class", type=count, default=1, help="images of each class in the Grad-CAM figures"
    )
    parser.add_argument("--max-gate-images", type=count, help="images for gates and branches at most; unset: all")
    parser.add_argument("--device", type=torch_device, default="auto", help="such as cpu or cuda:1")
    return parser.parse_args(argv)


def find_runs(out: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    """Find the finished runs of an output directory.

    Args:
        out: Output directory of `train_breakhis.py`.
        data_dir: Directory that image files are relative to; None: the one in the flags of each run.

    Returns:
        `metrics.json` of each run, together with `folder`, `data_dir` and `predictions` (the rows of
        `predictions.csv`), sorted by the study's order of variants, then by fold, then by seed.

    Raises:
        ValueError: There is no finished run, a file of a run is damaged, or a data directory does not exist.
    """
    runs = []
    for folder in sorted(file.parent for file in [*out.glob("metrics.json"), *out.glob("runs/*/metrics.json")]):
        run = read_run(folder)
        images = data_dir or (out / "synthetic" if run["synthetic"] else Path(str(run["flags"].get("data_dir"))))
        if not images.is_dir():
            raise ValueError(f"--data-dir must be a directory with the images of {folder}, got {str(images)!r}")
        runs.append(run | {"data_dir": images})
    if not runs:
        raise ValueError(f"--runs must be a directory with a finished run, which has metrics.json, got {str(out)!r}")
    order = [*study_variants(out / "results.json"), *ABLATION, *(run["variant"] for run in runs)]
    return sorted(runs, key=lambda run: (order.index(run["variant"]), run["fold"], run["seed"]))


def check_files(runs: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], study: Path, out: Path) -> None:
    """Refuse a run that is shown without the model that it has scored, and an output that would replace an input.

    Args:
        runs: All runs, from `find_runs`.
        shown: Those whose models are needed.
        study: Output directory of the runs.
        out: Directory for the figures.

    Raises:
        ValueError: The message names the file.
    """
    models = [run["folder"] / "best" / name for run in shown for name in FILES]
    for file in models:
        if not file.is_file():
            raise ValueError(f"{str(file)!r} must be a file of a finished run, got none")
    for run in shown:
        check_checkpoint(run["folder"] / "best", run["best_sha256"])
    images = [run["data_dir"] / row["file"] for run in runs for row in run["predictions"]]
    tables = [run["folder"] / name for run in runs for name in ("metrics.json", "predictions.csv")]
    check_table(out / "decisions.csv", COLUMNS)
    figures = [file for pattern in FIGURES for file in out.glob(pattern)]
    check_not_inputs(figures, [*models, *images, *tables, study / "results.json"])


def load_run_model(run: dict[str, Any]) -> nn.Module:
    """Load the model of a run.

    Raises:
        ValueError: The model has other classes than the run.
    """
    model = load_model(run["folder"] / "best")
    if (labels := model.pretrained_cfg["label_names"]) != run["classes"]:
        raise ValueError(f"{run['folder'] / 'best'} must have the classes of its run, {run['classes']}, got {labels}")
    return model


def load_images(run: dict[str, Any], model: nn.Module, rows: Sequence[dict[str, str]]) -> DataLoader:
    """Load images of a run's predictions as input of its model, in batches of (image, target, index)."""
    records = [
        Record(run["data_dir"] / row["file"], {run["task"]: row["target"]}, row["patient"], row["case"]) for row in rows
    ]
    return DataLoader(ImageDataset(records, run["task"], run["classes"], eval_transform(model)), batch_size=16)


def explain_images(run: dict[str, Any], model: nn.Module, rows: Sequence[dict[str, str]]) -> list[MapPanel]:
    """Return the Grad-CAM of each image's true class, and the prediction of the run."""
    prediction_of, transform = {row["file"]: row for row in run["predictions"]}, eval_transform(model)
    panels = []
    for images, targets, indices in load_images(run, model, rows):
        for cells, index in zip(grad_cam(model, images, targets), indices, strict=True):
            row = prediction_of[rows[index]["file"]]
            scores = {name: float(row[f"prob_{name}"]) for name in run["classes"]}
            target, answer = row["target"], max(scores, key=scores.__getitem__)
            size = open_rgb(run["data_dir"] / row["file"]).size
            panels.append(
                MapPanel(
                    SeenMap(cells, size, seen_part(transform, size)),
                    f"{'right' if answer == target else 'WRONG'}: {printable(answer)}, p = {scores[answer]:.2f}",
                    f"map of {printable(target)}, p = {scores[target]:.2f}",
                    answer != target,
                )
            )
    return panels


def draw_cams(pairs: Sequence[tuple[dict[str, Any], nn.Module]], count: int, path: Path) -> bool:
    """Draw the Grad-CAM of the true class: a row for each image, a column for each variant.

    Args:
        pairs: A run and its model for each variant, at one magnification. The images are those of the first run.
        count: Number of images of each class at most, the first ones by file name.
        path: The PNG file.

    Returns:
        Whether any model has a feature map; without one there is no figure.
    """
    first, _ = pairs[0]
    rows, columns = choose_images(first, count), {}
    for run, model in pairs:
        try:
            if scored_images(run) != scored_images(first):
                raise ValueError("it tests other images")
            cam_target(model)
        except ValueError as error:
            logger.warning("%s is left out of %s: %s", printable(run["variant"]), path.name, printable(error))
        else:
            columns[printable(run["variant"])] = explain_images(run, model, rows)
    if not columns:
        return False
    names = dict(zip(first["classes"], full_names(first["classes"]), strict=True))
    panels = []
    for row, *explained in zip(rows, *columns.values(), strict=True):
        field = open_rgb(first["data_dir"] / row["file"])
        field.thumbnail((FIELD_PX, FIELD_PX))  # one after the other: a field can have 100 million pixels
        label = f"{names[row['target']]}\npatient {printable(row['patient'])}"
        panels.append(MapRow(label, field, dict(zip(columns, explained, strict=True))))
    maps = [panel.map for row in panels for panel in row.panels.values()]
    which = f"first {'image' if count == 1 else f'{count} images'} of each class by file name"
    said = (which, describe_protocol(first), f"seed {first['seed']}", describe_rows(rows, first), describe_maps(maps))
    draw_map_panels(
        panels,
        Heading("Where the models look for the true class (Grad-CAM)", ", ".join([*said, "one scale for all maps"])),
        path,
    )
    return True


def draw_decisions(run: dict[str, Any], model: nn.Module, limit: int | None, out: Path) -> list[dict[str, Any]]:
    """Draw gates and branch weights of each KFDE layer, by class, for the images that the run was scored on.

    Args:
        run: A run from `find_runs`.
        model: The model of the run.
        limit: Number of images at most, taken at equal steps; None: all.
        out: Directory for the figures.

    Returns:
        The numbers in the figures, as rows of `decisions.csv`; a class without images has none.
    """
    rows, name = run["predictions"], f"{run['variant']}-{run['magnification']}"
    shown = rows if limit is None else rows[:: math.ceil(len(rows) / limit)]
    recorded = decisions(model, tqdm(load_images(run, model, shown), printable(name), unit="batch", disable=None))
    number, labels = len(run["classes"]), label_classes(run["classes"], rows, shown)
    protocol = f"{describe_protocol(run)}, seed {run['seed']}, {describe_rows(shown, run)}"
    table = []
    for module, values in recorded.gates.items():
        means, deviations = by_class(values, recorded.targets, number)
        stem = name if len(recorded.gates) == 1 else f"{name}-{module}"
        figure = out / file_name(f"gates-{stem}", ".png")
        heading = Heading(f"Open gates of CFE by channel ({run['variant']}, {module})", protocol)
        draw_gates(means, labels, heading, figure)
        table += table_rows(run, module, "gate", list(range(values.shape[1])), means, deviations)
    for module, values in recorded.branches.items():
        parts, values = branch_names(model.get_submodule(module)), values.mean(axis=2)
        means, deviations = by_class(values, recorded.targets, number)
        bounds = intervals_by_class(values, recorded.targets, groups(shown), number)
        weights = BranchWeights(means, *bounds, group_name(shown))
        stem = name if len(recorded.branches) == 1 else f"{name}-{module}"
        figure = out / file_name(f"branches-{stem}", ".png")
        heading = Heading(f"Branch weights of MFDF ({run['variant']}, {module})", protocol)
        draw_branch_weights(weights, parts, labels, heading, figure)
        table += table_rows(run, module, "branch", parts, means, deviations)
    return table


def branch_names(layer: MFDF) -> list[str]:
    """Name the branches of an MFDF by kernel size and dilation, such as "3 x 3 px"."""
    return [
        f"{size} x {size} px" + (f", dilation {dilation} px" if dilation > 1 else "")
        for size, dilation in zip(layer.kernel_sizes, layer.dilation, strict=True)
    ]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return 0, or 2 if there is nothing to draw or a file of a run is wrong."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    out = args.output_dir or args.runs / "explain"
    any_cam, table = False, []
    try:
        runs = find_runs(args.runs, args.data_dir)
        groups = {
            magnification: [variant[0] for variant in group_runs(group, "variant").values()]
            for (magnification,), group in group_runs(runs, "magnification").items()
        }
        check_files(runs, [run for group in groups.values() for run in group], args.runs, out)
        out.mkdir(parents=True, exist_ok=True)
        for magnification, group in groups.items():
            pairs = [(run, load_run_model(run).to(args.device)) for run in group]
            any_cam |= draw_cams(pairs, args.images_per_class, out / file_name(f"cam-{magnification}", ".png"))
            for run, model in pairs:
                if any(isinstance(module, (CFE, MFDF)) for module in model.modules()):
                    table += draw_decisions(run, model, args.max_gate_images, out)
                else:
                    names = printable(run["variant"]), printable(magnification)
                    logger.info("%s at %s has no KFDE layer, so no gates and branches", *names)
        if not any_cam and not table:
            raise ValueError(f"--runs must have a model with a feature map or KFDE layers, got none in {args.runs}")
    except ValueError as error:
        logger.error("error: %s", printable(error))
        return FAILED
    if table:
        write_csv(out / "decisions.csv", table)
    logger.info("drawn in %s", printable(out))
    return 0


if __name__ == "__main__":
    run_script(main)
