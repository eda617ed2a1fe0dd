"""The fused MFDF on CPU, its operators, and the equations that judge them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.fused.mfdf import operator
from tests.support.agreement import OPERATOR_TESTS, count_operations, relative_error
from tests.support.inputs import MEMORY_FORMATS, batches, draw, memory_formats, seeds, sides
from tests.support.mfdf import MfdfParameters, branch_shapes


@given(batches, sides, sides, seeds, branch_shapes, st.booleans(), memory_formats)
def test_fused_equals_reference_with_every_gradient(batch, height, width, seed, branches, bias, memory_format):
    sizes, dilations = zip(*branches, strict=True)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = draw(batch, 6, height, width, seed=seed, dtype=dtype, memory_format=memory_format).requires_grad_()
        cotangent = draw(*x.shape, seed=seed + 1, dtype=dtype)
        parameters = MfdfParameters.random(6, sizes, 6, bias, seed=seed, dtype=dtype)
        inputs = [x, *(tensor.requires_grad_() for tensor in parameters.tensors())]
        outputs = [parameters(x, dilations, 6, impl) for impl in ("fused", "reference")]
        assert relative_error(*outputs) < bound
        fused, reference = (torch.autograd.grad(output, inputs, cotangent) for output in outputs)
        scale = max(gradient.abs().max() for gradient in reference)  # judges gradients that cancel to zero
        for actual, expected in zip(fused, reference, strict=True):
            assert (actual - expected).abs().max() <= bound * max(expected.abs().max(), 1e-3 * scale)


def test_fused_makes_no_map_of_a_branch():
    x = draw(4, 6, 29, 31)
    parameters = MfdfParameters.random(6, (1, 3, 5, 7), 6)

    for impl, convolutions in (("reference", 4), ("fused", 1)):
        assert count_operations(lambda impl=impl: parameters(x, 1, 6, impl))["aten::conv2d"] == convolutions


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_compiled_in_one_graph_fused_is_the_same(memory_format):
    torch.compiler.reset()
    x = draw(2, 6, 9, 8, dtype=torch.float32, memory_format=memory_format).requires_grad_()
    parameters = MfdfParameters.random(6, (1, 3, 5, 7), 6, dtype=torch.float32)
    inputs = [x, *(tensor.requires_grad_() for tensor in parameters.tensors())]
    compiled = torch.compile(lambda: parameters(x, 1, 6, "fused"), fullgraph=True, backend="aot_eager")
    outputs = [compiled(), parameters(x, 1, 6, "reference")]
    assert relative_error(*outputs) < 1e-5
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its copies
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_the_operators_keep_their_contracts(memory_format):
    x = draw(3, 6, 5, 7, dtype=torch.float32, memory_format=memory_format).requires_grad_()
    alpha, stacked_kernels, bias, kernel = (
        draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((3, 4, 6), (4, 6, 3, 3), (3, 6), (6, 3, 3))
    )
    torch.library.opcheck(torch.ops.kfde.mean_of_convolution, (x, kernel, 2), test_utils=OPERATOR_TESTS)
    inputs = (x, alpha, stacked_kernels, bias, 2)
    torch.library.opcheck(torch.ops.kfde.merged_convolution, inputs, test_utils=OPERATOR_TESTS)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_fused_makes_no_copy_in_another_memory_format(memory_format):
    x = draw(2, 16, 56, 56, dtype=torch.float32, memory_format=memory_format)
    parameters = MfdfParameters.random(16, (1, 3, 5, 7), 16, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        parameters(x, 1, 16, "fused")
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    size = x.untyped_storage().nbytes()
    assert size <= peak <= 2.5 * size  # the result and at most 1.5 times the input


def test_fused_refuses_dense_branches():
    with pytest.raises(NotImplementedError, match="the branches must be depthwise, groups = 6, got 1"):
        MfdfParameters.random(6, (1, 3), 1)(draw(2, 6, 5, 5), 1, 1, "fused")


def test_the_comparison_of_fused_and_reference_can_fail(monkeypatch):
    """An operator with wrong biases must not pass for a right one."""
    merged_convolution = operator.cpu.merged_convolution

    def wrong_biases(x, alpha, stacked_kernels, bias, tap_spacing):
        return merged_convolution(x, alpha, stacked_kernels, 0.99 * bias, tap_spacing)

    x = draw(2, 6, 5, 7, dtype=torch.float32)
    parameters = MfdfParameters.random(6, (1, 3), 6, dtype=torch.float32)
    monkeypatch.setattr(operator.cpu, "merged_convolution", wrong_biases)
    assert relative_error(parameters(x, 1, 6, "fused"), parameters(x, 1, 6, "reference")) > 1e-4


def test_gradients_that_can_be_differentiated_again_are_the_same():
    x = draw(2, 3, 4, 7).requires_grad_()
    kernel = draw(3, 3, 3, seed=1).requires_grad_()
    p = torch.ops.kfde.mean_of_convolution(x, kernel, 1)
    plain, again = (
        torch.autograd.grad(p.square().sum(), (x, kernel), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(first, second.detach(), rtol=1e-10, atol=1e-10)
