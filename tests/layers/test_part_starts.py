"""The start of every part, and its type."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from tests.support.parts import (
    each_mfdf,
    make_layer,
)

RESETS = {
    "its own": lambda layer: layer.reset_parameters(),
    "every module, parents first": lambda layer: _reset(layer.modules()),
    "every module, parts first": lambda layer: _reset(reversed(list(layer.modules()))),
    "the parts alone": lambda layer: _reset(part for part in layer.modules() if not list(part.children())),
}


def _reset(modules):
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


STARTS = {
    "CFE": CFE,
    "CSFE": CSFE,
    "MFDF": MFDF,
    "MFDF, dense": functools.partial(MFDF, groups=1, kernel_sizes=(1, 3)),
    "MFDF, batch norm": functools.partial(MFDF, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU),
}


@pytest.mark.parametrize("make", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS.keys())
@pytest.mark.parametrize("copied", [False, True])
def test_every_way_to_reset_ends_at_the_documented_start(make, reset, copied):
    torch.manual_seed(0)
    layer = make(64, device="meta")
    if copied:
        layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
    reset(layer)
    for name, parameter in layer.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name  # of a norm: 1, 0
            continue
        noise = parameter.detach().clone()
        if noise.shape[1:2] == (1,) and noise.ndim == 4:  # a depthwise kernel: a Dirac kernel plus noise
            noise[:, :, noise.shape[2] // 2, noise.shape[3] // 2] -= 1
        assert 0.015 < noise.std() < 0.025, name


def test_parts_are_of_pytorchs_own_types():
    layer = MFDF(8, norm_layer=nn.BatchNorm2d)
    assert {type(branch.conv) for branch in layer.branches} == {nn.Conv2d}
    assert type(layer.fc1) is type(layer.fc2) is nn.Linear
    assert (type(CSFE(8).cfe), type(CSFE(8).sfe)) == (CFE, SFE)


@each_mfdf
def test_a_deleted_layer_is_freed_at_once(name):
    layer = make_layer(name)
    parts = [weakref.ref(part) for part in layer.modules()]
    gc.disable()
    try:
        del layer
        assert not [part() for part in parts if part() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_noise_has_its_deviation_and_no_outlier_in_any_dtype(dtype):
    torch.manual_seed(0)
    layer = MFDF(512, dtype=dtype)
    for weight in (layer.fc1.weight, layer.fc2.weight, layer.branches[3].weight):
        noise = weight.detach().double()
        if noise.ndim == 4:
            noise[:, :, 3, 3] -= 1
        assert noise.std() == pytest.approx(0.02, rel=0.05)
        assert noise.abs().max() < 7 * 0.02


def test_float32_starts_as_pytorch_draws_it():
    fc1 = MFDF(8).fc1
    torch.manual_seed(0)
    fc1.reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(fc1.weight, nn.init.trunc_normal_(torch.empty(fc1.weight.shape), std=0.02))
