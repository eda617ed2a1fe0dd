import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfde_layers.functional import mfdf
from kfde_layers.fused.mfdf import operator
from kfde_layers.ops import mfdf as mfdf_ops
from tests.support import oracle
from tests.support.agreement import OPERATOR_TESTS, as_numpy, count_operations, has_memory_format, relative_error
from tests.support.inputs import MEMORY_FORMATS, batches, draw, memory_formats, seeds, sides


@dataclasses.dataclass
class Parameters:
    """All tensors of an MFDF, large enough that every one of them matters."""

    branch_weights: list[Tensor]
    branch_biases: list[Tensor] | None
    fc: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def random(cls, channels, kernel_sizes, groups, bias=True, hidden=5, seed=0, dtype=torch.float64):
        def tensor(*shape):
            nonlocal seed
            seed += 1
            return 0.5 * draw(*shape, seed=seed, dtype=dtype)

        branches = len(kernel_sizes)
        return cls(
            [tensor(channels, channels // groups, size, size) for size in kernel_sizes],
            [tensor(channels) for _ in kernel_sizes] if bias else None,
            (
                tensor(hidden, channels),
                tensor(hidden),
                tensor(branches * channels, hidden),
                tensor(branches * channels),
            ),
        )

    def __call__(self, x, dilation, groups, impl="auto"):
        return mfdf(x, self.branch_weights, self.branch_biases, *self.fc, dilation, groups, impl=impl)

    def tensors(self):
        return [*self.branch_weights, *(self.branch_biases or []), *self.fc]

    def run_oracle(self, x, dilations, groups):
        weights, fc = map(as_numpy, self.branch_weights), map(as_numpy, self.fc)
        biases = [None] * len(dilations) if self.branch_biases is None else list(map(as_numpy, self.branch_biases))
        return oracle.mfdf(as_numpy(x), list(weights), biases, *fc, dilations, groups)


branch_shapes = st.lists(st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2, 3])), min_size=1, max_size=4)


def test_worked_example():
    # One channel of ones on 1 x 3, a kernel of ones: sums over the window are (2, 3, 2), their mean 7/3. The other
    # branch doubles: mean 2. fc1 halves p = 7/3 + 2, fc2 gives the scores (c, 0), so alpha_1 = sigmoid(13/6).
    x = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    twice = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    fc2 = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    alpha = 1 / (1 + math.exp(-13 / 6))
    expected = [alpha * window + (1 - alpha) * 2 for window in (2, 3, 2)]
    for impl in ("reference", "fused"):
        y = mfdf(x, [ones, twice], None, torch.full((1, 1), 0.5), zero, fc2, torch.zeros(2), impl=impl)
        torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))


@given(batches, sides, sides, seeds, branch_shapes, st.sampled_from([1, 2, 6]), st.booleans(), memory_formats)
def test_equals_the_paper_in_loops(batch, height, width, seed, branches, groups, bias, memory_format):
    sizes, dilations = zip(*branches, strict=True)
    x = draw(batch, 6, height, width, seed=seed, memory_format=memory_format)
    parameters = Parameters.random(6, sizes, groups, bias, seed=seed)
    expected = parameters.run_oracle(x, dilations, groups)
    for impl in ("reference", "fused") if groups == 6 else ("reference",):
        y = parameters(x, dilations, groups, impl)
        assert relative_error(y, expected) < 1e-12
        assert has_memory_format(y, memory_format)


@given(batches, sides, sides, seeds, branch_shapes, st.booleans(), memory_formats)
def test_fused_equals_reference_with_every_gradient(batch, height, width, seed, branches, bias, memory_format):
    sizes, dilations = zip(*branches, strict=True)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = draw(batch, 6, height, width, seed=seed, dtype=dtype, memory_format=memory_format).requires_grad_()
        cotangent = draw(*x.shape, seed=seed + 1, dtype=dtype)
        parameters = Parameters.random(6, sizes, 6, bias, seed=seed, dtype=dtype)
        inputs = [x, *(tensor.requires_grad_() for tensor in parameters.tensors())]
        outputs = [parameters(x, dilations, 6, impl) for impl in ("fused", "reference")]
        assert relative_error(*outputs) < bound
        fused, reference = (torch.autograd.grad(output, inputs, cotangent) for output in outputs)
        scale = max(gradient.abs().max() for gradient in reference)  # judges gradients that cancel to zero
        for actual, expected in zip(fused, reference, strict=True):
            assert (actual - expected).abs().max() <= bound * max(expected.abs().max(), 1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 3)])
