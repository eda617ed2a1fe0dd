import math

import pytest
import timm
import torch
from breakhis.baselines.bhcnet import BHCNet, SmallSEResNetModule
from timm.layers import BatchNormAct2d
from torch import nn

from tests.support.baselines import neutralise_norms, set_weights

SHIFT, HERE = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]  # kernels that take the neighbour before an element, or the element


def diagonal(first: list[float], second: list[float], upright: bool) -> list:
    """Make the weight of a convolution of two channels that do not mix, with one kernel for each."""
    zero = [0.0] * len(first)
    rows = [[first, zero], [zero, second]]
    return [[[[[tap] for tap in kernel] if upright else [kernel]][0] for kernel in row] for row in rows]


@pytest.mark.parametrize(
    ("name", "num_classes", "total"),
    [
        ("bhcnet_3", 10, 198_410),
        ("bhcnet_3", 100, 204_260),
        ("bhcnet_6", 10, 400_682),
        ("bhcnet_6", 100, 406_532),
    ],
)
def test_the_published_numbers_of_parameters(name, num_classes, total):
    """198K, 204K, 401K and 407K: Keras counts the statistics of batch norms too."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    statistics = [buffer for key, buffer in model.named_buffers() if "running" in key]
    assert sum(tensor.numel() for tensor in [*model.parameters(), *statistics]) == total


def test_a_module_by_hand():
    module = SmallSEResNetModule(2, 2).eval()
    neutralise_norms(module)
    convolutions = [layer for layer in module.residual if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in convolutions] == [(1, 3), (3, 1), (1, 3), (3, 1)]
    set_weights(convolutions[0], diagonal(SHIFT, SHIFT, upright=False))  # to the right
    set_weights(convolutions[1], diagonal(SHIFT, SHIFT, upright=True))  # down
    set_weights(convolutions[2], diagonal(HERE, HERE, upright=False), 1.0)
    set_weights(convolutions[3], diagonal([0.0, 2.0, 0.0], [0.0, -1.0, 0.0], upright=True))
    set_weights(module.se.fc1, [[[[0.4]], [[0.0]]]])  # 0.4 times the mean of the first residual, 2.5
    set_weights(module.se.fc2, [[[[0.0]]], [[[math.log(3)]]]])  # gates sigmoid(0) = 0.5 and sigmoid(log 3) = 0.75

    # The ReLU takes the -4 away. Of the 1, 2, 3, 0 that are left, moved right and down, the 1 remains. So the residuals
    # are 2 (0 + 1) and -(0 + 1) in three places, 2 (1 + 1) and -(1 + 1) in the fourth.
    x = torch.tensor([[[[1.0, 2.0], [3.0, -4.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    expected = torch.tensor([[[[2.0, 3.0], [4.0, -2.0]], [[0.25, 0.25], [0.25, -0.5]]]])
    torch.testing.assert_close(module(x), expected)


def test_the_shortcut_takes_the_raw_input_where_the_shape_changes():
    module = SmallSEResNetModule(1, 2, stride=2).eval()
    neutralise_norms(module)
    set_weights(module.residual[-1], 0.0)
    set_weights(module.shortcut, [[[[1.0]]], [[[10.0]]]], [0.0, 1.0])
    x = torch.tensor([[[[-1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, -9.0]]]])
    expected = torch.tensor([[[[-1.0, 3.0], [7.0, -9.0]], [[-9.0, 31.0], [71.0, -89.0]]]])
    torch.testing.assert_close(module(x), expected)
    assert isinstance(SmallSEResNetModule(2, 2).shortcut, nn.Identity)


def test_only_the_first_module_has_no_leading_norm():
    model = timm.create_model("bhcnet_3", num_classes=2)
    modules = [module for stage in model.stages for module in stage]
    assert len(modules) == 9
    first = [module.residual[0] for module in modules]
    assert isinstance(first[0], nn.Conv2d)
    assert all(isinstance(layer, BatchNormAct2d) for layer in first[1:])
    strides = [next(layer.stride for layer in module.residual if isinstance(layer, nn.Conv2d)) for module in modules]
    assert strides == [(1, 1)] * 3 + [(2, 2), (1, 1), (1, 1)] * 2


def test_a_whole_network_by_hand():
    model = BHCNet(1, (1,), in_chans=1, num_classes=1).eval()
    neutralise_norms(model)
    set_weights(model.stem[0], [[[[0.0, 0.0, 0.0], HERE, [0.0, 0.0, 0.0]]]])
    set_weights(model.stages[0][0].residual[-1], 0.0)
    set_weights(model.fc, [[3.0]], 1.0)
    x = torch.tensor([[[[1.0, -2.0], [3.0, 4.0]]]])
    assert model.forward_features(x).tolist() == [[[[1.0, 0.0], [3.0, 4.0]]]]  # the norms round nothing here
    assert model(x).item() == pytest.approx(7)  # 3 times the mean, 2, plus 1


def test_the_maps_of_an_image():
    with torch.device("meta"):
        model = timm.create_model("bhcnet_3")
        x, shapes = model.stem(torch.empty(1, 3, 224, 224)), []
        for stage in model.stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 224, 224), (32, 112, 112), (64, 56, 56)]


def test_norms_are_those_of_keras():
    model = timm.create_model("bhcnet_3", num_classes=2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules_per_stage": 0}, "modules_per_stage must be at least 1, got 0"),
        ({"widths": ()}, r"widths must name the channels of at least one stage, got \(\)"),
        ({"widths": (0, 8)}, "widths must be at least 1, got 0"),
        ({"widths": (8, "9")}, "widths must be an integer, got '9'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BHCNet(**arguments)


def test_there_are_no_weights_to_start_from():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for bhcnet_3"):
        timm.create_model("bhcnet_3", pretrained=True)
