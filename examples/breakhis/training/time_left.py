"""How long the runs that are left will take."""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from tqdm import tqdm


class TimeLeft:
    """Estimates how long runs will take, from the epochs that were timed.

    An epoch of a variant takes as long as the mean of this variant's epochs so far; if it has none, as long as the mean
    of all. Variants can be models of different sizes, so the first estimates are rough.

    Args:
        runs: The runs that are not finished.
    """

    def __init__(self, runs: Iterable[argparse.Namespace]) -> None:
        self._left: dict[Path, tuple[str, int]] = {run.output_dir: (run.variant, run.epochs) for run in runs}
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def add_epoch(self, run: argparse.Namespace, epoch: int, seconds: float) -> None:
        """Note the time of an epoch of a run, with its validation.

        Args:
            run: The run.
            epoch: Number of the epoch, from 1.
            seconds: Its time.
        """
        self._seconds[run.variant].append(seconds)
        self._left[run.output_dir] = run.variant, run.epochs - epoch

    def end_run(self, run: argparse.Namespace) -> None:
        """Note that a run is finished."""
        self._left.pop(run.output_dir, None)

    @property
    def timed(self) -> int:
        """Number of epochs that were timed."""
        return sum(map(len, self._seconds.values()))

    def __str__(self) -> str:
        """Write the estimate as hours, minutes and seconds, such as "about 1:02:03 left", once an epoch was timed."""
        mean_of_all = fmean(second for seconds in self._seconds.values() for second in seconds)
        means = {variant: fmean(seconds) for variant, seconds in self._seconds.items()}
        seconds = sum(epochs * means.get(variant, mean_of_all) for variant, epochs in self._left.values())
        return f"about {tqdm.format_interval(seconds)} left"
