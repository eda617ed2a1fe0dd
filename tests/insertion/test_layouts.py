import pytest
import timm
import torch
from torch import nn

from kfde_layers import SFE, insert, insertion_points
from kfde_layers.insertion import Point
from tests.support.inputs import images
from tests.support.networks import Patches


@pytest.mark.parametrize(("height", "width"), [(460, 700), (230, 350), (100, 60), (65, 33), (224, 224), (32, 32)])
def test_maps_of_any_image_are_recognised(height, width):
    """A stride rounds each side of the map separately, so that the two sides shrink by slightly different factors."""
    points = insertion_points(timm.create_model("resnet18"), example_input=torch.zeros(1, 3, height, width))
    assert [point.reduction for point in points.values()] == [2, 4, 8, 16, 32]
    assert {point.layout for point in points.values()} == {"NCHW"}


def test_an_oblong_example_distinguishes_the_layouts():
    class Transposed(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    model = nn.Sequential(nn.Conv2d(3, 24, 1), Transposed())
    x = torch.zeros(1, 3, 24, 24)  # as high and wide as it has channels: the layout is ambiguous
    assert insertion_points(model, example_input=x)["1"].layout == "NCHW"
    x = torch.zeros(1, 3, 24, 48)
    assert insertion_points(model, example_input=x) == {"0": Point(24, 1, "NCHW"), "1": Point(24, 1, "NHWC")}


def test_tokens_that_are_no_map_are_no_point():
    """The 20 tokens cannot be a map: a square image gives no map of 4 x 5."""
    model = nn.Sequential(nn.Conv2d(3, 20, 4, stride=4), nn.Flatten(2))
    assert list(insertion_points(model, example_input=images(64, 1))) == ["0"]


def test_ambiguous_tokens_are_refused():
    """25 tokens: one and then 4 x 6 of 8 px, or five and then 4 x 5 of nearly 9 px."""
    model, x = Patches(1, declared=False), torch.zeros(1, 3, 32, 48)
    model.conv = nn.Conv2d(3, 8, 8, stride=8)
    with pytest.raises(ValueError, match="its 25 tokens may be a map after 1 or 5 prefix tokens; try a square"):
        insert(model, {"tokens": SFE}, example_input=x)
    model.num_prefix_tokens = 1
    assert insertion_points(model, example_input=x)["tokens"] == Point(8, 8, "NLC", 1)
