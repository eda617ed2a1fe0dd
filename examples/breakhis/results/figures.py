"""Figures of a run and its model. Each title states the protocol."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only; a training machine has no screen

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

from breakhis.files import write_atomically
from breakhis.names import printable
from breakhis.results.metrics import CALIBRATION_BINS, expected_calibration_error

plt.rcParams["text.parse_math"] = False  # a name with two $ is no formula


class CamCell(NamedTuple):
    """The Grad-CAM of one model for one image."""

    picture: Image.Image
    """The image under its Grad-CAM."""
    target: str
    """Name of the explained class."""
    probability: float
    """Probability of that class."""


class CamRow(NamedTuple):
    """One image of `draw_cam_panels`."""

    label: str
    """Class and origin of the image, such as "DC, 100X"."""
    picture: Image.Image
    """The image, as the models see it."""
    overlays: dict[str, CamCell]
    """The Grad-CAM of each model, by the model's name. Every row has the same models."""


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """Draw the confusion matrix: counts of images, coloured by their share of the target.

    Args:
        matrix: Counts, a row for each target and a column for each prediction.
        classes: Names of the classes, in the order of rows and columns.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    figure, axes = plt.subplots(figsize=(2.6 + 0.6 * len(classes), 2.2 + 0.6 * len(classes)), layout="constrained")
    counts = np.asarray(matrix)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)  # a rare class is as dark as a common one
    display = ConfusionMatrixDisplay(shares, display_labels=classes).plot(ax=axes, cmap="Blues", colorbar=False)
    for text, count in zip(display.text_.flat, counts.flat, strict=True):
        text.set_text(count)
    axes.set(xlabel="prediction, number of images", ylabel="target")
    _save(figure, title, path)


def draw_curves(history: Sequence[dict[str, float]], best_epoch: int, title: str, path: Path) -> None:
    """Draw the losses and the validation scores of each epoch.

    Args:
        history: One row for each epoch: `epoch`, `train_loss`, and `val_loss`, `val_balanced_accuracy`,
            `val_image_accuracy` if there are validation images.
        best_epoch: The epoch of the checkpoint, marked in both panels.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, keys in ((losses, ("train_loss", "val_loss")), (scores, ("val_balanced_accuracy", "val_image_accuracy"))):
        for key in keys:
            if key in history[0]:
                axes.plot(epochs, [row[key] for row in history], marker="o", label=key.replace("_", " "))
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best, epoch {best_epoch}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.legend(fontsize="small")
    losses.set_ylabel("cross-entropy, nats")
    scores.set(ylabel="score, 0 to 1", ylim=(-0.02, 1.02))
    _save(figure, title, path)


