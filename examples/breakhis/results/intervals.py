"""Intervals that show how much a score depends on the choice of cases and seeds."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Score = Callable[[NDArray, NDArray, NDArray], float | None]
"""From targets, a row of probabilities for each image, and a weight for each image to a score."""
MIN_CASES = 8
"""With fewer cases, of all or of a class that the score needs, there is no interval: it would be too narrow."""


ROUNDING = 1e-9
"""An interval of this width is that of one number, computed in several orders."""


class Interval(NamedTuple):
    """A score and its interval; `low` and `high` are None where there is none."""

    value: float
    """The score."""
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Upper end."""


class Predictions(NamedTuple):
    """Predictions of the same test images by runs that differ only in the seed."""

    targets: NDArray
    """Class index of each image, (N,)."""
    case_ids: NDArray
    """Case of each image, (N,)."""
    probabilities: NDArray
    """Probability by seed, image and class, (S, N, C)."""
    weights: NDArray
    """Weight of each image in the score, (N,)."""


class Comparison(NamedTuple):
    """What `bootstrap` found."""

    scores: list[Interval]
    """The score of each arm."""
    differences: list[Interval]
    """The difference of each arm to the first, which is 0 for the first."""
    lacking: float
    """Share of the resamples that lack a class, from 0 to 1. Their scores are those of the classes that they have."""
    too_few: str | None
    """Of what there are too few for an interval: "cases", "cases of a class" or None."""


def bootstrap(
    arms: Sequence[Predictions], score: Score, *, by_class: bool = False, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Resample cases and seeds with replacement, the same ones for every arm.

    Cases are drawn instead of images, because the images of one case tend to be right or wrong together. No resample is
    drawn again: a score that needs a class which a resample lacks is taken over the classes present, and left out if it
    is then undefined. The quantiles of few cases are too close to each other, so they are moved out to where the
    t distribution has them (Hesterberg, 2015, The American Statistician 69(4), "expanded percentile interval").

    Args:
        arms: Methods to compare with the first one. They predict the same images, from the same number of seeds.
        score: The score of a resample, averaged over its seeds.
        by_class: Whether the score is a mean over classes: then it depends on the cases of each class.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The scores, and their differences to the first. There is no interval for fewer than `MIN_CASES` cases, of all
        or, with `by_class`, of a class; and none where all resamples have the same score.

    Raises:
        ValueError: The arms predict different images, have different numbers of seeds, or have no score.
    """
    first = arms[0]
    _check_arms(arms)
    rng = np.random.default_rng(seed)
    _, case_of = np.unique(first.case_ids, return_inverse=True)
    num_classes, num_cases, num_seeds = len(set(first.targets.tolist())), case_of.max() + 1, len(first.probabilities)

    def score_resample(counts: NDArray, seeds: NDArray) -> list[float] | None:
        drawn = counts > 0
        scores = [
            [
                score(arm.targets[drawn], arm.probabilities[s][drawn], (counts * arm.weights)[drawn])
                for s in seeds.tolist()
            ]
            for arm in arms
        ]
        return None if any(value is None for row in scores for value in row) else [np.mean(row) for row in scores]

    values = score_resample(np.ones(len(case_of)), np.arange(num_seeds))
    if values is None:
        raise ValueError("arms must have images of more than one class for this score")
    rows: list[list[float]] = []
    lacking = 0
    for _ in range(resamples):
        counts = np.bincount(rng.integers(num_cases, size=num_cases), minlength=num_cases)[case_of]
        lacking += len(set(first.targets[counts > 0].tolist())) < num_classes
        scores = score_resample(counts.astype(float), rng.integers(num_seeds, size=num_seeds))
        if scores is not None:
            rows.append(scores)
    too_few = _too_few(first, by_class)
    table, value = np.array([values] if too_few else rows), np.array(values)
    tail = 0.5 if too_few else _tail(num_cases)
    differences = _intervals(value - value[0], table - table[:, :1], tail)
    return Comparison(_intervals(value, table, tail), differences, lacking / resamples, too_few)


def _too_few(arm: Predictions, by_class: bool) -> str | None:
    if len(set(arm.case_ids.tolist())) < MIN_CASES:
        return "cases"
    cases_of = [len(set(arm.case_ids[arm.targets == k].tolist())) for k in set(arm.targets.tolist())]
    return "cases of a class" if by_class and min(cases_of) < MIN_CASES else None


def _tail(num_cases: int) -> float:
    """Return the share of resamples below a 95 % interval."""
    return float(norm.cdf(-math.sqrt(num_cases / (num_cases - 1)) * t.ppf(0.975, num_cases - 1)))


def _intervals(values: NDArray, table: NDArray, tail: float) -> list[Interval]:
    ends = np.quantile(table, [tail, 1 - tail], axis=0).T.tolist()
    return [
        Interval(value, *((low, high) if high - low > ROUNDING else (None, None)))
        for value, (low, high) in zip(values.tolist(), ends, strict=True)
    ]


def _check_arms(arms: Sequence[Predictions]) -> None:
    first = arms[0]
    for arm in arms:
        if arm.targets.tolist() != first.targets.tolist() or arm.case_ids.tolist() != first.case_ids.tolist():
            raise ValueError("arms must predict the same images of the same cases in the same order")
        if len(arm.probabilities) != len(first.probabilities):
            raise ValueError(
                f"arms must have as many seeds as the first, {len(first.probabilities)}, got {len(arm.probabilities)}"
            )


def verdict(difference: Interval, margin: float) -> str:
    """Say what an interval of a difference shows: "equal within <margin>", "better", "worse" or "undecided".

    Args:
        difference: Of a score of which more is better.
        margin: Largest difference that does not matter.
    """
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "undecided"
    if -margin <= low and high <= margin:
        return f"equal within {margin:g}"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
