import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.functional import mfdf
from tests.support.agreement import has_memory_format, relative_error
from tests.support.inputs import MEMORY_FORMATS, batches, draw, memory_formats, seeds, sides
from tests.support.mfdf import MfdfParameters, branch_shapes


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
    parameters = MfdfParameters.random(6, sizes, groups, bias, seed=seed)
    expected = parameters.run_oracle(x, dilations, groups)
    for impl in ("reference", "fused") if groups == 6 else ("reference",):
        y = parameters(x, dilations, groups, impl)
        assert relative_error(y, expected) < 1e-12
        assert has_memory_format(y, memory_format)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 3)])
def test_gradients(impl, height, width):
    x = draw(2, 4, height, width)
    parameters = MfdfParameters.random(4, (1, 5), 4, hidden=3)
    inputs = [tensor.requires_grad_() for tensor in (x, *parameters.tensors())]

    def call(x, w1, w2, b1, b2, *fc):
        return mfdf(x, [w1, w2], [b1, b2], *fc, (1, 2), impl=impl)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_every_dtype_is_computed_in_float32(impl, memory_format):
    parameters = MfdfParameters.random(6, (1, 3, 5), 6)
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
    parameters = MfdfParameters.random(6, (1, 3), 6)
    tensors = [tensor.requires_grad_() for tensor in parameters.tensors()]
    y = parameters(draw(0, 6, 4, 5), 1, 6, impl)
    assert y.shape == (0, 6, 4, 5)
    for gradient in torch.autograd.grad(y.sum(), tensors):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_sample_alone_equals_the_sample_in_a_batch(impl):
    x = draw(5, 6, 7, 3)
    parameters = MfdfParameters.random(6, (1, 3, 7), 6)
    together = parameters(x, 1, 6, impl)
    alone = torch.cat([parameters(sample, 1, 6, impl) for sample in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


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
    parameters = MfdfParameters.random(6, (1, 3), 6, dtype=torch.float32)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    arguments = dict(zip(names, parameters.fc, strict=True)) | {
        "x": torch.zeros(2, 6, 5, 5),
        "branch_weights": parameters.branch_weights,
        "branch_biases": parameters.branch_biases,
    }
    with pytest.raises(error, match=message):
        mfdf(**(arguments | change))
