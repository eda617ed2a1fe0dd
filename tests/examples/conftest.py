"""What the tests of the example share: a checker that is no part of the example, and a drawn data set."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from breakhis.data.synthetic import draw_tree


def leaking_patients(rows: Iterable[tuple[str, str]]) -> set[str]:
    """Patients that (patient, split) rows put into more than one split; knows nothing of the code under test."""
    splits = defaultdict(set)
    for patient, split in rows:
        splits[patient].add(split)
    return {patient for patient, names in splits.items() if len(names) > 1}


@pytest.fixture(scope="session")
def leak_checker():
    return leaking_patients


@pytest.fixture(scope="session")
def synthetic_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawn images: 3 patients of each of the 8 subtypes, 2 images each, at 100X."""
    root = tmp_path_factory.mktemp("synthetic")
    draw_tree(root, seed=0, magnifications=("100X",), patients_per_subtype=3, images_per_patient=2)
    return root


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