def draw_roc(
    targets: Sequence[int], probabilities: Sequence[Sequence[float]], classes: Sequence[str], title: str, path: Path
) -> None:
    """Draw the receiver operating characteristic.

    Two classes have one curve, of the second against the first. More classes have a curve each, against the rest, and
    the mean of these curves. A class with no image or with every image has no curve; the legend says so.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class.
        classes: Names of the classes.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    curves = []
    for index in [1] if len(classes) == 2 else range(len(classes)):
        if not (targets == index).any():
            axes.plot([], [], " ", label=f"{classes[index]}: no image")
        elif (targets == index).all():
            axes.plot([], [], " ", label=f"{classes[index]}: every image")
        else:
            scores = probabilities[:, index]
            curves.append(RocCurveDisplay.from_predictions(targets == index, scores, name=classes[index], ax=axes))
    if len(curves) > 1:
        grid = np.unique(np.concatenate([curve.fpr for curve in curves]))
        mean = np.mean([np.interp(grid, curve.fpr, curve.tpr) for curve in curves], axis=0)
        area = np.mean([curve.roc_auc for curve in curves])
        axes.plot([0, *grid], [0, *mean], "k", linewidth=2.5, label=f"macro average (AUC = {area:0.2f})")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance (AUC = 0.50)")
    axes.set(xlabel="false positive rate, 0 to 1", ylabel="true positive rate, 0 to 1", aspect="auto")
    _legend_outside(axes)
    _save(figure, title, path)


def draw_calibration(targets: Sequence[int], probabilities: Sequence[Sequence[float]], title: str, path: Path) -> None:
    """Draw the share of right predictions and the number of images by confidence.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class; the largest is the confidence.
        title: Title, which states the protocol; the expected calibration error is added.
        path: The PNG file.
    """
    confidences = np.max(probabilities, axis=1)
    hits = np.argmax(probabilities, axis=1) == np.asarray(targets)
    figure, (curve, counts) = plt.subplots(
        2, 1, figsize=(5, 5.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    bins = {"n_bins": CALIBRATION_BINS, "strategy": "uniform"}
    CalibrationDisplay.from_predictions(hits, confidences, **bins, pos_label=True, name="model", ax=curve)
    curve.set(xlabel="", ylabel="share of right predictions", xlim=(0, 1), ylim=(-0.02, 1.02))
    counts.hist(confidences, bins=np.linspace(0, 1, CALIBRATION_BINS + 1), edgecolor="white")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    counts.set(xlabel="confidence, 0 to 1", ylabel="images")
    error = expected_calibration_error(targets, probabilities)
    _save(figure, f"{title}; expected calibration error {error:.3f} on {len(hits)} images", path)


def draw_cam_panels(rows: Sequence[CamRow], title: str, path: Path) -> None:
    """Draw images and the Grad-CAM of each model next to them, arranged as in the paper's Figure 2.

    Args:
        rows: At least one image, each with the same models.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    models = list(rows[0].overlays)
    shape = (len(rows), 1 + len(models))
    figure, panels = plt.subplots(
        *shape, figsize=(0.5 + 2.2 * shape[1], 1 + 2.4 * shape[0]), squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], ["image", *models], strict=True):
        axes.set_title(name, fontsize="medium")
    for row, (first, *rest) in zip(rows, panels, strict=True):
        first.imshow(row.picture)
        first.set_ylabel(row.label)
        for axes, model in zip(rest, models, strict=True):
            cell = row.overlays[model]
            axes.imshow(cell.picture)
            axes.set_xlabel(f"{cell.target}, p = {cell.probability:.2f}", fontsize="small")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    _save(figure, title, path)


def draw_gates(shares: np.ndarray, classes: Sequence[str], title: str, path: Path) -> None:
    """Draw the share of open gates of a CFE, for each class from its most open channel to its least.

    Args:
        shares: Share of open gates, (classes, C), from 0 to 1; NaN for an absent class.
        classes: Names of the classes.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for name, row in zip(classes, np.sort(shares)[:, ::-1], strict=True):
        axes.plot(row, label=name if np.isfinite(row).all() else f"{name}: no image")
    axes.axhline(0.5, color="k", linestyle=":", label="start, on symmetric maps")
    axes.set(xlabel="rank of the channel within the class", ylabel="share of open gates, 0 to 1")
    axes.set_ylim(-0.02, 1.02)
    _legend_outside(axes)
    _save(figure, title, path)


def draw_branch_weights(
    means: np.ndarray, deviations: np.ndarray, branches: Sequence[str], classes: Sequence[str], title: str, path: Path
) -> None:
    """Draw the branch weights of an MFDF for each class.

    Args:
        means: Weight of each branch, (classes, K), over images and channels; NaN for an absent class.
        deviations: Standard deviation of the weights over the images, (classes, K).
        branches: Names of the branches, such as "3 x 3 px".
        classes: Names of the classes.
        title: Title, which states the protocol.
        path: The PNG file.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    width = 0.8 / len(classes)
    centres = np.arange(len(branches))
    for index, name in enumerate(classes):
        places = centres + width * (index - (len(classes) - 1) / 2)
        label = name if np.isfinite(means[index]).all() else f"{name}: no image"
        axes.bar(places, means[index], width, yerr=deviations[index], label=label, error_kw={"linewidth": 1})
    axes.axhline(1 / len(branches), color="k", linestyle=":", label=f"uniform, 1/{len(branches)}")
    axes.set_xticks(centres, branches)
    axes.set(xlabel="branch", ylabel="weight, mean and s.d. over images")
    _legend_outside(axes)
    _save(figure, title, path)


def _legend_outside(axes: Axes) -> None:
    """Put the legend to the right of the axes."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _save(figure: Figure, title: str, path: Path) -> None:
    """Put a title, in as many lines as it needs, over the whole figure, write the figure and close it."""
    figure.suptitle(textwrap.fill(printable(title), width=int(13 * figure.get_figwidth())), fontsize="small")
    try:
        write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))
    finally:
        plt.close(figure)
