import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.functional import cfe
from kfde_layers.fused.csfe.moments import csfe_from_moments
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.ops.cfe import cfe_gate
from tests.support import oracle
from tests.support.agreement import as_numpy, has_memory_format, relative_error
from tests.support.gates import AT_THRESHOLD, groups_of_one_value, input_away_from_threshold
from tests.support.inputs import MEMORY_FORMATS, batches, draw, draw_affine, even_channels, memory_formats, seeds, sides


def test_worked_example():
    # One group, mean 3, variance 1: x_hat = (1, -1) but for eps. gamma = (1, 3) gives w = (1/4, 3/4), so
    # z = (1/4, -3 * 3/4): the first element is open, the second keeps r = sigmoid(-9/4) and gives it away.
    x = torch.tensor([4.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    y = cfe(x, torch.tensor([1.0, 3.0]), torch.zeros(2), num_groups=1, eps=1e-12)
    r = 1 / (1 + math.exp(9 / 4))
    torch.testing.assert_close(y.flatten(), torch.tensor([4 + 2 * r, 2 * r], dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", "fused", "compiled equations"])
def test_an_element_at_the_threshold_is_closed(impl):
    x, weight = groups_of_one_value()
    for beta, expected in AT_THRESHOLD:
        bias = torch.full((4,), beta)
        if impl == "compiled equations":
            y = csfe_from_moments(x, weight, bias, CsfeOptions(num_groups=2))
        else:
            y = cfe(x, weight, bias, num_groups=2, impl=impl)
        assert y[0, :, 0, 0].tolist() == expected


@given(batches, even_channels, sides, sides, seeds, st.sampled_from([0.1, 0.5, 0.7]), memory_formats, st.data())
def test_equals_the_paper_in_loops(batch, channels, height, width, seed, threshold, memory_format, data):
    num_groups = data.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    x = draw(batch, channels, height, width, seed=seed, memory_format=memory_format)
    weight, bias = draw_affine(channels, seed)
    y = cfe(x, weight, bias, num_groups, threshold)
    expected = oracle.cfe(as_numpy(x), as_numpy(weight), as_numpy(bias), num_groups, threshold)
    assert relative_error(y, expected) < 1e-12
    assert has_memory_format(y, memory_format)


def test_every_dtype_is_computed_in_float32():
    x = draw(2, 34, 5, 7)
    weight, bias = draw_affine(34, seed=0)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        rounded = x.to(dtype)
        y = cfe(rounded, weight, bias, 2)
        expected = oracle.cfe(as_numpy(rounded), as_numpy(weight), as_numpy(bias), 2)
        assert y.dtype == dtype
        assert relative_error(y, expected) < bound  # the result itself is rounded


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_leaves_the_gates_as_they_are(dtype, bound):
    x, weight, bias = draw(1, 768, 7, 7, dtype=dtype), torch.ones(768, dtype=dtype), torch.zeros(768, dtype=dtype)
    expected = oracle.cfe(as_numpy(x), as_numpy(weight), as_numpy(bias), 16)
    assert relative_error(cfe(x, weight, bias, 16), expected) < bound
    _, is_open = cfe_gate(x.float(), weight, bias, 16, 0.5, 1e-5)
    assert abs(is_open.double().mean() - 0.5) < 0.01


@pytest.mark.parametrize("total", [0.0, 1e-9, -1e-9, 1e-3, -1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanishing_sum_of_gamma_gives_finite_numbers(total, dtype):
    x = draw(2, 6, 5, 7, dtype=dtype).requires_grad_()
    weight = torch.tensor([1.0, -1, 2, -2, 3, -3], dtype=dtype)
    weight[0] += total
    weight.requires_grad_()
    bias = torch.zeros(6, dtype=dtype, requires_grad=True)
    y = cfe(x, weight, bias, num_groups=2)
    y.square().sum().backward()
    for name, tensor in {"y": y, "x": x.grad, "weight": weight.grad, "bias": bias.grad}.items():
        assert tensor.isfinite().all(), name
    expected = oracle.cfe(as_numpy(x), as_numpy(weight), as_numpy(bias), 2)
    if dtype == torch.float64:
        assert relative_error(y, expected) < 1e-12


def test_the_sign_of_the_sum_of_gamma_flips_every_gate():
    x, bias = draw(2, 6, 5, 7), torch.zeros(6, dtype=torch.float64)
    _, plus = cfe_gate(x, torch.ones(6), bias, 2, 0.5, 1e-5)
    _, minus = cfe_gate(x, -torch.ones(6), bias, 2, 0.5, 1e-5)
    assert torch.equal(plus, ~minus)


def test_gradients():
    weight, bias = draw_affine(6, seed=1)
    x = input_away_from_threshold(
        lambda x: cfe(x, weight, bias, 3, impl="reference"),
        *(2, 6, 3, 5),
        margin=1e-3,
        first_seed=1,
        dtype=torch.float64,
    )
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *inputs: cfe(*inputs, num_groups=3), inputs)


def test_a_sample_alone_equals_the_sample_in_a_batch():
    x = draw(5, 16, 7, 3)
    weight, bias = draw_affine(16, seed=0)
    together = cfe(x, weight, bias, 4)
    alone = torch.cat([cfe(sample, weight, bias, 4) for sample in x.split(1)])
    assert torch.equal(together, alone)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(cfe(x[order], weight, bias, 4), together[order])


def test_empty_batch_and_non_contiguous_input():
    weight, bias = draw_affine(6, seed=0)
    assert cfe(draw(0, 6, 4, 5), weight, bias, 2).shape == (0, 6, 4, 5)
    x = draw(3, 12, 9, 11)[:, ::2, 1::2, ::3]
    torch.testing.assert_close(cfe(x, weight, bias, 2), cfe(x.contiguous(), weight, bias, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_a_large_mean_does_not_spoil_the_gate(memory_format):
    x = draw(2, 16, 23, 29, dtype=torch.float32, memory_format=memory_format) + 1e6
    weight, bias = torch.ones(16), torch.zeros(16)
    _, is_open = cfe_gate(x, weight, bias, 4, 0.5, 1e-5)
    x_hat = 16 * oracle.cfe_logits(as_numpy(x), as_numpy(weight), as_numpy(bias), 4)
    assert abs(x_hat[is_open.numpy() != (x_hat > 0)]).max(initial=0) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 6, 5)}, ValueError, r"x must have shape \(N, C, H, W\), got 3 dimensions: \(2, 6, 5\)"),
        (
            {"x": torch.zeros(2, 6, 5, 5, dtype=torch.int64)},
            TypeError,
            r"x must be a floating-point tensor \(.*\), got torch.int64",
        ),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 8, 5, 5)}, ValueError, "x must have 6 channels in dimension 1, got 8"),
        ({"weight": torch.ones(6, 1)}, ValueError, r"weight must have shape \(6,\), got \(6, 1\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"num_groups": 4}, ValueError, "num_groups must divide channels = 6, got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int, got 2.0"),
        ({"threshold": 1.0}, ValueError, "threshold must lie strictly between 0 and 1, got 1.0"),
        ({"threshold": 0}, ValueError, "threshold must lie strictly between 0 and 1, got 0"),
        ({"threshold": math.nan}, ValueError, "threshold must lie strictly between 0 and 1, got nan"),
        ({"threshold": "half"}, TypeError, "threshold must be a number, got 'half'"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"impl": "quick"}, ValueError, "impl must be one of 'auto', 'reference', 'fused', got 'quick'"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"x": torch.zeros(2, 6, 5, 5), "weight": torch.ones(6), "bias": torch.zeros(6), "num_groups": 2}
    with pytest.raises(error, match=message):
        cfe(**(arguments | change))


def test_odd_channels_are_refused():
    with pytest.raises(ValueError, match="channels must be even, since CFE crosses two halves of them, got 5"):
        cfe(torch.zeros(2, 5, 3, 3), torch.ones(5), torch.zeros(5), 1)
