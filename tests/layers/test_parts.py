"""Parts are called unless they are plain, whatever is done to them; compared with calling each part in float64."""

import copy
import functools
import gc
import pickle
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from kfde_layers import CFE, CSFE, MFDF, SFE
from kfde_layers.testing import random_tensor
from tests.support.agreement import count_operations
from tests.support.parts import MADE, call_parts, draw_map, make_layer, part_names

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.(weight_norm|spectral_norm)` is deprecated:FutureWarning"
)

each_layer = pytest.mark.parametrize("name", MADE)
each_mfdf = pytest.mark.parametrize("name", [name for name in MADE if name.startswith("MFDF")])
WITH_NORM = [name for name in MADE if "batch norm" in name]


def assert_calls_its_parts(make):
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


def changed(name, change):
    """Return a function that makes the layer `name` and passes it to `change`."""

    def make():
        layer = make_layer(name)
        change(layer)
        return layer

    return make


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


CHANGES = {
    "prune": lambda part: prune.l1_unstructured(part, "weight", 0.5),
    "pruned for good": lambda part: prune.remove(prune.random_unstructured(part, "weight", 0.5), "weight"),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
}
WITH_A_HOOK = ("prune", "weight_norm", "spectral_norm")


@pytest.mark.cell("Tools that change parts", "pruning, weight_norm, spectral_norm")
@pytest.mark.parametrize("change", CHANGES)
@each_mfdf
def test_tools_that_make_a_weight_anew_work_on_every_part(name, change):
    def change_every_part(layer):
        for part in [part for part in layer.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]:
            CHANGES[change](part)

    make = changed(name, change_every_part)
    assert_calls_its_parts(make)
    layer = make()
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(draw_map()).square().mean().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()


@pytest.mark.parametrize("change", ["prune", "pruned for good"])
def test_pruning_of_the_gate_of_a_csfe(change):
    assert_calls_its_parts(changed("CSFE", lambda layer: CHANGES[change](layer.cfe)))


@pytest.mark.parametrize("change", CHANGES)
def test_fused_refuses_a_weight_that_a_hook_makes(change):
    layer = MFDF(8, impl="fused").double()
    CHANGES[change](layer.branches[2])
    CHANGES[change](layer.fc1)  # fc1 and fc2 are called in each implementation
    if change in WITH_A_HOOK:
        with pytest.raises(NotImplementedError, match=r"cannot run: branches\[2\] has a forward or backward hook"):
            layer(draw_map())
    else:
        assert count_operations(lambda: layer(draw_map()))["aten::conv2d"] == 1


class ScaledConv(nn.Conv2d):
    """A convolution of another type."""

    def forward(self, x):
        return 2 * super().forward(x)


def _own_forward(module):
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


def _own_conv_forward(module):
    def forward(self, x, weight, bias):
        return 2 * nn.Conv2d._conv_forward(self, x, weight, bias)

    module._conv_forward = types.MethodType(forward, module)


BRANCHES = {
    "reflecting padding": (lambda: nn.Conv2d(8, 8, 5, padding=2, padding_mode="reflect", groups=8), "another kernel"),
    "another kernel size": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), "another kernel size"),
    "another dilation": (lambda: nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8), "another kernel size"),
    "other groups": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=2), "another kernel size"),
    "padding by name": (lambda: nn.Conv2d(8, 8, 5, padding="same", groups=8), "another kernel size"),
    "no bias": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), "another kernel size"),
    "another type": (lambda: ScaledConv(8, 8, 5, padding=2, groups=8), "is of type ScaledConv instead of Conv2d"),
    "several modules": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU()), "is of type Sequential instead of"),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_replaced_branch_is_called(branch):
    make, reason = BRANCHES[branch]

    def replace(layer):
        layer.branches[2] = make().double()

    assert_calls_its_parts(changed("MFDF", replace))
    layer = changed("MFDF", replace)()
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=f"impl='fused' cannot run: .*{reason}"):
        layer(draw_map())


@pytest.mark.parametrize("branch", [lambda: nn.Conv2d(8, 8, 5, 2, 2), lambda: nn.Conv2d(8, 4, 5, padding=2)])
def test_a_replaced_branch_that_changes_the_shape_is_refused(branch):
    layer = make_layer("MFDF")
    layer.branches[2] = branch().double()
    with pytest.raises(ValueError, match=r"the output of branch 2 must have shape \(4, 8, 33, 35\), got"):
        layer(draw_map())


def test_a_replaced_fc2_of_another_width_is_refused():
    layer = make_layer("MFDF")
    layer.fc2 = nn.Linear(32, 24).double()
    with pytest.raises(ValueError, match=r"the output of fc2 must have shape \(4, 32\), got \(4, 24\)"):
        layer(draw_map())


@each_mfdf
def test_fc1_and_fc2_may_be_anything_that_maps_their_shapes(name):
    def replace(layer):
        width = layer.fc2.out_features
        layer.fc1 = nn.Sequential(nn.Linear(8, 5), nn.Tanh()).double()
        layer.fc2 = nn.Linear(5, width, bias=False).double()

    assert_calls_its_parts(changed(name, replace))


@pytest.mark.parametrize("change", [_own_forward, _own_conv_forward])
def test_a_branch_with_a_forward_of_its_own_is_called(change):
    layer, x = make_layer("MFDF"), draw_map()
    before = layer(x)
    change(layer.branches[1])
    torch.testing.assert_close(layer(x), call_parts(layer, x), rtol=1e-10, atol=1e-10)
    assert not torch.equal(layer(x), before)
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=r"branches\[1\] has a forward of its own"):
        layer(x)


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith("CSFE")])
@pytest.mark.parametrize("part", ["cfe", "sfe"])
def test_a_replaced_part_of_csfe_is_called(name, part):
    make = changed(name, lambda layer: setattr(layer, part, nn.Sequential(getattr(layer, part), nn.GELU())))
    assert_calls_its_parts(make)
    layer = make()
    layer.impl = "fused"
    with pytest.raises(NotImplementedError, match=f"{part} is of type Sequential instead of {part.upper()}"):
        layer(draw_map())


def test_options_of_the_parts_are_read_at_the_call():
    layer, x = make_layer("CSFE"), draw_map()
    layer.cfe.threshold, layer.sfe.beta = 0.45, 0.1
    torch.testing.assert_close(layer(x), call_parts(layer, x), rtol=1e-10, atol=1e-10)


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose tensors are buffers, as detectors have it."""

    def __init__(self, channels):
        super().__init__()
        for index, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            self.register_buffer(name, 1 + 0.1 * index * random_tensor(channels, seed=index).abs())

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm of another type."""

    def forward(self, x):
        return super().forward(x) + 1


NORMS = {
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "Identity": nn.Identity,
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(8),
    "BatchNorm2d without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "BatchNorm2d without both": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    "a subclass of BatchNorm2d": lambda: ShiftedBatchNorm2d(8),
    "another BatchNorm2d": lambda: nn.BatchNorm2d(8, eps=0.1),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
}


@pytest.mark.cell("Tools that change parts", "a replaced norm")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", WITH_NORM)
def test_a_norm_that_is_replaced_after_construction(name, norm):
    def replace(layer):
        for branch in layer.branches:
            branch.norm = NORMS[norm]().double()

    if norm == "SyncBatchNorm":  # in training it needs a process group
        layer = changed(name, replace)()
        torch.testing.assert_close(layer(draw_map()), call_parts(layer, draw_map()), rtol=1e-10, atol=1e-10)
    else:
        assert_calls_its_parts(changed(name, replace))


@pytest.mark.parametrize("name", WITH_NORM)
def test_convolutions_that_took_over_their_norm(name):
    def fuse(layer):
        for branch in layer.branches:
            branch.conv = fusion.fuse_conv_bn_eval(branch.conv, branch.norm)
            branch.norm = nn.Identity()

    make = changed(name, fuse)
    torch.testing.assert_close(make()(draw_map()), make_layer(name)(draw_map()), rtol=1e-10, atol=1e-10)
    assert_calls_its_parts(make)


@pytest.mark.parametrize("name", WITH_NORM)
def test_pytorch_fuses_the_modules_of_a_branch(name):
    layer, x = make_layer(name), draw_map()
    before = layer(x)
    fused = torch.ao.quantization.fuse_modules(layer, [[f"branches.{k}.conv", f"branches.{k}.norm"] for k in range(4)])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), before, rtol=1e-10, atol=1e-10)


@each_layer
def test_a_graph_of_torch_fx_is_right_in_the_other_mode(name):
    x = draw_map()
    for traced_in in (False, True):
        layer = make_layer(name)
        graph = torch.fx.symbolic_trace(copy.deepcopy(layer).train(traced_in))
        for mode in (not traced_in, traced_in):
            torch.testing.assert_close(graph.train(mode)(x), layer.train(mode)(x), rtol=1e-9, atol=1e-9)


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


def _double(self, input: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return 2 * output


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


def test_a_weight_on_another_device_is_not_read():
    layer = MFDF(8, impl="fused")
    layer.branches[1].to("meta")
    with pytest.raises(NotImplementedError, match=r"branches\[1\] has its parameters on meta, but x is on cpu"):
        layer(torch.zeros(2, 8, 5, 5))
    csfe = CSFE(8, impl="fused")
    csfe.cfe.bias = nn.Parameter(csfe.cfe.bias.to("meta"))
    with pytest.raises(NotImplementedError, match="cfe has its parameters on meta, but x is on cpu"):
        csfe(torch.zeros(2, 8, 5, 5))


class RandomMask(nn.Module):
    """A parametrization that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 0.5 * weight


@each_mfdf
def test_a_parametrization_runs_once_a_call(name):
    layer = make_layer(name)
    masks = [RandomMask() for _ in layer.branches]
    for branch, mask in zip(layer.branches, masks, strict=True):
        parametrize.register_parametrization(getattr(branch, "conv", branch), "weight", mask, unsafe=True)
    for mode in (True, False):
        for mask in masks:
            mask.calls = 0
        layer.train(mode)(draw_map())
        assert [mask.calls for mask in masks] == [1] * len(masks)


class CountedNoise(nn.Module):
    """A parametrization that changes at each call, as spectral_norm does in training."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return (1 + 0.1 * self.calls) * weight


@pytest.mark.parametrize("hooked", [0, 3])
def test_a_parametrization_runs_once_when_another_branch_must_be_called(hooked):
    layer, counters = make_layer("MFDF"), [CountedNoise() for _ in range(4)]
    layer.branches[hooked].register_forward_hook(lambda *args: None)
    for branch, counter in zip(layer.branches, counters, strict=True):
        parametrize.register_parametrization(branch, "weight", counter, unsafe=True)
        counter.calls = 0
    layer(draw_map())
    assert [counter.calls for counter in counters] == [1, 1, 1, 1]


@each_mfdf
def test_fc1_may_be_scripted(name):
    layer, x = make_layer(name), draw_map()
    expected = layer(x)
    layer.fc1 = torch.jit.script(layer.fc1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@each_mfdf
def test_a_deleted_layer_is_freed_at_once(name):
    layer = make_layer(name)
    parts = [weakref.ref(part) for part in layer.modules()]
    gc.disable()
    try:
        del layer
        assert not [part() for part in parts if part() is not None]
    finally:
        gc.enable()


RESETS = {
    "its own": lambda layer: layer.reset_parameters(),
    "every module, parents first": lambda layer: _reset(layer.modules()),
    "every module, parts first": lambda layer: _reset(reversed(list(layer.modules()))),
    "the parts alone": lambda layer: _reset(part for part in layer.modules() if not list(part.children())),
}


def _reset(modules):
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


STARTS = {
    "CFE": CFE,
    "CSFE": CSFE,
    "MFDF": MFDF,
    "MFDF, dense": functools.partial(MFDF, groups=1, kernel_sizes=(1, 3)),
    "MFDF, batch norm": functools.partial(MFDF, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU),
}


@pytest.mark.parametrize("make", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS.keys())
@pytest.mark.parametrize("copied", [False, True])
def test_every_way_to_reset_ends_at_the_documented_start(make, reset, copied):
    torch.manual_seed(0)
    layer = make(64, device="meta")
    if copied:
        layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
    reset(layer)
    for name, parameter in layer.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name  # of a norm: 1, 0
            continue
        noise = parameter.detach().clone()
        if noise.shape[1:2] == (1,) and noise.ndim == 4:  # a depthwise kernel: a Dirac kernel plus noise
            noise[:, :, noise.shape[2] // 2, noise.shape[3] // 2] -= 1
        assert 0.015 < noise.std() < 0.025, name


def test_parts_are_of_pytorchs_own_types():
    layer = MFDF(8, norm_layer=nn.BatchNorm2d)
    assert {type(branch.conv) for branch in layer.branches} == {nn.Conv2d}
    assert type(layer.fc1) is type(layer.fc2) is nn.Linear
    assert (type(CSFE(8).cfe), type(CSFE(8).sfe)) == (CFE, SFE)
