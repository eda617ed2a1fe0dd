"""Figures of what KFDE layers decide for the images of each class: gates of CFE, branch weights of MFDF."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from breakhis.results.canvas import Heading, class_style, save


class BranchWeights(NamedTuple):
    """Branch weights of an MFDF by class."""

    means: np.ndarray
    """Weight of each branch, (classes, K), over images and channels; NaN for a class without images."""
    low: np.ndarray
    """Lower end of the interval of each mean, (classes, K); NaN where there is none."""
    high: np.ndarray
    """Upper end."""
    unit: str
    """What was drawn again for the intervals: "case" or "patient"."""


def draw_gates(shares: np.ndarray, labels: Sequence[str], heading: Heading, path: Path) -> None:
    """Draw the share of open gates of a CFE by channel, and how each class differs from the mean of the classes.

    Every panel has the channels in the same order, so that classes can be compared channel by channel.

    Args:
        shares: Share of open gates, (classes, C), from 0 to 1; NaN for a class without images, which is hatched.
        labels: Name of each class and number of its images.
        heading: What is shown and by which protocol.
        path: The PNG file.
    """
    present = np.isfinite(shares).all(axis=1)
    mean = shares[present].mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    rows_height = max(1.2, 0.3 * len(labels))  # inches; the scale beside the rows needs some
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(8.4, 2 + rows_height),
        width_ratios=(40, 1),
        height_ratios=(1.2, rows_height),
        layout="constrained",
    )
    (top, unused), (differences, bar) = axes
    unused.remove()
    top.plot(mean[order], color="black")
    top.axhline(0.5, color="grey", linestyle=":")
    top.set(ylabel="mean of\nthe classes", ylim=(-0.03, 1.03), xticks=[])
    rows = (shares - mean)[:, order]
    limit = np.abs(rows[present]).max() or 1.0  # all equal: any scale shows it
    image = differences.imshow(rows, "PuOr_r", aspect="auto", interpolation="nearest", vmin=-limit, vmax=limit)
    for row in np.flatnonzero(~present):
        hatched = {"facecolor": "white", "edgecolor": "silver", "hatch": "////", "linewidth": 0.8}
        differences.add_patch(Rectangle((-0.5, row - 0.5), shares.shape[1], 1, **hatched))
    top.set_xlim(differences.get_xlim())
    differences.set_yticks(range(len(labels)), labels)
    differences.set(xlabel="channels, in the order of the mean", xticks=[])
    figure.colorbar(image, cax=bar, label="class less mean")
    note = "share of a map's positions with an open gate, mean over images, dotted: an untrained CFE on symmetric maps"
    save(figure, heading._replace(subtitle=f"{heading.subtitle}; {note}"), path)


def draw_branch_weights(
    weights: BranchWeights, branches: Sequence[str], labels: Sequence[str], heading: Heading, path: Path
) -> None:
    """Draw how the branch weights of an MFDF differ from equal weights, for each class that has images.

    Args:
        weights: Weights and their intervals. A mean without an interval is drawn hollow.
        branches: Names of the branches, such as "3 x 3 px".
        labels: Name of each class, and numbers of its images and patients.
        heading: What is shown and by which protocol.
        path: The PNG file.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4 + 0.1 * len(labels)), layout="constrained")
    equal, centres = 1 / len(branches), np.arange(len(branches))
    present = np.flatnonzero(np.isfinite(weights.means).all(axis=1))
    axes.axhline(0, color="grey", linestyle=":", zorder=0)
    handles = []
    for index, label in enumerate(labels):
        if index not in present:
            handles += axes.plot([], [], " ", label=label)
            continue
        bounds = np.array([weights.low[index], weights.high[index]])
        known = np.isfinite(bounds).all()
        bars = np.abs(bounds - weights.means[index]) if known else None
        places = centres + 0.7 * ((np.searchsorted(present, index) + 0.5) / len(present) - 0.5)
        style = class_style(index) | {"linestyle": "none", "capsize": 3, "fillstyle": "full" if known else "none"}
        handles.append(axes.errorbar(places, weights.means[index] - equal, bars, **style, label=label))
    axes.set_xticks(centres, branches)
    for border in centres[1:] - 0.5:
        axes.axvline(border, color="gainsboro", linewidth=0.8, zorder=0)
    axes.set(xlim=(-0.5, len(branches) - 0.5), xlabel="branch", ylabel=f"weight less 1/{len(branches)}")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    note = f"bar: 95 % interval over resampled {weights.unit}s, hollow: one {weights.unit} only, no interval"
    save(figure, heading._replace(subtitle=f"{heading.subtitle}; {note}"), path)
