"""Intervals that show how much a score depends on the choice of patients and seeds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray, NDArray, NDArray], float | None]
"""From targets, a row of probabilities for each image, and a weight for each image to a score."""


class Interval(NamedTuple):
    """A score and its interval."""

    value: float
    """The score."""
    low: float
    """Quantile 2.5 % of the score over the resampled worlds."""
    high: float
    """Quantile 97.5 %."""


class Predictions(NamedTuple):
    """Predictions of the same test images by runs that differ only in the seed."""

    targets: NDArray
    """Class index of each image, (N,)."""
    patient_ids: NDArray
    """Patient of each image, (N,)."""
    probabilities: NDArray
    """Probability by seed, image and class, (S, N, C)."""


def bootstrap(
    arms: Sequence[Predictions], score: Score, resamples: int = 1000, seed: int = 0
) -> tuple[list[Interval], list[Interval]]:
    """Resample patients and seeds with replacement, the same ones for every arm.

    Patients are drawn instead of images, because the images of one patient tend to be right or wrong together. A world
    that lacks a class is drawn again, because a mean over fewer classes is another score.

    Args:
        arms: Methods to compare with the first one. They predict the same images, from the same number of seeds.
        score: The score of a world, averaged over its seeds.
        resamples: Number of worlds.
        seed: Seed of the resampling.

    Returns:
        The score of each arm, and the difference of each arm to the first, which is 0 for the first.

    Raises:
        ValueError: The arms predict different images, or have different numbers of seeds.
    """
    first = arms[0]
    for arm in arms:
        if arm.targets.tolist() != first.targets.tolist() or arm.patient_ids.tolist() != first.patient_ids.tolist():
            raise ValueError("arms must predict the same images of the same patients in the same order")
        if len(arm.probabilities) != len(first.probabilities):
            raise ValueError(
                f"arms must have as many seeds as the first, {len(first.probabilities)}, got {len(arm.probabilities)}"
            )
    rng = np.random.default_rng(seed)
    _, patient_of = np.unique(first.patient_ids, return_inverse=True)
    num_classes = len(set(first.targets.tolist()))
    num_patients, num_seeds = patient_of.max() + 1, len(first.probabilities)

    def score_world(weight: NDArray, seeds: NDArray) -> list[float] | None:
        """Score each arm in a world; return None if the world lacks a class."""
        drawn = weight > 0
        if len(set(first.targets[drawn].tolist())) < num_classes:
            return None
        scores = [
            [score(arm.targets[drawn], arm.probabilities[s][drawn], weight[drawn]) for s in seeds.tolist()]
            for arm in arms
        ]
        return None if any(value is None for row in scores for value in row) else [np.mean(row) for row in scores]

    values = score_world(np.ones(len(patient_of)), np.arange(num_seeds))
    if values is None:
        raise ValueError("arms must have images of more than one class for this score")
    worlds: list[list[float]] = []
    while len(worlds) < resamples:
        counts = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
        scores = score_world(counts[patient_of].astype(float), rng.integers(num_seeds, size=num_seeds))
        if scores is not None:
            worlds.append(scores)
    table, value = np.array(worlds), np.array(values)

    def intervals(values: NDArray, table: NDArray) -> list[Interval]:
        low, high = np.quantile(table, [0.025, 0.975], axis=0)
        return [Interval(*map(float, row)) for row in zip(values, low, high, strict=True)]

    return intervals(value, table), intervals(value - value[0], table - table[:, :1])
