import pytest
import torch

from kfde_layers import CFE, CSFE, SFE
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import draw

OPTIONS = {"num_groups": 3, "threshold": 0.45, "lambd": 1e-2, "beta": 0.3, "correction": 1, "eps": 1e-3}


@pytest.mark.parametrize("arrangement", ["parallel", "cfe_sfe", "sfe_cfe"])
def test_options_reach_the_branches(arrangement):
    layer = scatter_parameters(CSFE(6, **OPTIONS, arrangement=arrangement, fusion="mean")).double()
    assert type(layer.cfe) is CFE
    assert type(layer.sfe) is SFE
    x = draw(2, 6, 5, 7)
    expected = {
        "parallel": (layer.cfe(x) + layer.sfe(x)) / 2,
        "cfe_sfe": layer.sfe(layer.cfe(x)),
        "sfe_cfe": layer.cfe(layer.sfe(x)),
    }
    torch.testing.assert_close(layer(x), expected[arrangement], rtol=1e-12, atol=1e-12)


def test_the_sum_raises_the_spread_and_the_mean_does_not():
    x = draw(4, 64, 14, 14)
    assert 1.3 < CSFE(64).double()(x).std() < 1.7
    assert 0.6 < CSFE(64, fusion="mean").double()(x).std() < 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 7}, "channels must be even"),
        (
            {"channels": 8, "arrangement": "both"},
            "arrangement must be one of 'parallel', .*, got 'both'",
        ),
        ({"channels": 8, "fusion": "concat"}, "fusion must be one of 'sum', 'mean', got 'concat'"),
        ({"channels": 8, "num_groups": 5}, "num_groups must divide channels = 8, got 5"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CSFE(**kwargs)


def test_repr():
    assert "arrangement='cfe_sfe', fusion='sum', impl='auto'" in repr(CSFE(8, arrangement="cfe_sfe"))
