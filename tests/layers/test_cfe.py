import pytest
import torch

from kfde_layers import CFE
from kfde_layers.functional import cfe
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import count_parameters
from tests.support.inputs import draw


@pytest.mark.parametrize(
    ("channels", "num_groups"), [(2, 2), (34, 2), (40, 10), (48, 16), (96, 16), (768, 16), (46, 2)]
)
def test_the_default_is_the_largest_divisor_up_to_16(channels, num_groups):
    assert CFE(channels).num_groups == num_groups


def test_starts_as_a_plain_normalisation():
    layer = CFE(6)
    assert torch.equal(layer.weight, torch.ones(6))
    assert torch.equal(layer.bias, torch.zeros(6))
    assert count_parameters(layer) == 12
    scatter_parameters(layer).reset_parameters()
    assert torch.equal(layer.weight, torch.ones(6))


def test_calls_the_function_with_its_own_parameters():
    layer = scatter_parameters(CFE(6, num_groups=3, threshold=0.45, eps=1e-3))
    x = draw(2, 6, 5, 7, dtype=torch.float32)
    assert torch.equal(layer(x), cfe(x, layer.weight, layer.bias, 3, 0.45, 1e-3))


def test_the_gate_explains_the_output():
    layer = scatter_parameters(CFE(6, threshold=0.48)).double()
    x = draw(2, 6, 5, 7)
    r, is_open = layer.gate(x)
    assert r.min() > 0
    assert r.max() < 1
    assert torch.equal(is_open, r > 0.48)
    strong, weak = torch.where(is_open, x, r * x), torch.where(is_open, 0, r * x)
    torch.testing.assert_close(layer(x), strong + weak.roll(3, dims=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_of_the_gates_are_open_in_low_precision(dtype):
    layer, x = CFE(768, dtype=dtype), draw(4, 768, 7, 7, dtype=dtype)
    r, is_open = layer.gate(x)
    assert r.dtype == torch.float32
    assert abs(is_open.double().mean() - 0.5) < 0.01
    # Compared in its own dtype, most gates would be closed, and in bfloat16 all: this test guards against that fault.
    naive = (r.to(dtype) > 0.5).double().mean()
    assert naive == 0 if dtype == torch.bfloat16 else naive < 0.3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 7}, "channels must be even, since CFE crosses two halves of them, got 7"),
        ({"channels": 8, "num_groups": 3}, "num_groups must divide channels = 8, got 3"),
        ({"channels": 8, "threshold": 1.5}, "threshold must lie strictly between 0 and 1, got 1.5"),
        ({"channels": 8, "eps": -1e-5}, "eps must be positive and finite, got -1e-05"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CFE(**kwargs)


def test_repr():
    assert repr(CFE(8, threshold=0.4)) == "CFE(8, num_groups=8, threshold=0.4, eps=1e-05, impl='auto')"
