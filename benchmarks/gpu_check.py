"""Do everything that needs a GPU, in one command: check the layers, then measure time and memory.

    python -m benchmarks.gpu_check

Writes results like bench_layers and bench_models, and exits with 1 if a layer is wrong. Work for which there is no time
is left out, the least important first, and named.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import kfde_layers
from benchmarks import bench_layers, bench_models, common, device_checks
from benchmarks.arguments import command_parser
from benchmarks.common import DTYPES, LAYOUTS, Problems, Settings
from benchmarks.device_checks import Outcome
from benchmarks.report import stem, targets_table
from benchmarks.schema import Result, Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / kfde_layers.__version__
SHARE_OF_CHECKS = 0.4  # of the time
UNKNOWN = 60  # s; the expected time of the first piece of a kind


class Piece(NamedTuple):
    """A piece of work to measure."""

    suite: str
    """Either "layers" or "models"."""
    dtype: str
    """A key of `DTYPES`."""
    compiled: bool
    """Whether to measure compiled modules too."""
    arguments: tuple
    """The first arguments of the suite's `measure`."""


class Budget:
    """Time that runs out."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the time that is left, in s; negative when it has run out."""
        return self.end - time.monotonic()


def plan(device: str) -> list[Piece]:
    """List the work, the most important first: rows that have a target, then all others."""
    first, *rest = bench_layers.SHAPES[device]
    pieces = [
        Piece("layers", "bfloat16", True, (first, "channels_last", "forward")),
        Piece("layers", "bfloat16", True, (first, "channels_last", "forward+backward")),
        Piece("layers", "float32", True, (first, "channels_last", "forward")),
    ]
    models = bench_models.pieces(bench_models.SHAPES[device], ["channels_last"])
    pieces += [Piece("models", "bfloat16", False, model) for model in models]
    for dtype, shape, layout, work in itertools.product(
        ("bfloat16", "float32"), (first, *rest), reversed(LAYOUTS), bench_layers.WORK
    ):
        piece = Piece("layers", dtype, False, (shape, layout, work))
        if piece._replace(compiled=True) not in pieces:
            pieces.append(piece)
    return pieces


def check(outcomes: Iterable[Outcome], budget: Budget) -> list[str]:
    """Print the checks that failed or could not run, and return the failures; no passed check at all is one, too."""
    wrong, passed = [], 0
    for outcome in outcomes:
        if outcome.right is None:
            print(f"not checked: {outcome.what}: {outcome.detail}", flush=True)
        elif outcome.right:
            passed += 1
        else:
            wrong.append(f"{outcome.what}: {outcome.detail}")
            print(f"WRONG: {wrong[-1]}", flush=True)
        if budget.left() < 0:
            print("no time for further checks")
            break
    print(f"{passed} checks right, {len(wrong)} wrong", flush=True)
    return wrong or ([] if passed else ["nothing could be checked"])


def outcomes(device: str) -> Iterator[Outcome]:
    """Run every check of the layers, those first that are quick and find most faults."""
    first, *rest = device_checks.SHAPES
    yield from device_checks.values(device, "fused", [first])
    yield from device_checks.far_from_zero(device, "fused", first)
    yield from device_checks.values(device, "fused", rest)
    yield from device_checks.beyond_32_bits(device, "fused")
    yield from device_checks.ways_to_run(device, first)


def measure(pieces: Iterable[Piece], device: str, budget: Budget, seed: int, rounds: int = 21) -> list[Result]:
    """Measure the pieces in their order, each if there is as much time left as the longest of its kind took."""
    parts: dict[tuple[str, str], tuple[Settings, list[Row], Problems]] = {}
    longest: dict[tuple[str, bool], float] = {}
    for suite, dtype, compiled, arguments in pieces:
        settings = Settings(device, DTYPES[dtype], rounds, 1, 0.01, seed, compiled)
        _, rows, problems = parts.setdefault((suite, dtype), (settings, [], Problems()))
        if budget.left() < longest.get((suite, compiled), UNKNOWN):
            problems.skipped.append(f"{' '.join(map(str, arguments))}: no time left")
            continue
        start = time.monotonic()
        command = bench_layers if suite == "layers" else bench_models
        new_rows = list(command.measure(*arguments, settings, problems))
        longest[suite, compiled] = max(longest.get((suite, compiled), 0), time.monotonic() - start)
        common.show(new_rows)
        rows += new_rows
    return [common.result(suite, *part) for (suite, _), part in parts.items()]


def main() -> None:
    """Run the command."""
    parser = command_parser("gpu_check", __doc__)
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=RESULTS,
        help=f"folder for the results (default: {RESULTS.relative_to(ROOT)} of this checkout)",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA device, and PyTorch sees none here")

    common.set_up(torch.get_num_threads())
    budget = Budget(60 * args.minutes)
    wrong = check(outcomes("cuda"), Budget(SHARE_OF_CHECKS * budget.left()))
    if wrong:
        sys.exit("a layer is wrong, so there are no numbers: " + "; ".join(wrong))
    results = measure(plan("cuda"), "cuda", budget, args.seed)
    for result in results:
        common.write(result, args.output_dir / f"{stem(result)}.json")
        for line in (*result["skipped"], *result["failures"]):
            print(line)
    print("\n" + targets_table(results))
    if any(result["failures"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
