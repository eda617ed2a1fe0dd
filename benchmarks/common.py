"""What the commands share: their arguments, the rows, and the result file around the rows."""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
from torch import Tensor

import kfde_layers
from benchmarks.arguments import command_parser
from benchmarks.report import row_line, targets_table
from benchmarks.schema import Machine, Result, Row, Versions, validate
from benchmarks.timing import Key, Timed

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: str
    """Either "cpu" or "cuda"."""
    dtype: torch.dtype
    """Dtype of the input."""
    rounds: int
    """Interleaved rounds in each repetition."""
    repeats: int
    """Repetitions of all rounds."""
    run_time: float
    """Time of one visit to one candidate, in s."""
    seed: int
    """Seed of all random numbers."""
    compiled: bool
    """Whether to measure compiled modules too."""


@dataclass
class Problems:
    """Candidates that have no number, each with the reason."""

    failures: list[str] = field(default_factory=list)
    """They compute something else, or fail."""
    skipped: list[str] = field(default_factory=list)
    """They cannot run here, or there was no time."""


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or its type if there is no message."""
    return str(error).partition("\n")[0] or type(error).__name__


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the arguments that `bench_layers` and `bench_models` have in common."""
    parser = command_parser(name, description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default: 21)")
    parser.add_argument("--repeats", type=int, default=1, help="repetitions of the rounds (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three short rounds on small inputs, to see that it runs")
    parser.add_argument("--targets", action="store_true", help="print the targets and whether they are met")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    return parser


def start(args: argparse.Namespace, *, compiled: bool) -> Settings:
    """Configure PyTorch by the arguments, and return how to measure."""
    set_up(args.threads)
    rounds, run_time = (3, 0.001) if args.quick else (args.rounds, 0.02)
    return Settings(args.device, DTYPES[args.dtype], rounds, args.repeats, run_time, args.seed, compiled)


def set_up(threads: int) -> None:
    """Set the number of CPU threads, and switch TF32 off."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 rows are float32


def rows(
    timed: Mapping[Key, Timed], peaks: Mapping[Key, int], saved: Mapping[Key, int], x: Tensor, layout: str, work: str
) -> Iterator[Row]:
    """Make the rows of one piece of work.

    Args:
        timed: Times of each candidate.
        peaks: Peak memory of each candidate, in bytes.
        saved: Memory that forward keeps for backward, in bytes, of the candidates that have a backward pass.
        x: The input.
        layout: Memory format of the input, a key of `LAYOUTS`.
        work: Name of the work.
    """
    for key, (method, ms, over) in timed.items():
        subject, candidate = key
        yield {
            "subject": subject,
            "candidate": candidate,
            "shape": list(x.shape),
            "layout": layout,
            "work": work,
            "method": method,
            "ms": ms,
            "over": over,
            "input_bytes": x.numel() * x.element_size(),
            "peak_bytes": peaks[key],
            "saved_bytes": saved.get(key),
        }


def show(rows: list[Row]) -> None:
    """Print the rows of one piece of work."""
    first = rows[0]
    print(f"\n{tuple(first['shape'])} {first['layout']} {first['work']}")
    for row in rows:
        print(row_line(row), flush=True)


def finish(suite: str, args: argparse.Namespace, settings: Settings, rows: list[Row], problems: Problems) -> None:
    """Write the result, print the targets and what is missing, and exit with 1 if a candidate was wrong."""
    measured = result(suite, settings, rows, problems)
    if args.output is not None:
        write(measured, args.output)
    if args.targets:
        print("\n" + targets_table([measured]))
    for line in (*problems.skipped, *problems.failures):
        print(line)
    if problems.failures:
        sys.exit(1)


def result(suite: str, settings: Settings, rows: list[Row], problems: Problems) -> Result:
    """Make the content of a result file, and validate it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return validate(
        {
            "suite": suite,
            "date": datetime.date.today().isoformat(),
            "machine": machine(settings.device),
            "versions": versions(),
            "dtype": names[settings.dtype],
            "seed": settings.seed,
            "rounds": settings.rounds,
            "repeats": settings.repeats,
            "rows": rows,
            "failures": problems.failures,
            "skipped": problems.skipped,
        }
    )


def write(result: Result, path: Path) -> None:
    """Write a result file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine(device: str) -> Machine:
    """Describe the machine, as a result file does."""
    on_gpu = device == "cuda"
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def processor() -> str:
    """Return the market name of the processor, or its architecture if the system does not know the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if the system does not know it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else None


def versions() -> Versions:
    """Return the versions of Python and the libraries."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "kfde_layers": kfde_layers.__version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }
