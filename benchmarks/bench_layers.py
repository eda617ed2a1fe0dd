"""Time the layers beside the textbook form of their equations, their peers and a copy of the input.

    python benchmarks/bench_layers.py --output layers.json

Prints ratios and writes the measurements as JSON. The method is described in benchmarks/README.md.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import common
import torch
from candidates import Candidate, candidates
from checks import agree, forward, forward_and_backward, in_float64, sums_agree
from common import LAYOUTS, Problems, Settings
from memory import peak_bytes, saved_bytes
from schema import Row
from timing import clocks, interleaved
from torch import Tensor, nn

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

Call = Callable[[], tuple[Tensor, ...]]
Shape = tuple[int, int, int, int]


def sweep_shapes() -> list[Shape]:
    """Map size, channels and batch, each varied alone."""
    batch, channels, side, _ = SWEEP_BASE
    varied = [(batch, channels, size, size) for size in SWEEP_SIDES]
    varied += [(batch, count, side, side) for count in SWEEP_CHANNELS]
    varied += [(count, channels, side, side) for count in SWEEP_BATCHES]
    return sorted(set(varied))


def measure(
    shape: Shape,
    layout: str,
    work: str,
    settings: Settings,
    problems: Problems,
    wanted: Callable[[Candidate], bool] = lambda candidate: True,
) -> Iterator[Row]:
    """Time every candidate at one piece of work in the same rounds; who fails the check is named in `problems`."""
    torch.compiler.reset()  # what was compiled for another shape would only count against the limit
    torch.manual_seed(settings.seed)
    x, cotangent = (
        random_tensor(*shape, seed=seed, dtype=settings.dtype, device=settings.device, memory_format=LAYOUTS[layout])
        for seed in (settings.seed, settings.seed + 1)
    )

    def call_of(module: nn.Module, x: Tensor, cotangent: Tensor) -> Call:
        return forward(module, x) if work == "forward" else forward_and_backward(module, x, cotangent)

    calls: dict[tuple[str, str], Call] = {("floor", "copy"): lambda: (x.clone(),)}
    if settings.device == "cpu":
        calls["floor", "sigmoid"] = lambda: (x.sigmoid(),)
    saved: dict[tuple[str, str], int] = {}
    judged: dict[str, tuple[Tensor, ...]] = {}
    for subject, name, module, plain in filter(
        wanted, candidates(shape[1], settings.device, settings.dtype, settings.compiled)
    ):
        call = call_of(module.train(work != "forward"), x, cotangent)
        where = f"{subject} {name}, {shape} {layout} {work}"
        try:
            results = call()
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            problems.skipped.append(f"{where}: {common.reason(error)}")
            continue
        except Exception as error:  # one candidate that breaks must not cost the others their numbers
            problems.failures.append(f"{where}: {common.reason(error)}")
            continue
        if plain is not None:
            if subject not in judged:
                exact = call_of(in_float64(plain), x.double(), cotangent.double())
                judged[subject] = exact()
            pairs = list(zip(results, judged[subject], strict=True))  # two maps, then the parameters' gradients
            if not (all(agree(*pair) for pair in pairs[:2]) and all(sums_agree(*pair) for pair in pairs[2:])):
                problems.failures.append(f"{where}: WRONG beside the textbook form in float64, so there is no number")
                continue
        calls[subject, name] = call
        if work != "forward":
            leaf = x.clone().requires_grad_()
            saved[subject, name] = saved_bytes(lambda module=module, leaf=leaf: module(leaf), module.parameters())
    del judged

    peaks = {key: peak_bytes(call, settings.device) for key, call in calls.items()}
    baselines = {key: _baselines(key[0], calls) for key in calls}
    timed = interleaved(clocks(calls, settings.device, settings.run_time), baselines, settings.rounds, settings.repeats)
    for (subject, name), (method, ms, over) in timed.items():
        yield {
            "subject": subject,
            "candidate": name,
            "shape": list(shape),
            "layout": layout,
            "work": work,
            "method": method,
            "ms": ms,
            "over": over,
            "input_bytes": x.numel() * x.element_size(),
            "peak_bytes": peaks[subject, name],
            "saved_bytes": saved.get((subject, name)),
        }


def _baselines(subject: str, calls: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """What a subject's times are divided by: label and key, of those that are there."""
    found = {name: (subject, name) for name in ("textbook", "textbook compiled")} | {"copy": ("floor", "copy")}
    if subject == "MFDF":
        found["depthwise 7x7"] = ("peer", "depthwise 7x7")
    return {label: key for label, key in found.items() if key in calls}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile has to compile")
    parser.add_argument("--sweep", action="store_true", help="CSFE over map sizes, channels and batches instead")
    args = parser.parse_args()
    settings = common.start(args, compiled=not (args.no_compile or args.sweep))

    problems, rows = Problems(), []
    shapes = sweep_shapes() if args.sweep else SHAPES[args.device]
    layouts = ["contiguous"] if args.sweep else list(LAYOUTS)

    def wanted(candidate: Candidate) -> bool:
        return not args.sweep or candidate[:2] in SWEPT

    for shape, layout, work in itertools.product([QUICK_SHAPE] if args.quick else shapes, layouts, WORK):
        found = list(measure(shape, layout, work, settings, problems, wanted))
        common.show(found)
        rows += found
    common.finish("sweep" if args.sweep else "layers", args, settings, rows, problems)


if __name__ == "__main__":
    main()
