import pytest
import torch

from kfde_layers import SFE
from kfde_layers.functional import sfe
from tests.support.inputs import draw


def test_calls_the_function_with_its_own_options():
    x = draw(2, 6, 5, 7, dtype=torch.float32)
    assert torch.equal(SFE(6, lambd=1e-2, beta=0.3, correction=1)(x), sfe(x, 1e-2, 0.3, 1))


def test_has_no_parameters_and_needs_no_channels():
    assert not SFE().state_dict()
    x = draw(2, 6, 5, 7, dtype=torch.float32)
    assert torch.equal(SFE()(x), SFE(6, device="cpu", dtype=torch.float32)(x))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"channels": -2}, ValueError, "channels must be at least 1, got -2"),
        ({"channels": "8"}, TypeError, "channels must be an int, got '8'"),
        ({"lambd": 0}, ValueError, "lambd must be positive and finite, got 0"),
        ({"beta": "0.5"}, TypeError, "beta must be a number, got '0.5'"),
        ({"correction": -1}, ValueError, "correction must be at least 0, got -1"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        SFE(**kwargs)


def test_unfit_inputs_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got 3 dimensions: \(8, 5, 5\)"):
        SFE(8)(torch.zeros(8, 5, 5))


def test_repr():
    assert repr(SFE(beta=0.2)) == "SFE(lambd=0.0001, beta=0.2, correction=0, impl='auto')"
