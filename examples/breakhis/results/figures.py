"""Figures of a run's scores: confusion matrix, curves of training, ROC curves and calibration."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import calibration_curve
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

from breakhis.data.naming import full_names
from breakhis.results.canvas import Heading, class_style, save
from breakhis.results.metrics import CALIBRATION_BINS, expected_calibration_error

MIN_ROC_IMAGES = 5
"""With fewer images of a class, or of the rest, a ROC curve would be a few steps that look like a result."""
_SCORE_SPAN = 0.3  # least height of the axis of scores: small noise must not look like a trend
_DARK = 0.715  # share from which white letters are easier to read on matplotlib's "Blues" than black ones


def draw_confusion_matrix(
    matrix: Sequence[Sequence[int]], classes: Sequence[str], heading: Heading, path: Path
) -> None:
    """Draw the confusion matrix: count and share of the true class's images, coloured by the share.

    Args:
        matrix: Counts, a row for each true class and a column for each prediction. A row without images is hatched.
        classes: Names of the classes, in the order of rows and columns.
        heading: What is shown and by which protocol.
        path: The PNG file.
    """
    side = 0.9 + 0.62 * len(classes)
    figure, axes = plt.subplots(figsize=(side + 3.2, max(side, 2.6)), layout="constrained")
    counts = np.asarray(matrix)
    totals = counts.sum(axis=1)
    shares = counts / totals[:, None].clip(min=1)
    display = ConfusionMatrixDisplay(shares, display_labels=classes).plot(
        ax=axes, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1}
    )
    for index, text in np.ndenumerate(display.text_):
        share = f"\n{shares[index]:.2f}" if counts[index] else ""
        text.set(text=f"{counts[index]}{share}" if totals[index[0]] else "", fontsize="small")
        text.set_color("white" if shares[index] >= _DARK else "black")
    for row in np.flatnonzero(totals == 0):
        hatched = {"facecolor": "white", "edgecolor": "silver", "hatch": "////", "linewidth": 0.8}
        axes.add_patch(Rectangle((-0.5, row - 0.5), len(classes), 1, **hatched))
    names = zip(full_names(classes), totals, strict=True)
    axes.set_yticks(axes.get_yticks(), [f"{name}, {f'n = {total}' if total else 'no image'}" for name, total in names])
    axes.set(xlabel="prediction", ylabel="true class", aspect="auto")  # of equal sides, the layout loses labels
    figure.colorbar(display.im_, label="share of the true class", aspect=30)
    save(figure, heading, path)


def draw_curves(history: Sequence[dict[str, float]], best_epoch: int, heading: Heading, path: Path) -> None:
    """Draw the losses and the validation scores of each epoch, each curve named at its end.

    Args:
        history: One row for each epoch: `epoch`, `train_loss`, and `val_loss`, `val_balanced_accuracy`,
            `val_image_accuracy` if there are validation images; without them, there is no panel of scores.
        best_epoch: The epoch of the checkpoint, marked in each panel.
        heading: What is shown and by which protocol.
        path: The PNG file.
    """
    curves = {"train_loss": "training", "val_loss": "validation"}
    panels = [("cross-entropy, nats", {key: name for key, name in curves.items() if key in history[0]})]
    curves = {"val_balanced_accuracy": "balanced accuracy", "val_image_accuracy": "image accuracy"}
    panels += [("validation score", {key: name for key, name in curves.items() if key in history[0]})]
    panels = [(label, names) for label, names in panels if names]
    shape = {"figsize": (5 * len(panels), 3.4), "layout": "constrained", "squeeze": False}
    figure, ((losses, *scores),) = plt.subplots(1, len(panels), **shape)
    for axes, (label, names) in zip((losses, *scores), panels, strict=True):
        _draw_epochs(
            axes, [row["epoch"] for row in history], {n: [row[k] for row in history] for k, n in names.items()}
        )
        axes.axvline(best_epoch, color="grey", linestyle=":", zorder=0)
        axes.set(xlabel="epoch (dotted: the best one, which is kept)", ylabel=label)
    for axes in scores:
        low, high = axes.get_ylim()
        middle = np.clip((low + high) / 2, _SCORE_SPAN / 2, 1 - _SCORE_SPAN / 2)
        low, high = min(low, middle - _SCORE_SPAN / 2), max(high, middle + _SCORE_SPAN / 2)
        axes.set_ylim(max(low, 0) - 0.02, min(high, 1) + 0.02)
    save(figure, heading, path)


def _draw_epochs(axes: Axes, epochs: Sequence[int], curves: dict[str, Sequence[float]]) -> None:
    """Draw curves over the epochs, and write the name of each at its end, so that equal curves are both seen."""
    ends = sorted(curves, key=lambda name: curves[name][-1])
    for index, (name, values) in enumerate(curves.items()):
        look = (
            {"linestyle": "-", "markersize": 7, "fillstyle": "none"}
            if index == 0
            else {"linestyle": "--", "markersize": 4}
        )
        style = class_style(index) | look | {"markevery": -(-len(epochs) // 20)}
        axes.plot(epochs, values, **style, label=name)
        lift = 12 * (ends.index(name) - (len(ends) - 1) / 2)  # points: equal ends have their names above each other
        place = {"xy": (1, values[-1]), "xycoords": ("axes fraction", "data"), "xytext": (5, lift)}
        axes.annotate(name, **place, textcoords="offset points", va="center", color=style["color"], fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)


def draw_roc(
    targets: Sequence[int],
    probabilities: Sequence[Sequence[float]],
    classes: Sequence[str],
    heading: Heading,
    path: Path,
) -> None:
    """Draw the receiver operating characteristic.

    Two classes have one curve, of the second against the first. More classes have a curve each, against the rest, and
    the mean of these curves. Without `MIN_ROC_IMAGES` images on both sides there is no curve; the subtitle says so.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class.
        classes: Names of the classes.
        heading: What is shown and by which protocol; the classes without a curve are added.
        path: The PNG file.
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities)
    counts, names = np.bincount(targets, minlength=len(classes)), full_names(classes)
    figure, axes = plt.subplots(figsize=(6.8, 6), layout="constrained")
    curves, missing = [], []
    for index in [1] if len(classes) == 2 else range(len(classes)):
        if min(counts[index], len(targets) - counts[index]) < MIN_ROC_IMAGES:
            missing.append(f"{classes[index]} (n = {counts[index]})")
            continue
        curve = RocCurveDisplay.from_predictions(targets == index, probabilities[:, index], ax=axes)
        look = {
            "color": class_style(index)["color"],
            "linestyle": "--" if len(classes) > 2 and 2 * index >= len(classes) else "-",
        }
        curve.line_.set(**look, label=f"{names[index]} (n = {counts[index]}): AUC {curve.roc_auc:.2f}")
        curves.append(curve)
    if len(curves) > 1:
        grid = np.unique(np.concatenate([curve.fpr for curve in curves]))
        mean = np.mean([np.interp(grid, curve.fpr, curve.tpr) for curve in curves], axis=0)
        area = np.mean([curve.roc_auc for curve in curves])
        axes.plot([0, *grid], [0, *mean], "k", linewidth=2.5, label=f"mean of these {len(curves)}: AUC {area:.2f}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance: AUC 0.50")
    axes.set(xlabel="false positive rate, 0 to 1", ylabel="true positive rate, 0 to 1", aspect="equal")
    axes.legend().remove()
    figure.legend(loc="outside lower center", ncols=1 if len(classes) == 2 else 2, fontsize="small")
    if missing:
        why = f"no curve with fewer than {MIN_ROC_IMAGES} images of the class or the rest: {', '.join(missing)}"
        heading = heading._replace(subtitle=f"{heading.subtitle}; {why}")
    save(figure, heading, path)


