"""Measure the KFDE models and their plain backbones.

    python -m benchmarks.bench_models --output models.json

Prints ratios and writes the measurements as JSON. benchmarks/README.md describes the method.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, textbook
from benchmarks.agreement import agree
from benchmarks.calls import Call, copy_parameters
from benchmarks.common import LAYOUTS, Problems, Settings
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.schema import Row
from benchmarks.timing import clocks, interleaved
from kfde_layers.testing import random_tensor

SHAPES = {
    "cpu": [
        *(("atto", (8, 3, 224, 224)), ("tiny", (8, 3, 224, 224))),
        *((size, (1, 3, 224, 224)) for size in ("atto", "femto", "tiny")),
    ],
    "cuda": [("tiny", (256, 3, 224, 224)), ("tiny", (1, 3, 224, 224))],
}
QUICK_SHAPES = [("atto", (2, 3, 64, 64))]
WORK = ("inference", "training", "checkpointed training")

Shape = tuple[int, int, int, int]


def measure(size: str, shape: Shape, layout: str, work: str, settings: Settings, problems: Problems) -> Iterator[Row]:
    """Measure a model and its backbone on one piece of work, in the same rounds.

    With a 16-bit dtype the parameters stay in float32, and the work runs under autocast.

    Args:
        size: Size of the model, such as "tiny".
        shape: Shape of the images, (N, 3, H, W).
        layout: A key of `LAYOUTS`.
        work: An element of `WORK`.
        settings: How to measure.
        problems: Collects the models that have no number, and why.
    """
    torch.compiler.reset()
    torch.manual_seed(settings.seed)
    images = random_tensor(*shape, seed=settings.seed, device=settings.device, memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, shape[:1]).to(settings.device)
    autocast = torch.autocast(settings.device, settings.dtype, enabled=settings.dtype is not torch.float32)
    models = make_models(size, images, layout, work, autocast, problems)
    if settings.compiled:
        models |= {f"{name} compiled": torch.compile(model, dynamic=False) for name, model in models.items()}

    calls, baselines, peaks, saved = {}, {}, {}, {}
    for name, model in models.items():
        forward = with_autocast(model, images, autocast)
        calls[size, name] = inference(forward) if work == "inference" else training(model, forward, labels)
        baselines[size, name] = {label: (size, label) for label in ("backbone", "backbone compiled") if label in models}
        parameter_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        peaks[size, name] = parameter_bytes + peak_bytes(calls[size, name], settings.device)
        if work == "training":  # the hooks of `saved_bytes` do not see the tensors that checkpointing saves
            saved[size, name] = saved_bytes(forward, model.parameters())

    one_image = shape[0] == 1  # takes less time on a GPU than launching its kernels from Python
    timed = interleaved(
        clocks(calls, settings.device, settings.run_time, graphs=one_image),
        baselines,
        settings.rounds,
        settings.repeats,
    )
    yield from common.rows(timed, peaks, saved, images, layout, work)


def pieces(shapes: Iterable[tuple[str, Shape]], layouts: Iterable[str]) -> Iterator[tuple[str, Shape, str, str]]:
    """List size, shape, memory format and work of all measurements; one image is measured in inference only."""
    for (size, shape), layout, work in itertools.product(shapes, layouts, WORK):
        if shape[0] > 1 or work == "inference":
            yield size, shape, layout, work


def make_models(
    size: str, images: Tensor, layout: str, work: str, autocast: torch.autocast, problems: Problems
) -> dict[str, nn.Module]:
    """Make "kfde" and "backbone"; a KFDE model that is wrong is left out, and named in `problems`."""
    models: dict[str, nn.Module] = {}
    for name, variant in (("kfde", f"kfde_convnextv2_{size}"), ("backbone", f"convnextv2_{size}")):
        model = timm.create_model(variant).to(images.device, memory_format=LAYOUTS[layout])
        models[name] = model.train(work != "inference")
    with autocast:
        correct = computes_kfde(models["kfde"], images)
    for model in models.values():
        model.set_grad_checkpointing(work == "checkpointed training")
    if not correct:
        del models["kfde"]
        problems.failures.append(
            f"{size} kfde, {layout} {work}: WRONG, differs from the textbook implementation in float64"
        )
    return models


def computes_kfde(model: nn.Module, images: Tensor) -> bool:
    """Return whether the KFDE part of `model` agrees with the textbook implementation in float64 on the same input."""
    kfde = model.stages[-1].kfde
    maps: list[Tensor] = []
    handle = kfde.register_forward_hook(lambda module, inputs, output: maps.extend((inputs[0], output)))
    with torch.no_grad():
        model(images)
    handle.remove()
    x, y = maps
    plain = nn.Sequential(textbook.CSFE(x.shape[1]), textbook.MFDF(x.shape[1])).to(x.device).double()
    copy_parameters(kfde, plain)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return agree(y, plain(x.double()))


def with_autocast(model: nn.Module, images: Tensor, autocast: torch.autocast) -> Callable[[], Tensor]:
    """Make a call of `model` on `images` under `autocast`."""

    def call() -> Tensor:
        with autocast:
            return model(images)

    return call


def inference(forward: Callable[[], Tensor]) -> Call:
    """Make a call of `forward` in inference mode."""

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (forward(),)

    return call


def training(model: nn.Module, forward: Callable[[], Tensor], labels: Tensor) -> Call:
    """Make a call of forward, backward and an optimiser step that is too small to change the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def call() -> tuple[Tensor, ...]:
        F.cross_entropy(forward(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return ()

    return call


def main() -> None:
    """Run the command."""
    parser = common.parser("bench_models", __doc__)
    parser.add_argument("--compile", action="store_true", help="measure the compiled models too")
    args = parser.parse_args()
    settings = common.start(args, compiled=args.compile)
    problems, rows = Problems(), []
    shapes = QUICK_SHAPES if args.quick else SHAPES[args.device]
    layouts = list(LAYOUTS) if args.device == "cpu" else ["channels_last"]
    for piece in pieces(shapes, layouts):
        new_rows = list(measure(*piece, settings, problems))
        common.show(new_rows)
        rows += new_rows
    common.finish("models", args, settings, rows, problems)


if __name__ == "__main__":
    main()
