import functools

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads():
    """Restore the number of threads that a command sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compile without code generation, which takes many seconds and which other tests cover."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def make_spread():
    """Make the spread of one repetition."""

    def make(median):
        return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}

    return make


@pytest.fixture
def make_row(make_spread):
    """Make a row of a result, with a ratio for each label in `over`."""

    def make(subject="CSFE", candidate="auto", over=None, **changes):
        row = {
            "subject": subject,
            "candidate": candidate,
            "shape": [8, 96, 56, 56],
            "layout": "contiguous",
            "work": "forward",
            "method": "timer",
            "ms": [make_spread(2.0)],
            "over": {label: [make_spread(ratio)] for label, ratio in (over or {}).items()},
            "input_bytes": 1000,
            "peak_bytes": 500,
            "saved_bytes": None,
        }
        return row | changes

    return make


@pytest.fixture
def make_result():
    """Make a result with these rows."""

    def make(*rows, **changes):
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

    return make
