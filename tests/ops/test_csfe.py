import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfde_layers.functional import cfe, csfe, sfe
from kfde_layers.ops.csfe import ARRANGEMENTS, FUSIONS
from tests.support import oracle
from tests.support.agreement import as_numpy, has_memory_format, relative_error
from tests.support.gates import input_away_from_threshold
from tests.support.inputs import batches, draw, draw_affine, even_channels, memory_formats, seeds, sides


@given(
    batches,
    even_channels,
    sides,
    sides,
    seeds,
    st.sampled_from(ARRANGEMENTS),
    st.sampled_from(FUSIONS),
    st.sampled_from([0.4, 0.5]),
    memory_formats,
)
def test_equals_the_paper_in_loops(batch, channels, height, width, seed, arrangement, fusion, threshold, memory_format):
    x = draw(batch, channels, height, width, seed=seed, memory_format=memory_format)
    weight, bias = draw_affine(channels, seed)
    options = {"threshold": threshold, "lambd": 1e-3, "beta": 0.2, "eps": 1e-4}
    y = csfe(x, weight, bias, 2, **options, arrangement=arrangement, fusion=fusion)
    arrays = (as_numpy(tensor) for tensor in (x, weight, bias))
    expected = oracle.csfe(*arrays, 2, **options, arrangement=arrangement, fusion=fusion)
    assert relative_error(y, expected) < 1e-12
    assert has_memory_format(y, memory_format)


def test_is_made_of_its_branches():
    x, (weight, bias) = draw(2, 6, 5, 7), draw_affine(6)

    def cfe_of(x):
        return cfe(x, weight, bias, 3)

    expected = {
        ("parallel", "sum"): cfe_of(x) + sfe(x),
        ("parallel", "mean"): (cfe_of(x) + sfe(x)) / 2,
        ("cfe_sfe", "sum"): sfe(cfe_of(x)),
        ("cfe_sfe", "mean"): sfe(cfe_of(x)),
        ("sfe_cfe", "sum"): cfe_of(sfe(x)),
        ("sfe_cfe", "mean"): cfe_of(sfe(x)),
    }
    assert set(expected) == set(itertools.product(ARRANGEMENTS, FUSIONS))
    for (arrangement, fusion), value in expected.items():
        y = csfe(x, weight, bias, 3, arrangement=arrangement, fusion=fusion)
        torch.testing.assert_close(y, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_nothing_is_rounded_between_the_branches(arrangement):
    x = draw(2, 6, 5, 7).to(torch.bfloat16)
    weight, bias = torch.ones(6), torch.zeros(6)
    y = csfe(x, weight, bias, 3, arrangement=arrangement)
    expected = oracle.csfe(as_numpy(x), as_numpy(weight), as_numpy(bias), 3, arrangement=arrangement)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2**-8


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_gradients(arrangement):
    weight, bias = draw_affine(6, seed=4)
    x = input_away_from_threshold(
        lambda x: csfe(x, weight, bias, 3, arrangement=arrangement, impl="reference"),
        *(2, 6, 3, 5),
        margin=1e-3,
        first_seed=4,
        dtype=torch.float64,
    )
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *inputs: csfe(*inputs, num_groups=3, arrangement=arrangement), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrangement": "serial"}, "arrangement must be one of 'parallel', 'cfe_sfe', 'sfe_cfe', got 'serial'"),
        ({"fusion": "max"}, "fusion must be one of 'sum', 'mean', got 'max'"),
        ({"x": torch.zeros(2, 8, 5, 5)}, "x must have 6 channels in dimension 1, got 8"),
        ({"num_groups": 4}, "num_groups must divide channels = 6, got 4"),
        ({"lambd": -1.0}, "lambd must be positive and finite, got -1.0"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(2, 6, 5, 5), "weight": torch.ones(6), "bias": torch.zeros(6), "num_groups": 2}
    with pytest.raises(ValueError, match=message):
        csfe(**(arguments | change))
