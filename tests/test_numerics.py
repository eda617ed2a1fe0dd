"""What docs/numerics.md promises: errors, range, independence of the batch, repeatability and the reach of a NaN."""

import copy
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.fused.csfe.moments import csfe_from_moments
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.mfdf import branch_mean
from kfde_layers.testing import largest_error, random_tensor, scatter_parameters
from tests.support.agreement import use_reference, with_gradients
from tests.support.gates import move_away_from_threshold
from tests.support.inputs import LAYOUTS
from tests.support.pages import DOCS

ROUND_OFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(2, 16, 23, 29), (3, 6, 7, 5), (1, 64, 14, 14)]

LAYERS = {
    "CFE": CFE,
    "SFE": SFE,
    "CSFE": CSFE,
    "CSFE, cfe_sfe": lambda channels, **kwargs: CSFE(channels, arrangement="cfe_sfe", **kwargs),
    "CSFE, sfe_cfe": lambda channels, **kwargs: CSFE(channels, arrangement="sfe_cfe", **kwargs),
    "MFDF": MFDF,
}
ONE_PASS = ("CFE", "SFE", "CSFE")
each_layer = pytest.mark.parametrize("name", LAYERS)
each_impl = pytest.mark.parametrize("impl", ["reference", "fused"])


class Bound(NamedTuple):
    """Promised errors, in units of round-off of the dtype, relative to the largest exact value of each tensor."""

    output: float
    """Of the output."""
    input_gradient: float
    """Of the gradient of the input."""
    parameter_gradients: float
    """Of the gradient of each parameter."""


# Parameters are in float32 with every dtype of the map.
PROMISED = {
    torch.float32: Bound(output=4, input_gradient=16, parameter_gradients=32),
    torch.bfloat16: Bound(output=1, input_gradient=1, parameter_gradients=32),
    torch.float16: Bound(output=1, input_gradient=1, parameter_gradients=32),
}
# With scores of at most 8: their error grows with them, and passes through the softmax.
PROMISED_OF_MFDF = {
    torch.float32: Bound(output=32, input_gradient=32, parameter_gradients=1024),
    torch.bfloat16: Bound(output=1, input_gradient=2, parameter_gradients=1024),
    torch.float16: Bound(output=1, input_gradient=2, parameter_gradients=1024),
}


def groups_of(channels: int) -> int:
    return 2 if channels % 4 else 4


def make(name: str, channels: int, impl: str = "auto") -> nn.Module:
    torch.manual_seed(0)  # MFDF starts at random, and errors depend on its weights
    options = {} if name in ("SFE", "MFDF") else {"num_groups": groups_of(channels)}
    return scatter_parameters(LAYERS[name](channels, impl=impl, **options))


