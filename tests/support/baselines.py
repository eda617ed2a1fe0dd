"""Small versions of the compared systems, and layers whose results can be worked out by hand."""

import breakhis.baselines  # noqa: F401 -- registers the systems with timm
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SYSTEMS = ("bhcnet_3", "bhcnet_6", "breastnet", "ahonet_resnet18", "cnn_lstm_resnet50", "glnet_resnet101")

SMALL_SYSTEMS = {
    "bhcnet": ("bhcnet_3", {"widths": (4, 8)}),
    "breastnet": ("breastnet", {}),
    "ahonet": ("ahonet_resnet18", {"reduction_dim": 8}),
    "ahonet-last": ("ahonet_resnet18", {"reduction_dim": 8, "eca": "last", "eca_kernel": 3, "last_stride": 2}),
    "cnn_lstm": ("cnn_lstm_resnet50", {"backbone": "test_resnet", "hidden": 4}),
    "cnn_lstm-rows": (
        "cnn_lstm_resnet50",
        {"backbone": "test_resnet", "hidden": 4, "order": "rows", "bidirectional": True},
    ),
    "glnet": ("glnet_resnet101", {"backbone": "test_resnet", "hidden": 8}),
    "glnet-tiles": ("glnet_resnet101", {"backbone": "test_resnet", "hidden": 8, "tiles": "image"}),
}
"""Model and arguments of a small version of each system, by a name for it."""


def make_small(case: str, **arguments) -> nn.Module:
    """Make a small system with random weights, in evaluation mode."""
    name, options = SMALL_SYSTEMS[case]
    torch.manual_seed(0)
    defaults = {"num_classes": 3, "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    return timm.create_model(name, **{**defaults, **options, **arguments}).eval()


@torch.no_grad()
def neutralise_norms(model: nn.Module) -> None:
    """Make every batch norm the identity in evaluation mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.fill_(1)
            module.bias.zero_()
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)


@torch.no_grad()
def set_weights(layer: nn.Module, weight, bias=None) -> None:
    """Give a layer weights that are written as nested lists, or one value for all."""
    layer.weight.copy_(torch.tensor(weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.tensor(0.0 if bias is None else bias))
