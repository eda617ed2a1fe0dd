"""Types of command-line arguments for argparse: each turns a text into a value, or says what it must be."""

import argparse
import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from breakhis.mappings import parse_yaml
from breakhis.names import printable

LARGEST = 10**6
"""The largest number that a flag takes by default. Libraries fail on much larger ones without naming the flag."""
SIDES = range(32, 4097)
"""Sides of an input image in px, up to a size that memory can hold."""
MAX_WORKERS = 256
"""The largest number of processes that load images, twice the cores of a large machine. Each one is started at once."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors can be printed: the command line may hold names of files, which may hold anything."""

    def error(self, message: str) -> NoReturn:
        """Print the message, and the flag that was probably meant, and leave with exit code 2."""
        _, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            meant = get_close_matches(rest.partition("=")[0].split(" ")[0], flags, n=1)
            message += f"; did you mean {meant[0]}?" if meant else ""
        super().error(printable(message))


def as_argv(config: dict[str, Any]) -> list[str]:
    """Turn a YAML mapping into a command line, so that its flags are checked in the same way."""
    argv = []
    for key, value in config.items():
        name = str(key).replace("_", "-")
        match value:
            case None:  # saved for a flag that was not set
                continue
            case False if name == "mixed-precision":  # YAML reads an unquoted "no" as false
                argv += [f"--{name}", "no"]
            case bool():
                argv.append(f"--{name}" if value else f"--no-{name}")
            case dict():
                argv += [f"--{name}", yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)]
            case list():
                argv += [f"--{name}", *map(str, value)]
            case _:
                argv += [f"--{name}", str(value)]
    return argv


def number(kind: type, low: float, high: float = LARGEST) -> Callable[[str], Any]:
    """Make the type of a number from `low` to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {value}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it, as in "invalid int value"
    return parse


def positive(text: str) -> float:
    """Parse a number above 0, at most `LARGEST`."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value}")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST:g}, got {value}")
    return value


def mapping(text: str) -> dict[str, Any]:
    """Parse a mapping in YAML, such as "{output_stride: 16, csfe: false}"."""
    try:
        value = parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be a mapping in YAML, got {text!r:.200}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in YAML, got {text!r:.200}")
    return value


def sha256(text: str) -> str:
    """Parse a SHA-256 in hexadecimal digits."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"must be 64 hexadecimal digits, got {text!r}")
    return text.lower()


def path(text: str) -> Path:
    """Parse a path."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, which has no NUL character, got {text!r}")
    return Path(text)


def fold(text: str) -> int | str:
    """Parse the number of a fold, or "all"."""
    return text if text == "all" else number(int, 0)(text)


class Shard(NamedTuple):
    """A part of the runs of a study."""

    index: int
    """Number of the part, from 1."""
    count: int
    """Number of parts."""


def shard(text: str) -> Shard:
    """Parse a part, such as "1/4"."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 1/4, got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def torch_device(text: str) -> Any:
    """Parse the name of a device of this machine; "auto" is its accelerator if it has one, else the CPU."""
    import torch  # late: it takes seconds, and `--help` needs none of it

    if text == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        probe = torch.ones(1, device=text)
        probe.tolist()  # "meta" has no numbers
        return probe.device
    except (AssertionError, RuntimeError) as error:  # an AssertionError where PyTorch lacks the backend
        raise argparse.ArgumentTypeError(f"must be 'auto' or a device of this machine, got {text!r}") from error
