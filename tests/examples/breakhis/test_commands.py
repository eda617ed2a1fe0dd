import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from breakhis.commands import one_line, one_line_errors
from torch.utils.data import DataLoader, Dataset

from tests.support.runs import heed_interrupts

EXAMPLES = Path(__file__).parents[3] / "examples"


def script(error: BaseException):
    """Make the main function of a script that fails."""

    @one_line_errors
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("--lr must be\n\tpositive"), "--lr must be positive"),
        (OSError(28, "No space left on device", "state.pt"), "[Errno 28] No space left on device: 'state.pt'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff"),
        (FloatingPointError("loss must be finite, got nan"), "loss must be finite, got nan"),
        (ValueError(), "ValueError"),
        (MemoryError("Unable to allocate 8 PiB"), "Unable to allocate 8 PiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory. Tried"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), "DataLoader worker (pid 1) is"),
    ],
)
def test_an_error_that_the_user_can_mend_is_one_line(error, message):
    with pytest.raises(SystemExit) as stopped:
        script(error)()
    assert stopped.value.code.startswith(f"test_commands.py: error: {message}")
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    "error", [TypeError("a"), KeyError("a"), RuntimeError("a"), AssertionError(), IndexError(), ZeroDivisionError()]
)
def test_a_fault_of_the_program_is_a_traceback(error):
    with pytest.raises(type(error)):
        script(error)()


def test_no_name_reaches_the_terminal_raw():
    with pytest.raises(SystemExit) as stopped:
        script(OSError("got 'a\x1b[2J\x9b\u202eb.png'\nforged"))()
    assert stopped.value.code == r"test_commands.py: error: got 'a\x1b[2J\x9b\u202eb.png' forged"


def test_a_terminal_may_lack_letters():
    code = "from breakhis.commands import run_script; run_script(lambda: print('größe'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "gr\\xf6\\xdfe\n")


def test_a_full_memory_of_the_machine_is_one_line():
    @one_line_errors
    def main() -> None:
        torch.empty(10**18)

    with pytest.raises(SystemExit, match=r"test_commands.py: error: .*can't allocate memory: you tried to allocate"):
        main()


class BrokenImages(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise ValueError("path must be an image file, got 'a: b.png'")


@pytest.mark.slow  # a process is started
def test_the_error_of_a_process_that_loads_images_is_its_last_line():
    with pytest.raises(ValueError, match="Traceback") as raised:
        list(DataLoader(BrokenImages(), num_workers=1))
    assert one_line(raised.value) == "path must be an image file, got 'a: b.png'"


class KilledImages(BrokenImages):
    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # a process is started
def test_a_process_that_loads_images_and_dies_is_one_line():
    @one_line_errors
    def main() -> None:
        list(DataLoader(KilledImages(), num_workers=1))

    with pytest.raises(
        SystemExit, match=r"error: DataLoader worker \(pid.* (killed by signal: Killed|exited unexpectedly)"
    ):
        main()


SCRIPT = """
import sys, time
from breakhis.commands import one_line_errors, run_script

class Sleeper:
    def __del__(self):
        time.sleep(60)

class HalfMade:
    def __init__(self):
        time.sleep(60)
        self.parts = []

    def __del__(self):
        self.parts.clear()  # not there yet if a signal came before

@one_line_errors
def main():
    try:
        print("ready", flush=True)
        if sys.argv[1] == "dropped":
            Sleeper()  # Python drops what is raised in __del__
        if sys.argv[1] == "half made":
            HalfMade()
        time.sleep(60 if sys.argv[1] in ("wait", "dropped") else 0)
        return {"code": 3, "list": [1], "none": None}[sys.argv[1]]
    except KeyboardInterrupt as stop:
        stop.add_note("o is complete")
        raise
    finally:
        print("cleaned up", flush=True)

run_script(main)
"""


def start(tmp_path: Path, argument: str) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), argument]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=heed_interrupts, **pipes)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("moment", ["wait", "dropped", "half made"])
def test_a_signal_ends_the_script_after_its_clean_up_and_says_what_is_saved(tmp_path, moment, number, code, word):
    process = start(tmp_path, moment)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (code, "cleaned up\n", f"script.py: {word}; o is complete\n")


FORK = """
import os, sys
from breakhis.commands import run_script

def main():
    if os.fork() == 0:
        raise EOFError("in the child")
    os.wait()
    raise TypeError("in the main process")

run_script(main)
"""


def test_only_the_main_process_prints_a_traceback(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    result = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "TypeError: in the main process" in result.stderr
    assert "in the child" not in result.stderr


@pytest.mark.parametrize(("argument", "code"), [("code", 3), ("list", 0), ("none", 0), ("nonsense", 1)])
def test_the_exit_code_is_what_main_returns(tmp_path, argument, code):
    process = start(tmp_path, argument)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("Traceback" in errors) == (argument == "nonsense")  # a KeyError is a fault of the program
