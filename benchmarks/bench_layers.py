"""Measure the layers, the textbook implementation of their equations, their peers and a copy of the input.

    python -m benchmarks.bench_layers --output layers.json

Prints ratios and writes the measurements as JSON. benchmarks/README.md describes the method.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.agreement import agree, sums_agree
from benchmarks.calls import Call, forward, forward_and_backward, in_float64
from benchmarks.candidates import Candidate, candidates
from benchmarks.common import LAYOUTS, Problems, Settings
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.schema import Row
from benchmarks.timing import Key, clocks, interleaved
from kfde_layers.testing import random_tensor

SHAPES = {
    "cpu": [(8, 96, 56, 56), (8, 192, 28, 28), (8, 384, 14, 14), (32, 768, 7, 7)],
    "cuda": [(64, 96, 56, 56), (64, 192, 28, 28), (64, 384, 14, 14), (256, 768, 7, 7)],
}
QUICK_SHAPE = (2, 64, 14, 14)
WORK = ("forward", "forward+backward")

SWEEP_BASE = (8, 256, 28, 28)
SWEEP_SIDES = (7, 14, 28, 56, 112)
SWEEP_CHANNELS = (64, 128, 256, 512, 1024)
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32)
SWEPT = {("CSFE", "auto"), ("CSFE", "textbook")}

GRID = [
    *((batch, channels, 1, 1) for batch, channels in ((1, 32), (64, 320), (1, 2816))),
    *((batch, channels, 7, 7) for batch, channels in ((1, 320), (1, 768), (64, 64), (8, 2816))),
    *((batch, channels, 14, 14) for batch, channels in ((2, 64), (1, 96), (8, 384), (1, 1024))),
    *((batch, channels, 28, 28) for batch, channels in ((1, 32), (64, 32), (8, 192), (1, 512))),
    *((batch, channels, 56, 56) for batch, channels in ((1, 32), (8, 96), (1, 384))),
    *((batch, channels, 112, 112) for batch, channels in ((1, 32), (2, 64))),
    *((batch, channels, 224, 224) for batch, channels in ((1, 32), (1, 96))),
]
IN_GRID = {"textbook", "auto", "reference"}

Shape = tuple[int, int, int, int]
Choice = Callable[[Candidate], bool]


def sweep_shapes() -> list[Shape]:
    """List the shapes of a sweep: map size, channels and batch, each varied alone."""
    batch, channels, side, _ = SWEEP_BASE
    shapes = [(batch, channels, size, size) for size in SWEEP_SIDES]
    shapes += [(batch, count, side, side) for count in SWEEP_CHANNELS]
    shapes += [(count, channels, side, side) for count in SWEEP_BATCHES]
    return sorted(set(shapes))


class Task(NamedTuple):
    """A piece of work, with its tensors."""

    work: str
    """An element of `WORK`."""
    x: Tensor
    """The input, (N, C, H, W)."""
    cotangent: Tensor
    """The gradient of the output, of the shape of `x`."""

    def call(self, module: nn.Module) -> Call:
        """Make the call of a module that is measured."""
        if self.work == "forward":
            return forward(module, self.x)
        return forward_and_backward(module, self.x, self.cotangent)

    def in_float64(self) -> "Task":
        """Return the same task on tensors in float64."""
        return Task(self.work, self.x.double(), self.cotangent.double())


def measure(
    shape: Shape,
    layout: str,
    work: str,
    settings: Settings,
    problems: Problems,
    chosen: Choice = lambda candidate: True,
) -> Iterator[Row]:
    """Measure the candidates on one piece of work, in the same rounds.

    Args:
        shape: Shape of the input, (N, C, H, W).
        layout: A key of `LAYOUTS`.
        work: An element of `WORK`.
        settings: How to measure.
        problems: Collects the candidates that have no number, and why.
        chosen: Says of a candidate whether it is measured.
    """
    torch.compiler.reset()  # the code compiled for other shapes would count against the limit
    torch.manual_seed(settings.seed)
    x, cotangent = (
        random_tensor(*shape, seed=seed, dtype=settings.dtype, device=settings.device, memory_format=LAYOUTS[layout])
        for seed in (settings.seed, settings.seed + 1)
    )
    calls: dict[Key, Call] = {("floor", "copy"): lambda: (x.clone(),)}
    if settings.device == "cpu":
        calls["floor", "sigmoid"] = lambda: (x.sigmoid(),)
    saved: dict[Key, int] = {}
    modules = filter(chosen, candidates(shape[1], settings.device, settings.dtype, settings.compiled))
    for module, key, call in _correct(modules, Task(work, x, cotangent), f"{shape} {layout} {work}", problems):
        calls[key] = call
        if work != "forward":
            saved[key] = saved_bytes(partial(module, x.clone().requires_grad_()), module.parameters())

    peaks = {key: peak_bytes(call, settings.device) for key, call in calls.items()}
    baselines = {key: _baselines(key[0], calls) for key in calls}
    timed = interleaved(clocks(calls, settings.device, settings.run_time), baselines, settings.rounds, settings.repeats)
    yield from common.rows(timed, peaks, saved, x, layout, work)


def _correct(
    modules: Iterable[Candidate], task: Task, where: str, problems: Problems
) -> Iterator[tuple[nn.Module, Key, Call]]:
    """Yield the module, the key and the call of each candidate that runs and gives the exact result."""
    exact_results: dict[str, tuple[Tensor, ...]] = {}
    for subject, name, module, plain in modules:
        call = task.call(module.train(task.work != "forward"))
        title = f"{subject} {name}, {where}"
        try:
            results = call()
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            problems.skipped.append(f"{title}: {common.reason(error)}")
            continue
        except Exception as error:  # one candidate that fails must not cost the others their numbers
            problems.failures.append(f"{title}: {common.reason(error)}")
            continue
        if plain is not None:
            if subject not in exact_results:
                exact_results[subject] = task.in_float64().call(in_float64(plain))()
            if not _agree(results, exact_results[subject]):
                problems.failures.append(
                    f"{title}: WRONG, differs from the textbook implementation in float64, so it has no number"
                )
                continue
        yield module, (subject, name), call


def _agree(results: tuple[Tensor, ...], exact_results: tuple[Tensor, ...]) -> bool:
    """Compare results: the output and the gradient of x, which are maps, then the gradients of the parameters."""
    pairs = list(zip(results, exact_results, strict=True))
    return all(agree(*pair) for pair in pairs[:2]) and all(sums_agree(*pair) for pair in pairs[2:])


def _baselines(subject: str, calls: Iterable[Key]) -> dict[str, Key]:
    """Return label and key of the calls that a subject's times are divided by, as far as they exist."""
    keys = {name: (subject, name) for name in ("textbook", "textbook compiled")} | {"copy": ("floor", "copy")}
    if subject == "MFDF":
        keys["depthwise 7x7"] = ("peer", "depthwise 7x7")
    return {label: key for label, key in keys.items() if key in calls}


