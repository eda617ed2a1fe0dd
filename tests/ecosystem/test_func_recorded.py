"""`torch.func` on layers that TorchScript or torch.fx has recorded: their operators give the numbers of the layers."""

import pytest
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import relative_error
from tests.support.inputs import draw

TOLERANCE = 1e-11  # both sides compute in float64
RECORDERS = {"FX": torch.fx.symbolic_trace, "TorchScript": torch.jit.script}


def mfdf_without_a_bias():
    layer = MFDF(6, norm_layer=nn.BatchNorm2d)
    layer.fc2.bias = None
    return layer


# one for each operator, and for each implementation that it has
LAYERS = {
    "kfde::cfe, auto": lambda: CFE(6),
    "kfde::cfe, fused": lambda: CFE(6, impl="fused"),
    "kfde::sfe, auto": SFE,
    "kfde::sfe, fused": lambda: SFE(impl="fused"),
    "kfde::csfe, auto": lambda: CSFE(6, arrangement="cfe_sfe"),
    "kfde::csfe, fused": lambda: CSFE(6, impl="fused"),
    "kfde::mfdf, auto": lambda: MFDF(6),
    "kfde::mfdf, fused": lambda: MFDF(6, dilation=2, impl="fused"),
    "kfde::mfdf_fuse": lambda: MFDF(6, norm_layer=nn.BatchNorm2d),
    "kfde::mfdf_branch_mean, kfde::mfdf_sum_branches": mfdf_without_a_bias,
}


@pytest.fixture(params=[(how, name) for how in RECORDERS for name in LAYERS], ids=" of ".join)
def recorded_and_layer(request):
    """A layer that a tool has recorded, and the layer, both in float64."""
    how, name = request.param
    layer = scatter_parameters(LAYERS[name]()).double().eval()
    recorded = RECORDERS[how](layer)
    for operator in name.split(", kfde::"):
        assert operator.split(",")[0].removeprefix("kfde::") in str(getattr(recorded, "inlined_graph", recorded.graph))
    return recorded, layer


@torch.no_grad()
def test_vmap(recorded_and_layer):
    recorded, layer = recorded_and_layer
    x = draw(3, 2, 6, 5, 7)
    y = torch.vmap(recorded, in_dims=1)(x.movedim(0, 1))
    assert relative_error(y, torch.stack([layer(batch) for batch in x])) < TOLERANCE


def test_gradients_of_each_batch(recorded_and_layer):
    recorded, layer = recorded_and_layer
    x = draw(3, 2, 6, 5, 7).requires_grad_()
    (expected,) = torch.autograd.grad(sum(layer(batch).sin().sum() for batch in x), x)
    gradient = torch.func.grad(lambda batch: recorded(batch).sin().sum())
    assert relative_error(gradient(x[0].detach()), expected[0]) < TOLERANCE
    assert relative_error(torch.vmap(gradient)(x.detach()), expected) < TOLERANCE


def test_jacobian(recorded_and_layer):
    recorded, layer = recorded_and_layer
    x = draw(2, 6, 2, 3)
    expected = torch.autograd.functional.jacobian(lambda x: layer(x).sin().sum(dim=(2, 3)), x)
    jacobian = torch.func.jacrev(lambda x: recorded(x).sin().sum(dim=(2, 3)))(x)
    assert relative_error(jacobian, expected) < TOLERANCE
