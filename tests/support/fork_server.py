"""Runs of the script that trains in processes of their own, which get signals.

Importing the script takes longer than a small run, so one process imports it and is forked for each run.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.runs import ROOT, heed_interrupts

SERVER = """
import json, os, signal, sys
import train_breakhis
from breakhis import runner
from breakhis.commands import run_script

runner.draw_figures = lambda *args: None  # as in the tests that compare with these runs
for line in sys.stdin:
    arguments, errors = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # ends a run that hangs
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["train_breakhis.py", *arguments]
        run_script(train_breakhis.main)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def fork_server() -> Iterator[subprocess.Popen]:
    """Start the process that is forked."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, preexec_fn=heed_interrupts, **pipes)
    try:
        yield process
    finally:
        process.kill()  # its runs have ended, and its own end would take seconds
        process.communicate(timeout=30)


def run_and_signal(
    server: subprocess.Popen, arguments: list[str], errors: Path, seconds: float, number: int, after: Path | None = None
) -> tuple[int, str]:
    """Return exit status and errors of a run that gets a signal.

    Args:
        server: The process from `fork_server`.
        arguments: Command line of the run.
        errors: File for the standard error.
        seconds: Time before the signal.
        number: The signal.
        after: File that must be there before the time begins; None: it begins with the run.
    """
    server.stdin.write(json.dumps([arguments, str(errors)]) + "\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    deadline = time.monotonic() + 60
    while after is not None and not after.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(child, number)
    return int(server.stdout.readline()), errors.read_text()
