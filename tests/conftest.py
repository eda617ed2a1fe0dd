import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.cells import Cells

# No deadline: the first call of an operator loads it, and machines differ. CI draws the same examples every time.
settings.register_profile("kfde", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kfde")

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only slow them down


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cells", type=Path, metavar="FILE", help="write the results of the marked tests to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    config.pluginmanager.register(Cells(None if is_worker else config.getoption("--cells")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
