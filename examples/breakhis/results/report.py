"""Tables and sentences about a run. Every sentence with a score names the protocol."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from breakhis.data.images import open_rgb
from breakhis.data.records import Record, cases, patients
from breakhis.data.splits import Split, absent_classes, shared_cases

logger = logging.getLogger(__name__)

PARTS = {"train": "training", "val": "validation", "test": "test"}
"""What the parts of a split are called."""


def log_split(split: Split, task: str, classes: Sequence[str]) -> None:
    """Log the size of each part of a split, and the classes that it lacks."""
    for name, records in split.parts().items():
        sizes = len(records), len(patients(records)), len(cases(records))
        logger.info("%s: %d images of %d patients, %d cases", name, *sizes)
        absent = absent_classes(records, task, classes)
        if records and absent:
            logger.warning("WARNING: %s has no image of %s", name, ", ".join(absent))
        if records and len(classes) - len(absent) == 1:
            only = "no model can learn to tell classes apart" if name == "train" else "balanced accuracy is its recall"
            logger.warning("WARNING: %s has one class only: %s", name, only)
    if shared := len(shared_cases(split)):
        logger.warning(
            "WARNING: %d of %d test images are of cases that training or validation has too: the score is too good for "
            "new cases",
            shared,
            len(split.test),
        )
    if not split.val:
        logger.warning("WARNING: too few patients or images for a validation set, so best = last epoch")


def log_crop(crop_mode: str, example: Path) -> None:
    """Log which share of a field evaluation sees.

    Args:
        crop_mode: "center", "squash" or "border".
        example: An image file.
    """
    width, height = open_rgb(example).size
    share = min(width, height) / max(width, height) if crop_mode == "center" else 1
    logger.info("evaluation sees %.0f %% of a field of %d x %d px: crop mode %s", 100 * share, width, height, crop_mode)


def split_rows(split: Split, data_dir: Path, hashes: Mapping[Path, str]) -> list[dict[str, str]]:
    """Make the rows of `split.csv`: `file`, `patient`, `case`, `split`, `sha256` for each image.

    Args:
        split: The division of the images.
        data_dir: Directory that `file` is relative to.
        hashes: SHA-256 of each file.
    """
    return [
        {
            "file": record.path.relative_to(data_dir).as_posix(),
            "patient": record.patient_id,
            "case": record.case_id,
            "split": name,
            "sha256": hashes[record.path],
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
    """Make the rows of `predictions.csv`: `file`, `patient`, `case`, `target`, `prediction`, `prob_<class>` by image.

    Args:
        records: The predicted images.
        probabilities: A row for each image, a column for each class.
        task: The task whose labels are the targets.
        classes: Names of the classes, in the order of the columns.
        data_dir: Directory that `file` is relative to.
    """
    return [
        {
            "file": record.path.relative_to(data_dir).as_posix(),
            "patient": record.patient_id,
            "case": record.case_id,
            "target": record.labels[task],
            "prediction": classes[max(range(len(classes)), key=row.__getitem__)],
            # 9 digits restore a float32
            **{f"prob_{name}": f"{value:.9g}" for name, value in zip(classes, row, strict=True)},
        }
        for record, row in zip(records, probabilities, strict=True)
    ]


def name_source(results: dict[str, Any]) -> str:
    """Name the source of the images, from the metrics of a run or the results of a study."""
    return "synthetic images" if results["synthetic"] else results["dataset"]


def describe_protocol(metrics: dict[str, Any]) -> str:
    """Describe the images and the protocol of a run, such as "patient protocol, fold 0 of 5, breakhis 100X, binary"."""
    magnification = "" if metrics["magnification"] == "pooled" else f" {metrics['magnification']}"
    source = f"{name_source(metrics)}{magnification}"
    return f"{metrics['protocol_in_words']}, {metrics['fold_in_words']}, {source}, {metrics['task']}"


def describe_images(metrics: dict[str, Any], part: str) -> str:
    """Count images, patients and cases of a part, such as "77 test images of 4 patients (3 cases)"."""
    counts = [metrics[key][part] for key in ("n_images", "n_patients", "n_cases")]
    return count_images(*counts, PARTS[part])


def count_images(images: int, patients: int, cases: int | None, part: str) -> str:
    """Say how many images a figure shows, and of how many patients.

    Args:
        images: Number of images.
        patients: Number of patients.
        cases: Number of cases, which is said if it differs; None: not known.
        part: Name of the part of the data, such as "test".
    """
    text = f"{images} {part} image{'s' * (images != 1)} of {patients} patient{'s' * (patients != 1)}"
    return text if cases in (None, patients) else f"{text} ({cases} case{'s' * (cases != 1)})"


def summarise(metrics: dict[str, Any]) -> str:
    """Write one sentence with the protocol, the scores, and the numbers of images and patients."""
    shared = metrics["n_shared"]
    return (
        f"{describe_protocol(metrics)}: image accuracy {metrics['image_accuracy']:.3f}, "
        f"patient recognition rate {metrics['patient_recognition_rate']:.3f}, "
        f"balanced accuracy {metrics['balanced_accuracy']:.3f}, macro F1 {metrics['macro_f1']:.3f} "
        f"on {describe_images(metrics, metrics['scored_on'])}"
        + (f"; {shared} of the test images are of cases that training or validation has too" if shared else "")
    )
