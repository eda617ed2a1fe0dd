"""Classify a folder of images with a model that `train_breakhis.py` saved.

    python examples/predict_breakhis.py --checkpoint OUT/best --images DIR --output predictions.csv --cam-dir CAMS

Images may have any name and lie at any depth, also in linked folders. Images with names like BreakHis' are also
combined by patient, in `predictions_patients.csv`. No input is ever replaced.
"""

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from breakhis.commands import one_line_errors, run_script
from breakhis.data.images import IMAGE_SUFFIXES, find_faults, open_rgb
from breakhis.data.naming import full_names, parse_name
from breakhis.data.records import Record
from breakhis.data.search import Tree, search
from breakhis.files import real_path, write_csv
from breakhis.mappings import read_json
from breakhis.names import printable
from breakhis.results.canvas import Heading
from breakhis.results.explain import cam_target, grad_cam
from breakhis.results.maps import SeenMap, draw_map, largest, seen_part
from breakhis.results.outputs import check_not_inputs, check_outside, check_table, overlay_paths
from breakhis.training.argument_types import MAX_WORKERS, Parser, number, torch_device
from breakhis.training.argument_types import path as path_type
from breakhis.training.checkpoints import eval_transform, load_model
from breakhis.training.finite import check_scores
from breakhis.training.trained_on import warn_of
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import kfde_layers  # noqa: F401 -- registers the kfde_* models with timm

logger = logging.getLogger("breakhis")

NOTHING_PREDICTED = 2  # exit code, the same as argparse's
COLUMNS, PATIENT_COLUMNS = ("file", "patient", "prediction"), ("patient", "n_images", "prediction")
"""First columns of the tables. The probabilities follow."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or `argv` if it is not None."""
    parser = Parser(
        description="Classify a folder of images with a model that train_breakhis.py saved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {"type": path_type, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--checkpoint", **required, help="folder with config.json and model.safetensors")
    parser.add_argument("--images", **required, help="directory with images at any depth")
    parser.add_argument("--output", **required, help="CSV file to write, with one row for each image")
    parser.add_argument(
        "--cam-dir", type=path_type, help="directory for a Grad-CAM of each image's predicted class, as PNG"
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="images per step")
    parser.add_argument(
        "--num-workers",
        type=number(int, 0, MAX_WORKERS),
        default=2,
        help=f"processes that load images, at most {MAX_WORKERS}; 0: the main process does",
    )
    parser.add_argument("--device", type=torch_device, default="auto", help="such as cpu or cuda:1")
    args = parser.parse_args(argv)
    for name in ("config.json", "model.safetensors"):
        if not (args.checkpoint / name).is_file():
            parser.error(f"argument --checkpoint: must be a folder with {name}, got {str(args.checkpoint)!r}")
    if not args.images.is_dir():
        parser.error(f"argument --images: must be a directory, got {str(args.images)!r}")
    _check_outputs(parser, args)
    return args


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse now what could not be written after the images are predicted."""
    if args.output.suffix.lower() in IMAGE_SUFFIXES:
        parser.error(f"argument --output: must be a CSV file, not named like an image, got {str(args.output)!r}")
    try:
        if args.output.is_dir():
            parser.error(f"argument --output: must be a file, got the directory {str(args.output)!r}")
        check_table(args.output, COLUMNS)
        check_table(patients_file(args.output), PATIENT_COLUMNS)
    except (OSError, ValueError) as error:  # an OSError for a name that is too long
        parser.error(f"argument --output: {error}")
    if args.cam_dir is not None and real_path(args.cam_dir).is_relative_to(real_path(args.images)):
        parser.error(
            "argument --cam-dir: must not lie below --images, whose next run would take the overlays for images, "
            f"got {str(args.cam_dir)!r}"
        )
    for name, folder in (("output", args.output.parent), ("cam-dir", args.cam_dir)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"argument --{name}: must be in a writable folder, got {str(folder)!r}: {error}")


def patients_file(output: Path) -> Path:
    """Return the file for the votes of the patients, next to that for the images."""
    return output.with_name(f"{output.stem}_patients.csv")


def usable_images(directory: Path, paths: Sequence[Path]) -> list[Path]:
    """List the images below a directory that can be read; the log names the other ones and counts both."""
    faults = find_faults(paths)
    for path, reason in faults.items():
        logger.warning("skipped %s: %s", printable(path.relative_to(directory)), reason)
    usable = [path for path in paths if path not in faults]
    logger.info("%d images, %d skipped", len(usable), len(faults))
    return usable


def choose_overlays(args: argparse.Namespace, tree: Tree) -> dict[Path, Path]:
    """Choose a file for the Grad-CAM of each image, before any image is opened.

    Raises:
        ValueError: An overlay would replace an input, or the next run would take it for an image.
    """
    check_outside(args.cam_dir, tree.folders)  # links lead to folders elsewhere
    names = [path.relative_to(args.images).as_posix() for path in tree.files]
    overlays = overlay_paths(names, args.cam_dir)
    check_not_inputs(overlays, [*tree.files, *args.checkpoint.rglob("*")])
    return dict(zip(tree.files, overlays, strict=True))


def predict(
    model: nn.Module, loader: DataLoader, paths: Sequence[Path], checkpoint: Path, explain: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predict every image, and find where the model looks.

    Args:
        model: The model, in evaluation mode.
        loader: Batches of images, (N, 3, H, W), in order.
        paths: The image files, in the same order.
        checkpoint: Folder of the model, for the error.
        explain: Whether to compute Grad-CAM.

    Returns:
        Probabilities, a row for each image and a column for each class; and, if `explain`, the Grad-CAM of each image's
        predicted class, (h, w).

    Raises:
        FloatingPointError: A logit is not finite. The message names the model and the image.
    """
    device, rows, maps = next(model.parameters()).device, [], []
    for inputs in tqdm(loader, "predicting", unit="batch", disable=None):
        inputs, files = inputs.to(device), paths[len(rows) : len(rows) + len(inputs)]
        with torch.inference_mode():
            logits = model(inputs)
        check_scores(logits, files, checkpoint)
        if explain:
            maps += list(grad_cam(model, inputs, logits.argmax(1).tolist()))
        rows += logits.softmax(1).tolist()
    return np.array(rows), maps


