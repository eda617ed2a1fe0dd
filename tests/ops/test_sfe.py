import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.functional import sfe
from tests.support import oracle
from tests.support.agreement import as_numpy, has_memory_format, relative_error
from tests.support.inputs import batches, draw, memory_formats, seeds, sides


def test_worked_example():
    # Mean 2, deviations (-1, 1), variance 1: every score is 1/4 + beta, but for lambda.
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    gate = 1 / (1 + math.exp(-0.75))
    torch.testing.assert_close(sfe(x, lambd=1e-12).flatten(), torch.tensor([gate, 3 * gate], dtype=torch.float64))
    # With the divisor n - 1 the variance is 2, and the score 1/8 + beta.
    gate = 1 / (1 + math.exp(-0.625))
    y = sfe(x, lambd=1e-12, correction=1)
    torch.testing.assert_close(y.flatten(), torch.tensor([gate, 3 * gate], dtype=torch.float64))


@given(
    batches,
    st.sampled_from([1, 3, 6]),
    sides,
    sides,
    seeds,
    st.sampled_from([1e-4, 0.5]),
    st.sampled_from([-1.0, 0.5]),
    st.sampled_from([0, 1]),
    memory_formats,
)
def test_equals_the_paper_in_loops(batch, channels, height, width, seed, lambd, beta, correction, memory_format):
    if height * width == correction:
        height = 2  # 0 / 0 in the equations; the next test says what the library does
    x = draw(batch, channels, height, width, seed=seed, memory_format=memory_format)
    y = sfe(x, lambd, beta, correction)
    assert relative_error(y, oracle.sfe(as_numpy(x), lambd, beta, correction)) < 1e-12
    assert has_memory_format(y, memory_format)


def test_one_position_gives_sigmoid_beta_times_x():
    x = draw(3, 5, 1, 1)
    for correction in (0, 1):
        torch.testing.assert_close(sfe(x, correction=correction), x * torch.sigmoid(torch.tensor(0.5)))


def test_every_dtype_is_computed_in_float32():
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        x = 300 * draw(2, 3, 5, 7).to(dtype)  # squares beyond the range of float16
        y = sfe(x)
        assert y.dtype == dtype
        assert relative_error(y, oracle.sfe(as_numpy(x))) < bound


def test_the_gate_lies_between_sigmoid_beta_and_one():
    x = draw(2, 3, 5, 7)
    gate = sfe(x) / x
    assert gate.min() >= torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)) - 1e-12
    assert gate.max() < 1


def test_flips_and_transposes_with_the_map():
    x = draw(2, 3, 5, 7)
    torch.testing.assert_close(sfe(x.flip(3)), sfe(x).flip(3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sfe(x.mT), sfe(x).mT, rtol=1e-12, atol=1e-12)


def test_gradients():
    x = draw(2, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sfe(x), (x,))
    assert torch.autograd.gradcheck(lambda x: sfe(x, 0.1, -0.5, 1), (x,))


def test_a_sample_alone_equals_the_sample_in_a_batch():
    x = draw(5, 3, 7, 3)
    assert torch.equal(sfe(x), torch.cat([sfe(sample) for sample in x.split(1)]))
    assert sfe(x[:0]).shape == (0, 3, 7, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(6, 5)}, ValueError, r"x must have shape \(N, C, H, W\), got 2 dimensions"),
        (
            {"x": torch.zeros(2, 6, 5, 5, dtype=torch.bool)},
            TypeError,
            r"x must be a floating-point tensor \(.*\), got torch.bool",
        ),
        (
            {"x": torch.zeros(2, 6, 5, 5, dtype=torch.complex64)},
            TypeError,
            r"x must be a floating-point tensor \(.*\), got torch.c",
        ),
        ({"lambd": 0.0}, ValueError, "lambd must be positive and finite, got 0.0"),
        ({"beta": math.inf}, ValueError, "beta must be finite, got inf"),
        ({"correction": -1}, ValueError, "correction must be at least 0, got -1"),
        ({"correction": 0.5}, TypeError, "correction must be an int, got 0.5"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        sfe(**({"x": torch.zeros(2, 6, 5, 5)} | change))
