"""Networks that take a block, and how to prepare them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn


class Series(nn.Module):
    """Run its children one after the other, as `nn.Sequential` does, in a class of its own."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(str(index), child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Patches(nn.Module):
    """Return patches of 4 x 4 px as a sequence of tokens, after some prefix tokens."""

    def __init__(self, num_prefix_tokens: int, declared: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.tokens = nn.Identity()
        self.prefix = nn.Parameter(torch.randn(1, num_prefix_tokens, 8))
        if declared:
            self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.tokens(torch.cat((self.prefix.expand(len(x), -1, -1), tokens), 1))


class ConvNorm(nn.Module):
    """A convolution and a batch norm, which can become one convolution."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def plain_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        nn.Conv2d(32, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def model_with_alias() -> nn.Module:
    """Make a model that holds its first module under two names."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model.add_module("alias", model[0])
    model.forward = lambda x: model[1](model[0](x))
    return model


def _timm_model(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=5, **kwargs)


# For each host: how to make it, two points with their maps, and the side of its images in px.
HOSTS = {
    "ResNet": (_timm_model("resnet18"), {"layer3": (256, 16, "NCHW"), "layer4": (512, 32, "NCHW")}, 64),
    "ConvNeXt": (_timm_model("convnextv2_atto"), {"stages.2": (160, 16, "NCHW"), "stages.3": (320, 32, "NCHW")}, 64),
    "Swin": (
        _timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
        {"layers.2": (384, 16, "NHWC"), "layers.3": (768, 32, "NHWC")},
        64,
    ),
    "EfficientNet": (
        _timm_model("efficientnet_b0"),
        {"blocks.4": (112, 16, "NCHW"), "blocks.6": (320, 32, "NCHW")},
        64,
    ),
    "nn.Sequential": (plain_backbone, {"1": (32, 4, "NCHW"), "2": (8, 4, "NCHW")}, 64),
}
each_host = pytest.mark.parametrize(
    ("make", "points", "side"),
    [pytest.param(*host, id=name, marks=pytest.mark.slow if name == "Swin" else ()) for name, host in HOSTS.items()],
)


def make_host(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a host, the same one at each call, in eval mode."""
    torch.manual_seed(0)
    return fill_zero_weights(make().eval())


@torch.no_grad()
def fill_zero_weights(model: nn.Module) -> nn.Module:
    """Fill the weights that start from zeros, and return the model.

    Heads and the ends of residual branches may start from zeros, and would hide what comes before them. Scales become
    one half, all other weights random; biases stay as they are.
    """
    for name, parameter in model.named_parameters():
        if parameter.any():
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        elif not name.endswith("bias"):
            parameter.fill_(0.5)
    return model


def replace_output(module: nn.Module, block: nn.Module) -> None:
    """Insert by hand: put the block's output in the place of the module's own."""
    module.register_forward_hook(lambda module, args, output: block(output))
