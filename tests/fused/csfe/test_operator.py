"""The fused implementation of CFE, SFE and CSFE against the reference, and its operator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.functional import cfe, csfe, sfe
from kfde_layers.fused.csfe import samples
from kfde_layers.fused.csfe.moments import moments_from_sums
from kfde_layers.fused.csfe.options import CsfeOptions
from tests.support.agreement import OPERATOR_TESTS, has_memory_format, relative_error, with_gradients
from tests.support.gates import input_away_from_threshold
from tests.support.inputs import MEMORY_FORMATS, batches, draw, draw_affine, memory_formats, seeds, sides

OPERATIONS = {
    "CFE": lambda x, weight, bias, **kw: cfe(x, weight, bias, 5, 0.45, 1e-3, **kw),
    "SFE": lambda x, *_, **kw: sfe(x, 1e-3, 0.2, **kw),
    "SFE, SimAM": lambda x, *_, **kw: sfe(x, correction=1, **kw),
    "CSFE": lambda x, weight, bias, **kw: csfe(x, weight, bias, 2, **kw),
    "CSFE, one group": lambda x, weight, bias, **kw: csfe(x, weight, bias, 1, 0.55, **kw),
    "CSFE, a channel a group": lambda x, weight, bias, **kw: csfe(x, weight, bias, 10, correction=1, **kw),
    "CSFE, mean": lambda x, weight, bias, **kw: csfe(x, weight, bias, 5, fusion="mean", **kw),
    "CSFE, cfe_sfe": lambda x, weight, bias, **kw: csfe(x, weight, bias, 5, arrangement="cfe_sfe", **kw),
    "CSFE, sfe_cfe": lambda x, weight, bias, **kw: csfe(x, weight, bias, 5, arrangement="sfe_cfe", **kw),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def map_and_parameters(*shape, seed=0, dtype=torch.float64, memory_format=torch.contiguous_format):
    x = draw(*shape, seed=seed, dtype=dtype, memory_format=memory_format)
    return [tensor.requires_grad_() for tensor in (x, *draw_affine(shape[1], seed, dtype))]


def run(operation, tensors, impl):
    """Return the output, and its gradients for a random cotangent."""
    y = operation(*tensors, impl=impl)
    return with_gradients(y, tensors, draw(*y.shape, seed=99, dtype=y.dtype))


def assert_equal(actual, expected, bound):
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert actual_tensor.dtype == expected_tensor.dtype
        scale = max(expected_tensor.abs().max(), 1e-3 * expected[-1].abs().max())
        assert (actual_tensor - expected_tensor).abs().max() <= bound * scale


@given(st.sampled_from(list(OPERATIONS.values())), batches, sides, sides, seeds, memory_formats, st.integers(1, 200))
def test_fused_equals_reference_with_every_gradient(operation, batch, height, width, seed, memory_format, block):
    tensors = map_and_parameters(batch, 10, height, width, seed=seed, memory_format=memory_format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CACHE", 9 * block)  # cut within samples, between them, or not at all
        fused = run(operation, tensors, "fused")
    assert_equal(fused, run(operation, tensors, "reference"), 1e-10)
    assert has_memory_format(fused[0], memory_format)
    assert has_memory_format(fused[1], memory_format)


@each_operation
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_computed_in_float32(operation, memory_format, dtype):
    tensors = map_and_parameters(2, 10, 17, 19, seed=3, dtype=dtype, memory_format=memory_format)
    exact = run(operation, [tensor.detach().double().requires_grad_() for tensor in tensors], "reference")
    for impl in ("fused", "reference"):
        for y, expected in zip(run(operation, tensors, impl), exact, strict=True):
            assert y.dtype == dtype
            assert relative_error(y, expected) < {torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)


@each_operation
@pytest.mark.parametrize("shape", [(1, 10, 1, 1), (2, 10, 40, 9), (1, 10, 120, 60)])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_auto_takes_fused(operation, shape, memory_format):
    tensors = map_and_parameters(*shape, dtype=torch.float32, memory_format=memory_format)
    auto, fused = (operation(*tensors, impl=impl) for impl in ("auto", "fused"))
    assert torch.equal(auto, fused)


@pytest.mark.parametrize(("shape", "few_calls"), [((768, 7, 7), True), ((267, 56, 56), True), ((268, 56, 56), False)])
@pytest.mark.parametrize("batch", [1, 9])
def test_the_batch_has_no_part_in_how_it_is_computed(shape, few_calls, batch):
    assert samples.fit_in_cache(torch.empty(batch, *shape, device="meta")) == few_calls


def test_many_blocks_lose_nothing(monkeypatch):
    tensors = map_and_parameters(1, 2, 211, 199, dtype=torch.float32)
    exact = run(OPERATIONS["CSFE"], [t.detach().double().requires_grad_() for t in tensors], "reference")
    for memory_format in MEMORY_FORMATS:
        monkeypatch.setattr(samples, "CACHE", 9000)
        x = tensors[0].detach().contiguous(memory_format=memory_format).requires_grad_()
        fused = run(OPERATIONS["CSFE"], [x, *tensors[1:]], "fused")
        for actual, expected in zip(fused, exact, strict=True):
            assert relative_error(actual, expected) < 5e-6


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_a_large_mean_cancels_before_it_is_squared(memory_format):
    x = draw(2, 16, 23, 29, dtype=torch.float32, memory_format=memory_format) + 1e6
    _, mean, m2 = torch.ops.kfde.csfe_fused(x, None, None, *CsfeOptions(with_sfe=True))
    exact = x.double().flatten(2)
    assert float((mean.double().sum(1) - exact.mean(2)).abs().max()) < 1e-7  # the two parts together
    assert relative_error(m2, exact.var(2, correction=0) * 23 * 29) < 1e-6


def test_a_constant_map_has_no_deviations():
    x = torch.full((1, 2, 31, 37), 1e15 / 3)
    _, mean, m2 = torch.ops.kfde.csfe_fused(x, None, None, *CsfeOptions(with_sfe=True))
    assert float(m2.min()) >= 0
    assert relative_error(mean.double().sum(1), x.double().mean((2, 3))) < 1e-12


def test_rounding_makes_no_negative_variance():
    one = torch.ones(1, 1)
    _, mean_low, m2, _ = moments_from_sums(0 * one, 3.000001 * one, 3 * one, n=3)
    assert float(mean_low) == pytest.approx(1)
    assert float(m2) == 0


@pytest.mark.parametrize("total", [0.0, 3e-7, -3e-7, 1e-5])
def test_the_gradient_of_a_vanishing_sum_of_gamma(total):
    x, *_ = map_and_parameters(2, 2, 5, 7)
    bias = torch.tensor([-0.4, 0.7], dtype=torch.float64, requires_grad=True)
    # tiny values, with which the gates are not saturated although the sum is guarded
    weight = torch.tensor([total + 2e-7, -2e-7], dtype=torch.float64, requires_grad=True)
    results = [run(lambda *t, **kw: cfe(*t, 1, **kw), [x, weight, bias], impl) for impl in ("fused", "reference")]
    assert results[1][2].abs().max() > 1  # the gradient of gamma
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-8, atol=1e-10)


@each_operation
def test_empty_batches_and_gaps_between_elements(operation):
    empty = map_and_parameters(0, 10, 4, 5)
    y, *gradients = run(operation, empty, "fused")
    assert y.shape == (0, 10, 4, 5)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)
    sliced = draw(3, 20, 9, 11)[:, ::2, 1::2, ::3].requires_grad_()
    tensors = [sliced, *map_and_parameters(1, 10, 1, 1)[1:]]
    assert_equal(*(run(operation, tensors, impl) for impl in ("fused", "reference")), 1e-10)


@pytest.mark.slow
@each_operation
def test_gradients_of_first_and_second_order(operation):
    _, weight, bias = map_and_parameters(2, 10, 1, 3, seed=5)
    x = input_away_from_threshold(
        lambda x: operation(x, weight, bias, impl="reference"),
        *(2, 10, 1, 3),
        margin=1e-3,
        first_seed=5,
        dtype=torch.float64,
    ).requires_grad_()
    has_parameters = len(run(operation, [x, weight, bias], "fused")) == 4
    inputs = [x, weight, bias] if has_parameters else [x]

    def call(x, weight=weight, bias=bias):
        return operation(x, weight, bias, impl="fused")

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("indices", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_of_the_inputs(indices, create_graph):
    tensors = map_and_parameters(2, 10, 3, 5)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in indices)
    inputs = [tensors[index] for index in indices]
    outputs = [csfe(*tensors, 5, impl=impl) for impl in ("fused", "reference")]
    cotangent = draw(*outputs[0].shape, seed=9)
    gradients = [torch.autograd.grad(y, inputs, cotangent, create_graph=create_graph) for y in outputs]
    assert_equal(*gradients, 1e-10)


@pytest.mark.parametrize("operation", ["CFE", "SFE", "CSFE", "CSFE, cfe_sfe", "CSFE, sfe_cfe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_saved_than_the_input_and_its_moments(operation, dtype):
    tensors = map_and_parameters(2, 10, 7, 7, dtype=dtype)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = OPERATIONS[operation](*tensors, impl="fused")
    for parameter in tensors[1:]:
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    moments = 3 * 4 * 2 * 10  # three numbers in float32 for each channel of each sample
    assert sum(saved.values()) <= tensors[0].untyped_storage().nbytes() + moments


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its copies
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_the_operator_keeps_its_contract(memory_format):
    x, weight, bias = map_and_parameters(2, 10, 5, 7, dtype=torch.float32, memory_format=memory_format)
    for parameters, options in (
        ((weight, bias), CsfeOptions(5, with_sfe=True)),
        ((weight, bias), CsfeOptions(5)),
        ((None, None), CsfeOptions(with_sfe=True)),
    ):
        torch.library.opcheck(torch.ops.kfde.csfe_fused, (x, *parameters, *options), test_utils=OPERATOR_TESTS)


@pytest.mark.slow
@each_operation
def test_compiled_in_one_graph_it_is_the_same(operation):
    torch.compiler.reset()
    tensors = map_and_parameters(2, 10, 5, 7, dtype=torch.float32)
    for impl in ("auto", "fused"):
        compiled = torch.compile(
            lambda *args, impl=impl: operation(*args, impl=impl), fullgraph=True, backend="aot_eager"
        )
        eager = run(operation, tensors, "reference")
        assert_equal(run(lambda *args, impl, compiled=compiled: compiled(*args), tensors, impl), eager, 1e-5)


def test_a_graph_can_hold_the_operator_itself():
    x, weight, bias = map_and_parameters(2, 10, 5, 7, dtype=torch.float32)
    options = CsfeOptions(5, with_sfe=True)

    def call(x, weight, bias):
        return torch.ops.kfde.csfe_fused(x, weight, bias, *options)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_equal(*([f(x, weight, bias)] for f in (compiled, call)), 1e-6)
    gradients = [torch.autograd.grad(f(x, weight, bias).sum(), (x, weight, bias)) for f in (compiled, call)]
    assert_equal(*gradients, 1e-6)


def test_the_comparison_can_fail(monkeypatch):
    spatial_gate = samples._spatial_gate
    monkeypatch.setattr(samples, "_spatial_gate", lambda *args: spatial_gate(*args).mul_(1.001))
    tensors = map_and_parameters(2, 10, 5, 7)
    fused, reference = (run(OPERATIONS["CSFE"], tensors, impl) for impl in ("fused", "reference"))
    with pytest.raises(AssertionError):
        assert_equal(fused, reference, 1e-6)
