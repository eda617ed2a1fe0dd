"""Networks to put blocks into."""

import functools

import pytest
import timm
import torch
from torch import nn

from tests.helpers import draw


class Series(nn.Module):
    """Runs whatever children it has, one behind the other."""

    def __init__(self, *children):
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(str(index), child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def plain_backbone():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        nn.Conv2d(32, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def timm_model(name, **kwargs):
    return functools.partial(timm.create_model, name, num_classes=5, **kwargs)


# For each host: how to make it, two points, and their maps at the size of the image.
HOSTS = {
    "ResNet": (timm_model("resnet18"), {"layer3": (256, 16, "NCHW"), "layer4": (512, 32, "NCHW")}, 64),
    "ConvNeXt": (timm_model("convnextv2_atto"), {"stages.2": (160, 16, "NCHW"), "stages.3": (320, 32, "NCHW")}, 64),
    "Swin": (
        timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
        {"layers.2": (384, 16, "NHWC"), "layers.3": (768, 32, "NHWC")},
        64,
    ),
    "EfficientNet": (timm_model("efficientnet_b0"), {"blocks.4": (112, 16, "NCHW"), "blocks.6": (320, 32, "NCHW")}, 64),
    "nn.Sequential": (plain_backbone, {"1": (32, 4, "NCHW"), "2": (8, 4, "NCHW")}, 64),
}


each_host = pytest.mark.parametrize(("make", "points", "side"), HOSTS.values(), ids=HOSTS.keys())


def host(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # ResNet ends its blocks in zeros, behind which a block would have nothing to do
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
    return model


def images(side, batch=2):
    return draw(batch, 3, side, side, dtype=torch.float32)


def replace_output(module, block):
    """Insertion by hand: put the block's output in the place of the module's own."""
    module.register_forward_hook(lambda module, args, output: block(output))


def aliased():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model.add_module("alias", model[0])
    model.forward = lambda x: model[1](model[0](x))
    return model


class Patches(nn.Module):
    """Patches of 4 x 4 px as a sequence of tokens behind some prefix tokens."""

    def __init__(self, num_prefix_tokens, declared=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.tokens = nn.Identity()
        self.prefix = nn.Parameter(torch.randn(1, num_prefix_tokens, 8))
        if declared:
            self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.tokens(torch.cat((self.prefix.expand(len(x), -1, -1), tokens), 1))
