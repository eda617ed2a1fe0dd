"""Fixtures of the tests of the examples."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from breakhis import runner
from breakhis.data.synthetic import draw_tree
from breakhis.results import study
from breakhis.results.intervals import bootstrap
from filelock import FileLock
from PIL import Image

from tests.support.predictions import save_checkpoint, write_images

DRAW_FIGURES = runner.draw_figures


def leaking_patients(rows: Iterable[tuple[str, str]]) -> set[str]:
    """Return the patients that (patient, split) rows put into more than one split; uses no code of the example."""
    splits = defaultdict(set)
    for patient, split in rows:
        splits[patient].add(split)
    return {patient for patient, names in splits.items() if len(names) > 1}


@pytest.fixture(scope="session")
def leak_checker():
    return leaking_patients


@pytest.fixture(scope="session")
def synthetic_tree(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Draw 48 images: 3 patients of each of the 8 subtypes, 2 images each, at 100X. All workers read the same.

    They have the shape of a field and half of its height and width, so that they are decoded quickly.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own if worker_id == "master" else own.parent) / "synthetic"
    with FileLock(root.with_suffix(".lock")):
        if not root.exists():
            part = root.with_suffix(".part")
            draw_tree(part, seed=0, magnifications=("100X",), patients_per_subtype=3, images_per_patient=2)
            for path in part.rglob("*.png"):
                with Image.open(path) as image:
                    image.reduce(2).save(path)
            part.rename(root)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "kfde_convnextv2_atto")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session", autouse=True)
def few_resamples():
    """Resample few worlds: a study would spend most of its time on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "bootstrap", partial(bootstrap, resamples=50))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_sync():
    """Do not wait for the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("breakhis.files.fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_log_level() -> Iterator[None]:
    """Undo the level of the log that scripts set for the whole process, so that the order of tests does not matter."""
    yield
    logging.getLogger("breakhis").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Train without drawing figures, which takes half of the time of a small run; see `with_figures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda *args: None)
        yield


@pytest.fixture(scope="session")
def with_figures() -> Callable[[], AbstractContextManager[object]]:
    """Return a context in which runs draw their figures."""
    return lambda: mock.patch.object(runner, "draw_figures", DRAW_FIGURES)
