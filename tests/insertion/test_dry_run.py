import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from kfde_layers import SFE, insert, remove
from tests.support.inputs import images
from tests.support.networks import Series


def test_a_module_that_runs_its_children_runs_the_block_once():
    model = Series(nn.Conv2d(3, 8, 3), Series(nn.Conv2d(8, 6, 3)))
    expected = SFE()(model(images(16)))
    insert(model, {"1": SFE})
    assert torch.equal(model(images(16)), expected)
    remove(model)
    assert torch.equal(SFE()(model(images(16))), expected)


def test_a_block_without_effect_on_the_output_gives_a_warning():
    vit = timm.create_model("test_vit", img_size=32)
    with pytest.warns(UserWarning, match=r"output does not depend on the feature map at 'blocks.5': the block"):
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
    with pytest.raises(ValueError, match="at '0': LeavesOutTheLast does not run its children in sequence"):
        insert(model, {"0": SFE})
    assert torch.equal(model(images(8)), before)
