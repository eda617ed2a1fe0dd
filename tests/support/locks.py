"""A process that holds the lock of a folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
HOLD = """
import sys
from pathlib import Path
from breakhis.training.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start(code: str, folder: Path) -> subprocess.Popen:
    """Start a process that runs code with the folder as its argument, and wait for its first line."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, **pipes)
    assert process.stdout.readline() in ("locked\n", "ready\n")
    return process


@contextmanager
def lock_holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Hold the lock in another process until the block ends."""
    process = start(HOLD, folder)
    try:
        yield process
    finally:
        process.communicate(timeout=30)
