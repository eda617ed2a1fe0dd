"""The pytest plugin that collects the table of compatibility: which layer works with which tool.

A test marked `cell(table, row, column)` is evidence for a cell. Without a column, the cell is in the one that the first
word of the test's parameters names, as `CFE` of `test_compile[CFE, one group-bfloat16]`. A cell works if all of its
tests pass. A test may add a "note" or a "limit" to its cell, with `record_property`.
"""

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGES = (
    "torch",
    "timm",
    "torchvision",
    "transformers",
    "ultralytics",
    "opacus",
    "openvino",
    "executorch",
    "litert-torch",
    "coremltools",
    "segmentation-models-pytorch",
    "monai",
    "onnxruntime",
    "accelerate",
    "lightning",
    "peft",
    "torchao",
)


def cell_of(item: pytest.Item) -> tuple[str, str, str] | None:
    """Return table, row and column of a marked test."""
    mark = item.get_closest_marker("cell")
    if mark is None:
        return None
    if len(mark.args) == 3:
        return mark.args
    word = re.search(r"\[(\w+)", item.name)
    if len(mark.args) != 2 or word is None:
        raise pytest.UsageError(f"{item.nodeid}: cell(table, row) needs a column or a parameter that names it")
    return (*mark.args, word[1])


class Result(NamedTuple):
    """A test of a cell, or one of its reports."""

    position: int
    """Position of the test among all collected tests."""
    cell: tuple[str, ...]
    """Table, row and column."""
    outcome: str | None
    """Outcome "passed", "failed" or "skipped"; None for a test that was collected."""
    remarks: list[tuple[str, str]]
    """Kind and text of each remark; the kinds are "notes" and "limits"."""


class Cells:
    """A plugin that gathers the outcomes of marked tests and writes them to a file.

    Under pytest-xdist, workers collect and run the tests, and the process that writes the file sees only their reports.
    Each report therefore carries the cell of its test, and the test's position, which gives the order in the file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.results: list[Result] = []
        self.collected: list[tuple[Path, tuple[str, str, str] | None]] = []

    @pytest.hookimpl(tryfirst=True)  # before a marker leaves tests out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = [(item.path, cell_of(item)) for item in items]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for position, item in enumerate(session.items):
            if (cell := cell_of(item)) is not None:
                item.user_properties.append(("cell", (position, *cell)))
                self.results.append(Result(position, cell, None, []))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties or (report.when != "call" and report.passed):
            return
        position, *cell = properties["cell"]
        remarks = [(f"{name}s", str(value)) for name, value in report.user_properties if name in ("note", "limit")]
        if report.skipped and isinstance(report.longrepr, tuple):
            remarks.append(("notes", report.longrepr[2].removeprefix("Skipped: ")))
        self.results.append(Result(position, tuple(cell), report.outcome, remarks))

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            text = json.dumps({"versions": versions(), "cells": summary(self.results)}, indent=1)
            self.path.write_text(text + "\n", encoding="utf-8")


def summary(results: list[Result]) -> list[dict[str, Any]]:
    """Return the cells in the order of their first tests, each with the counts of outcomes and the remarks."""
    cells: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: result.position):
        empty = {"passed": 0, "failed": 0, "skipped": 0, "notes": [], "limits": []}
        cell = cells.setdefault(result.cell, empty)
        if result.outcome is not None:
            cell[result.outcome] += 1
        for kind, text in result.remarks:
            if text not in cell[kind]:
                cell[kind].append(text)
    return [dict(zip(("table", "row", "column"), place, strict=True)) | cell for place, cell in cells.items()]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the tests ran with."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return installed
