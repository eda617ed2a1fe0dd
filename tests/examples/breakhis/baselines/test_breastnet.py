import math

import pytest
import timm
import torch
from breakhis.baselines.breastnet import Hypercolumn, ResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.baselines import make_small, neutralise_norms, set_weights


def test_the_published_numbers_of_parameters():
    """The authors list 603,262 trained parameters, and 605,566 with the statistics of batch norms."""
    with torch.device("meta"):
        model = timm.create_model("breastnet", num_classes=2)
    trained = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(buffer.numel() for key, buffer in model.named_buffers() if "running" in key)
    assert (trained, trained + statistics) == (603_262, 605_566)


def enlarged(*maps: Tensor) -> Tensor:
    """Join maps as the authors do: at the size of the image, which has twice the sides of the first map."""
    sizes = [2 ** (index + 1) for index in range(len(maps))]
    return torch.cat(
        [F.interpolate(x, scale_factor=size, mode="bilinear") for x, size in zip(maps, sizes, strict=True)], dim=1
    )


def test_the_mean_of_the_hypercolumn_is_that_of_the_enlarged_maps():
    maps = [torch.randn(2, channels, 48 // size, 80 // size).double() for channels, size in ((3, 2), (5, 4), (7, 8))]
    assert Hypercolumn()(*maps).shape == (2, 15, 6, 10)
    assert enlarged(*maps).shape == (2, 15, 48, 80)
    torch.testing.assert_close(Hypercolumn()(*maps).mean((2, 3)), enlarged(*maps).mean((2, 3)), rtol=0, atol=1e-14)


def test_the_network_is_that_with_enlarged_maps():
    model, images = make_small("breastnet").double(), torch.randn(2, 3, 32, 40).double()
    first = model.stage1(images)
    second = model.stage2(first)
    joined = enlarged(first, second, model.stage3(second))
    assert joined.shape == (2, 224, 32, 40)
    torch.testing.assert_close(model.fc(model.dense(joined.mean((2, 3)))), model(images))


def test_a_hypercolumn_by_hand():
    large = torch.arange(16.0).reshape(1, 1, 4, 4)
    small = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert Hypercolumn()(large, small).tolist() == [[[[2.5, 4.5], [10.5, 12.5]], [[1.0, 2.0], [3.0, 4.0]]]]


def test_a_residual_block_by_hand():
    block = ResidualBlock(1).eval()
    neutralise_norms(block)
    here = [[[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]]
    set_weights(block.residual[0], here)
    set_weights(block.residual[3], here, -1.0)
    # -2 becomes -2 * 0.3 - 1 - 2 = -3.6, and then -1.08; 2 becomes 2 - 1 + 2 = 3
    torch.testing.assert_close(block(torch.tensor([[[[-2.0, 2.0]]]])), torch.tensor([[[[-1.08, 3.0]]]]))


def test_attention_by_hand():
    attention = make_small("breastnet").stage2[1]
    set_weights(attention.channel.fc1, 0.0, 1.0)  # the one hidden value of both paths is 1
    set_weights(attention.channel.fc2, 0.0, math.log(3) / 2)  # and both have this bias: sigmoid(log 3) = 0.75
    weight = torch.zeros(1, 2, 7, 7)
    weight[0, 1, 3, 3] = math.log(3) / 0.75  # of the maximum of the channels, which is 0.75 and then 0
    set_weights(attention.spatial.conv, weight.tolist())
    x = torch.zeros(1, 64, 1, 2)
    x[0, 5, 0, 0], x[0, 6, 0, 1] = 1.0, -4.0
    gated = attention(x)
    assert gated[0, 5].tolist() == [[pytest.approx(0.75 * 0.75), 0.0]]
    assert gated[0, 6].tolist() == [[0.0, pytest.approx(-4 * 0.75 * 0.5)]]


def test_the_layers_are_those_of_the_listing():
    model = timm.create_model("breastnet", num_classes=2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert [module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)] == [0.3] * 4
    assert model.stage2[1].channel.fc1.out_channels == 8
    assert model.stage3[1].channel.fc1.out_channels == 16
    assert model.stage3[1].spatial.conv.bias is None
    kinds = [type(layer).__name__ for layer in model.dense]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear", "BatchNorm1d", "ReLU"]
    assert model.dense[3].p == 0.3


def test_images_are_scaled_to_one_and_no_more():
    config = timm.create_model("breastnet", num_classes=2).pretrained_cfg
    assert (config["mean"], config["std"]) == ((0, 0, 0), (1, 1, 1))