def test_gradients(impl, height, width):
    x = draw(2, 4, height, width)
    parameters = Parameters.random(4, (1, 5), 4, hidden=3)
    inputs = [tensor.requires_grad_() for tensor in (x, *parameters.tensors())]

    def call(x, w1, w2, b1, b2, *fc):
        return mfdf(x, [w1, w2], [b1, b2], *fc, (1, 2), impl=impl)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_every_dtype_is_computed_in_float32(impl, memory_format):
    parameters = Parameters.random(6, (1, 3, 5), 6)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        x = draw(3, 6, 17, 19, dtype=dtype, memory_format=memory_format)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = parameters(x, 1, 6, impl)
            assert y.dtype == dtype
            assert has_memory_format(y, memory_format)
            assert relative_error(y, parameters.run_oracle(x, (1, 1, 1), 6)) < bound


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_an_empty_batch_keeps_the_parameters_in_the_graph(impl):
    parameters = Parameters.random(6, (1, 3), 6)
    tensors = [tensor.requires_grad_() for tensor in parameters.tensors()]
    y = parameters(draw(0, 6, 4, 5), 1, 6, impl)
    assert y.shape == (0, 6, 4, 5)
    for gradient in torch.autograd.grad(y.sum(), tensors):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_sample_alone_equals_the_sample_in_a_batch(impl):
    x = draw(5, 6, 7, 3)
    parameters = Parameters.random(6, (1, 3, 7), 6)
    together = parameters(x, 1, 6, impl)
    alone = torch.cat([parameters(sample, 1, 6, impl) for sample in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_fused_makes_no_map_of_a_branch():
    x = draw(4, 6, 29, 31)
    parameters = Parameters.random(6, (1, 3, 5, 7), 6)

    for impl, convolutions in (("reference", 4), ("fused", 1)):
        assert count_operations(lambda impl=impl: parameters(x, 1, 6, impl))["aten::conv2d"] == convolutions


@pytest.mark.parametrize(
    ("kernel_sizes", "dilation", "merged"),
    [
        ((1, 3, 5, 7), 1, True),
        ((1, 3, 5, 7), 2, True),
        ((1, 3, 5, 7), (1, 2, 3, 1), True),
        ((3, 3, 3), (1, 2, 6), False),
        ((3, 5), 1, False),
    ],
)
def test_auto_merges_where_that_was_measured_to_be_faster(kernel_sizes, dilation, merged):
    parameters, x = Parameters.random(6, kernel_sizes, 6), draw(2, 6, 11, 13)
    y = parameters(x, dilation, 6, "auto")
    assert torch.equal(y, parameters(x, dilation, 6, "fused")) == merged
    assert torch.equal(y, parameters(x, dilation, 6, "reference")) == (not merged)


def test_exporters_see_the_branches(monkeypatch):
    monkeypatch.setattr(mfdf_ops, "exporting", lambda: True)
    parameters, x = Parameters.random(6, (1, 3, 5, 7), 6), draw(2, 6, 28, 28)
    assert relative_error(parameters(x, 1, 6, "auto"), parameters(x, 1, 6, "reference")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_compiled_in_one_graph_fused_is_the_same(memory_format):
    torch.compiler.reset()
    x = draw(2, 6, 9, 8, dtype=torch.float32, memory_format=memory_format).requires_grad_()
    parameters = Parameters.random(6, (1, 3, 5, 7), 6, dtype=torch.float32)
    inputs = [x, *(tensor.requires_grad_() for tensor in parameters.tensors())]
    compiled = torch.compile(lambda: parameters(x, 1, 6, "fused"), fullgraph=True, backend="aot_eager")
    outputs = [compiled(), parameters(x, 1, 6, "reference")]
    assert relative_error(*outputs) < 1e-5
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize(
    ("size", "memory_format", "grad", "operator"),
    [
        (16, torch.channels_last, False, False),
        (16, torch.channels_last, True, True),
        (17, torch.channels_last, False, True),
        (16, torch.contiguous_format, False, True),
    ],
)
def test_a_compiler_sees_the_branches_where_its_code_is_faster(size, memory_format, grad, operator):
    torch.compiler.reset()
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = draw(2, 6, size, size, dtype=torch.float32, memory_format=memory_format)
    parameters = Parameters.random(6, (1, 3, 5, 7), 6, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        y = torch.compile(lambda: parameters(x, 1, 6), fullgraph=True, backend=backend)()
        assert relative_error(y, parameters(x, 1, 6, "reference")) < 1e-5
    assert any("merged_convolution" in target for target in targets) == operator


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
    parameters = Parameters.random(16, (1, 3, 5, 7), 16, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        parameters(x, 1, 16, "fused")
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    size = x.untyped_storage().nbytes()
    assert size <= peak <= 2.5 * size  # the result and at most 1.5 times the input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6, 5, 5)}, ValueError, r"x must have shape \(N, C, H, W\), got 3 dimensions"),
        (
            {"x": torch.zeros(2, 6, 5, 5).long()},
            TypeError,
            r"x must be a floating-point tensor \(.*\), got torch.int64",
        ),
        ({"x": torch.zeros(2, 8, 5, 5)}, ValueError, "x must have 6 channels in dimension 1, got 8"),
        (
            {"branch_weights": torch.zeros(2, 6, 1, 3, 3)},
            TypeError,
            "branch_weights must be a sequence of tensors, got",
        ),
        ({"branch_weights": [torch.zeros(6)] * 2}, ValueError, r"must have shape \(C, C / groups, k, k\), got 1 dim"),
        ({"fc1_weight": torch.zeros(())}, ValueError, r"fc1_weight must have shape \(d, C\), got 0 dimensions: \(\)"),
        ({"branch_weights": []}, ValueError, "branch_weights must have at least one entry, got none"),
        ({"branch_weights": [torch.zeros(6, 1, 2, 2)] * 2}, ValueError, r"branch_weights\[0\] must be odd.*got 2"),
        (
            {"branch_weights": [torch.zeros(6, 1, 3, 5)] * 2},
            ValueError,
            r"branch_weights\[0\] must have shape \(6, 1, 5, 5\)",
        ),
        (
            {"branch_weights": [torch.zeros(6, 6, 3, 3)] * 2},
            ValueError,
            r"must have shape \(6, 1, 3, 3\), got \(6, 6, 3, 3\)",
        ),
        ({"branch_biases": torch.zeros(2, 6)}, TypeError, "branch_biases must be a sequence of tensors, got"),
        ({"branch_biases": [torch.zeros(6)]}, ValueError, "branch_biases must be None or have 2 entries, got 1"),
        ({"branch_biases": [torch.zeros(6), torch.zeros(5)]}, ValueError, r"branch_biases\[1\] must have shape \(6,\)"),
        ({"fc1_bias": torch.zeros(4)}, ValueError, r"fc1_bias must have shape \(5,\), got \(4,\)"),
        ({"fc2_weight": torch.zeros(6, 5)}, ValueError, r"fc2_weight must have shape \(12, 5\), got \(6, 5\)"),
        (
            {"dilation": (1, 1, 1)},
            ValueError,
            r"dilation must be an int or have 2 entries, one per branch, got \(1, 1, 1\)",
        ),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": (1, 1.5)}, TypeError, "dilation must be an int, got 1.5"),
        ({"groups": 4}, ValueError, "groups must divide channels = 6, got 4"),
        ({"groups": "dense"}, ValueError, "groups must be an int or 'depthwise', got 'dense'"),
        ({"impl": "triton"}, ValueError, "impl must be one of 'auto', 'reference', 'fused', got 'triton'"),
    ],
)
def test_refusals(change, error, message):
    parameters = Parameters.random(6, (1, 3), 6, dtype=torch.float32)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    arguments = dict(zip(names, parameters.fc, strict=True)) | {
        "x": torch.zeros(2, 6, 5, 5),
        "branch_weights": parameters.branch_weights,
        "branch_biases": parameters.branch_biases,
    }
    with pytest.raises(error, match=message):
        mfdf(**(arguments | change))


def test_fused_refuses_dense_branches():
    with pytest.raises(NotImplementedError, match="the branches must be depthwise, groups = 6, got 1"):
        Parameters.random(6, (1, 3), 1)(draw(2, 6, 5, 5), 1, 1, "fused")


def test_the_comparison_of_fused_and_reference_can_fail(monkeypatch):
    """An operator with wrong biases must not pass for a right one."""
    merged_convolution = operator.merged_convolution

    def wrong_biases(x, alpha, stacked_kernels, bias, tap_spacing):
        return merged_convolution(x, alpha, stacked_kernels, 0.99 * bias, tap_spacing)

    x = draw(2, 6, 5, 7, dtype=torch.float32)
    parameters = Parameters.random(6, (1, 3), 6, dtype=torch.float32)
    monkeypatch.setattr(operator, "merged_convolution", wrong_biases)
    assert relative_error(parameters(x, 1, 6, "fused"), parameters(x, 1, 6, "reference")) > 1e-4
