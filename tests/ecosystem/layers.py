"""The layers, in each of their options, and a model, each beside the float64 reference that judges it."""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.layers import Blend
from kfde_layers.ops import cfe as cfe_ops
from kfde_layers.testing import scatter_parameters
from tests.helpers import draw
from tests.layers.test_all_layers import LAYERS

TABLE = "Compilers, exporters and transforms"

# Relative to the largest value. In float32 eager layers come within 4e-7 of the reference and the model within 2e-6;
# their gradients, for which there is three times as much, within 3e-6 and 9e-6.
TOLERANCE = 1e-5

Shape = tuple[int, int, int, int]
LAYER_SHAPES: tuple[Shape, ...] = ((3, 6, 16, 15), (2, 6, 11, 9), (5, 6, 7, 20))
MODEL_SHAPES: tuple[Shape, ...] = ((2, 3, 64, 96), (3, 3, 96, 64), (4, 3, 128, 96))

# For an exporter: batch, height and width of the input are free, and it fails where it would have to fix one of them.
DYNAMIC = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


class Case(NamedTuple):
    """A module, and inputs of several batches and sizes for it."""

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]


def _case(make: Callable[[int], nn.Module]) -> Case:
    def made() -> nn.Module:
        torch.manual_seed(0)
        layer = scatter_parameters(make(6))
        layer.train()(draw(4, 6, 5, 5, seed=1, dtype=torch.float32))  # the statistics of batch norms leave their start
        return layer

    return Case(made, LAYER_SHAPES)


def _atto(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("kfde_convnextv2_atto", num_classes=8, **options)
    scatter_parameters(model.stages[3].kfde)
    return model


MODEL = Case(_atto, MODEL_SHAPES)
SHALLOW = Case(functools.partial(_atto, depths=(1, 1, 1, 1)), MODEL_SHAPES)  # for what takes its time with every block
OPTIONS = {
    name: _case(make)
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
    if not name.startswith("Blend")  # no column of the table, and there as an option of the layer that it blends in
}
NOT_EXPORTED = ("MFDF, fused",)  # made for its operator, which other software does not have
EXPORTED = {name: case for name, case in (OPTIONS | {"models": MODEL}).items() if name not in NOT_EXPORTED}
DEFAULTS = {name: OPTIONS[name] for name in ("CFE", "SFE", "CSFE", "MFDF")} | {"models": MODEL}
CASES = OPTIONS | {"models": MODEL}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    """Run a test for each of these, under the name by which the table knows it."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """The module in float32, its parameters off their start, and its reference in float64; both in eval mode."""
    module = case.make().eval()
    reference = copy.deepcopy(module).double()
    for part in reference.modules():
        if hasattr(part, "impl"):
            part.impl = "reference"
    return module, reference


def clear_of_the_step(reference: nn.Module, shape: Shape) -> Tensor:
    """A float32 input of which no gate lies so near to its threshold that rounding could carry it over."""
    inputs = (draw(*shape, seed=seed, dtype=torch.float32) for seed in range(99))
    return next(x for x in inputs if _distance_from_the_step(reference, x.double()) > 1e-5)


def _distance_from_the_step(reference: nn.Module, x: Tensor) -> float:
    """How near the logits of the gates come to the threshold, relative to the largest of them."""
    distances = [float("inf")]

    def watched(*arguments):
        r, is_open = cfe_gate(*arguments)
        z, threshold = r.logit(), torch.tensor(arguments[4]).logit()
        distances.append(float((z - threshold).abs().min() / z.abs().max()))
        return r, is_open

    cfe_gate = cfe_ops.cfe_gate
    with mock.patch.object(cfe_ops, "cfe_gate", watched), torch.no_grad():
        reference(x)
    return min(distances)


def passes(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of `call`, which runs `module`, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = call(x)
    inputs = {"the input": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(y, list(inputs.values()), draw(*y.shape, seed=1, dtype=torch.float32).to(y))
    return {"the output": y.detach(), **{f"the gradient of {name}": g for name, g in zip(inputs, found, strict=True)}}


def assert_near(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Compare what `passes` gives, each tensor relative to its largest value."""
    assert actual.keys() == exact.keys()
    largest = max(float(tensor.abs().max()) for tensor in exact.values())
    for name, tensor in exact.items():
        scale = float(tensor.abs().max())
        if ".conv." in name:  # in training, batch norm takes back what its scale or bias does: rounding is all there is
            scale = max(scale, 0.1 * largest)
        error = float((actual[name].double() - tensor).abs().max())
        assert error < (TOLERANCE if name == "the output" else 3 * TOLERANCE) * scale, name


def in_one_graph(module: nn.Module, **options) -> Callable[[Tensor], Tensor]:
    """The module compiled whole, by a compiler that remembers nothing."""
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, **options)
