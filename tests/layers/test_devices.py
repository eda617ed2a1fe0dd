"""A layer refuses parameters on another device than its input, which PyTorch's convolutions do not."""

import functools
import re

import pytest
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, insert
from kfde_layers.functional import cfe, mfdf
from kfde_layers.layers import Blend

LAYERS = {
    f"{name}, {impl}": functools.partial(make, impl=impl)
    for name, make in {
        "CFE": CFE,
        "CSFE": CSFE,
        "CSFE, cfe_sfe": functools.partial(CSFE, arrangement="cfe_sfe"),
        "MFDF": MFDF,
    }.items()
    for impl in ("auto", "fused", "reference")
} | {
    "MFDF, dense": functools.partial(MFDF, groups=1, kernel_sizes=(1, 3)),
    "MFDF, ReLU": functools.partial(MFDF, act_layer=nn.ReLU),
    "MFDF, dense, ReLU, no bias": functools.partial(MFDF, groups=1, bias=False, act_layer=nn.ReLU),
    "MFDF, batch norm": functools.partial(MFDF, norm_layer=nn.BatchNorm2d),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def owner_and_key(layer, name):
    parent, _, key = name.rpartition(".")
    return layer.get_submodule(parent), key


@pytest.mark.parametrize("side", [5, 40])  # where "auto" takes the one and the other implementation
@pytest.mark.parametrize("mode", [True, False])
@each_layer
def test_one_parameter_on_another_device_is_refused(make, mode, side):
    for name, parameter in make(64).named_parameters():
        layer = make(64).train(mode)
        owner, key = owner_and_key(layer, name)
        setattr(owner, key, nn.Parameter(parameter.to("meta")))
        with pytest.raises((ValueError, RuntimeError), match="device") as refusal:
            layer(torch.zeros(2, 64, side, side))
        assert "meta" in str(refusal.value), name
        assert "cpu" in str(refusal.value), name


@each_layer
def test_a_layer_and_a_map_on_different_devices_are_refused(make):
    for device, map_device in (("meta", "cpu"), ("cpu", "meta")):
        with pytest.raises((ValueError, RuntimeError), match="device"):
            make(8, device=device)(torch.zeros(2, 8, 5, 5, device=map_device))


@each_layer
def test_one_device_is_enough(make):
    assert make(8, device="meta")(torch.zeros(2, 8, 5, 5, device="meta")).is_meta


@pytest.mark.parametrize("mode", [True, False])
def test_called_branches_are_refused_too(mode):
    layer = MFDF(8, groups=1).train(mode)
    layer.fc1.register_forward_hook(lambda *args: None)
    layer.branches[0].register_forward_hook(lambda *args: None)
    layer.branches[3].to("meta")
    message = "weight of branches[3] must be on the device of x, cpu, got meta"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.zeros(2, 8, 5, 5))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.branch_weights(torch.zeros(2, 8, 5, 5))


def test_functions_name_argument_and_devices():
    x, ones = torch.zeros(1, 2, 3, 3), torch.ones(2)
    with pytest.raises(ValueError, match="cfe: bias must be on the device of x, cpu, got meta"):
        cfe(x, ones, ones.to("meta"), 1)
    kernels, fc = [torch.ones(2, 1, 3, 3)], (torch.ones(4, 2), torch.ones(4), torch.ones(2, 4), torch.ones(2))
    for index, name in enumerate(["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]):
        moved = [tensor.to("meta") if index == place else tensor for place, tensor in enumerate(fc)]
        with pytest.raises(ValueError, match=f"mfdf: {name} must be on the device of x, cpu, got meta"):
            mfdf(x, kernels, None, *moved)


def test_a_block_left_on_meta_gives_no_answer():
    model = insert(nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": MFDF}, example_input=torch.zeros(1, 3, 9, 9))
    model[0].kfde.to_empty(device="meta")
    with pytest.raises(ValueError, match="must be on the device of x, cpu, got meta"):
        model(torch.zeros(1, 3, 9, 9))
    with pytest.raises(RuntimeError, match="device"):
        Blend(nn.Identity(), 8, device="meta")(torch.zeros(1, 8, 3, 3))
