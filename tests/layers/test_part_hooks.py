"""Hooks on the parts of a layer; compared with calling each part in float64."""

import copy
import pickle

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from kfde_layers import CSFE, MFDF
from tests.support.agreement import count_operations
from tests.support.parts import (
    assert_calls_its_parts,
    call_parts,
    draw_map,
    each_layer,
    make_layer,
    part_names,
)


@each_layer
def test_plain_parts_may_be_merged(name):
    assert_calls_its_parts(lambda: make_layer(name))


@pytest.mark.cell("Tools that change parts", "forward and backward hooks")
@each_layer
def test_a_forward_hook_sees_every_part_and_may_replace_its_output(name):
    layer, x = make_layer(name), draw_map()
    for part in part_names(layer):
        hooked = copy.deepcopy(layer)
        outputs = []

        def scale(module, args, output, outputs=outputs):
            outputs.append(output)
            return 1.5 * output

        hooked.get_submodule(part).register_forward_hook(scale)
        y = hooked(x)
        assert len(outputs) == 1, part
        torch.testing.assert_close(y, call_parts(hooked, x), rtol=1e-10, atol=1e-10)
        assert not torch.equal(y, layer(x)), part


@pytest.mark.cell("Tools that change parts", "forward and backward hooks")
@pytest.mark.parametrize("kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@each_layer
def test_every_other_kind_of_hook_sees_every_part(name, kind):
    layer, x = make_layer(name), draw_map().requires_grad_()
    for part in part_names(layer):
        hooked = copy.deepcopy(layer)
        calls = []
        getattr(hooked.get_submodule(part), f"register_{kind}")(lambda *args, calls=calls: calls.append(args))
        hooked(x).sum().backward()
        assert len(calls) == 1, part


@each_layer
def test_a_hook_on_all_modules_of_the_process_sees_every_part(name):
    layer, x, modules = make_layer(name), draw_map(), []
    expected = layer(x)
    handle = register_module_forward_hook(lambda module, args, output: modules.append(module))
    try:
        y = layer(x)
    finally:
        handle.remove()
    assert {layer.get_submodule(part) for part in part_names(layer)} <= set(modules)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@each_layer
def test_backward_hooks_receive_the_gradient_of_the_part(name):
    layer, x = make_layer(name), draw_map().requires_grad_()
    for part in part_names(layer):
        hooked, gradients = copy.deepcopy(layer), []
        hooked.get_submodule(part).register_full_backward_hook(
            lambda module, inputs, outputs, gradients=gradients: gradients.append(outputs[0])
        )
        hooked(x).square().sum().backward()
        call_parts(hooked, x).square().sum().backward()
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_a_hook_that_is_removed_leaves_the_part_plain():
    layer, x = make_layer("MFDF"), draw_map()
    for part in part_names(layer):
        handle = layer.get_submodule(part).register_forward_hook(lambda *args: None)
        handle.remove()
    assert count_operations(lambda: layer(x))["aten::conv2d"] == 1
    layer.branches[2].register_forward_hook(lambda *args: None)
    assert count_operations(lambda: layer(x))["aten::conv2d"] == 4


def _double(self, input: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@pytest.mark.slow
@each_layer
def test_torch_fx_and_torchscript_record_what_was_done_to_a_part(name):
    x = draw_map()
    for part in part_names(make_layer(name)):
        layer = make_layer(name)
        layer.get_submodule(part).register_forward_hook(_double)
        expected = layer(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.jit.script(layer)(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [CSFE, MFDF])
def test_fused_is_not_recorded_with_a_part_that_must_be_called(make):
    layer = make(8, impl="fused")
    part = layer.cfe if make is CSFE else layer.fc1
    part.register_forward_hook(_double)
    with pytest.raises(NotImplementedError, match="impl='fused' cannot run"):
        torch.fx.symbolic_trace(layer)
    with pytest.raises(torch.jit.Error, match="impl='fused' cannot run"):
        torch.jit.script(layer)(torch.zeros(2, 8, 5, 5))


@each_layer
def test_16_bits_with_a_hook(name):
    x = draw_map(dtype=torch.bfloat16)
    layer = make_layer(name, torch.bfloat16)
    for part in part_names(layer):
        hooked = copy.deepcopy(layer)
        hooked.get_submodule(part).register_forward_hook(lambda *args: None)
        y, expected = hooked(x), call_parts(hooked, x)  # a chain rounds the map between its parts to 16 bits
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))


@each_layer
def test_autocast_keeps_to_the_parts(name):
    layer, x = make_layer(name, torch.float32), draw_map(dtype=torch.float32)
    for part in part_names(layer):
        hooked = copy.deepcopy(layer)
        outputs = []
        hooked.get_submodule(part).register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
        with torch.autocast("cpu", torch.bfloat16):
            y = hooked(x)
        assert len(outputs) == 1, part
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, layer(x), rtol=0, atol=0.03 * float(y.detach().abs().max()))


@each_layer
def test_hooked_layers_survive_deepcopy_and_pickle(name):
    layer, x = make_layer(name), draw_map()
    for part in part_names(layer):
        layer.get_submodule(part).register_forward_hook(_double)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
