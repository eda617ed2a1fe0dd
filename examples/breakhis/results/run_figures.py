"""The figures of one run, with what they show and by which protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from breakhis.results.canvas import Heading
from breakhis.results.figures import draw_calibration, draw_confusion_matrix, draw_curves, draw_roc
from breakhis.results.report import describe_images, describe_protocol


def draw_figures(
    metrics: dict[str, Any], targets: Sequence[int], probabilities: Sequence[Sequence[float]], out: Path
) -> None:
    """Draw the confusion matrix, the curves of training, ROC curves and calibration of a run.

    Args:
        metrics: Content of `metrics.json`.
        targets: Class index of each scored image.
        probabilities: A row for each of these images, a column for each class.
        out: Folder for the PNG files.
    """
    classes, protocol = metrics["classes"], describe_protocol(metrics)
    learnt = [describe_images(metrics, part) for part in ("train", "val") if metrics["n_images"][part]]
    best = f"Training, epoch {metrics['best_epoch']} of {len(metrics['history'])} is kept"
    heading = Heading(best, ", ".join([protocol, *learnt]))
    draw_curves(metrics["history"], metrics["best_epoch"], heading, out / "curves.png")
    scored = f"{protocol}, {describe_images(metrics, metrics['scored_on'])}"
    heading = Heading(f"Predictions by true class, balanced accuracy {metrics['balanced_accuracy']:.3f}", scored)
    draw_confusion_matrix(metrics["confusion_matrix"], classes, heading, out / "confusion_matrix.png")
    which = f"of {classes[1]} against {classes[0]}" if len(classes) == 2 else "of each class against the rest"
    draw_roc(targets, probabilities, classes, Heading(f"ROC {which}", scored), out / "roc.png")
    draw_calibration(targets, probabilities, Heading("Confidence against accuracy", scored), out / "calibration.png")
