"""Everything that wants a GPU, in one command: correctness, speed and memory beside what was asked.

    python benchmarks/gpu_check.py

Writes results like bench_layers.py and bench_models.py, and fails where a layer is wrong. What does not fit into the
time is left out, the least important first, and named.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import bench_layers
import bench_models
import common
import correctness
import torch
from common import DTYPES, LAYOUTS, Problems, Settings
from correctness import Outcome
from report import stem, targets_table
from schema import Result, Row

import kfde_layers

RESULTS = Path(__file__).parent / "results" / kfde_layers.__version__
SHARE_OF_CORRECTNESS = 0.4  # of the time
UNKNOWN = 60  # seconds that the first piece of a kind is taken to need


class Piece(NamedTuple):
    """One piece of work to measure, as the arguments of a script's `measure`."""

    suite: str
    dtype: str
    compiled: bool
    arguments: tuple


class Budget:
    """Time that runs out."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def plan(device: str) -> list[Piece]:
    """What to measure, the most important first: what has a target, then every other row."""
    first, *others = bench_layers.SHAPES[device]
    pieces = [
        Piece("layers", "bfloat16", True, (first, "channels_last", "forward")),
        Piece("layers", "bfloat16", True, (first, "channels_last", "forward+backward")),
        Piece("layers", "float32", True, (first, "channels_last", "forward")),
    ]
    for size, shape in bench_models.SHAPES[device].items():
        pieces += [
            Piece("models", "bfloat16", False, (size, shape, "channels_last", work)) for work in bench_models.WORK
        ]
    for dtype, shape, layout, work in itertools.product(
        ("bfloat16", "float32"), (first, *others), reversed(LAYOUTS), bench_layers.WORK
    ):
        piece = Piece("layers", dtype, False, (shape, layout, work))
        if piece._replace(compiled=True) not in pieces:
            pieces.append(piece)
    return pieces


def check(outcomes: Iterable[Outcome], budget: Budget) -> list[str]:
    """Print what is wrong or could not run; return what is wrong, which a check that nothing passes is too."""
    wrong, right = [], 0
    for outcome in outcomes:
        if outcome.right is None:
            print(f"not checked: {outcome.what}: {outcome.detail}", flush=True)
        elif outcome.right:
            right += 1
        else:
            wrong.append(f"{outcome.what}: {outcome.detail}")
            print(f"WRONG: {wrong[-1]}", flush=True)
        if budget.left() < 0:
            print("no time for further checks of correctness")
            break
    print(f"{right} checks right, {len(wrong)} wrong", flush=True)
    return wrong or ([] if right else ["nothing could be checked"])


def outcomes(device: str) -> Iterator[Outcome]:
    """Every check of correctness, the quickest and most telling first."""
    few, *rest = correctness.SHAPES
    yield from correctness.values(device, "fused", [few])
    yield from correctness.far_from_zero(device, "fused", few)
    yield from correctness.values(device, "fused", rest)
    yield from correctness.beyond_32_bits(device, "fused")
    yield from correctness.ways_to_run(device, few)


def measure(pieces: Iterable[Piece], device: str, budget: Budget, seed: int, rounds: int = 21) -> list[Result]:
    """Measure one piece after the other while there is time for one as long as the longest of its kind."""
    found: dict[tuple[str, str], tuple[Settings, list[Row], Problems]] = {}
    longest: dict[tuple[str, bool], float] = {}
    for suite, dtype, compiled, arguments in pieces:
        settings = Settings(device, DTYPES[dtype], rounds, 1, 0.01, seed, compiled)
        _, rows, problems = found.setdefault((suite, dtype), (settings, [], Problems()))
        if budget.left() < longest.get((suite, compiled), UNKNOWN):
            problems.skipped.append(f"{' '.join(map(str, arguments))}: no time left")
            continue
        begun = time.monotonic()
        script = bench_layers if suite == "layers" else bench_models
        measured = list(script.measure(*arguments, settings, problems))
        longest[suite, compiled] = max(longest.get((suite, compiled), 0), time.monotonic() - begun)
        common.show(measured)
        rows += measured
    return [common.result(suite, *rest) for (suite, _), rest in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check.py needs a CUDA device, and PyTorch sees none here")

    common.set_up(torch.get_num_threads())
    budget = Budget(60 * args.minutes)
    wrong = check(outcomes("cuda"), Budget(SHARE_OF_CORRECTNESS * budget.left()))
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
