"""Scores of a set of predictions, per image and per patient."""

from collections import defaultdict
from collections.abc import Sequence

from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score


def patient_recognition_rate(targets: Sequence[int], predictions: Sequence[int], patient_ids: Sequence[str]) -> float:
    r"""Mean over patients of the share of a patient's images that is right.

    \[ \frac{1}{P} \sum_{p=1}^{P} \frac{N_{\mathrm{rec}}(p)}{N(p)} \]   with P patients, of whose N(p) images
    N_rec(p) are classified correctly. Each patient counts once, however many images there are.
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


def balanced_accuracy(targets: Sequence[int], predictions: Sequence[int]) -> float:
    """Mean recall over the classes that are present in the targets, from 0 to 1; at least one image."""
    return float(recall_score(targets, predictions, labels=sorted(set(targets)), average="macro", zero_division=0))


def score(
    targets: Sequence[int], predictions: Sequence[int], patient_ids: Sequence[str], num_classes: int
) -> dict[str, float | list[list[int]]]:
    """Every score of the report.

    Args:
        targets: Class index of each image, at least one.
        predictions: Predicted class index of each image.
        patient_ids: Patient of each image.
        num_classes: Size of the confusion matrix, which has a row for absent classes too.

    Returns:
        `image_accuracy`, `patient_recognition_rate`, `balanced_accuracy` (over the classes in the targets), `macro_f1`
        (over the classes in the targets or the predictions), each from 0 to 1, and `confusion_matrix`: counts of
        images, a row for each target and a column for each prediction.
    """
    seen = sorted(set(targets) | set(predictions))
    return {
        "image_accuracy": float(accuracy_score(targets, predictions)),
        "patient_recognition_rate": patient_recognition_rate(targets, predictions, patient_ids),
        "balanced_accuracy": balanced_accuracy(targets, predictions),
        "macro_f1": float(f1_score(targets, predictions, labels=seen, average="macro", zero_division=0)),
        "confusion_matrix": confusion_matrix(targets, predictions, labels=range(num_classes)).tolist(),
    }
