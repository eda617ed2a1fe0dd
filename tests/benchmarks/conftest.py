import sys
from pathlib import Path

import pytest
import torch

# The scripts import each other by name, as they do when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def spread(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def make_row(subject="CSFE", candidate="auto", over=None, **changes):
    row = {
        "subject": subject,
        "candidate": candidate,
        "shape": [8, 96, 56, 56],
        "layout": "contiguous",
        "work": "forward",
        "method": "timer",
        "ms": [spread(2.0)],
        "over": {label: [spread(ratio)] for label, ratio in (over or {}).items()},
        "input_bytes": 1000,
        "peak_bytes": 500,
        "saved_bytes": None,
    }
    return row | changes


def make_result(*rows, **changes):
    result = {
        "suite": "layers",
        "date": "2026-01-31",
        "machine": {"device": "cpu", "name": "Some (R) CPU", "threads": 2, "driver": None, "cuda": None},
        "versions": {"kfde_layers": "0.1.0", "torch": "2.9", "timm": "1.0", "triton": None, "python": "3.11"},
        "dtype": "float32",
        "seed": 0,
        "rounds": 21,
        "repeats": 1,
        "rows": list(rows),
        "failures": [],
        "skipped": [],
    }
    return result | changes


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def result():
    return make_result


@pytest.fixture
def spreads():
    return spread
