"""Every layer in each of its options and a model, each with the float64 reference that judges it."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import use_reference
from tests.support.gates import input_away_from_threshold
from tests.support.inputs import draw

LAYERS = {
    "CFE": CFE,
    "CFE, threshold, one group": functools.partial(CFE, num_groups=1, threshold=0.45, eps=1e-3),
    "SFE": SFE,
    "SFE, SimAM": functools.partial(SFE, correction=1, lambd=1e-3, beta=0.1),
    "CSFE": CSFE,
    "CSFE, mean": functools.partial(CSFE, fusion="mean"),
    "CSFE, cfe_sfe": functools.partial(CSFE, arrangement="cfe_sfe"),
    "CSFE, sfe_cfe": functools.partial(CSFE, arrangement="sfe_cfe", num_groups=2, correction=1),
    "CSFE, fused": functools.partial(CSFE, impl="fused"),
    "CSFE, reference": functools.partial(CSFE, impl="reference"),
    "MFDF": MFDF,
    "MFDF, fused": functools.partial(MFDF, impl="fused", dilation=(1, 2, 3, 1)),
    "MFDF, reference, no bias": functools.partial(MFDF, impl="reference", bias=False, kernel_sizes=(3, 5), dilation=2),
    "MFDF, dense": functools.partial(MFDF, groups=1, kernel_sizes=(1, 3), rd_channels=7),
    "MFDF, grouped, ReLU": functools.partial(MFDF, groups=2, kernel_sizes=(1, 3), act_layer=nn.ReLU),
    "MFDF, batch norm": functools.partial(MFDF, kernel_sizes=(1, 3, 5), norm_layer=nn.BatchNorm2d),
    "MFDF, dense, batch norm, ReLU": functools.partial(
        MFDF, groups=1, kernel_sizes=(1, 3), norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU
    ),
    "Blend of CSFE": lambda channels, **kwargs: Blend(CSFE(channels, **kwargs), channels, **kwargs),
}

TABLE = "Compilers, exporters and transforms"

# Relative to the largest value. Three times as much is allowed for gradients. In float32, eager layers differ from the
# reference by at most 4e-7 and the model by 2e-6; their gradients differ by 3e-6 and 9e-6.
TOLERANCE = 1e-5

Shape = tuple[int, int, int, int]
LAYER_SHAPES: tuple[Shape, ...] = ((3, 6, 16, 15), (2, 6, 11, 9), (5, 6, 7, 20))
MODEL_SHAPES: tuple[Shape, ...] = ((2, 3, 64, 96), (3, 3, 96, 64), (4, 3, 128, 96))

# For an exporter: batch, height and width of the input are free. The export fails if it has to fix one of them.
DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


class Case(NamedTuple):
    """A module, and inputs of several batches and sizes for it."""

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]


def make_layer(make: Callable[..., nn.Module], channels: int = 6, **kwargs: object) -> nn.Module:
    """Make a layer whose parameters differ from their start, in eval mode."""
    return scatter_parameters(make(channels, **kwargs)).eval()


def _layer_case(make: Callable[[int], nn.Module]) -> Case:
    def make_trained() -> nn.Module:
        torch.manual_seed(0)
        layer = make_layer(make).train()
        layer(draw(4, 6, 5, 5, seed=1, dtype=torch.float32))  # moves the statistics of batch norms
        return layer

    return Case(make_trained, LAYER_SHAPES)


def _atto(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("kfde_convnextv2_atto", num_classes=8, **options)
    scatter_parameters(model.stages[3].kfde)
    return model


MODEL = Case(functools.partial(_atto, depths=(1, 1, 1, 1)), MODEL_SHAPES)  # more blocks would repeat the same graph
SHALLOW = Case(functools.partial(_atto, depths=(0, 0, 0, 0)), MODEL_SHAPES)  # for slow compilers: KFDE without blocks
OPTIONS = {
    name: _layer_case(make)
    for name, make in (
        LAYERS
        | {
            "CFE, fused": functools.partial(CFE, impl="fused"),
            "CFE, reference": functools.partial(CFE, impl="reference"),
            "SFE, fused": functools.partial(SFE, impl="fused"),
            "SFE, reference": functools.partial(SFE, impl="reference"),
            "CSFE, cfe_sfe, fused": functools.partial(CSFE, arrangement="cfe_sfe", impl="fused"),
            "CSFE, blended": LAYERS["Blend of CSFE"],
            "MFDF, blended": lambda channels: Blend(MFDF(channels), channels),
        }
    ).items()
    if not name.startswith("Blend")  # has no column of the table: here it is an option of the layer that it blends
}
# Compilers and exporters get the same graph of "fused" as of "auto", whose name follows: their tests check it, and run
# their slower parts on one of the two.
AUTO_OF_FUSED = {
    "CFE, fused": "CFE",
    "SFE, fused": "SFE",
    "CSFE, fused": "CSFE",
    "CSFE, cfe_sfe, fused": "CSFE, cfe_sfe",
}
NOT_EXPORTED = ("MFDF, fused",)  # runs its operator, which other software does not have
EXPORTED = {name: case for name, case in (OPTIONS | {"models": MODEL}).items() if name not in NOT_EXPORTED}
DEFAULTS = {name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")} | {"models": MODEL}
CASES = OPTIONS | {"models": MODEL}


def each_case(cases: dict[str, Case]) -> pytest.MarkDecorator:
    """Run a test for each of these cases, under the name by which the table knows it."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def module_and_reference(case: Case) -> tuple[nn.Module, nn.Module]:
    """Make the module in float32, its parameters away from their start, and its reference in float64.

    Both are in eval mode.
    """
    module = case.make().eval()
    return module, use_reference(copy.deepcopy(module).double())


def input_of_case(reference: nn.Module, shape: Shape) -> Tensor:
    """Draw a float32 input of which rounding cannot carry a gate across its threshold."""
    return input_away_from_threshold(reference, *shape, margin=1e-5)


def output_and_gradients(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of `call`, which runs `module`, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = call(x)
    inputs = {"the input": x, **dict(module.named_parameters())}
    cotangent = draw(*y.shape, seed=1, dtype=torch.float32).to(y)
    gradients = torch.autograd.grad(y, list(inputs.values()), cotangent)
    named = {f"the gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {"the output": y.detach(), **named}


def assert_within_tolerance(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Compare two results of `output_and_gradients`, each tensor relative to its largest value."""
    assert actual.keys() == exact.keys()
    largest = max(float(tensor.abs().max()) for tensor in exact.values())
    for name, tensor in exact.items():
        scale = float(tensor.abs().max())
        if ".conv." in name:  # in training, batch norm undoes its scale and bias: the gradient is rounding alone
            scale = max(scale, 0.1 * largest)
        error = float((actual[name].double() - tensor).abs().max())
        assert error < (TOLERANCE if name == "the output" else 3 * TOLERANCE) * scale, name


def compile_whole(module: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
    """Compile the module into one graph, with a compiler that remembers nothing."""
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, **options)
