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
from typing import Any

import pytest

PACKAGES = (
    "torch",
    "timm",
    "torchvision",
    "transformers",
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


class Cells:
    """A plugin that gathers the outcomes of marked tests and writes them to a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.cells: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.first_test: dict[tuple[str, str, str], int] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for index, item in enumerate(session.items):
            if (cell := cell_of(item)) is not None:
                item.user_properties.append(
                    ("cell", (*cell, index))
                )  # travels in the reports of pytest-xdist's workers
                self._place(cell, index)

    def _place(self, cell: tuple[str, str, str], index: int) -> dict[str, Any]:
        self.first_test[cell] = min(index, self.first_test.get(cell, index))
        return self.cells.setdefault(cell, {"passed": 0, "failed": 0, "skipped": 0, "notes": [], "limits": []})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        place = dict(report.user_properties).get("cell")
        if place is None or (report.when != "call" and report.passed):
            return
        *names, index = place
        cell = self._place(tuple(names), index)
        cell[report.outcome] += 1
        remarks = [(f"{name}s", str(value)) for name, value in report.user_properties if name in ("note", "limit")]
        if report.skipped and isinstance(report.longrepr, tuple):
            remarks.append(("notes", report.longrepr[2].removeprefix("Skipped: ")))
        for kind, text in remarks:
            if text not in cell[kind]:
                cell[kind].append(text)

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            names = ("table", "row", "column")
            ordered = sorted(self.cells, key=self.first_test.__getitem__)  # workers finish in any order
            cells = [dict(zip(names, cell, strict=True)) | self.cells[cell] for cell in ordered]
            text = json.dumps({"versions": versions(), "cells": cells}, indent=1)
            self.path.write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the tests ran with."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return installed
