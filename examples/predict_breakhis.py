"""Classify a folder of images with a model that `train_breakhis.py` saved.

    python examples/predict_breakhis.py --checkpoint OUT/best --images DIR --output predictions.csv --cam-dir CAMS

Images may have any name and lie at any depth. Images with names like BreakHis' are also combined by patient, in
`predictions_patients.csv`.
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
from breakhis.data.images import find_faults, image_files, open_rgb
from breakhis.data.naming import parse_name
from breakhis.files import write_csv
from breakhis.results.explain import as_picture, cam_target, grad_cam, overlay
from breakhis.training.argument_types import torch_device
from breakhis.training.checkpoints import eval_transform, load_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import kfde_layers  # noqa: F401 -- registers the kfde_* models with timm

logger = logging.getLogger("breakhis")

NOTHING_PREDICTED = 2  # exit code, the same as argparse's


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, or `argv` if it is not None."""
    parser = argparse.ArgumentParser(
        description="Classify a folder of images with a model that train_breakhis.py saved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--checkpoint", **required, help="folder with config.json and model.safetensors")
    parser.add_argument("--images", **required, help="directory with images at any depth")
    parser.add_argument("--output", **required, help="CSV file to write, with one row for each image")
    parser.add_argument("--cam-dir", type=Path, help="directory for a Grad-CAM of each image's predicted class, as PNG")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument(
        "--num-workers", type=int, default=2, help="processes that load images; 0: the main process does"
    )
    parser.add_argument("--device", type=torch_device, default="auto", help="such as cpu or cuda:1")
    args = parser.parse_args(argv)
    for name in ("config.json", "model.safetensors"):
        if not (args.checkpoint / name).is_file():
            parser.error(f"argument --checkpoint: must be a folder with {name}, got {str(args.checkpoint)!r}")
    if not args.images.is_dir():
        parser.error(f"argument --images: must be a directory, got {str(args.images)!r}")
    if args.output.is_dir():
        parser.error(f"argument --output: must be a file, got the directory {str(args.output)!r}")
    if args.cam_dir is not None and args.cam_dir.resolve().is_relative_to(args.images.resolve()):
        parser.error(
            "argument --cam-dir: must not lie below --images, whose next run would take the overlays for images, "
            f"got {str(args.cam_dir)!r}"
        )
    for name, folder in (("output", args.output.parent), ("cam-dir", args.cam_dir)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
        except OSError as error:  # refuse now, not after the images are predicted
            parser.error(f"argument --{name}: must be in a writable folder, got {str(folder)!r}: {error}")
    for name, minimum in (("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) < minimum:
            flag = name.replace("_", "-")
            parser.error(f"argument --{flag}: must be at least {minimum}, got {getattr(args, name)}")
    return args


def usable_images(directory: Path) -> list[Path]:
    """List the images below a directory that can be read; the log names the other ones and counts both."""
    paths = image_files(directory)
    faults = find_faults(paths)
    for path, reason in faults.items():
        logger.warning("skipped %s: %s", path.relative_to(directory), reason)
    usable = [path for path in paths if path not in faults]
    logger.info("%d images, %d skipped", len(usable), len(faults))
    return usable


def predict(model: nn.Module, loader: DataLoader, overlays: Sequence[Path] | None) -> np.ndarray:
    """Predict every image, and draw where the model looks.

    Args:
        model: The model, in evaluation mode.
        loader: Batches of images, (N, 3, H, W), in order.
        overlays: For each image, the PNG file for the Grad-CAM of its predicted class; None: no Grad-CAM.

    Returns:
        Probabilities, a row for each image and a column for each class.
    """
    device, rows = next(model.parameters()).device, []
    for inputs in tqdm(loader, "predicting", unit="batch"):
        inputs = inputs.to(device)
        with torch.inference_mode():
            probabilities = model(inputs).softmax(1)
        if overlays is not None:
            cams = grad_cam(model, inputs, probabilities.argmax(1).tolist())
            for image, cam, path in zip(inputs, cams, overlays[len(rows) :], strict=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                overlay(as_picture(model, image), cam).save(path)
        rows += probabilities.tolist()
    return np.array(rows)


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


def _patient_id(path: Path) -> str:
    """Return the patient in a file's name, or "" if the name is not like BreakHis'."""
    try:
        return parse_name(path).patient_id
    except ValueError:
        return ""


def _load(transform: Callable[[Image.Image], Tensor], paths: Sequence[Path]) -> Tensor:
    """Load a batch of images."""
    return torch.stack([transform(open_rgb(path)) for path in paths])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return 0, or 2 if there is nothing to predict."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    paths = usable_images(args.images)
    if not paths:
        logger.error("argument --images: must hold an image that can be used, got none in %r", str(args.images))
        return NOTHING_PREDICTED
    model = load_model(args.checkpoint).to(args.device)
    names = [path.relative_to(args.images).as_posix() for path in paths]
    overlays = None
    if args.cam_dir is not None:
        try:
            cam_target(model)
        except ValueError as error:
            logger.error("argument --cam-dir: %s", error)
            return NOTHING_PREDICTED
        # Keep the suffix and add another one, so that a.png and a.jpg in one folder get different overlays.
        overlays = [args.cam_dir / f"{name}.png" for name in names]

    load = partial(_load, eval_transform(model))
    loader = DataLoader(paths, args.batch_size, num_workers=args.num_workers, collate_fn=load)
    probabilities = predict(model, loader, overlays)
    classes, patient_ids = model.pretrained_cfg["label_names"], [_patient_id(path) for path in paths]
    rows = [
        {"file": name, "patient": patient_id, **_prediction(row, classes)}
        for name, patient_id, row in zip(names, patient_ids, probabilities, strict=True)
    ]
    write_csv(args.output, rows)
    named = [index for index, patient_id in enumerate(patient_ids) if patient_id]
    if named:
        votes = patient_votes([patient_ids[index] for index in named], probabilities[named], classes)
        write_csv(args.output.with_name(f"{args.output.stem}_patients.csv"), votes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
