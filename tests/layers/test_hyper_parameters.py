"""Hyper-parameters that are set on a layer after it was made."""

import copy

import pytest
import torch

from kfde_layers import CFE, CSFE, SFE
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import draw

CHANGES = [
    (CFE, "num_groups", 4),
    (CFE, "threshold", 0.52),
    (CFE, "eps", 0.1),
    (SFE, "lambd", 0.1),
    (SFE, "beta", -0.3),
    (SFE, "correction", 1),
    (CSFE, "cfe.num_groups", 4),
    (CSFE, "cfe.threshold", 0.52),
    (CSFE, "cfe.eps", 0.1),
    (CSFE, "sfe.lambd", 0.1),
    (CSFE, "sfe.beta", -0.3),
    (CSFE, "sfe.correction", 1),
    (CSFE, "arrangement", "cfe_sfe"),
    (CSFE, "arrangement", "sfe_cfe"),
    (CSFE, "fusion", "mean"),
]
each_change = pytest.mark.parametrize(("make", "name", "value"), CHANGES)


def set_on(layer, name, value):
    part, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(part), attribute, value)


@each_change
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_value_holds_from_the_next_call_on(make, name, value, impl):
    x = draw(2, 8, 5, 7, dtype=torch.float32)
    layer = scatter_parameters(make(8, impl=impl))
    before = layer(x)
    made_so = make(8, impl=impl, **{name.rpartition(".")[2]: value})
    made_so.load_state_dict(layer.state_dict())
    old = getattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])

    set_on(layer, name, value)
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), made_so(x))
    assert torch.equal(copy.deepcopy(layer)(x), made_so(x))
    set_on(layer, name, old)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("make", "name", "value", "error", "message"),
    [
        (CFE, "num_groups", 3, ValueError, "cfe: num_groups must divide channels = 8, got 3"),
        (CFE, "threshold", 1.5, ValueError, "cfe: threshold must lie strictly between 0 and 1, got 1.5"),
        (SFE, "lambd", 0.0, ValueError, "sfe: lambd must be positive and finite, got 0.0"),
        (SFE, "correction", "one", TypeError, "sfe: correction must be an int, got 'one' of type str"),
        (CSFE, "cfe.eps", None, TypeError, "cfe: eps must be a number, got None of type NoneType"),
        (CSFE, "sfe.beta", float("nan"), ValueError, "sfe: beta must be finite, got nan"),
        (CSFE, "arrangement", "both", ValueError, "csfe: arrangement must be one of 'parallel'"),
        (CSFE, "fusion", "max", ValueError, "csfe: fusion must be one of 'sum', 'mean', got 'max'"),
    ],
)
def test_a_wrong_value_is_refused_at_every_call(make, name, value, error, message):
    layer, x = make(8), draw(1, 8, 3, 3, dtype=torch.float32)
    layer(x)
    set_on(layer, name, value)
    for _ in range(2):
        with pytest.raises(error, match=message):
            layer(x)


@pytest.mark.parametrize("make", [CFE, CSFE])
@pytest.mark.parametrize(
    ("channels", "message"),
    [(6, "cfe: num_groups must divide channels = 6, got 8"), (7, "cfe: channels must be even, .* got 7")],
)
def test_other_parameters_must_fit_the_groups(make, channels, message):
    """As after structured pruning, which replaces the parameters of a layer by shorter ones."""
    layer = make(8)
    layer(draw(1, 8, 3, 3, dtype=torch.float32))
    part = getattr(layer, "cfe", layer)
    part.weight, part.bias = (torch.nn.Parameter(torch.ones(channels)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        layer(draw(1, channels, 3, 3, dtype=torch.float32))
    part.num_groups = 1
    if channels % 2 == 0:
        assert layer(draw(1, channels, 3, 3, dtype=torch.float32)).shape == (1, channels, 3, 3)


@each_change
def test_a_compiled_layer_takes_it_too(make, name, value):
    torch.compiler.reset()
    x = draw(2, 8, 5, 7, dtype=torch.float32)
    layer = scatter_parameters(make(8))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(x)
    set_on(layer, name, value)
    torch.testing.assert_close(compiled(x), layer(x))
