"""Time the KFDE models beside their plain backbones.

    python benchmarks/bench_models.py --output models.json

Prints ratios and writes the measurements as JSON. The method is described in benchmarks/README.md.
"""

import itertools
from collections.abc import Callable, Iterator

import common
import textbook
import timm
import torch
import torch.nn.functional as F
from checks import agree, same_parameters
from common import LAYOUTS, Problems, Settings
from memory import peak_bytes, saved_bytes
from schema import Row
from timing import clocks, interleaved
from torch import Tensor, nn

from kfde_layers.testing import random_tensor

SHAPES = {
    "cpu": {"atto": (8, 3, 224, 224), "tiny": (8, 3, 224, 224)},
    "cuda": {"tiny": (256, 3, 224, 224)},
}
QUICK_SHAPES = {"atto": (2, 3, 64, 64)}
WORK = ("inference", "training", "checkpointed training")

Shape = tuple[int, int, int, int]


def measure(size: str, shape: Shape, layout: str, work: str, settings: Settings, problems: Problems) -> Iterator[Row]:
    """Time a model and its backbone at one piece of work in the same rounds.

    With a 16-bit format the parameters stay in float32, and the work runs under autocast.
    """
    torch.compiler.reset()
    torch.manual_seed(settings.seed)
    images = random_tensor(*shape, seed=settings.seed, device=settings.device, memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, shape[:1]).to(settings.device)
    autocast = torch.autocast(settings.device, settings.dtype, enabled=settings.dtype is not torch.float32)

    models: dict[str, nn.Module] = {}
    for name, variant in (("kfde", f"kfde_convnextv2_{size}"), ("backbone", f"convnextv2_{size}")):
        model = timm.create_model(variant).to(settings.device, memory_format=LAYOUTS[layout])
        models[name] = model.train(work != "inference")
    with autocast:
        right = computes_kfde(models["kfde"], images)
    for model in models.values():
        model.set_grad_checkpointing(work == "checkpointed training")
    if not right:
        del models["kfde"]
        problems.failures.append(f"{size} kfde, {layout} {work}: WRONG beside the textbook form in float64")
    if settings.compiled:
        models |= {f"{name} compiled": torch.compile(model, dynamic=False) for name, model in models.items()}

    calls, baselines, peaks, saved = {}, {}, {}, {}
    for name, model in models.items():
        forward = with_autocast(model, images, autocast)
        calls[size, name] = inference(forward) if work == "inference" else training(model, forward, labels)
        baselines[size, name] = {label: (size, label) for label in ("backbone", "backbone compiled") if label in models}
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        peaks[size, name] = held + peak_bytes(calls[size, name], settings.device)
        if work == "training":  # checkpointing keeps what it keeps out of the meter's sight
            saved[size, name] = saved_bytes(forward, model.parameters())

    timed = interleaved(
        clocks(calls, settings.device, settings.run_time, graphs=False), baselines, settings.rounds, settings.repeats
    )
    for key, (method, ms, over) in timed.items():
        yield {
            "subject": size,
            "candidate": key[1],
            "shape": list(shape),
            "layout": layout,
            "work": work,
            "method": method,
            "ms": ms,
            "over": over,
            "input_bytes": images.numel() * images.element_size(),
            "peak_bytes": peaks[key],
            "saved_bytes": saved.get(key),
        }


def computes_kfde(model: nn.Module, images: Tensor) -> bool:
    """Whether the KFDE part of `model` gives what the textbook form gives in float64, on what reaches it."""
    kfde = model.stages[-1].kfde
    seen: list[Tensor] = []
    handle = kfde.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        model(images)
    handle.remove()
    x, y = seen
    plain = nn.Sequential(textbook.CSFE(x.shape[1]), textbook.MFDF(x.shape[1])).to(x.device).double()
    same_parameters(kfde, plain)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return agree(y, plain(x.double()))


def with_autocast(model: nn.Module, images: Tensor, autocast: torch.autocast) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with autocast:
            return model(images)

    return call


def inference(forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (forward(),)

    return call


def training(model: nn.Module, forward: Callable[[], Tensor], labels: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, backward and a step so small that the model stays what it is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def call() -> tuple[Tensor, ...]:
        F.cross_entropy(forward(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return ()

    return call


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="time the compiled models too")
    args = parser.parse_args()
    settings = common.start(args, compiled=args.compile)
    problems, rows = Problems(), []
    shapes = QUICK_SHAPES if args.quick else SHAPES[args.device]
    layouts = list(LAYOUTS) if args.device == "cpu" else ["channels_last"]
    for (size, shape), layout, work in itertools.product(shapes.items(), layouts, WORK):
        found = list(measure(size, shape, layout, work, settings, problems))
        common.show(found)
        rows += found
    common.finish("models", args, settings, rows, problems)


if __name__ == "__main__":
    main()
