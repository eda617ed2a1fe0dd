"""A leak of known size: the same test images, with and without other images of their cases in training."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from breakhis.data.leak import halve_tested_cases, leak_tested_cases
from breakhis.data.naming import parse_name
from breakhis.data.records import Record
from breakhis.data.splits import Split, fold_split


def case_of(record: Record) -> str:
    """Read the case in the name of a file, without the code under test."""
    return record.path.stem.split("-")[2].rstrip("ABCD")


def counts(records: list[Record]) -> Counter[str]:
    return Counter(record.labels["binary"] for record in records)


@pytest.fixture
def split() -> Split:
    """Divide 24 cases, some of two slides, with 1 to 7 images each."""
    records = []
    for number in range(24):
        letter, kind = ("B", "A") if number % 3 else ("M", "DC")
        for image in range(1 + number % 7):
            slide = f"{100 + number}{'CD' if image % 2 else 'AB'}"
            records.append(parse_name(Path(f"SOB_{letter}_{kind}-14-{slide}-100-{image:03d}.png")))
    return fold_split(records, "binary", "case", num_folds=2, fold=0, seed=0)


def test_half_of_each_tested_case_is_tested_and_nothing_else_changes(split):
    halved, others = halve_tested_cases(split)
    assert (halved.train, halved.val) == (split.train, split.val)
    assert sorted([*halved.test, *others], key=str) == sorted(split.test, key=str)
    whole, half = (Counter(map(case_of, records)) for records in (split.test, halved.test))
    assert half == {case: (count + 1) // 2 for case, count in whole.items()}
    assert halved.protocol == "case protocol, half of each tested case"
    assert not {case_of(record) for record in halved.train} & {case_of(record) for record in halved.test}


def test_the_leak_tests_the_same_images_and_trains_on_as_many_of_each_class(split):
    halved, others = halve_tested_cases(split)
    leaked = leak_tested_cases(halved, others, "binary", seed=0)
    assert (leaked.test, leaked.val) == (halved.test, halved.val)
    assert len(leaked.train) == len(set(map(str, leaked.train))) == len(halved.train)
    assert counts(leaked.train) == counts(halved.train)
    assert {str(record) for record in leaked.train} - {str(record) for record in halved.train} == set(map(str, others))
    assert leaked.protocol.endswith("the other half in training (cases leak)")
    assert leak_tested_cases(halved, others, "binary", seed=0) == leaked
    assert leak_tested_cases(halved, others, "binary", seed=1).train != leaked.train


def test_images_with_one_number_stay_together():
    """They can be one file under two types, or one field at two magnifications."""
    files = product(("DC", "LC"), (40, 100), (1, 2, 3))
    records = [parse_name(Path(f"SOB_M_{kind}-14-13412-{power}-{number:03d}.png")) for kind, power, number in files]
    halved, others = halve_tested_cases(Split([], [], records, "", ""))
    assert {record.path.stem[-3:] for record in halved.test} == {"001", "003"}
    assert {record.path.stem[-3:] for record in others} == {"002"}
    assert len(halved.test) == 8


def test_images_take_the_place_of_another_class_where_their_own_has_run_out(split):
    halved, others = halve_tested_cases(split)
    few = Split([r for r in halved.train if r.labels["binary"] == "benign"], halved.val, halved.test, "", "")
    leaked = leak_tested_cases(few, others, "binary", seed=0)
    assert len(leaked.train) == len(few.train)
    assert counts(leaked.train)["malignant"] == counts(others)["malignant"] > 0


def test_a_training_set_smaller_than_the_leak_is_replaced_whole(split):
    halved, others = halve_tested_cases(split)
    small = Split(halved.train[:3], halved.val, halved.test, "", "")
    leaked = leak_tested_cases(small, others, "binary", seed=0)
    assert len(leaked.train) == 3
    assert set(map(str, leaked.train)) <= set(map(str, others))
