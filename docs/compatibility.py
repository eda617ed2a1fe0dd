"""Write the outcomes of the tests into the page on compatibility while the site is built."""

import json
from pathlib import Path
from typing import Any

OUTCOMES = Path(__file__).with_name("compatibility.json")
MARK = "<!-- cells -->"
GPU = "needs a GPU"


def tables(outcomes: dict[str, Any]) -> str:
    """Return the tables in Markdown, after the versions they were made with."""
    versions = ", ".join(f"{package} {version}" for package, version in outcomes["versions"].items())
    parts = [f"Made with {versions}."]
    if any(GPU in cell["notes"] for cell in outcomes["cells"]):
        parts.append(
            "There was no GPU: tests that need one (`pytest -m gpu`) did not run, and no tick depends on them."
        )
    for name in dict.fromkeys(cell["table"] for cell in outcomes["cells"]):
        parts.append(f"## {name}")
        parts.append(table([cell for cell in outcomes["cells"] if cell["table"] == name]))
    return "\n\n".join(parts)


def table(cells: list[dict[str, Any]]) -> str:
    """Return one table; its last column holds the notes, if there are any."""
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    lines = []
    for row in dict.fromkeys(cell["row"] for cell in cells):
        by_column = {cell["column"]: cell for cell in cells if cell["row"] == row}
        notes = dict.fromkeys(
            note for cell in by_column.values() for note in cell["notes"] + cell["limits"] if note != GPU
        )
        lines.append(
            [row, *(mark(by_column[column]) if column in by_column else "" for column in columns), "; ".join(notes)]
        )
    header = ["", *columns, "notes"]
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    rule = ["---", *(":-:" for _ in columns), "---"][: len(header)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def mark(cell: dict[str, Any]) -> str:
    """Return the sign for failed, passed, passed within limits, or not run."""
    passed = "(✓)" if cell["limits"] else "✓"
    return "✗" if cell["failed"] else passed if cell["passed"] else "-"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Write the tables."""
    return markdown.replace(MARK, tables(json.loads(OUTCOMES.read_text()))) if MARK in markdown else markdown
