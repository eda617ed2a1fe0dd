"""Whether the layers compute what they should on a device: values, gradients, and every way to run them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import textbook
import torch
from checks import (
    MOST_FAR,
    SUM_FACTOR,
    TOLERANCE,
    agree,
    far_share,
    forward_and_backward,
    in_float64,
    same_parameters,
    sum_error,
)
from common import DTYPES, LAYOUTS, reason
from timing import captured
from torch import Tensor, nn

import kfde_layers
from kfde_layers.testing import random_tensor, scatter_parameters

Shape = tuple[int, int, int, int]
Forms = Mapping[str, tuple[Callable[..., nn.Module], Callable[[int], nn.Module]]]

ARRANGEMENTS: dict[str, dict[str, str]] = {
    "parallel": {},
    "mean": {"fusion": "mean"},
    "cfe_sfe": {"arrangement": "cfe_sfe"},
    "sfe_cfe": {"arrangement": "sfe_cfe"},
}
FORMS: Forms = {
    "CFE": (kfde_layers.CFE, textbook.CFE),
    "SFE": (kfde_layers.SFE, textbook.SFE),
    **{
        f"CSFE {name}": (partial(kfde_layers.CSFE, **options), partial(textbook.CSFE, **options))
        for name, options in ARRANGEMENTS.items()
    },
    "MFDF": (kfde_layers.MFDF, textbook.MFDF),
}
SHAPES: Sequence[Shape] = ((8, 96, 56, 56), (4, 768, 7, 7), (3, 80, 13, 17), (5, 48, 1, 1), (2, 48, 512, 512))
LARGE_SHAPE: Shape = (86, 96, 512, 512)  # a little more than 2^31 elements


class Allowed(NamedTuple):
    """How wrong a map may be; a parameter's gradient ten times the tolerance, as a whole."""

    tolerance: float
    far: float = MOST_FAR  # share of the elements; two elements always, which one gate can reach


# Around 1e4 float32 has three digits behind the point, and the gradients multiply by 1e4 what is lost there. A variance
# without digits puts most elements far off.
FAR_FROM_ZERO = Allowed(1e-2, 2e-2)
SAME = Allowed(TOLERANCE[torch.float32])


class Outcome(NamedTuple):
    """What a check found."""

    what: str
    right: bool | None  # None: it could not run
    detail: str


def values(device: str, impl: str, shapes: Iterable[Shape] = SHAPES, forms: Forms = FORMS) -> Iterator[Outcome]:
    """Output and all gradients of every form, in every format and layout, beside the textbook form in float64."""
    for shape in shapes:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                x = _input(shape, device, DTYPES[dtype], layout)
                for name in forms:
                    check = partial(_values, name, forms, impl, x, Allowed(TOLERANCE[x.dtype]))
                    yield _outcome(f"{name} {shape} {layout} {dtype}", check)


def far_from_zero(device: str, impl: str, shape: Shape, forms: Forms = FORMS) -> Iterator[Outcome]:
    """The same in float32 around a mean of 1e4, where a variance by E[x^2] - E[x]^2 has no digit left.

    Not for MFDF, which takes no variance, and whose softmax saturates there.
    """
    for layout in LAYOUTS:
        x = 1e4 + _input(shape, device, torch.float32, layout)
        for name in forms:
            if name != "MFDF":
                check = partial(_values, name, forms, impl, x, FAR_FROM_ZERO)
                yield _outcome(f"{name} {shape} {layout}, mean 1e4", check)


def beyond_32_bits(device: str, impl: str, shape: Shape = LARGE_SHAPE, forms: Forms = FORMS) -> Iterator[Outcome]:
    """Output and gradient of x for the first and the last sample of a batch whose elements 32 bits cannot count."""
    for layout in LAYOUTS:
        for name in forms:
            what = f"{name} {shape} {layout} bfloat16"
            yield _outcome(what, partial(_ends, name, forms, impl, shape, device, layout))


def ways_to_run(device: str, shape: Shape, forms: Forms = FORMS) -> Iterator[Outcome]:
    """Compiled, under autocast, as a CUDA graph "auto" gives what it gives alone; its second gradient is right."""
    x = _input(shape, device, torch.float32, "channels_last")
    ways = [_compiled, _under_autocast, _second_gradient] + ([_as_graph] if device == "cuda" else [])
    for way in ways:
        for name in forms:
            yield _outcome(f"{name} {shape}{way.__name__.replace('_', ' ')}", partial(way, name, forms, x))


