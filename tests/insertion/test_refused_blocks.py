"""Blocks that would break a network are refused, and leave it as it was."""

import pytest
import torch
from torch import nn

from kfde_layers import CSFE, SFE, insert, remove
from kfde_layers.testing import random_tensor

X = random_tensor(1, 3, 16, 16, dtype=torch.float32)


class Twice(nn.Module):
    """A network that calls a part a second time in training only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return self.conv(y) if self.training else y


class Answer(nn.Module):
    """A block that answers with `make(x)`."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
shared = CSFE(8)
not_finite = SFE(8)
REFUSALS = {
    "the model itself": (
        lambda: plain,
        {"0": plain},
        "the block at '0' must share no module with the model, got a Seq",
    ),
    "a part of the model": (
        lambda: plain,
        {"0": plain[1]},
        "the block at '0' must share no module with the model, got a",
    ),
    "a block that holds the model": (lambda: plain, {"1": nn.Sequential(plain)}, "must share no module with the model"),
    "one block twice": (lambda: plain, {"0": shared, "1": shared}, "at '1' must share no module with the block at '0'"),
    "another dtype": (lambda: plain, {"0": Answer(torch.Tensor.double)}, "at '0' must keep the dtype torch.float32"),
    "integers": (lambda: plain, {"1": Answer(lambda x: x.long())}, "at '1' must keep the dtype torch.float32 .*int64"),
    "not a number": (lambda: plain, {"1": Answer(lambda x: x / 0)}, "at '1' must return finite values"),
    "detached": (lambda: plain, {"0": Answer(torch.Tensor.detach)}, "at '0' must pass gradients to its map"),
    "detached before its parameters": (
        lambda: plain,
        {"0": nn.Sequential(Answer(torch.Tensor.detach), nn.Conv2d(8, 8, 1))},
        "at '0' must pass gradients to its map",
    ),
    "a tuple": (lambda: plain, {"0": Answer(lambda x: (x, x))}, "at '0' must return one tensor, got tuple"),
    "nothing": (lambda: plain, {"0": Answer(lambda x: None)}, "at '0' must return one tensor, got NoneType"),
    "odd channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 7, 3)),
        {"0": CSFE},
        "the block at '0' cannot be made for its 7 channels",
    ),
    "a bad option": (
        lambda: plain,
        {"1": lambda c: CSFE(c, 3)},
        "at '1' cannot be made for its 8 channels: num_groups",
    ),
    "twice in training": (
        lambda: nn.Sequential(Twice()),
        {"0.conv": SFE},
        "at '0.conv': in training .* calls it 2 times",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_blocks_that_would_break_the_network_are_refused(case):
    make, blocks, message = REFUSALS[case]
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert(model, blocks, example_input=X)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("broken", ["weight", "example"])
def test_values_that_are_not_finite_are_refused(broken):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), X.clone()
    with torch.no_grad():
        (model[0].weight if broken == "weight" else x).view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match="cannot insert at '1': its map has values that are not finite"):
        insert(model, {"1": SFE}, example_input=x)


def test_blocks_that_work_in_place_are_taken():
    insert(plain_copy := nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": nn.ReLU(inplace=True)}, example_input=X)
    assert plain_copy(X).min() == 0


@pytest.mark.parametrize("names", [3, 1.5, torch.nn.ReLU])
def test_remove_refuses_what_holds_no_names(names):
    with pytest.raises(TypeError, match="names must be a list of module names or None, got"):
        remove(plain, names)
