"""Small networks with a layer in them, and the plain training loop that every engine is compared with."""

import functools

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfde_layers import CFE, CSFE, MFDF, SFE, insert
from kfde_layers.testing import random_tensor, scatter_parameters
from tests.support.agreement import use_reference

CHANNELS = 8
CLASSES = 4
STEPS = 4


def small_network(layer: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        scatter_parameters(layer),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, CLASSES),
    )


def resnet_with_blocks() -> nn.Module:
    blocks = {"layer2": CSFE, "layer3": MFDF}
    model = insert(timm.create_model("resnet18", num_classes=CLASSES), blocks, identity_start=True)
    return model.eval()  # in training mode, batch norms would see the images of one process only


def kfde_model() -> nn.Module:
    model = timm.create_model("kfde_convnextv2_atto", num_classes=CLASSES)
    scatter_parameters(model.stages[3].kfde, deviation=0.1)
    return model


# "fused" where that implementation exists: on maps this small "auto" may take the reference, which judges them.
SMALL = {
    "CFE": lambda: small_network(CFE(CHANNELS, impl="fused")),
    "SFE": lambda: small_network(SFE(CHANNELS, impl="fused")),
    "CSFE": lambda: small_network(CSFE(CHANNELS, impl="fused")),
    "CSFE, one after the other": lambda: small_network(CSFE(CHANNELS, arrangement="cfe_sfe", impl="fused")),
    "MFDF": lambda: small_network(MFDF(CHANNELS, impl="fused")),
    "MFDF, dense, ReLU": lambda: small_network(MFDF(CHANNELS, groups=1, kernel_sizes=(1, 3), act_layer=nn.ReLU)),
}
WITH_BATCH_NORM = {
    "MFDF, batch norm": lambda: small_network(
        MFDF(CHANNELS, kernel_sizes=(1, 3), bias=False, norm_layer=nn.BatchNorm2d)
    )
}
MODELS = {"models": kfde_model}
INSERTED = {"CSFE, with MFDF in ResNet-18": resnet_with_blocks}
NETWORKS = SMALL | WITH_BATCH_NORM | MODELS | INSERTED


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a network, the same one at each call."""
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype)


def build_reference(name: str) -> nn.Module:
    """Make the same network in float64, each layer by the plain equations."""
    return use_reference(build(name))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of this package in `model`, without their parts: a hook on a part keeps it from being fused."""
    layers = [module for module in model.modules() if isinstance(module, (CFE, SFE, CSFE, MFDF))]
    parts = {part for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if layer not in parts]


def batch(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return an image of each class, recognisable by its colour, and the labels."""
    side = 12 if name in SMALL | WITH_BATCH_NORM else 64 if name in MODELS else 32
    labels = torch.arange(CLASSES)
    images = random_tensor(len(labels), 3, side, side, seed=1, dtype=dtype)
    images[:, :2] += torch.stack((labels // 2, labels % 2), dim=1)[:, :, None, None]
    return images, labels


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD. Adam would divide rounding errors by themselves where a gradient is zero."""
    return torch.optim.SGD(model.parameters(), lr=0.002 if name in MODELS else 0.2, momentum=0.9)


def train(name: str, model: nn.Module, images: Tensor, labels: Tensor, steps: int = STEPS) -> Tensor:
    """Take plain steps on one batch and return their losses."""
    return optimize(model, make_optimizer(name, model), images, labels, steps)


def optimize(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int = STEPS
) -> Tensor:
    """Do the same as `train` with the given optimizer."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@functools.cache
def exact_training(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return losses and final weights of the plain loop with the reference."""
    model = build_reference(name)
    return train(name, model, *batch(name)), model.state_dict()