def compiled_equations(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute a layer by the equations that compilers and exporters see."""
    cfe = layer.cfe if isinstance(layer, CSFE) else layer
    weight, bias = getattr(cfe, "weight", None), getattr(cfe, "bias", None)
    options = CsfeOptions(num_groups=getattr(cfe, "num_groups", 1), with_sfe=not isinstance(layer, CFE))
    return csfe_from_moments(x.to(torch.promote_types(x.dtype, torch.float32)), weight, bias, options).to(x.dtype)


def errors(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[float]:
    """Return the errors of the output and of every gradient of `call(x)`, which computes `layer`, in round-offs."""
    exact_layer = use_reference(copy.deepcopy(layer).double())
    dy = random_tensor(*x.shape, seed=5, dtype=x.dtype)
    results = []
    for module, run, inputs, upstream in (
        (layer, call, x.detach().requires_grad_(), dy),
        (exact_layer, exact_layer, x.detach().double().requires_grad_(), dy.double()),
    ):
        results.append(with_gradients(run(inputs), [inputs, *module.parameters()], upstream))
    return [
        largest_error(actual, exact) / float(exact.abs().max()) / ROUND_OFF[actual.dtype]
        for actual, exact in zip(*results, strict=True)
    ]


def assert_kept(promised: Bound, found: list[float]) -> None:
    bounds = [promised.output, promised.input_gradient] + [promised.parameter_gradients] * (len(found) - 2)
    for error, bound in zip(found, bounds, strict=True):
        assert error <= bound


def draw_map(name: str, shape: tuple[int, ...], mean: float, dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    """Draw a map whose channels differ, with a mean of so many deviations; no gate is near its threshold."""
    x = random_tensor(*shape, seed=1) + random_tensor(1, shape[1], 1, 1, seed=2) + mean
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    if "CFE" in name or "CSFE" in name:
        exact = use_reference(copy.deepcopy(make(name, shape[1])).double())
        with torch.no_grad():
            move_away_from_threshold(exact, x, 1e-5)
    return x


def check_errors(name: str, impl: str, mean: float, dtype: torch.dtype, bound: Bound) -> None:
    for shape in SHAPES:
        for layout in LAYOUTS:
            layer = make(name, shape[1], "auto" if impl == "compiled" else impl)
            call = functools.partial(compiled_equations, layer) if impl == "compiled" else layer
            assert_kept(bound, errors(call, layer, draw_map(name, shape, mean, dtype, layout)))


@pytest.mark.parametrize("mean", [0, 3, 1e4, 1e6])
@pytest.mark.parametrize("impl", ["reference", "fused", "compiled"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_errors_in_float32_at_any_mean(name, impl, mean):
    check_errors(name, impl, mean, torch.float32, PROMISED[torch.float32])


@pytest.mark.parametrize("mean", [0, 3, 30])
@pytest.mark.parametrize("impl", ["reference", "fused", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ONE_PASS)
def test_errors_in_16_bits(name, dtype, impl, mean):
    check_errors(name, impl, mean, dtype, PROMISED[dtype])


def limit_scores(layer: MFDF, x: Tensor) -> MFDF:
    """Scale fc2 so that the largest score is 8."""
    with torch.no_grad():
        scores = layer._scores(branch_mean([branch(x.float()) for branch in layer.branches]))
        layer.fc2.weight *= 8 / scores.abs().max()
        layer.fc2.bias *= 8 / scores.abs().max()
    return layer


@pytest.mark.parametrize("mean", [0, 3, 30, 300])
@each_impl
@pytest.mark.parametrize("dtype", PROMISED_OF_MFDF)
def test_errors_of_mfdf(dtype, impl, mean):
    for shape in SHAPES:
        for layout in LAYOUTS:
            x = draw_map("MFDF", shape, mean, dtype, layout)
            layer = limit_scores(make("MFDF", shape[1], impl), x)
            assert_kept(PROMISED_OF_MFDF[dtype], errors(layer, layer, x))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e12, 1e15])
@pytest.mark.parametrize("impl", ["reference", "fused", "compiled"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_range(name, impl, magnitude):
    layer = make(name, 16, "auto" if impl == "compiled" else impl)
    call = functools.partial(compiled_equations, layer) if impl == "compiled" else layer
    x = magnitude * random_tensor(2, 16, 23, 29, mean=2)
    assert_kept(PROMISED[torch.float32], errors(call, layer, x)[:2])


@each_impl
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_range_of_mfdf(magnitude, impl):
    layer = make("MFDF", 16, impl)
    with torch.no_grad():
        for branch in layer.branches:
            branch.bias *= magnitude
    x = magnitude * random_tensor(2, 16, 23, 29)
    assert errors(limit_scores(layer, x), layer, x)[0] <= PROMISED_OF_MFDF[torch.float32].output


def alone_and_together(name: str, impl: str, shape: tuple[int, ...], layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and input gradient of the samples alone, and of the same samples in a batch."""
    layer = make(name, shape[1], impl)
    x, dy = (random_tensor(*shape, seed=seed, mean=1, memory_format=LAYOUTS[layout]) for seed in (1, 2))

    def run(chosen: slice) -> list[Tensor]:
        inputs = x[chosen].clone(memory_format=LAYOUTS[layout]).requires_grad_()
        return with_gradients(layer(inputs), [inputs], dy[chosen])

    alone = [run(slice(i, i + 1)) for i in range(len(x))]
    return [torch.cat(tensors) for tensors in zip(*alone, strict=True)], run(slice(None))


# Maps on both sides of every limit of "auto", and of the blocks of the fused implementation. PyTorch computes the last
# elements of a tensor, beyond a multiple of its vectors, by other functions: sigmoid then differs in its last bit.
BATCHES = [(3, 16, 2, 2), (4, 64, 8, 16), (2, 64, 12, 11), (8, 128, 14, 14), (2, 32, 65, 64), (2, 64, 149, 151)]
UNEVEN_BATCHES = [(5, 6, 7, 5), (2, 2, 149, 151), (2, 10, 211, 199)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["auto", "reference", "fused"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "MFDF"])
def test_a_sample_alone_has_the_bits_of_the_sample_in_a_batch(name, impl, layout):
    for shape in BATCHES:
        for alone, together in zip(*alone_and_together(name, impl, shape, layout), strict=True):
            assert torch.equal(alone, together), shape
    for shape in UNEVEN_BATCHES:
        for alone, together in zip(*alone_and_together(name, impl, shape, layout), strict=True):
            assert largest_error(alone, together.double()) <= 2**-21 * float(together.abs().max()), shape
            assert (alone != together).sum() <= 64


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ["auto", "reference", "fused"])
def test_a_sample_alone_is_near_the_sample_in_a_batch_in_mfdf(impl, layout):
    for shape in BATCHES + UNEVEN_BATCHES:
        for alone, together in zip(*alone_and_together("MFDF", impl, shape, layout), strict=True):
            assert largest_error(alone, together.double()) <= 2**-17 * float(together.abs().max()), shape