def main() -> None:
    """Run the command."""
    parser = common.parser("bench_layers", __doc__)
    parser.add_argument("--no-compile", action="store_true", help="do not measure compiled modules")
    suites = parser.add_mutually_exclusive_group()
    suites.add_argument("--sweep", action="store_true", help="measure CSFE over map sizes, channels and batches")
    suites.add_argument("--grid", action="store_true", help="measure small and large maps: where is 'auto' wrong?")
    args = parser.parse_args()
    suite = "sweep" if args.sweep else "grid" if args.grid else "layers"
    settings = common.start(args, compiled=suite == "layers" and not args.no_compile)

    problems, rows = Problems(), []
    shapes = {"sweep": sweep_shapes(), "grid": GRID, "layers": SHAPES[args.device]}[suite]
    layouts = ["contiguous"] if args.sweep else list(LAYOUTS)
    choices: dict[str, Choice] = {
        "sweep": lambda candidate: (candidate.subject, candidate.name) in SWEPT,
        "grid": lambda candidate: candidate.name in IN_GRID,
        "layers": lambda candidate: True,
    }
    chosen = choices[suite]

    for shape, layout, work in itertools.product([QUICK_SHAPE] if args.quick else shapes, layouts, WORK):
        new_rows = list(measure(shape, layout, work, settings, problems, chosen))
        common.show(new_rows)
        rows += new_rows
    common.finish(suite, args, settings, rows, problems)


if __name__ == "__main__":
    main()
