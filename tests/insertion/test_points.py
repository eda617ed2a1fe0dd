import copy

import pytest
import torch
from einops import rearrange
from torch import nn

from kfde_layers import CSFE, SFE, insert, insertion_points
from kfde_layers.insertion import Point
from tests.support.inputs import images
from tests.support.networks import Series, each_host, make_host


@each_host
def test_points_are_named_with_channels_reduction_and_layout(make, points, side):
    model = make_host(make)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    all_points = insertion_points(model, example_input=images(side, 1))
    assert {name: all_points[name] for name in points} == {name: Point(*point) for name, point in points.items()}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    if hasattr(model, "feature_info"):
        assert list(all_points) == [info["module"] for info in model.feature_info]
        assert [point.channels for point in all_points.values()] == [info["num_chs"] for info in model.feature_info]
        assert [point.reduction for point in all_points.values()] == [info["reduction"] for info in model.feature_info]


class Sum(Series):
    """Give each child the same input, and return the sum of their outputs."""

    def forward(self, x):
        return sum(child(x) for child in self.children())


class Unfit(nn.Module):
    """A model with every kind of point that cannot take a block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.twice = nn.ReLU()
        self.never = nn.ReLU()
        self.parts = nn.ModuleDict({"own": Sum(nn.Identity())})
        self.flat = nn.Flatten()

    def forward(self, x):
        return self.flat(self.parts["own"](self.twice(self.twice(self.conv(x)))))


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("convs", SFE, "cannot insert at 'convs': the model has no submodule of that name; close to it: 'conv'"),
        ("", SFE, "cannot insert at '': the model has no submodule of that name"),
        ("never", SFE, "cannot insert at 'never': the forward pass does not call it"),
        ("twice", SFE, "cannot insert at 'twice': the forward pass calls it 2 times"),
        ("parts.own", SFE, "cannot insert at 'parts.own': Sum does not run its children in sequence, and would use"),
        ("parts", SFE, "cannot insert at 'parts': the forward pass does not call it"),
        ("flat", SFE, r"it returns no feature map of the input, .* but torch.float32 of shape \(1, 1792\)"),
        ("conv", CSFE, "channels must be even, since CFE crosses two halves of them, got 7"),
    ],
)
def test_refusals_leave_the_model_unchanged(name, block, message):
    model = Unfit()
    keys, expected = list(model.state_dict()), model(images(16))
    with pytest.raises(ValueError, match=message):
        insert(model, {"parts.own.0": SFE, name: block}, example_input=torch.zeros(1, 3, 16, 16))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images(16)), expected)
    assert not any(hasattr(module, "kfde") or module._forward_hooks for module in model.modules())
    assert set(insertion_points(model, example_input=torch.zeros(1, 3, 16, 16))) == {"conv", "parts.own", "parts.own.0"}


def test_windows_of_a_map_are_no_point():
    class Windows(nn.Module):
        def forward(self, x):
            return rearrange(x, "n c (i h) (j w) -> (n i j) c h w", i=2, j=2)

    class Whole(nn.Module):
        def forward(self, x):
            return rearrange(x, "(n i j) c h w -> n c (i h) (j w)", i=2, j=2)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Windows(), nn.Conv2d(8, 8, 1), Whole())
    assert list(insertion_points(model, example_input=images(8))) == ["0", "3"]
    with pytest.raises(ValueError, match="cannot insert at '1': it returns no feature map of the input"):
        insert(model, {"1": SFE}, example_input=images(8))
