import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CSFE, SFE, insert, insertion_points, remove
from tests.support.inputs import images
from tests.support.networks import Series


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
        ("parts.own", SFE, "cannot insert at 'parts.own': Sum runs its children in its own way, and would take"),
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


def test_a_module_that_runs_its_children_runs_the_block_once():
    model = Series(nn.Conv2d(3, 8, 3), Series(nn.Conv2d(8, 6, 3)))
    expected = SFE()(model(images(16)))
    insert(model, {"1": SFE})
    assert torch.equal(model(images(16)), expected)
    remove(model)
    assert torch.equal(SFE()(model(images(16))), expected)


def test_a_block_without_effect_on_the_output_gives_a_warning():
    vit = timm.create_model("test_vit", img_size=32)
    with pytest.warns(
        UserWarning, match=r"output does not depend, as it stands, on the feature map at 'blocks.5': the block"
    ):
        insert(vit, {"blocks.4": SFE, "blocks.5": SFE}, example_input=images(32))
    for model in (
        timm.create_model("test_vit", img_size=32, global_pool="avg"),
        timm.create_model("test_vit", img_size=32, features_only=True),
        nn.Sequential(OrderedDict(blocks=nn.Sequential(*[nn.Identity()] * 5, nn.Conv2d(3, 4, 1)))),
    ):
        name = next(name for name, _ in model.named_modules() if name.endswith("blocks.5"))
        insert(model, {name: SFE}, example_input=images(32))  # a warning would be an error here


def test_no_warning_where_the_head_starts_from_zeros():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    nn.init.zeros_(model[2].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        insert(model, {"0": SFE}, example_input=images(8))
    assert not caught
    assert type(model[0].kfde) is SFE


class LeavesOutTheLast(Series):
    """Run all children except the last."""

    def forward(self, x):
        for child in list(self.children())[:-1]:
            x = child(x)
        return x


def test_a_module_that_one_more_child_would_change_is_refused():
    model = nn.Sequential(LeavesOutTheLast(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    before = model(images(8))
    with pytest.raises(ValueError, match="cannot insert at '0': LeavesOutTheLast runs its children in its own way"):
        insert(model, {"0": SFE})
    assert torch.equal(model(images(8)), before)
