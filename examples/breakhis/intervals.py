"""Intervals that say how far a score hangs on which patients, and which seeds, happened to be there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# From targets, a row of probabilities for each image, and how often each image counts, to a score.
Score = Callable[[NDArray, NDArray, NDArray], float | None]


class Interval(NamedTuple):
    """A score, and the interval that holds it in 95 % of the resampled worlds."""

    value: float
    low: float
    high: float


class Predictions(NamedTuple):
    """What runs that differ in the seed alone said of the same test images.

    Attributes:
        targets: Class index of each image, (N,).
        patient_ids: Patient of each image, (N,).
        probabilities: Of each seed, image and class, (S, N, C).
    """

    targets: NDArray
    patient_ids: NDArray
    probabilities: NDArray


def bootstrap(
    arms: Sequence[Predictions], score: Score, resamples: int = 1000, seed: int = 0
) -> tuple[list[Interval], list[Interval]]:
    """Resamples patients, and seeds, with replacement; the same patients and seeds for every arm.

    Patients are drawn, not images, because the images of one patient are right or wrong together. A world that lacks a
    class is drawn again: a mean over fewer classes, or a curve of one, is another score.

    Args:
        arms: Two or more that predict the same images, from as many seeds; the first is what the others are compared
            with.
        score: What to compute in each world, averaged over its seeds.
        resamples: Number of worlds.
        seed: Of the resampling.

    Returns:
        The score of each arm, and the difference of each to the first, which is 0 for the first.

    Raises:
        ValueError: The arms are not about the same images, or differ in their numbers of seeds.
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

    def world(weight: NDArray, seeds: NDArray) -> list[float] | None:
        seen = weight > 0
        if len(set(first.targets[seen].tolist())) < num_classes:
            return None
        scores = [
            [score(arm.targets[seen], arm.probabilities[s][seen], weight[seen]) for s in seeds.tolist()] for arm in arms
        ]
        return None if any(value is None for row in scores for value in row) else [np.mean(row) for row in scores]

    values = world(np.ones(len(patient_of)), np.arange(num_seeds))
    if values is None:
        raise ValueError("arms must have images of more than one class for this score")
    worlds: list[list[float]] = []
    while len(worlds) < resamples:
        counts = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
        drawn = world(counts[patient_of].astype(float), rng.integers(num_seeds, size=num_seeds))
        if drawn is not None:
            worlds.append(drawn)
    table, value = np.array(worlds), np.array(values)

    def intervals(values: NDArray, table: NDArray) -> list[Interval]:
        low, high = np.quantile(table, [0.025, 0.975], axis=0)
        return [Interval(*map(float, row)) for row in zip(values, low, high, strict=True)]

    return intervals(value, table), intervals(value - value[0], table - table[:, :1])
