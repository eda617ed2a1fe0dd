"""Scores of a set of predictions, per image and per patient."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, f1_score
from torchmetrics.functional.classification import multiclass_calibration_error

CALIBRATION_BINS = 15


def patient_recognition_rate(targets: Sequence[int], predictions: Sequence[int], patient_ids: Sequence[str]) -> float:
    r"""Average, over patients, the share of a patient's images that is right.

    \[ \frac{1}{P} \sum_{p=1}^{P} \frac{N_{\mathrm{rec}}(p)}{N(p)} \]   with P patients; patient p has
    N(p) images, of which N_rec(p) are classified correctly. Each patient counts once, with any number of images.
    Source: Spanhol, Oliveira, Petitjean, Heutte (2016), IEEE TBME 63(7). Differs from the paper: nowhere.

    Args:
        targets: Class index of each image, at least one.
        predictions: Predicted class index of each image.
        patient_ids: Patient of each image.

    Returns:
        A rate from 0 to 1.
    """
    hits = defaultdict(list)
    for target, prediction, patient_id in zip(targets, predictions, patient_ids, strict=True):
        hits[patient_id].append(target == prediction)
    return sum(sum(row) / len(row) for row in hits.values()) / len(hits)


def image_accuracy(targets: ArrayLike, probabilities: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Return the share of the images whose most probable class is right.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class; logits are accepted too.
        sample_weight: Weight of each image, such as its number of copies.
    """
    hits = np.asarray(probabilities).argmax(axis=1) == np.asarray(targets)
    return float(np.average(hits, weights=sample_weight))


def balanced_accuracy(targets: ArrayLike, probabilities: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Average, over the classes in the targets, the share of a class's images that is right.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class; logits are accepted too.
        sample_weight: Weight of each image, such as its number of copies.
    """
    targets = np.asarray(targets)
    weight = np.ones(len(targets)) if sample_weight is None else np.asarray(sample_weight)
    hits = np.asarray(probabilities).argmax(axis=1) == targets
    right, total = np.bincount(targets, weight * hits), np.bincount(targets, weight)
    return float(np.mean(right[total > 0] / total[total > 0]))


def auc(targets: ArrayLike, probabilities: ArrayLike, sample_weight: ArrayLike | None = None) -> float | None:
    """Average, over the classes in the targets, the area under the ROC curve of a class against the rest.

    The area is the share of pairs, one image of the class and one of the rest, of which the first has the larger
    probability; a tie counts half. scikit-learn takes a millisecond, too long for thousands of resampled worlds.

    Args:
        targets: Class index of each image.
        probabilities: A row for each image, a column for each class. With two columns both classes have the same area.
        sample_weight: Weight of each image, such as its number of copies.

    Returns:
        An area from 0 to 1, or None if only one class is present: then it is undefined.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    present = sorted(set(targets.tolist()))
    if len(present) < 2:
        return None
    if probabilities.shape[1] == 2:
        present = present[1:]
    weight = np.ones(len(targets)) if sample_weight is None else np.asarray(sample_weight)
    areas = []
    for k in present:
        _, rank = np.unique(probabilities[:, k], return_inverse=True)  # equal probabilities have equal ranks
        positive, negative = (np.bincount(rank, weight * part) for part in (targets == k, targets != k))
        areas.append(positive @ (negative.cumsum() - negative / 2) / (positive.sum() * negative.sum()))
    return float(np.mean(areas))


def expected_calibration_error(targets: Sequence[int], probabilities: ArrayLike) -> float:
    """Average, over images, the distance of confidence and accuracy in `CALIBRATION_BINS` equal bins of confidence.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class.

    Returns:
        A distance from 0, if confidence equals accuracy, to 1.
    """
    rows = torch.tensor(np.asarray(probabilities), dtype=torch.float32)
    return multiclass_calibration_error(
        rows, torch.tensor(targets), num_classes=rows.shape[1], n_bins=CALIBRATION_BINS
    ).item()


def score(
    targets: Sequence[int], probabilities: ArrayLike, patient_ids: Sequence[str]
) -> dict[str, float | list[list[int]] | None]:
    """Compute every score of the report; the prediction of an image is its most probable class.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class.
        patient_ids: Patient of each image.

    Returns:
        `image_accuracy`, `patient_recognition_rate`, `balanced_accuracy` (over the classes in the targets), `macro_f1`
        (over the classes in the targets or the predictions), `auc` and `ece` (expected calibration error), each from 0
        to 1, but `auc` may be None; and `confusion_matrix`: counts of images, a row for each target and a column for
        each prediction, of all classes.
    """
    probabilities = np.asarray(probabilities)
    predictions = probabilities.argmax(axis=1).tolist()
    classes = sorted(set(targets) | set(predictions))
    return {
        "image_accuracy": image_accuracy(targets, probabilities),
        "patient_recognition_rate": patient_recognition_rate(targets, predictions, patient_ids),
        "balanced_accuracy": balanced_accuracy(targets, probabilities),
        "macro_f1": float(f1_score(targets, predictions, labels=classes, average="macro", zero_division=0)),
        "auc": auc(targets, probabilities),
        "ece": expected_calibration_error(targets, probabilities),
        "confusion_matrix": confusion_matrix(targets, predictions, labels=range(probabilities.shape[1])).tolist(),
    }
