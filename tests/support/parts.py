"""Layers computed part by part: the oracle for all that other tools do to a part."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfde_layers import CSFE, MFDF
from kfde_layers.testing import random_tensor, scatter_parameters

MADE: dict[str, Callable[[], nn.Module]] = {
    "CSFE": lambda: CSFE(8),
    "CSFE, cfe_sfe": lambda: CSFE(8, arrangement="cfe_sfe"),
    "CSFE, sfe_cfe": lambda: CSFE(8, arrangement="sfe_cfe"),
    "CSFE, mean": lambda: CSFE(8, fusion="mean"),
    "MFDF": lambda: MFDF(8),
    "MFDF, dense, no bias": lambda: MFDF(8, groups=1, kernel_sizes=(1, 3), bias=False),
    "MFDF, batch norm": lambda: MFDF(8, norm_layer=nn.BatchNorm2d),
    "MFDF, batch norm, ReLU": lambda: MFDF(8, groups=2, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU),
}
each_layer = pytest.mark.parametrize("name", MADE)
each_mfdf = pytest.mark.parametrize("name", [name for name in MADE if name.startswith("MFDF")])
WITH_NORM = [name for name in MADE if "batch norm" in name]


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a layer of `MADE` with 8 channels, its parameters and statistics away from their start."""
    torch.manual_seed(0)
    layer = scatter_parameters(MADE[name]())
    with torch.no_grad():
        layer.train()(random_tensor(4, 8, 6, 6, seed=5, mean=1.0))
    return layer.to(dtype).eval()


def draw_map(seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a feature map for the layers of `MADE`, large enough that "auto" takes the fused CSFE."""
    return random_tensor(4, 8, 33, 35, seed=seed, mean=0.5, dtype=dtype)


def call_parts(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of `layer`, computed by calling each of its parts. It repeats none of the layer's code."""
    if isinstance(layer, CSFE):
        if layer.arrangement == "cfe_sfe":
            return layer.sfe(layer.cfe(x))
        if layer.arrangement == "sfe_cfe":
            return layer.cfe(layer.sfe(x))
        y = layer.cfe(x) + layer.sfe(x)
        return y / 2 if layer.fusion == "mean" else y
    maps = torch.stack([branch(x) for branch in layer.branches], dim=1)
    p = maps.sum(dim=1).mean(dim=(2, 3))
    alpha = layer.fc2(layer.fc1(p)).reshape(len(x), maps.shape[1], -1).softmax(dim=1)
    return (alpha[..., None, None] * maps).sum(dim=1)


def part_names(layer: nn.Module) -> list[str]:
    """Return the names of all submodules of `layer` but containers."""
    return [name for name, part in layer.named_modules() if name and not isinstance(part, nn.ModuleList)]


def assert_calls_its_parts(make: Callable[[], nn.Module]) -> None:
    """Compare output and every gradient of `make()` with those of calling each part, in evaluation and in training.

    `make` must return the same layer at each call: a pruned one cannot be copied.
    """
    for mode in (False, True):
        results = []
        for call in (lambda layer, x: layer(x), call_parts):
            torch.manual_seed(0)  # spectral_norm draws its first vectors
            layer = make().train(mode)
            inputs = [draw_map().requires_grad_(), *layer.parameters()]
            y = call(layer, inputs[0])
            cotangent = random_tensor(*y.shape, seed=9, dtype=y.dtype)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, cotangent)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1))


def changed(name: str, change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Return a function that makes the layer `name` and passes it to `change`."""

    def make() -> nn.Module:
        layer = make_layer(name)
        change(layer)
        return layer

    return make
