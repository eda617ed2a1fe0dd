"""Backward passes compute no gradient that nobody asked for."""

from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
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
    "MFDF, no biases": lambda: MFDF(8, bias=False, impl="fused"),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


class Asked(TorchDispatchMode):
    """Keep what each operator for a backward pass is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, tuple[bool, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("kfde::") and name.endswith("_backward"):
            flags = [argument.name for argument in func._schema.arguments].index("with_x")
            self.of[name.removeprefix("kfde::")] = args[flags:]
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
    assert gradients(make, layout, True)[1] == {mean: (True, True), merged: (True, True, True, True)}
    assert gradients(make, layout, False)[1] == {mean: (False, True), merged: (False, True, True, True)}
    # The gradient of the map needs that of the branches' weights alpha, which depend on the map.
    assert gradients(make, layout, True, ("",))[1] == {mean: (True, False), merged: (True, True, False, True)}
    # Only the fully connected layers are trained, on a frozen map by frozen branches.
    assert gradients(make, layout, False, ("branches",))[1] == {merged: (False, True, False, True)}
    without_biases = gradients(LAYERS["MFDF, no biases"], layout, True)[1]
    assert without_biases == {mean: (True, True), merged: (True, True, True, False)}


def backward_calls():
    """Return the arguments of each operator for a backward pass, and which of its flags each gradient depends on."""
    x, dp, weight, options = draw(2, 8, 5, 7), draw(2, 8), draw(8), CsfeOptions(2, with_sfe=True)
    y, mean, m2 = torch.ops.kfde.csfe_fused(x, weight, weight, *options)
    alpha, kernels = draw(2, 3, 8), draw(3, 8, 5, 5)
    return {
        "csfe_fused_backward": ((y, x, weight, weight, mean, m2, *options), (0, 1, 1)),
        "mean_of_convolution_backward": ((dp, x, kernels[0], 1), (0, 1)),
        "merged_convolution_backward": ((x, x, alpha, kernels, 1), (0, 1, 2, 3)),
    }


@pytest.mark.parametrize("name", backward_calls())
def test_gradients_that_nobody_asked_for_are_empty(name):
    """So they are in the operator's fake form, which a compiler sees."""
    arguments, flag_of = backward_calls()[name]
    operator = getattr(torch.ops.kfde, name)
    for flags in product((True, False), repeat=1 + max(flag_of)):
        found = operator(*arguments, *flags)
        assert [gradient.numel() > 0 for gradient in found] == [flags[flag] for flag in flag_of]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            assert [fake.shape for fake in operator(*fakes, *flags)] == [gradient.shape for gradient in found]


@pytest.mark.parametrize("name", backward_calls())
def test_gradients_that_nobody_asked_for_take_no_steps(name):
    arguments, flag_of = backward_calls()[name]
    operator, count = getattr(torch.ops.kfde, name), 1 + max(flag_of)

    def steps(*flags: bool) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            operator(*arguments, *flags)
        return sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))

    everything = steps(*[True] * count)
    for left_out in range(count):
        assert steps(*(flag != left_out for flag in range(count))) < everything


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
