"""Faults that can be planted in the code, and the tests that must see each of them."""

import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A small change that makes the code wrong."""

    file: str
    """File to change, from the root of the repository."""
    right: str
    """Text of the file, which occurs once."""
    wrong: str
    """Text that replaces it."""
    tests: tuple[str, ...]
    """Tests that mirror the file."""
    interpreted: bool
    """Whether they run the kernels in Triton's interpreter."""


def load_faults() -> list[Fault]:
    """Read `faults.toml`."""
    tables = tomllib.loads((Path(__file__).parent / "faults.toml").read_text(encoding="utf-8"))
    return [
        Fault(file, right, wrong, tuple(table["tests"]), table.get("interpreted", False))
        for file, table in tables.items()
        for right, wrong in table["faults"]
    ]