def draw_calibration(
    targets: Sequence[int], probabilities: Sequence[Sequence[float]], heading: Heading, path: Path
) -> None:
    """Draw the share of right predictions and the number of images by confidence.

    Args:
        targets: Class index of each image, at least one.
        probabilities: A row for each image, a column for each class; the largest is the confidence.
        heading: What is shown and by which protocol; the expected calibration error is added to the title.
        path: The PNG file.
    """
    confidences = np.max(probabilities, axis=1)
    hits = np.argmax(probabilities, axis=1) == np.asarray(targets)
    shares, means = calibration_curve(hits, confidences, n_bins=CALIBRATION_BINS, pos_label=True)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    images = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=CALIBRATION_BINS)
    figure, (dots, counts) = plt.subplots(
        2, 1, figsize=(5, 5.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    lowest = 1 / np.shape(probabilities)[1]  # the largest of K probabilities is not below 1/K
    dots.plot([lowest, 1], [lowest, 1], color="grey", linestyle=":", label="perfectly calibrated")
    sizes = 400 * images[images > 0] / images.max()
    dots.scatter(means, shares, sizes, alpha=0.7, label="images of one bin, area by number")
    pad = 0.04 * (1 - lowest)
    dots.set(ylabel="share of right predictions, 0 to 1", xlim=(lowest - pad, 1 + pad), ylim=(-0.06, 1.06))
    legend = dots.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    legend.legend_handles[1].set_sizes([40])
    counts.bar(edges[:-1], images, width=1 / CALIBRATION_BINS, align="edge", edgecolor="white")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, steps=[1, 2, 5, 10]))
    counts.set(xlabel=f"confidence, from 1/{np.shape(probabilities)[1]} to 1", ylabel="images")
    error = expected_calibration_error(targets, probabilities)
    save(figure, heading._replace(title=f"{heading.title}, expected calibration error {error:.3f}"), path)
