"""What the scripts share: their arguments, and the result file around their rows."""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
from report import row_line, targets_table
from schema import Machine, Result, Row, Versions, validate

import kfde_layers

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: str
    dtype: torch.dtype
    rounds: int
    repeats: int
    run_time: float  # of one visit to one candidate, in seconds
    seed: int
    compiled: bool


@dataclass
class Problems:
    """Why candidates have no number."""

    failures: list[str] = field(default_factory=list)  # they compute something else
    skipped: list[str] = field(default_factory=list)  # they cannot run here, or there was no time


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0] or type(error).__name__


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments that the scripts have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default: 21)")
    parser.add_argument("--repeats", type=int, default=1, help="repetitions of the rounds (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three short rounds on little work, to see that it runs")
    parser.add_argument("--targets", action="store_true", help="end with what was asked beside what was measured")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    return parser


def start(args: argparse.Namespace, *, compiled: bool) -> Settings:
    """Set up PyTorch as the arguments say."""
    set_up(args.threads)
    rounds, run_time = (3, 0.001) if args.quick else (args.rounds, 0.02)
    return Settings(args.device, DTYPES[args.dtype], rounds, args.repeats, run_time, args.seed, compiled)


def set_up(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 rows are float32


def show(rows: list[Row]) -> None:
    """Print the rows of one piece of work."""
    first = rows[0]
    print(f"\n{tuple(first['shape'])} {first['layout']} {first['work']}")
    for row in rows:
        print(row_line(row), flush=True)


def finish(suite: str, args: argparse.Namespace, settings: Settings, rows: list[Row], problems: Problems) -> None:
    """Write the result, say what is missing and what was asked, and fail where a candidate was wrong."""
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
    """The result file's content, validated."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def machine(device: str) -> Machine:
    on_gpu = device == "cuda"
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def processor() -> str:
    """The processor by its market name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def driver() -> str | None:
    """The version of the NVIDIA driver, where the system tells it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else None


def versions() -> Versions:
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
