import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from hypothesis import settings

from tests.support.cells import Cells

# No deadline: the first call of an operator loads it, and machines differ. CI draws the same examples every time.
settings.register_profile("kfde", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kfde")

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only slow them down
torch._inductor.config.compile_threads = 1  # more would be processes that each load PyTorch, for every worker


# Files and folders of tests that cannot even be collected without these libraries.
_NEEDED = {
    "examples": ("accelerate", "matplotlib", "pytorch_grad_cam", "skimage", "sklearn", "torchmetrics", "tqdm", "yaml"),
    "benchmarks": ("matplotlib",),
    "test_docs.py": ("latex2mathml", "matplotlib", "mkdocs"),
}
_MISSING = {
    path: absent for path, names in _NEEDED.items() if (absent := [name for name in names if find_spec(name) is None])
}
collect_ignore = list(_MISSING)


def pytest_report_header() -> list[str]:
    return [f"left out: tests/{path}, because {', '.join(names)} is not installed" for path, names in _MISSING.items()]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cells", type=Path, metavar="FILE", help="write the results of the marked tests to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    config.pluginmanager.register(Cells(None if is_worker else config.getoption("--cells")), "cells")


def pytest_collection_finish() -> None:
    gc.freeze()  # the imported libraries live until the end: each collection would look through all their objects


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
