"""Tables and sentences about a run. No sentence gives a score without its protocol."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from breakhis.records import Record, patients
from breakhis.splits import Split, absent_classes

logger = logging.getLogger(__name__)


def log_split(split: Split, task: str, classes: Sequence[str]) -> None:
    """Logs the size of each part of a split, and in words what is missing from it."""
    for name, records in split.parts().items():
        logger.info("%s: %d images of %d patients", name, len(records), len(patients(records)))
        absent = absent_classes(records, task, classes)
        if records and absent:
            logger.warning("WARNING: %s has no image of %s", name, ", ".join(absent))
        if records and len(classes) - len(absent) == 1:
            only = "no model can learn to tell classes apart" if name == "train" else "balanced accuracy is its recall"
            logger.warning("WARNING: %s has one class only: %s", name, only)
    if not split.val:
        logger.warning("WARNING: too few patients or images for a validation set, so best = last epoch")


def split_rows(split: Split, data_dir: Path) -> list[dict[str, str]]:
    """`file` (relative to `data_dir`), `patient`, `case`, `split` for each image."""
    return [
        {
            "file": record.path.relative_to(data_dir).as_posix(),
            "patient": record.patient_id,
            "case": record.case_id,
            "split": name,
        }
        for name, records in split.parts().items()
        for record in records
    ]


def prediction_rows(
    records: Sequence[Record],
    probabilities: Sequence[Sequence[float]],
    task: str,
    classes: Sequence[str],
    data_dir: Path,
) -> list[dict[str, str]]:
    """`file`, `patient`, `target`, `prediction` and a probability for each class, for each image.

    Args:
        records: The images predicted.
        probabilities: A row for each image, a column for each class.
        task: Whose labels are the targets.
        classes: Names of the columns.
        data_dir: What `file` is relative to.
    """
    return [
        {
            "file": record.path.relative_to(data_dir).as_posix(),
            "patient": record.patient_id,
            "target": record.labels[task],
            "prediction": classes[max(range(len(classes)), key=row.__getitem__)],
            **{f"prob_{name}": f"{value:.9g}" for name, value in zip(classes, row, strict=True)},  # restores a float32
        }
        for record, row in zip(records, probabilities, strict=True)
    ]


def name_source(results: dict[str, Any]) -> str:
    """Where the images come from, of a run or a study."""
    return "synthetic images" if results["synthetic"] else results["dataset"]


def describe_protocol(metrics: dict[str, Any]) -> str:
    """What the scores of a run hold for, such as "patient protocol, fold 0 of 5, breakhis 100X, binary"."""
    magnification = "" if metrics["magnification"] == "pooled" else f" {metrics['magnification']}"
    source = f"{name_source(metrics)}{magnification}"
    return f"{metrics['protocol_in_words']}, {metrics['fold_in_words']}, {source}, {metrics['task']}"


def summarise(metrics: dict[str, Any]) -> str:
    """One sentence: protocol, scores, and how many images and patients they rest on."""
    part = metrics["scored_on"]
    return (
        f"{describe_protocol(metrics)}: image accuracy {metrics['image_accuracy']:.3f}, "
        f"patient recognition rate {metrics['patient_recognition_rate']:.3f}, "
        f"balanced accuracy {metrics['balanced_accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f} "
        f"on {metrics['n_images'][part]} images of {metrics['n_patients'][part]} patients"
    )
