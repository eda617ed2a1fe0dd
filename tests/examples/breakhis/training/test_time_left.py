"""The estimate of how long the runs that are left will take."""

from argparse import Namespace
from pathlib import Path

from breakhis.training.time_left import TimeLeft

SMALL = [Namespace(output_dir=Path(f"small-{seed}"), variant="small", epochs=10) for seed in (0, 1)]
LARGE = Namespace(output_dir=Path("large"), variant="large", epochs=10)


def test_an_epoch_of_a_method_without_one_takes_as_long_as_the_mean():
    left = TimeLeft([*SMALL, LARGE])
    left.add_epoch(SMALL[0], 1, 4.0)
    assert str(left) == "about 01:56 left"  # 29 epochs of 4 s


def test_each_method_has_its_own_speed():
    left = TimeLeft([*SMALL, LARGE])
    left.add_epoch(SMALL[0], 1, 1.0)
    left.add_epoch(SMALL[0], 2, 3.0)
    left.add_epoch(LARGE, 1, 100.0)
    assert left.timed == 3
    assert str(left) == "about 15:36 left"  # 18 epochs of 2 s, 9 of 100 s


def test_a_finished_run_takes_no_time_even_if_it_was_resumed():
    left = TimeLeft([SMALL[0], LARGE])
    left.add_epoch(SMALL[0], 9, 2.0)  # the first eight were timed in another process
    assert str(left) == "about 00:22 left"
    left.end_run(SMALL[0])
    left.end_run(SMALL[1])  # was finished before
    assert str(left) == "about 00:20 left"