def draw_maps(
    directory: Path, overlays: dict[Path, Path], model: nn.Module, probabilities: np.ndarray, maps: Sequence[np.ndarray]
) -> None:
    """Draw the Grad-CAM of each image over its field, all on one scale. The log names one that cannot be written.

    Args:
        directory: Folder of the images.
        overlays: The PNG file of each image file, in the order of the rows.
        model: The model.
        probabilities: A row for each image, a column for each class.
        maps: Grad-CAM of each image's predicted class.
    """
    classes, transform = full_names(model.pretrained_cfg["label_names"]), eval_transform(model)
    scale = largest(maps)
    for (image, path), row, cells in zip(
        tqdm(overlays.items(), "drawing", disable=None), probabilities, maps, strict=True
    ):
        field = open_rgb(image)
        shown = SeenMap(cells, field.size, seen_part(transform, field.size))
        title = f"Prediction: {classes[row.argmax()]}, probability {row.max():.2f}"
        heading = Heading(
            title,
            f"{image.relative_to(directory).as_posix()}, Grad-CAM of the predicted class, one scale for all images",
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_map(field, shown, scale, heading, path)
        except OSError as error:
            logger.warning("WARNING: no Grad-CAM in %s: %s", printable(path), printable(error.strerror or error))


def patient_votes(
    patient_ids: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """Combine the images of each patient, of all magnifications.

    Args:
        patient_ids: Patient of each image.
        probabilities: A row for each image, a column for each class.
        classes: Names of the classes.

    Returns:
        For each patient: `patient`, `n_images`, `prediction` by the mean of the images' probabilities, those means as
        `prob_<class>`, and the class of most images, `majority`, with their share, `majority_share`. Of classes with
        the same number of images, the one with the larger mean is the majority.
    """
    rows_of = defaultdict(list)
    for patient_id, row in zip(patient_ids, probabilities, strict=True):
        rows_of[patient_id].append(row)
    rows = []
    for patient_id, images in sorted(rows_of.items()):
        means = np.mean(images, axis=0)
        counts = np.bincount(np.argmax(images, axis=1), minlength=len(classes))
        majority = max(range(len(classes)), key=lambda index: (counts[index], means[index]))
        rows.append(
            {"patient": patient_id, "n_images": len(images), **_prediction(means, classes)}
            | {"majority": classes[majority], "majority_share": counts[majority] / len(images)}
        )
    return rows


def _prediction(probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    """Make the columns `prediction` and `prob_<class>`."""
    columns = {f"prob_{name}": f"{value:.9g}" for name, value in zip(classes, probabilities, strict=True)}
    return {"prediction": classes[probabilities.argmax()], **columns}  # 9 digits restore a float32


def _record(path: Path) -> Record | None:
    """Read a file's name, or return None if it is not like BreakHis'."""
    try:
        return parse_name(path)
    except ValueError:
        return None


def _load(transform: Callable[[Image.Image], Tensor], paths: Sequence[Path]) -> Tensor:
    """Load a batch of images."""
    return torch.stack([transform(open_rgb(path)) for path in paths])


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return 0, or 2 if there is nothing to predict or an input would be replaced."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    tree, overlays = search(args.images, IMAGE_SUFFIXES), {}
    if args.cam_dir is not None:
        try:
            overlays = choose_overlays(args, tree)
        except ValueError as error:
            logger.error("argument --cam-dir: %s", printable(error))
            return NOTHING_PREDICTED
    paths = usable_images(args.images, tree.files)
    if not paths:
        logger.error("argument --images: must hold an image that can be used, got none in %r", str(args.images))
        return NOTHING_PREDICTED
    model = load_model(args.checkpoint).to(args.device)
    if overlays:
        try:
            cam_target(model)
        except ValueError as error:
            logger.error("argument --cam-dir: %s", printable(error))
            return NOTHING_PREDICTED

    records = [_record(path) for path in paths]
    for message in warn_of(read_json(args.checkpoint / "config.json").get("trained_on"), list(filter(None, records))):
        logger.warning("WARNING: %s", message)
    load = partial(_load, eval_transform(model))
    loader = DataLoader(paths, args.batch_size, num_workers=args.num_workers, collate_fn=load)
    probabilities, maps = predict(model, loader, paths, args.checkpoint, bool(overlays))
    classes = model.pretrained_cfg["label_names"]
    patient_ids = [record.patient_id if record else "" for record in records]
    rows = [
        {"file": path.relative_to(args.images).as_posix(), "patient": patient_id, **_prediction(row, classes)}
        for path, patient_id, row in zip(paths, patient_ids, probabilities, strict=True)
    ]
    write_csv(args.output, rows)
    named = [index for index, patient_id in enumerate(patient_ids) if patient_id]
    if named:
        votes = patient_votes([patient_ids[index] for index in named], probabilities[named], classes)
        write_csv(patients_file(args.output), votes)
    if overlays:  # last: no fault of a figure must cost the predictions
        draw_maps(args.images, {path: overlays[path] for path in paths}, model, probabilities, maps)
    return 0


if __name__ == "__main__":
    run_script(main)
