"""Check the layers on a device: values and gradients, and the ways to run a layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kfde_layers
from benchmarks import textbook
from benchmarks.agreement import MOST_FAR, SUM_FACTOR, TOLERANCE, agree, far_share, sum_error
from benchmarks.calls import copy_parameters, forward_and_backward, in_float64
from benchmarks.common import DTYPES, LAYOUTS, reason
from benchmarks.timing import captured
from kfde_layers.testing import random_tensor, scatter_parameters

Shape = tuple[int, int, int, int]


class Case(NamedTuple):
    """A layer in one of its options."""

    make: Callable[..., nn.Module]
    """Makes the layer from the number of channels and `impl`."""
    make_plain: Callable[[int], nn.Module]
    """Makes its textbook implementation from the number of channels."""


Cases = Mapping[str, Case]

ARRANGEMENTS: dict[str, dict[str, str]] = {
    "parallel": {},
    "mean": {"fusion": "mean"},
    "cfe_sfe": {"arrangement": "cfe_sfe"},
    "sfe_cfe": {"arrangement": "sfe_cfe"},
}
CASES: Cases = {
    "CFE": Case(kfde_layers.CFE, textbook.CFE),
    "SFE": Case(kfde_layers.SFE, textbook.SFE),
    **{
        f"CSFE {name}": Case(partial(kfde_layers.CSFE, **options), partial(textbook.CSFE, **options))
        for name, options in ARRANGEMENTS.items()
    },
    "MFDF": Case(kfde_layers.MFDF, textbook.MFDF),
}
SHAPES: Sequence[Shape] = ((8, 96, 56, 56), (4, 768, 7, 7), (3, 80, 13, 17), (5, 48, 1, 1), (2, 48, 512, 512))
LARGE_SHAPE: Shape = (86, 96, 512, 512)  # a little more than 2^31 elements


class Allowed(NamedTuple):
    """Allowed error of a map. For a parameter's gradient as a whole it is `SUM_FACTOR` times the tolerance."""

    tolerance: float
    """Relative error of an element."""
    far: float = MOST_FAR
    """Share of the elements that may differ more; always at least two elements, which one gate can change."""


# Near 1e4 float32 keeps three digits after the decimal point, and the gradients multiply the lost ones by 1e4. A
# variance computed without digits puts most elements far off.
FAR_FROM_ZERO = Allowed(1e-2, 2e-2)
SAME = Allowed(TOLERANCE[torch.float32])


class Outcome(NamedTuple):
    """The result of a check."""

    what: str
    """The layer, the input and the way to run it."""
    right: bool | None
    """Whether the check passed; None: it could not run."""
    detail: str
    """What is wrong, or why it could not run."""


def values(device: str, impl: str, shapes: Iterable[Shape] = SHAPES, cases: Cases = CASES) -> Iterator[Outcome]:
    """Compare output and gradients with the textbook implementation in float64, in every dtype and memory format."""
    for shape in shapes:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                x = _input(shape, device, DTYPES[dtype], layout)
                for name, case in cases.items():
                    check = partial(_values, case, impl, x, Allowed(TOLERANCE[x.dtype]))
                    yield _outcome(f"{name} {shape} {layout} {dtype}", check)


def far_from_zero(device: str, impl: str, shape: Shape, cases: Cases = CASES) -> Iterator[Outcome]:
    """Compare as `values` does, in float32 around a mean of 1e4, where a variance by E[x^2] - E[x]^2 has no digit left.

    MFDF is left out: it computes no variance, and its softmax saturates there.
    """
    for layout in LAYOUTS:
        x = 1e4 + _input(shape, device, torch.float32, layout)
        for name, case in cases.items():
            if name != "MFDF":
                yield _outcome(f"{name} {shape} {layout}, mean 1e4", partial(_values, case, impl, x, FAR_FROM_ZERO))


def beyond_32_bits(device: str, impl: str, shape: Shape = LARGE_SHAPE, cases: Cases = CASES) -> Iterator[Outcome]:
    """Compare the first and the last sample of a batch that has more elements than 32 bits can count."""
    for layout in LAYOUTS:
        for name, case in cases.items():
            check = partial(_ends_of_batch, case, impl, shape, device, layout)
            yield _outcome(f"{name} {shape} {layout} bfloat16", check)


