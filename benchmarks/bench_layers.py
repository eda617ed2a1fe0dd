"""Time the layers beside the textbook form of their equations and beside a copy of the input.

    python benchmarks/bench_layers.py --output layers.json

Prints a table of ratios and writes the measurements as JSON. The method is described in benchmarks/README.md.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import textbook
import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import kfde_layers

SHAPES = [(8, 96, 56, 56), (8, 192, 28, 28), (8, 384, 14, 14), (32, 768, 7, 7)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYERS: dict[str, tuple[Callable[[int], nn.Module], type[nn.Module]]] = {
    "CFE": (kfde_layers.CFE, textbook.CFE),
    "SFE": (kfde_layers.SFE, textbook.SFE),
    "CSFE": (kfde_layers.CSFE, textbook.CSFE),
    "MFDF auto": (kfde_layers.MFDF, textbook.MFDF),
    "MFDF fused": (lambda channels: kfde_layers.MFDF(channels, impl="fused"), textbook.MFDF),
    "MFDF reference": (lambda channels: kfde_layers.MFDF(channels, impl="reference"), textbook.MFDF),
}


def same_parameters(layer: nn.Module, plain: nn.Module) -> None:
    """Give the textbook form the layer's parameters; both register them in the order of the equations."""
    with torch.no_grad():
        for theirs, ours in zip(plain.parameters(), layer.parameters(), strict=True):
            theirs.copy_(ours)


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are the same, but for the few gates that rounding puts on the other side of the threshold."""
    far = (actual - expected).abs() > 1e-4 * (1 + expected.abs())
    return far.double().mean().item() < 1e-3


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, min_run_time: float) -> dict[str, list[float]]:
    """Seconds per call, by name: in each round each call once, so that a disturbance meets all alike."""
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in calls.items()
    }
    loops = {}
    for name, timer in timers.items():  # also the warm-up
        loops[name] = max(1, round(min_run_time / timer.timeit(3).median))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(loops[name]).median)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def measure(name: str, shape: tuple[int, ...], layout: str, backward: bool, rounds: int, run_time: float) -> dict:
    """One row: a layer on one shape, as ratios to the textbook form and to a copy, taken round by round."""
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    cotangent = torch.randn_like(x)
    make, make_plain = LAYERS[name]
    layer, plain = make(shape[1]), make_plain(shape[1])
    same_parameters(layer, plain)
    if not agree(layer(x), plain(x)):
        raise SystemExit(f"{name} on {shape} differs from the textbook form: there is no number to print")

    def run(module: nn.Module) -> Callable[[], object]:
        def forward() -> Tensor:
            with torch.inference_mode():
                return module(x)

        inputs = [x.clone().requires_grad_(), *module.parameters()]

        def forward_and_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(inputs[0]), inputs, cotangent)

        return forward_and_backward if backward else forward

    seconds = interleaved({"layer": run(layer), "textbook": run(plain), "copy": x.clone}, rounds, run_time)
    return {
        "layer": name,
        "shape": shape,
        "layout": layout,
        "pass": "forward+backward" if backward else "forward",
        "layer_ms": spread([1e3 * value for value in seconds["layer"]]),
        "over_textbook": spread([a / b for a, b in zip(seconds["layer"], seconds["textbook"], strict=True)]),
        "over_copy": spread([a / b for a, b in zip(seconds["layer"], seconds["copy"], strict=True)]),
    }


def processor() -> str:
    """The processor by its market name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default: 21)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--quick", action="store_true", help="three rounds on the smallest shape, to see that it runs")
    parser.add_argument("--output", type=Path, help="where to write the measurements as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds, run_time, shapes = (3, 0.001, SHAPES[-1:]) if args.quick else (args.rounds, 0.02, SHAPES)

    rows = []
    print(f"{'layer':<16}{'shape':<20}{'layout':<15}{'pass':<18}{'/ textbook':>12}{'/ copy':>10}")
    for name in LAYERS:
        for shape in shapes:
            for layout in LAYOUTS:
                for backward in (False, True):
                    row = measure(name, shape, layout, backward, rounds, run_time)
                    rows.append(row)
                    ratios = f"{row['over_textbook']['median']:>12.2f}{row['over_copy']['median']:>10.1f}"
                    print(f"{name:<16}{shape!s:<20}{layout:<15}{row['pass']:<18}{ratios}", flush=True)
    result = {
        "kfde_layers": kfde_layers.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": f"{processor()}, {args.threads} threads",
        "dtype": "float32",
        "rounds": rounds,
        "rows": rows,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
