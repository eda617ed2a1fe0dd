"""Fixtures for the tests of the kernels, and a table of the compiled kernels at the end of a run."""

from collections import defaultdict
from importlib.metadata import version

import pytest

from tests.support.guards import guarded_memory


@pytest.fixture
def guards():
    """Guard new tensors, so that an element that no kernel writes is seen, and one written outside of them too."""
    with guarded_memory():
        yield


@pytest.fixture(scope="module")
def new_triton_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    rows = [row for report in reports for name, row in report.user_properties if name == "resources"]
    if not rows:
        return
    terminalreporter.section(f"registers per thread, as compiled by Triton {version('triton')} over all shapes tested")
    registers, worst = defaultdict(lambda: defaultdict(set)), defaultdict(lambda: (0, 0))
    for row in rows:
        registers[row["kernel"]][row["target"]].add(row["registers"])
        worst[row["kernel"]] = tuple(map(max, worst[row["kernel"]], (row["spills"], row["shared"])))
    targets = sorted({row["target"] for row in rows}, key=lambda target: int(target.removeprefix("sm_")))
    line = ("{:<30}" + "{:>12}" * len(targets) + "{:>10}{:>16}").format
    terminalreporter.line(line("kernel", *targets, "spills", "shared, bytes"))
    for kernel, by_target in registers.items():
        found = [by_target[target] for target in targets]
        ranges = [f"{min(counts)} - {max(counts)}" if counts else "" for counts in found]
        terminalreporter.line(line(kernel, *ranges, *worst[kernel]))