def ways_to_run(device: str, shape: Shape, cases: Cases = CASES) -> Iterator[Outcome]:
    """Run "auto" compiled, under autocast and in a CUDA graph, which must change nothing; differentiate it twice."""
    x = _input(shape, device, torch.float32, "channels_last")
    ways = {"compiled": _compiled, "under autocast": _under_autocast, "second gradient": _second_gradient}
    if device == "cuda":
        ways["as graph"] = _as_graph
    for way, check in ways.items():
        for name, case in cases.items():
            yield _outcome(f"{name} {shape} {way}", partial(check, case, x))


def _outcome(what: str, check: Callable[[], str]) -> Outcome:
    """Run a check, which returns what is wrong, or an empty string."""
    try:
        wrong = check()
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        return Outcome(what, None, reason(error))
    except Exception as error:  # one check that fails must not stop the others
        wrong = reason(error)
    return Outcome(what, not wrong, wrong)


def _input(shape: Shape, device: str, dtype: torch.dtype, layout: str) -> Tensor:
    return random_tensor(*shape, dtype=dtype, device=device, memory_format=LAYOUTS[layout])


def _layer_and_textbook(case: Case, impl: str, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Make a layer and its textbook implementation with the same parameters, for the channels, device, dtype of `x`."""
    layer, plain = case.make(x.shape[1], impl=impl), case.make_plain(x.shape[1])
    scatter_parameters(plain, deviation=0.1)
    copy_parameters(plain, layer)
    return layer.to(x), plain.to(x)


def _values(case: Case, impl: str, x: Tensor, allowed: Allowed) -> str:
    layer, plain = _layer_and_textbook(case, impl, x)
    cotangent = torch.randn_like(x)
    actual = forward_and_backward(layer, x, cotangent)()
    expected = forward_and_backward(in_float64(plain), x.double(), cotangent.double())()
    return _differences(layer, actual, expected, allowed)


def _differences(layer: nn.Module, actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: Allowed) -> str:
    """Name the results that differ from `expected` by more than is allowed."""
    names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
    differences = []
    for index, (name, result, exact) in enumerate(zip(names[: len(actual)], actual, expected, strict=True)):
        if index < 2:  # a map
            error, limit = far_share(result, exact, allowed.tolerance), max(allowed.far, 2 / result.numel())
        else:
            error, limit = sum_error(result, exact), SUM_FACTOR * allowed.tolerance
        if not error <= limit:
            differences.append(f"{name}: error {error:.2g}, allowed {limit:.2g}")
    return "; ".join(differences)


def _ends_of_batch(case: Case, impl: str, shape: Shape, device: str, layout: str) -> str:
    torch.manual_seed(0)
    samples = torch.randn(2, *shape[1:]).to(device, torch.bfloat16)
    layer, plain = _layer_and_textbook(case, impl, samples)
    x = torch.empty(shape, device=device, dtype=samples.dtype, memory_format=LAYOUTS[layout]).zero_()
    x[0], x[-1] = samples
    y = layer(x.requires_grad_())
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    actual = [torch.stack((result[0], result[-1])) for result in (y, gradient)]
    expected = forward_and_backward(in_float64(plain), samples.double(), samples.double())()[:2]
    return _differences(layer, actual, expected, Allowed(TOLERANCE[samples.dtype]))


def _compiled(case: Case, x: Tensor) -> str:
    torch.compiler.reset()
    layer, _ = _layer_and_textbook(case, "auto", x)
    run = forward_and_backward(torch.compile(layer, fullgraph=True, dynamic=False), x, torch.ones_like(x))
    return _differences(layer, run(), forward_and_backward(layer, x, torch.ones_like(x))(), SAME)


def _under_autocast(case: Case, x: Tensor) -> str:
    layer, _ = _layer_and_textbook(case, "auto", x)
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(leaf)
    actual = (y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y)))
    return _differences(layer, actual, forward_and_backward(layer, x, torch.ones_like(x))(), SAME)


def _as_graph(case: Case, x: Tensor) -> str:
    layer, _ = _layer_and_textbook(case, "auto", x)
    run = forward_and_backward(layer, x, torch.ones_like(x))
    expected = run()
    graph, actual = captured(run)
    graph.replay()
    return _differences(layer, actual, expected, SAME)


def _second_gradient(case: Case, x: Tensor) -> str:
    layer, plain = _layer_and_textbook(case, "auto", x)

    def differentiate_twice(module: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact = differentiate_twice(in_float64(plain), x.double())
    return "" if agree(differentiate_twice(layer, x), exact) else "the second gradient is wrong"
