"""The one door of all scripts: an error that the user can mend ends in one line, a fault of the program in a traceback.

The exit code is 0 for success, 1 for an error, 2 for wrong arguments (argparse's own code), 130 after Ctrl-C and 143
after SIGTERM.
"""

import functools
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

from breakhis.names import printable

P = ParamSpec("P")
T = TypeVar("T")


# PyTorch raises RuntimeError where a process that loads images died, often because the memory was full, and where the
# memory of a device or of the machine is full. Only the text tells these from faults of a program.
_SIGNS = ("DataLoader worker", "out of memory", "can't allocate memory")


class Terminated(KeyboardInterrupt):
    """SIGTERM. It takes the way of Ctrl-C, so that the same clean-up runs for both."""


def one_line_errors(main: Callable[P, T]) -> Callable[P, T]:
    """Make the main function of a script leave with one line, `<script>: error: <message>`, and exit code 1.

    This holds for errors that the user can mend: a wrong value (ValueError), a file, the disk or the network (OSError),
    numbers that are not finite (FloatingPointError), a full memory, and a process of a DataLoader that died. A type of
    error that a library has for broken files is turned into a ValueError where the file is read.

    Args:
        main: The main function, in the file of the script.
    """
    script = Path(inspect.getfile(main)).name

    @functools.wraps(main)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except (FloatingPointError, MemoryError, OSError, ValueError) as error:
            sys.exit(f"{script}: error: {one_line(error)}")
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _SIGNS):
                raise
            sys.exit(f"{script}: error: {one_line(error)}")

    return call


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line without control characters.

    Of a traceback from a process of a DataLoader, this is the last line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return printable(" ".join(line.strip() for line in lines))


def run_script(main: Callable[[], object]) -> NoReturn:
    """Call the main function of a script, and end the process with its exit code.

    After Ctrl-C or SIGTERM, the notes of the KeyboardInterrupt (`add_note`) say what is saved and how to go on.

    Args:
        main: Returns the exit code, or anything that is no number for success.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of `accelerate launch`, whose other processes may end at once
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a name
    sys.unraisablehook = _raise_again
    sys.excepthook = functools.partial(_print_traceback, os.getpid())
    try:
        code = main()
    except KeyboardInterrupt as stop:
        sys.unraisablehook = _ignore_missing_attributes
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        notes = "; ".join([f"{Path(sys.argv[0]).name}: {word}", *getattr(stop, "__notes__", [])])
        print(printable(notes), file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise Terminated


def _raise_again(unraisable: Any) -> None:
    """Raise a KeyboardInterrupt a little later where Python would drop it, as in `__del__` or around a fork."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(unraisable)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise unraisable.exc_type

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _ignore_missing_attributes(unraisable: Any) -> None:
    """Print nothing of objects that a signal has left half made, and that miss an attribute as they are deleted."""
    if not issubclass(unraisable.exc_type, AttributeError):
        sys.__unraisablehook__(unraisable)


def _print_traceback(pid: int, *error: Any) -> None:
    """Print a traceback in the main process alone.

    The processes that load images send their errors to the main process. What they would print themselves is only that
    the main process has gone, after a signal.
    """
    if os.getpid() == pid:
        sys.__excepthook__(*error)
