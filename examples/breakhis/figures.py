"""Figures of a run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; a training machine has no screen

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay


def draw_confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """Writes the confusion matrix, in images, as a PNG file.

    Args:
        matrix: Counts, a row for each target and a column for each prediction.
        classes: Names of both.
        title: States the protocol.
        path: The file.
    """
    figure, axes = plt.subplots(figsize=(2.6 + 0.6 * len(classes), 2.2 + 0.6 * len(classes)), layout="constrained")
    display = ConfusionMatrixDisplay(np.asarray(matrix), display_labels=classes)
    display.plot(ax=axes, cmap="Blues", colorbar=False)
    axes.set(xlabel="prediction", ylabel="target")
    axes.set_title(title, fontsize="small", wrap=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(history: Sequence[dict[str, float]], best_epoch: int, title: str, path: Path) -> None:
    """Writes the losses and the validation scores of each epoch as a PNG file.

    Args:
        history: One row for each epoch: `epoch`, `train_loss`, and `val_loss`, `val_balanced_accuracy`,
            `val_image_accuracy` where there are validation images.
        best_epoch: The epoch of the checkpoint, marked in both panels.
        title: States the protocol.
        path: The file.
    """
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize="small")
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
    figure.savefig(path, dpi=150)
    plt.close(figure)
