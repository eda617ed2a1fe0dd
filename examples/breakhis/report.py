"""Tables and sentences about a run. No sentence gives a score without its protocol."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from breakhis.data import CLASSES, BreakHisImage
from breakhis.splits import Split, absent_classes, patients

logger = logging.getLogger(__name__)


def log_split(split: Split, task: str) -> None:
    """Logs the size of each part of a split, and in words what is missing from it."""
    for name, images in split.parts().items():
        logger.info("%s: %d images of %d patients", name, len(images), len(patients(images)))
        absent = absent_classes(images, task)
        if images and absent:
            logger.warning("WARNING: %s has no image of %s", name, ", ".join(absent))
        if images and len(CLASSES[task]) - len(absent) == 1:
            only = "no model can learn to tell classes apart" if name == "train" else "balanced accuracy is its recall"
            logger.warning("WARNING: %s has one class only: %s", name, only)
    if not split.val:
        logger.warning("WARNING: too few patients or images for a validation set, so best = last epoch")


def write_split(path: Path, split: Split, data_dir: Path) -> None:
    """Writes `file` (relative to `data_dir`), `patient`, `split` for each image, as CSV."""
    rows = [
        (image.path.relative_to(data_dir).as_posix(), image.patient_id, name)
        for name, images in split.parts().items()
        for image in images
    ]
    _write_csv(path, ["file", "patient", "split"], rows)


def write_predictions(
    path: Path, images: Sequence[BreakHisImage], probabilities: Sequence[Sequence[float]], task: str, data_dir: Path
) -> None:
    """Writes `file`, `patient`, `target`, `prediction` and a probability for each class, as CSV.

    Args:
        path: The file to write.
        images: The images predicted.
        probabilities: A row for each image, a column for each class of the task.
        task: "binary" or "subtype".
        data_dir: What `file` is relative to.
    """
    classes = CLASSES[task]
    rows = [
        (
            image.path.relative_to(data_dir).as_posix(),
            image.patient_id,
            image.label(task),
            classes[max(range(len(classes)), key=row.__getitem__)],
            *(f"{probability:.9g}" for probability in row),  # 9 digits restore a float32
        )
        for image, row in zip(images, probabilities, strict=True)
    ]
    _write_csv(path, ["file", "patient", "target", "prediction", *(f"prob_{name}" for name in classes)], rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def describe_protocol(metrics: dict[str, Any]) -> str:
    """What the scores of a run hold for, such as "patient protocol, fold 0 of 5, 100X, binary"."""
    if metrics["protocol"] == "patient":
        protocol = f"patient protocol, fold {metrics['fold']} of {metrics['folds']}"
    else:
        protocol = "image protocol (70/30, patients leak)"
    source = "synthetic images, " if metrics["synthetic"] else ""
    return f"{source}{protocol}, {metrics['magnification']}, {metrics['task']}"


def summarise(metrics: dict[str, Any]) -> str:
    """One sentence: protocol, scores, and how many images and patients of the test set they rest on."""
    return (
        f"{describe_protocol(metrics)}: image accuracy {metrics['image_accuracy']:.3f}, "
        f"patient recognition rate {metrics['patient_recognition_rate']:.3f}, "
        f"balanced accuracy {metrics['balanced_accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f} "
        f"on {metrics['n_images']['test']} images of {metrics['n_patients']['test']} patients"
    )
