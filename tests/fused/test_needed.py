"""Backward passes compute no gradient that nobody asked for."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.fused.csfe.options import CsfeOptions
from tests.support.inputs import MEMORY_FORMATS, draw

LAYERS = {
    "CFE": lambda: CFE(8, 2, impl="fused"),
    "SFE": lambda: SFE(8, impl="fused"),
    "CSFE": lambda: CSFE(8, 2, impl="fused"),
    "CSFE, sfe_cfe": lambda: CSFE(8, 2, arrangement="sfe_cfe", impl="fused"),
    "MFDF": lambda: MFDF(8, impl="fused"),
    "MFDF, biases": lambda: MFDF(8, bias=True, impl="fused"),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


class Asked(TorchDispatchMode):
    """Keep what each operator for a backward pass is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, tuple[bool, bool]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("kfde::") and name.endswith("_backward"):
            self.of[name.removeprefix("kfde::")] = args[-2:]
        return func(*args, **(kwargs or {}))


def gradients(make, memory_format, with_x: bool, frozen: tuple[str, ...] = ()):
    """Return the gradients by name, and what the operators were asked for; `frozen` has beginnings of names."""
    torch.manual_seed(0)
    layer = make().double()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 0.5)
        parameter.requires_grad = not name.startswith(frozen) if frozen else True
    x = draw(3, 8, 5, 7, memory_format=memory_format).requires_grad_(with_x)
    y = layer(x)
    with Asked() as asked:
        if y.requires_grad:
            y.backward(draw(*y.shape, seed=1))
    return {name: tensor.grad for name, tensor in [("x", x), *layer.named_parameters()]}, asked.of


@each_layer
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_what_is_asked_for_does_not_change_with_what_is_not(make, memory_format):
    everything, _ = gradients(make, memory_format, True)
    names = [name for name, gradient in everything.items() if name != "x"]
    parts = {name.rpartition(".")[0] or name for name in names}
    for with_x, frozen in product((True, False), [(), ("",), *((part,) for part in parts)]):
        some, _ = gradients(make, memory_format, with_x, frozen)
        for name, gradient in some.items():
            asked = with_x if name == "x" else not any(name.startswith(prefix) for prefix in frozen)
            assert (gradient is not None) == asked, name
            if gradient is not None:
                torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["CFE", "CSFE"])
def test_gates_ask_for_the_map_or_for_the_parameters(name):
    make, layout = LAYERS[name], torch.contiguous_format
    assert gradients(make, layout, True)[1] == {"csfe_fused_backward": (True, True)}
    assert gradients(make, layout, False)[1] == {"csfe_fused_backward": (False, True)}
    assert gradients(make, layout, True, ("",))[1] == {"csfe_fused_backward": (True, False)}
    assert gradients(make, layout, False, ("",))[1] == {}


def test_branches_ask_for_the_map_or_for_the_kernels():
    make, layout = LAYERS["MFDF"], torch.contiguous_format
    mean, merged = "mean_of_convolution_backward", "merged_convolution_backward"
    assert gradients(make, layout, True)[1] == {mean: (True, True), merged: (True, True)}
    assert gradients(make, layout, False)[1] == {mean: (False, True), merged: (False, True)}
    # The weights of the branches depend on the map, and so does the gradient of the map on that of these weights.
    assert gradients(make, layout, True, ("",))[1] == {mean: (True, False), merged: (True, True)}
    # Only the fully connected layers are trained, on a frozen map by frozen branches.
    assert gradients(make, layout, False, ("branches",))[1] == {merged: (False, True)}


def test_gradients_that_nobody_asked_for_take_no_memory():
    x, weight = draw(2, 8, 5, 7), draw(8)
    options = CsfeOptions(2, with_sfe=True)
    y, mean, m2 = torch.ops.kfde.csfe_fused(x, weight, weight, *options)
    backward = torch.ops.kfde.csfe_fused_backward
    for with_x, with_parameters in product((True, False), repeat=2):
        found = backward(y, x, weight, weight, mean, m2, *options, with_x, with_parameters)
        assert [gradient.numel() for gradient in found] == [560 * with_x, 8 * with_parameters, 8 * with_parameters]


@each_layer
def test_inference_keeps_nothing(make):
    layer, x, saved = make().double(), draw(2, 8, 5, 7), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        with torch.inference_mode():
            layer(x)
        with torch.no_grad():
            layer(x)
        assert saved == []
        layer(x.requires_grad_())
    assert saved
