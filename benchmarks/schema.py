"""The content of a result file, and a check of it."""

import json
import math
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class Spread(TypedDict):
    """Median and quartiles over the rounds of one repetition."""

    median: float
    q1: float
    q3: float


class Row(TypedDict):
    """One candidate on one piece of work. The lists hold one spread per repetition."""

    subject: str
    """The layer or the size of the model, or "peer" or "floor"."""
    candidate: str
    """The implementation, the model, the peer or the floor."""
    shape: list[int]
    """Shape of the input, (N, C, H, W)."""
    layout: Literal["contiguous", "channels_last"]
    """Memory format of the input."""
    work: Literal["forward", "forward+backward", "inference", "training", "checkpointed training"]
    """What is done with the input."""
    method: Literal["timer", "cuda graph", "cuda events"]
    """How the time was taken."""
    ms: list[Spread]
    """Time, in ms."""
    over: dict[str, list[Spread]]
    """Time over that of a baseline, taken round by round."""
    input_bytes: int
    """Memory of the input."""
    peak_bytes: int
    """Memory held at most, see README.md."""
    saved_bytes: int | None
    """Memory kept for backward; None: there is no backward pass."""


class Machine(TypedDict):
    """The machine of a run."""

    device: Literal["cpu", "cuda"]
    name: str
    threads: int
    driver: str | None
    cuda: str | None


class Versions(TypedDict):
    """Versions of Python and the libraries."""

    kfde_layers: str
    torch: str
    timm: str
    triton: str | None
    python: str


class Result(TypedDict):
    """One run of one command."""

    suite: Literal["layers", "sweep", "grid", "calls", "models"]
    date: str
    machine: Machine
    versions: Versions
    dtype: Literal["float32", "bfloat16", "float16"]
    seed: int
    rounds: int
    repeats: int
    rows: list[Row]
    failures: list[str]
    """Candidates without a number because they compute something else or fail."""
    skipped: list[str]
    """Candidates without a number because they cannot run here, or there was no time."""


def best(repetitions: list[Spread]) -> Spread:
    """Return the repetition with the lowest median."""
    return min(repetitions, key=lambda spread: spread["median"])


def load(path: Path) -> Result:
    """Read and validate a result file.

    Raises:
        ValueError: The file is not a result; the message names the file and the place.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    try:
        return validate(result)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def validate(result: Any) -> Result:
    """Return `result` if it is a `Result`.

    Raises:
        ValueError: It is not; the message names the place, the wanted value and the actual one.
    """
    _check("result", result, Result)
    for index, row in enumerate(result["rows"]):
        spreads = {"ms": row["ms"]} | {f"over[{name!r}]": values for name, values in row["over"].items()}
        for name, repetitions in spreads.items():
            where = f"result.rows[{index}].{name}"
            if len(repetitions) != result["repeats"]:
                raise ValueError(f"{where}: wanted {result['repeats']} repetitions, got {len(repetitions)}")
            for spread in repetitions:
                if not 0 < spread["q1"] <= spread["median"] <= spread["q3"]:
                    raise ValueError(f"{where}: wanted 0 < q1 <= median <= q3, got {spread}")
    return result


def _check(where: str, value: Any, wanted: Any) -> None:
    """Refuse a value that does not have the wanted type."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if is_typeddict(wanted):
        _check(where, value, dict)
        hints = get_type_hints(wanted)
        if value.keys() != hints.keys():
            missing, unknown = sorted(hints.keys() - value.keys()), sorted(value.keys() - hints.keys())
            raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")
        for key, hint in hints.items():
            _check(f"{where}.{key}", value[key], hint)
    elif origin is list:
        _check(where, value, list)
        for index, item in enumerate(value):
            _check(f"{where}[{index}]", item, arguments[0])
    elif origin is dict:
        _check(where, value, dict)
        for key, item in value.items():
            _check(f"{where}[{key!r}]", item, arguments[1])
    elif origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: wanted one of {arguments}, got {value!r}")
    elif origin is UnionType:
        if value is not None:
            _check(where, value, arguments[0])
    elif wanted is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{where}: wanted a finite number, got {value!r}")
    elif type(value) is not wanted:
        raise ValueError(f"{where}: wanted {wanted.__name__}, got {value!r}")
