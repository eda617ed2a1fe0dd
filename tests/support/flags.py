"""Flags of the trainer."""

import argparse
from pathlib import Path

from breakhis.training.options import parse_args


def parse(tmp_path: Path, *argv: str) -> argparse.Namespace:
    """Parse the flags of a run on drawn images."""
    return parse_args(["--synthetic", "--output-dir", str(tmp_path / "out"), *argv])