def _outcome(what: str, check: Callable[[], str]) -> Outcome:
    """Run a check, which says what is wrong, or nothing."""
    try:
        wrong = check()
    except (NotImplementedError, torch.OutOfMemoryError) as error:
        return Outcome(what, None, reason(error))
    except Exception as error:  # one check that breaks must not cost the others
        wrong = reason(error)
    return Outcome(what, not wrong, wrong)


def _input(shape: Shape, device: str, dtype: torch.dtype, layout: str) -> Tensor:
    return random_tensor(*shape, dtype=dtype, device=device, memory_format=LAYOUTS[layout])


def _pair(name: str, forms: Forms, impl: str, like: Tensor) -> tuple[nn.Module, nn.Module]:
    """A form and its textbook form, on the device and in the format of `like`, with the same parameters."""
    make, make_plain = forms[name]
    layer, plain = make(like.shape[1], impl=impl), make_plain(like.shape[1])
    scatter_parameters(plain, deviation=0.1)
    same_parameters(plain, layer)
    return layer.to(like), plain.to(like)


def _values(name: str, forms: Forms, impl: str, x: Tensor, allowed: Allowed) -> str:
    layer, plain = _pair(name, forms, impl, x)
    cotangent = torch.randn_like(x)
    actual = forward_and_backward(layer, x, cotangent)()
    expected = forward_and_backward(in_float64(plain), x.double(), cotangent.double())()
    return _wrong(layer, actual, expected, allowed)


def _wrong(layer: nn.Module, actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: Allowed) -> str:
    """What is further from `expected` than is allowed."""
    names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
    found = []
    for index, (name, ours, right) in enumerate(zip(names[: len(actual)], actual, expected, strict=True)):
        if index < 2:
            error, limit = far_share(ours, right, allowed.tolerance), max(allowed.far, 2 / ours.numel())
        else:
            error, limit = sum_error(ours, right), SUM_FACTOR * allowed.tolerance
        if not error <= limit:
            found.append(f"{name}: error {error:.2g}, allowed {limit:.2g}")
    return "; ".join(found)


def _ends(name: str, forms: Forms, impl: str, shape: Shape, device: str, layout: str) -> str:
    torch.manual_seed(0)
    few = torch.randn(2, *shape[1:]).to(device, torch.bfloat16)
    layer, plain = _pair(name, forms, impl, few)
    x = torch.empty(shape, device=device, dtype=few.dtype, memory_format=LAYOUTS[layout]).zero_()
    x[0], x[-1] = few
    y = layer(x.requires_grad_())
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    actual = [torch.stack((found[0], found[-1])) for found in (y, gradient)]
    expected = forward_and_backward(in_float64(plain), few.double(), few.double())()[:2]
    return _wrong(layer, actual, expected, Allowed(TOLERANCE[few.dtype]))


def _compiled(name: str, forms: Forms, x: Tensor) -> str:
    torch.compiler.reset()
    layer, _ = _pair(name, forms, "auto", x)
    run = forward_and_backward(torch.compile(layer, fullgraph=True, dynamic=False), x, torch.ones_like(x))
    return _wrong(layer, run(), forward_and_backward(layer, x, torch.ones_like(x))(), SAME)


def _under_autocast(name: str, forms: Forms, x: Tensor) -> str:
    layer, _ = _pair(name, forms, "auto", x)
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(leaf)
    actual = (y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y)))
    return _wrong(layer, actual, forward_and_backward(layer, x, torch.ones_like(x))(), SAME)


def _as_graph(name: str, forms: Forms, x: Tensor) -> str:
    layer, _ = _pair(name, forms, "auto", x)
    run = forward_and_backward(layer, x, torch.ones_like(x))
    expected = run()
    graph, actual = captured(run)
    graph.replay()
    return _wrong(layer, actual, expected, SAME)


def _second_gradient(name: str, forms: Forms, x: Tensor) -> str:
    layer, plain = _pair(name, forms, "auto", x)

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    return "" if agree(twice(layer, x), twice(in_float64(plain), x.double())) else "the second gradient is wrong"
