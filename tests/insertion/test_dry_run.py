import time
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CSFE, SFE, insert, insertion_points, remove
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


class Through(nn.Module):
    """Compute `function(x)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OneWay(torch.autograd.Function):
    """An operation without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x


class FailsBackward(torch.autograd.Function):
    """An operation whose backward pass fails with an error of its own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        raise KeyError("no gradient")


class Uncopied(nn.Module):
    """A module of which no copy can be made."""

    def forward(self, x):
        return 2 * x

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


WITHOUT_GRADIENT = {
    "a derivative of zero": lambda x: (10 * x).round(),
    "detached": lambda x: x.detach() + 1,
    "no backward pass": OneWay.apply,
    "a backward pass that fails": FailsBackward.apply,
    "no copy": Uncopied(),
    "a gradient that is not a number": lambda x: torch.where(x < 9, x, (0 * x).sqrt()),
    "integers": lambda x: (10 * x).long(),
    "another result where gradients are wanted": lambda x: x.detach() if torch.is_grad_enabled() else x,
}


@pytest.mark.parametrize("function", WITHOUT_GRADIENT.values(), ids=WITHOUT_GRADIENT.keys())
def test_no_warning_where_the_output_changes_without_a_gradient(function, recwarn):
    model = insert(nn.Sequential(nn.Conv2d(3, 4, 1), Through(function)), {"0": SFE}, example_input=images(8))
    assert type(model[0].kfde) is SFE
    assert not recwarn.list


class IgnoresTheSecond(nn.Sequential):
    """Round the map of the first child, and drop that of the second."""

    def forward(self, x):
        x = self[0](x)
        self[1](x)
        return (10 * x).round()


def test_a_block_without_effect_is_found_beside_others_that_get_no_gradient():
    model = IgnoresTheSecond(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match="output does not depend on the feature map at '1'") as caught:
        insert(model, {"0": SFE, "1": SFE}, example_input=images(8))
    assert len(caught) == 1


class SkippedWithGradients(nn.Sequential):
    """Leave out the second child where gradients are wanted."""

    def forward(self, x):
        x = self[0](x)
        return x if torch.is_grad_enabled() else self[1](x)


def test_a_module_that_is_not_called_where_gradients_are_wanted(recwarn):
    model = SkippedWithGradients(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        expected = SFE()(model(images(8)))
        insert(model, {"1": SFE}, example_input=images(8))
        assert torch.equal(model(images(8)), expected)
    assert not recwarn.list


@pytest.mark.parametrize("grad", [True, False])
def test_many_points_take_no_more_runs_than_one(grad):
    runs = []
    for count in (1, 12):
        model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(12)], nn.Flatten())
        calls = []
        model.register_forward_hook(lambda module, args, output, calls=calls: calls.append(None))
        with torch.set_grad_enabled(grad):
            insert(model, {str(index): SFE for index in range(count)}, example_input=images(8))
        runs.append(len(calls))
    assert runs[0] == runs[1] < 10


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


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, 5])
def test_a_network_of_300_modules_takes_seconds(count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 7, stride=4), *[nn.Conv2d(16, 16, 3, padding=1) for _ in range(298)])
    start = time.perf_counter()
    points = insertion_points(model)
    insert(model, dict.fromkeys(list(points)[-count:], CSFE))
    assert len(points) == 299
    assert time.perf_counter() - start < 10
