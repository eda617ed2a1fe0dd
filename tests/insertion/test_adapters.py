import copy
from collections import OrderedDict
from dataclasses import dataclass, is_dataclass
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from kfde_layers import MFDF, SFE, insert, insertion_points, remove
from kfde_layers.insertion import Point
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import draw, images
from tests.support.networks import Patches, Series, each_host, make_host


@each_host
def test_maps_in_either_layout_reach_the_block_as_nchw(make, points, side):
    name, (channels, reduction, _) = next(iter(points.items()))
    received = []

    class Spy(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            received.append((self.channels, tuple(x.shape)))
            return x

    model = insert(make_host(make), {name: Spy}, example_input=images(side))
    received.clear()  # `insert` has tried the block on the probed map
    torch.testing.assert_close(model(images(side)), make_host(make)(images(side)))
    assert received == [(channels, (2, channels, side // reduction, side // reduction))]


class Reordered(nn.Module):
    """Return the map as NHWC."""

    def forward(self, x):
        return rearrange(x, "n c h w -> n h w c")


def test_rows_stay_rows_in_nhwc():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Reordered())
    model.output_fmt = "NHWC"
    shifted = nn.ConstantPad2d((1, -1, 0, 0), 0.0)  # by one px to the right
    x = draw(2, 3, 5, 7, dtype=torch.float32)
    before = model(x)
    after = insert(model, {"1": shifted}, example_input=x)(x)
    assert torch.equal(after[:, :, 1:], before[:, :, :-1])
    assert not after[:, :, 0].any()


class HeadAndTail(NamedTuple):
    head: Tensor
    tail: Tensor


@dataclass
class Output:
    logits: Tensor
    tail: Tensor | None = None


class Packed(nn.Module):
    """Return the input and a summary of it, in a container that `pack` makes."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(x.mean((2, 3)), x)


PACKS = {
    "tuple": lambda mean, x: (mean, x),
    "list": lambda mean, x: [x, mean],
    "named tuple": HeadAndTail,
    "dict": lambda mean, x: {"mean": mean, 1: x},
    "ordered dict": lambda mean, x: OrderedDict(map=x, mean=mean),
    "dataclass": Output,
}


def unpacked(output):
    if is_dataclass(output):
        output = vars(output)
    return list(output.values() if isinstance(output, dict) else output)


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("container", [nn.Sequential, Series])
def test_the_first_map_of_an_output_goes_through_the_block(pack, container):
    """The block follows a module of its own class, and then the last child of a container."""
    for name in ("1", ""):
        model = container(nn.Conv2d(3, 6, 3, stride=2, padding=1), Packed(pack))
        if not name:
            model, name = container(model), "0"
        x = images(16)
        before = model(x)
        insert(model, {name: SFE})
        after = model(x)
        assert type(after) is type(before)
        assert not isinstance(after, dict) or list(after) == list(before)
        for part, part_after in zip(unpacked(before), unpacked(after), strict=True):
            assert torch.equal(part_after, SFE()(part) if part.ndim == 4 else part)
        assert torch.equal(unpacked(copy.deepcopy(model)(x))[1], unpacked(after)[1])
        assert all(map(torch.equal, unpacked(remove(model)(x)), unpacked(before)))


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (40, 16), (30, 41)])
@pytest.mark.parametrize(("num_prefix_tokens", "declared"), [(0, False), (1, False), (2, False), (5, False), (3, True)])
def test_tokens_reach_the_block_as_the_rows_of_a_map(size, num_prefix_tokens, declared):
    model = Patches(num_prefix_tokens, declared)
    x = draw(2, 3, *size, dtype=torch.float32)
    assert insertion_points(model, example_input=x)["tokens"] == Point(8, 4, "NLC", num_prefix_tokens)
    before, block = model(x), scatter_parameters(MFDF(8))
    insert(model, {"tokens": block}, example_input=x)
    prefix, tokens = before.split((num_prefix_tokens, before.shape[1] - num_prefix_tokens), 1)
    maps = rearrange(tokens, "n (h w) c -> n c h w", h=size[0] // 4)
    expected = torch.cat((prefix, rearrange(block(maps), "n c h w -> n (h w) c")), 1)
    torch.testing.assert_close(model(x), expected)
    twice = draw(2, 3, 2 * (size[0] // 4 * 4), 2 * (size[1] // 4 * 4), dtype=torch.float32)
    tokens = remove(copy.deepcopy(model))(twice)[:, num_prefix_tokens:]
    maps = rearrange(tokens, "n (h w) c -> n c h w", h=2 * (size[0] // 4))
    torch.testing.assert_close(model(twice)[:, num_prefix_tokens:], rearrange(block(maps), "n c h w -> n (h w) c"))


def test_tokens_of_another_aspect_ratio_are_refused():
    model = insert(Patches(1), {"tokens": SFE}, example_input=images(16))
    with pytest.raises(
        ValueError, match=r"x must have 1 prefix tokens and a map with the aspect ratio of \(4, 4\), .* got 13"
    ):
        model(torch.zeros(1, 3, 16, 12))


def test_inserted_tokens_can_be_scripted():
    model = insert(Patches(1), {"tokens": SFE}, example_input=images(16)).eval()
    assert torch.equal(torch.jit.script(model)(images(16)), model(images(16)))