@each_layer
@each_impl
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_repeats_its_bits(threads, impl, name):
    layer, before = make(name, 64, impl), torch.get_num_threads()
    x, dy = (random_tensor(4, 64, 37, 41, seed=seed) for seed in (1, 2))
    torch.set_num_threads(threads)
    try:
        first, second = (
            with_gradients(layer(inputs), [inputs, *layer.parameters()], dy)
            for inputs in (x.clone().requires_grad_() for _ in range(2))
        )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, second))


def reach_of_nan(name: str, impl: str) -> Tensor:
    """Return which elements of the output a NaN in channel 1 of the first of three samples reaches."""
    layer = make(name, 8, impl)
    x = random_tensor(3, 8, 7, 5)
    spoilt = x.clone()
    spoilt[0, 1, 2, 3] = float("nan")
    y, expected = layer(spoilt), layer(x)
    assert torch.equal(y[1:], expected[1:])
    return y.isnan()


@each_impl
def test_a_nan_stays_in_its_sample(impl):
    everywhere = torch.ones(8, 7, 5, dtype=torch.bool)
    group_and_partner = torch.zeros_like(everywhere)
    group_and_partner[[0, 1, 4, 5]] = True  # four groups of two channels; half of the channels is four
    channel = torch.zeros_like(everywhere)
    channel[1] = True
    expected = {"CFE": group_and_partner, "SFE": channel, "CSFE": group_and_partner, "MFDF": everywhere}
    for name, reached in expected.items():
        assert torch.equal(reach_of_nan(name, impl)[0], reached), name


@each_layer
@each_impl
def test_a_nan_stays_in_its_sample_backward(impl, name):
    layer, (x, dy) = make(name, 8, impl), (random_tensor(3, 8, 7, 5, seed=seed) for seed in (1, 2))
    spoilt = dy.clone()
    spoilt[0, 1, 2, 3] = float("nan")
    gradients = []
    for upstream in (dy, spoilt):
        inputs = x.clone().requires_grad_()
        gradients += torch.autograd.grad(layer(inputs), inputs, upstream)
    assert gradients[1][0].isnan().any()
    assert torch.equal(gradients[0][1:], gradients[1][1:])


def test_every_promise_names_a_test():
    page = (DOCS / "numerics.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) >= 8
    files = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", page))
    assert len(files) >= 8
    for file, test in files:
        test = "test_equals_the_paper_in_loops" if file.startswith("tests/ops") and not test else test
        assert f"def {test}" in (DOCS.parent / file).read_text()
    assert named - {"test_equals_the_paper_in_loops"} <= globals().keys()
    for bound in (*PROMISED.values(), *PROMISED_OF_MFDF.values()):
        assert "| " + " | ".join(f"{number:g}" for number in bound) + " |" in page
