"""Parts that are replaced after construction; compared with calling each part in float64."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion

from kfde_layers import MFDF
from kfde_layers.testing import random_tensor
from tests.support.parts import (
    MADE,
    WITH_NORM,
    assert_calls_its_parts,
    call_parts,
    changed,
    draw_map,
    each_layer,
    each_mfdf,
    make_layer,
)


class ScaledConv(nn.Conv2d):
    """A convolution of another type."""

    def forward(self, x):
        return 2 * super().forward(x)


def _own_forward(module):
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


def _own_conv_forward(module):
    def forward(self, x, weight, bias):
        return 2 * nn.Conv2d._conv_forward(self, x, weight, bias)

    module._conv_forward = types.MethodType(forward, module)


BRANCHES = {
    "reflecting padding": (lambda: nn.Conv2d(8, 8, 5, padding=2, padding_mode="reflect", groups=8), "another kernel"),
    "another kernel size": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), "another kernel size"),
    "another dilation": (lambda: nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8), "another kernel size"),
    "other groups": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=2), "another kernel size"),
    "padding by name": (lambda: nn.Conv2d(8, 8, 5, padding="same", groups=8), "another kernel size"),
    "no bias": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), "another kernel size"),
    "another type": (lambda: ScaledConv(8, 8, 5, padding=2, groups=8), "is of type ScaledConv instead of Conv2d"),
    "several modules": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), "is of type Sequential instead of"),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_replaced_branch_is_called(branch):
    make, reason = BRANCHES[branch]

    def replace(layer):
        layer.branches[2] = make().double()

    assert_calls_its_parts(changed("MFDF", replace))
    layer = changed("MFDF", replace)()
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=f"impl='fused' cannot run: .*{reason}"):
        layer(draw_map())


@pytest.mark.parametrize("branch", [lambda: nn.Conv2d(8, 8, 5, 2, 2), lambda: nn.Conv2d(8, 4, 5, padding=2)])
def test_a_replaced_branch_that_changes_the_shape_is_refused(branch):
    layer = make_layer("MFDF")
    layer.branches[2] = branch().double()
    with pytest.raises(ValueError, match=r"the output of branch 2 must have shape \(4, 8, 33, 35\), got"):
        layer(draw_map())


def test_a_replaced_fc2_of_another_width_is_refused():
    layer = make_layer("MFDF")
    layer.fc2 = nn.Linear(32, 24).double()
    with pytest.raises(ValueError, match=r"the output of fc2 must have shape \(4, 32\), got \(4, 24\)"):
        layer(draw_map())


@each_mfdf
def test_fc1_and_fc2_may_be_anything_that_maps_their_shapes(name):
    def replace(layer):
        width = layer.fc2.out_features
        layer.fc1 = nn.Sequential(nn.Linear(8, 5), nn.Tanh()).double()
        layer.fc2 = nn.Linear(5, width, bias=False).double()

    assert_calls_its_parts(changed(name, replace))


@pytest.mark.parametrize("change", [_own_forward, _own_conv_forward])
def test_a_branch_with_a_forward_of_its_own_is_called(change):
    layer, x = make_layer("MFDF"), draw_map()
    before = layer(x)
    change(layer.branches[1])
    torch.testing.assert_close(layer(x), call_parts(layer, x), rtol=1e-10, atol=1e-10)
    assert not torch.equal(layer(x), before)
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=r"branches\[1\] has a forward of its own"):
        layer(x)


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith("CSFE")])
@pytest.mark.parametrize("part", ["cfe", "sfe"])
def test_a_replaced_part_of_csfe_is_called(name, part):
    make = changed(name, lambda layer: setattr(layer, part, nn.Sequential(getattr(layer, part), nn.GELU())))
    assert_calls_its_parts(make)
    layer = make()
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=f"{part} is of type Sequential instead of {part.upper()}"):
        layer(draw_map())


def test_options_of_the_parts_are_read_at_the_call():
    layer, x = make_layer("CSFE"), draw_map()
    layer.cfe.threshold, layer.sfe.beta = 0.45, 0.1
    torch.testing.assert_close(layer(x), call_parts(layer, x), rtol=1e-10, atol=1e-10)


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose tensors are buffers, as detectors have it."""

    def __init__(self, channels):
        super().__init__()
        for index, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            self.register_buffer(name, 1 + 0.1 * index * random_tensor(channels, seed=index).abs())

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm of another type."""

    def forward(self, x):
        return super().forward(x) + 1


NORMS = {
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "Identity": nn.Identity,
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(8),
    "BatchNorm2d without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "BatchNorm2d without both": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    "a subclass of BatchNorm2d": lambda: ShiftedBatchNorm2d(8),
    "another BatchNorm2d": lambda: nn.BatchNorm2d(8, eps=0.1),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
}


@pytest.mark.cell("Tools that change parts", "a replaced norm")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", WITH_NORM)
def test_a_norm_that_is_replaced_after_construction(name, norm):
    def replace(layer):
        for branch in layer.branches:
            branch.norm = NORMS[norm]().double()

    if norm == "SyncBatchNorm":  # in training it needs a process group
        layer = changed(name, replace)()
        torch.testing.assert_close(layer(draw_map()), call_parts(layer, draw_map()), rtol=1e-10, atol=1e-10)
    else:
        assert_calls_its_parts(changed(name, replace))


@pytest.mark.parametrize("name", WITH_NORM)
def test_convolutions_that_took_over_their_norm(name):
    def fuse(layer):
        for branch in layer.branches:
            branch.conv = fusion.fuse_conv_bn_eval(branch.conv, branch.norm)
            branch.norm = nn.Identity()

    make = changed(name, fuse)
    torch.testing.assert_close(make()(draw_map()), make_layer(name)(draw_map()), rtol=1e-10, atol=1e-10)
    assert_calls_its_parts(make)


@pytest.mark.parametrize("name", WITH_NORM)
def test_pytorch_fuses_the_modules_of_a_branch(name):
    layer, x = make_layer(name), draw_map()
    before = layer(x)
    fused = torch.ao.quantization.fuse_modules(layer, [[f"branches.{k}.conv", f"branches.{k}.norm"] for k in range(4)])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), before, rtol=1e-10, atol=1e-10)


@each_layer
def test_a_graph_of_torch_fx_is_right_in_the_other_mode(name):
    x = draw_map()
    for traced_in in (False, True):
        layer = make_layer(name)
        graph = torch.fx.symbolic_trace(copy.deepcopy(layer).train(traced_in))
        for mode in (not traced_in, traced_in):
            torch.testing.assert_close(graph.train(mode)(x), layer.train(mode)(x), rtol=1e-9, atol=1e-9)


@each_mfdf
def test_fc1_may_be_scripted(name):
    layer, x = make_layer(name), draw_map()
    expected = layer(x)
    layer.fc1 = torch.jit.script(layer.fc1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_an_activation_that_is_no_module_is_refused():
    layer = MFDF(8, norm_layer=nn.BatchNorm2d)
    with pytest.raises(TypeError, match="child module 'act'"):
        layer.branches[0].act = torch.relu


class Counting(nn.Module):
    """A parametrization that counts how often its parameter is read."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def forward(self, weight):
        self.reads += 1
        return weight


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda layer: setattr(layer.branches[1], "bias", None)),
        ({"norm_layer": nn.BatchNorm2d}, lambda layer: None),
        ({"norm_layer": lambda channels: nn.BatchNorm2d(channels, affine=False)}, lambda layer: None),
        ({"norm_layer": nn.BatchNorm2d, "groups": 1}, lambda layer: None),
        ({"norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU}, lambda layer: None),
    ],
)
def test_a_parametrized_weight_is_read_once_a_call(options, change):
    layer = MFDF(8, **options).eval()
    change(layer)
    conv = layer.branches[0].conv if options else layer.branches[0]
    counting = Counting()
    nn.utils.parametrize.register_parametrization(conv, "weight", counting)
    counting.reads = 0
    layer(random_tensor(2, 8, 5, 7))
    assert counting.reads == 1
