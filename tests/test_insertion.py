import copy
import functools
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from dataclasses import dataclass, is_dataclass
from typing import NamedTuple

import pytest
import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from kfde_layers import CFE, CSFE, MFDF, SFE, insert, insertion_points, remove
from kfde_layers.insertion import Point
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.helpers import draw


class Series(nn.Module):
    """Runs whatever children it has, one behind the other."""

    def __init__(self, *children):
        super().__init__()
        for index, child in enumerate(children):
            self.add_module(str(index), child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Sum(Series):
    """Gives each child the same input."""

    def forward(self, x):
        return sum(child(x) for child in self.children())


def plain_backbone():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True)),
        nn.Conv2d(32, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def timm_model(name, **kwargs):
    return functools.partial(timm.create_model, name, num_classes=5, **kwargs)


# For each host: how to make it, two points, and their maps at the size of the image.
HOSTS = {
    "ResNet": (timm_model("resnet18"), {"layer3": (256, 16, "NCHW"), "layer4": (512, 32, "NCHW")}, 64),
    "ConvNeXt": (timm_model("convnextv2_atto"), {"stages.2": (160, 16, "NCHW"), "stages.3": (320, 32, "NCHW")}, 64),
    "Swin": (
        timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
        {"layers.2": (384, 16, "NHWC"), "layers.3": (768, 32, "NHWC")},
        64,
    ),
    "EfficientNet": (timm_model("efficientnet_b0"), {"blocks.4": (112, 16, "NCHW"), "blocks.6": (320, 32, "NCHW")}, 64),
    "nn.Sequential": (plain_backbone, {"1": (32, 4, "NCHW"), "2": (8, 4, "NCHW")}, 64),
}
each_host = pytest.mark.parametrize(("make", "points", "side"), HOSTS.values(), ids=HOSTS.keys())


def host(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # ResNet ends its blocks in zeros, behind which a block would have nothing to do
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
    return model


def images(side, batch=2):
    return draw(batch, 3, side, side, dtype=torch.float32)


def replace_output(module, block):
    """Insertion by hand: put the block's output in the place of the module's own."""
    module.register_forward_hook(lambda module, args, output: block(output))


@each_host
def test_points_are_named_with_channels_reduction_and_layout(make, points, side):
    model = host(make)
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.train().modules()]
    found = insertion_points(model, example_input=images(side, 1))
    assert {name: found[name] for name in points} == {name: Point(*point) for name, point in points.items()}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    if hasattr(model, "feature_info"):
        assert list(found) == [info["module"] for info in model.feature_info]
        assert [point.channels for point in found.values()] == [info["num_chs"] for info in model.feature_info]
        assert [point.reduction for point in found.values()] == [info["reduction"] for info in model.feature_info]


@each_host
def test_blocks_are_run_behind_their_points(make, points, side):
    bare, x = host(make), images(side)
    model = insert(copy.deepcopy(bare), dict.fromkeys(points, CSFE), example_input=x)
    for name in points:
        scatter_parameters(model.get_submodule(name).kfde)
        replace_output(bare.get_submodule(name), model.get_submodule(name).kfde)
    torch.testing.assert_close(model(x), bare(x))
    changed, unchanged = model(x), host(make)(x)
    assert (changed - unchanged).norm() > 0.01 * unchanged.norm()


@each_host
def test_maps_in_either_layout_reach_the_block_as_nchw(make, points, side):
    name, (channels, reduction, _) = next(iter(points.items()))
    seen = []

    class Spy(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            seen.append((self.channels, tuple(x.shape)))
            return x

    model = insert(host(make), {name: Spy}, example_input=images(side))
    seen.clear()  # of the trial on the probed map
    torch.testing.assert_close(model(images(side)), host(make)(images(side)))
    assert seen == [(channels, (2, channels, side // reduction, side // reduction))]


@each_host
def test_identity_start_leaves_the_outputs_equal_and_then_trains(make, points, side):
    bare, x = host(make), images(side)
    blocks = dict(zip(points, (CSFE, MFDF), strict=True))
    model = insert(host(make), blocks, example_input=x, identity_start=True)
    assert torch.equal(model(x), bare(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    added = [(name, parameter) for name, parameter in model.named_parameters() if ".kfde." in name]
    assert added
    for name, parameter in added:
        assert parameter.grad.abs().max() > 0, name


@each_host
def test_the_bare_checkpoint_still_loads(make, points, side):
    bare = host(make)
    model = insert(host(make), dict.fromkeys(points, MFDF), example_input=images(side))
    result = model.load_state_dict(bare.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(key.startswith(tuple(f"{name}.kfde." for name in points)) for key in result.missing_keys)
    again = insert(host(make), dict.fromkeys(points, MFDF), example_input=images(side))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images(side)), model(images(side)))


@each_host
def test_deepcopy_and_pickle(make, points, side):
    model, x = insert(host(make), dict.fromkeys(points, CSFE), example_input=images(side)), images(side)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize(("make", "points", "side"), list(HOSTS.values())[:4], ids=list(HOSTS)[:4])
def test_the_rest_of_timms_api_passes_through_the_block(make, points, side):
    bare, x = host(make), images(side)
    model = insert(host(make), dict.fromkeys(points, CSFE), example_input=x)
    for name in points:
        replace_output(bare.get_submodule(name), model.get_submodule(name).kfde)
    for given, wanted in zip(
        *(m.forward_intermediates(x, intermediates_only=True) for m in (model, bare)), strict=True
    ):
        torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(model.forward_features(x), bare.forward_features(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    for name, parameter in model.named_parameters():
        if ".kfde." in name:
            assert parameter.grad.abs().max() > 0, name


def test_inserting_into_a_features_only_model():
    name, x = "resnet18", images(64)
    model = timm.create_model(name, features_only=True).eval()
    before = model(x)
    insert(model, {"layer4": SFE})
    after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    torch.testing.assert_close(after[-1], SFE()(before[-1]))


def test_blocks_by_class_partial_and_instance():
    model, shared = plain_backbone(), CFE(8)
    insert(model, {"0": SFE, "1": functools.partial(MFDF, kernel_sizes=(3,)), "2": shared})
    assert type(model[0].kfde) is SFE
    assert model[1].kfde.kernel_sizes == (3,)
    assert model[2].kfde is shared


def test_blocks_follow_dtype_device_and_mode_of_their_point():
    model = insert(plain_backbone().to(torch.bfloat16).eval(), {"1": CSFE})
    assert model[1].kfde.cfe.weight.dtype == torch.bfloat16
    assert not model[1].kfde.training
    assert model(images(32).bfloat16()).dtype == torch.bfloat16
    model = insert(plain_backbone().to("meta"), {"1": CSFE})
    assert model[1].kfde.cfe.weight.device.type == "meta"
    assert model[1].kfde.training


def test_the_example_is_guessed_from_the_first_convolution():
    model = nn.Sequential(nn.Conv2d(5, 16, 3, stride=2, padding=1), nn.ReLU())
    assert insertion_points(model) == {"0": Point(16, 2, "NCHW"), "1": Point(16, 2, "NCHW")}
    assert insertion_points(timm.create_model("resnet18", in_chans=1))["layer1"] == Point(64, 4, "NCHW")


@pytest.mark.parametrize(("height", "width"), [(460, 700), (230, 350), (100, 60), (65, 33), (224, 224), (32, 32)])
def test_maps_of_any_image_are_recognised(height, width):
    """A stride rounds each side of the map by itself, so that the two sides shrink by slightly different factors."""
    found = insertion_points(timm.create_model("resnet18"), example_input=torch.zeros(1, 3, height, width))
    assert [point.reduction for point in found.values()] == [2, 4, 8, 16, 32]
    assert {point.layout for point in found.values()} == {"NCHW"}


def test_torchscript_takes_an_inserted_model():
    for name in ("convnextv2_atto", "resnet18"):
        model = timm.create_model(name).eval()
        insert(model, {list(insertion_points(model))[-1]: CSFE})
        torch.testing.assert_close(torch.jit.script(model)(images(64)), model(images(64)), rtol=1e-4, atol=1e-5)


def aliased():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model.add_module("alias", model[0])
    model.forward = lambda x: model[1](model[0](x))
    return model


def test_one_module_under_two_names():
    model = aliased()
    before = model(images(16))
    insert(model, {"alias": SFE})
    assert type(model[0].kfde) is SFE
    with pytest.raises(ValueError, match="cannot insert at 'alias': it is one module with another of the names"):
        insert(aliased(), {"0": SFE, "alias": CSFE})
    assert not torch.allclose(model(images(16)), before)


def test_an_oblong_example_tells_the_layouts_apart():
    class Transposed(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    model = nn.Sequential(nn.Conv2d(3, 24, 1), Transposed())
    x = torch.zeros(1, 3, 24, 24)  # as square as it is deep: nothing to tell by
    assert insertion_points(model, example_input=x)["1"].layout == "NCHW"
    x = torch.zeros(1, 3, 24, 48)
    assert insertion_points(model, example_input=x) == {"0": Point(24, 1, "NCHW"), "1": Point(24, 1, "NHWC")}


class Odd(nn.Module):
    """A model with every kind of point that cannot take a block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.twice = nn.ReLU()
        self.never = nn.ReLU()
        self.parts = nn.ModuleDict({"own": Sum(nn.Identity())})
        self.flat = nn.Flatten()

    def forward(self, x):
        return self.flat(self.parts["own"](self.twice(self.twice(self.conv(x)))))


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (["1"], TypeError, r"blocks must be a dict from module names to blocks, got \['1'\] of type list"),
        ({"1": 3}, TypeError, "the block at '1' must be a module or make one of a number of channels, got 3"),
        ({"1": lambda channels: nn.Flatten()}, ValueError, r"the block at '1' must keep the shape \(1, 32, 56, 56\)"),
        ({"1": CSFE(8)}, ValueError, "the block at '1' does not run .* x must have 8 channels in dimension 1, got 32"),
    ],
)
def test_unfit_blocks_are_refused(blocks, error, message):
    model = plain_backbone()
    with pytest.raises(error, match=message):
        insert(model, blocks)
    assert list(model.state_dict()) == list(plain_backbone().state_dict())


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("convs", SFE, "cannot insert at 'convs': the model has no submodule of that name; close to it: 'conv'"),
        ("", SFE, "cannot insert at '': the model has no submodule of that name"),
        ("never", SFE, "cannot insert at 'never': the forward pass does not call it"),
        ("twice", SFE, "cannot insert at 'twice': the forward pass calls it 2 times"),
        ("parts.own", SFE, "cannot insert at 'parts.own': Sum runs its children in its own way, and would take"),
        ("parts", SFE, "cannot insert at 'parts': the forward pass does not call it"),
        ("flat", SFE, r"it returns no feature map of the input, .* but torch.float32 of shape \(1, 1792\)"),
        ("conv", CSFE, "channels must be even, since CFE crosses two halves of them, got 7"),
    ],
)
def test_refusals_leave_the_model_unchanged(name, block, message):
    model = Odd()
    keys, expected = list(model.state_dict()), model(images(16))
    with pytest.raises(ValueError, match=message):
        insert(model, {"parts.own.0": SFE, name: block}, example_input=torch.zeros(1, 3, 16, 16))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images(16)), expected)
    assert not any(hasattr(module, "kfde") or module._forward_hooks for module in model.modules())
    assert set(insertion_points(model, example_input=torch.zeros(1, 3, 16, 16))) == {"conv", "parts.own", "parts.own.0"}


def test_a_point_takes_one_block_and_others_go_on_taking_theirs():
    model = insert(plain_backbone(), {"1": SFE})
    with pytest.raises(ValueError, match="cannot insert at '1': it already holds a block"):
        insert(model, {"1": SFE})
    assert list(insertion_points(model)) == ["0.0", "0.1", "0", "1.0", "1.1", "2", "3"]
    insert(model, {"2": CFE})
    assert set(model.state_dict()) - set(plain_backbone().state_dict()) == {"2.kfde.weight", "2.kfde.bias"}
    assert type(model[1].kfde) is SFE


def test_a_module_that_runs_its_children_runs_the_block_once():
    model = Series(nn.Conv2d(3, 8, 3), Series(nn.Conv2d(8, 6, 3)))
    expected = SFE()(model(images(16)))
    insert(model, {"1": SFE})
    assert torch.equal(model(images(16)), expected)
    remove(model)
    assert torch.equal(SFE()(model(images(16))), expected)


class Both(NamedTuple):
    head: Tensor
    tail: Tensor


@dataclass
class Output:
    logits: Tensor
    tail: Tensor | None = None


class Packed(nn.Module):
    """Returns its input and a summary of it, packed in some way."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(x.mean((2, 3)), x)


PACKS = {
    "tuple": lambda mean, x: (mean, x),
    "list": lambda mean, x: [x, mean],
    "named tuple": Both,
    "dict": lambda mean, x: {"mean": mean, 1: x},
    "ordered dict": lambda mean, x: OrderedDict(map=x, mean=mean),
    "dataclass": Output,
}


def unpacked(output):
    if is_dataclass(output):
        output = vars(output)
    return list(output.values() if isinstance(output, dict) else output)


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("container", [nn.Sequential, Series])
def test_the_first_map_of_an_output_goes_through_the_block(pack, container):
    """Behind a module of its own, and behind the last child of a container."""
    for name in ("1", ""):
        model = container(nn.Conv2d(3, 6, 3, stride=2, padding=1), Packed(pack))
        if not name:
            model, name = container(model), "0"
        x = images(16)
        before = model(x)
        insert(model, {name: SFE})
        after = model(x)
        assert type(after) is type(before)
        assert not isinstance(after, dict) or list(after) == list(before)
        for old, new in zip(unpacked(before), unpacked(after), strict=True):
            assert torch.equal(new, SFE()(old) if old.ndim == 4 else old)
        assert torch.equal(unpacked(copy.deepcopy(model)(x))[1], unpacked(after)[1])
        assert all(map(torch.equal, unpacked(remove(model)(x)), unpacked(before)))


class Patches(nn.Module):
    """Patches of 4 x 4 px as a sequence of tokens behind some prefix tokens."""

    def __init__(self, num_prefix_tokens, declared=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.tokens = nn.Identity()
        self.prefix = nn.Parameter(torch.randn(1, num_prefix_tokens, 8))
        if declared:
            self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.tokens(torch.cat((self.prefix.expand(len(x), -1, -1), tokens), 1))


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (40, 16), (30, 41)])
@pytest.mark.parametrize(("num_prefix_tokens", "declared"), [(0, False), (1, False), (2, False), (5, False), (3, True)])
def test_tokens_reach_the_block_as_the_rows_of_a_map(size, num_prefix_tokens, declared):
    model = Patches(num_prefix_tokens, declared)
    x = draw(2, 3, *size, dtype=torch.float32)
    assert insertion_points(model, example_input=x)["tokens"] == Point(8, 4, "NLC", num_prefix_tokens)
    before, block = model(x), scatter_parameters(MFDF(8))
    insert(model, {"tokens": block}, example_input=x)
    prefix, tokens = before.split((num_prefix_tokens, before.shape[1] - num_prefix_tokens), 1)
    maps = rearrange(tokens, "n (h w) c -> n c h w", h=size[0] // 4)
    expected = torch.cat((prefix, rearrange(block(maps), "n c h w -> n (h w) c")), 1)
    torch.testing.assert_close(model(x), expected)
    twice = draw(2, 3, 2 * (size[0] // 4 * 4), 2 * (size[1] // 4 * 4), dtype=torch.float32)
    tokens = remove(copy.deepcopy(model))(twice)[:, num_prefix_tokens:]
    maps = rearrange(tokens, "n (h w) c -> n c h w", h=2 * (size[0] // 4))
    torch.testing.assert_close(model(twice)[:, num_prefix_tokens:], rearrange(block(maps), "n c h w -> n (h w) c"))


def test_tokens_of_another_aspect_ratio_are_refused():
    model = insert(Patches(1), {"tokens": SFE}, example_input=images(16))
    with pytest.raises(
        ValueError, match=r"x must have 1 tokens and a map with the aspect ratio of \(4, 4\), .* got 13"
    ):
        model(torch.zeros(1, 3, 16, 12))


def test_tokens_that_are_no_map_are_left_alone():
    """A square image gives no grid of 4 x 5, wherever 20 tokens may come from."""
    model = nn.Sequential(nn.Conv2d(3, 20, 4, stride=4), nn.Flatten(2))
    assert list(insertion_points(model, example_input=images(64, 1))) == ["0"]


def distributed(wrap):
    def wrapped(model):
        with tempfile.NamedTemporaryFile() as file:
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.FileStore(file.name), rank=0, world_size=1
            )
            try:
                return wrap(model)
            finally:
                torch.distributed.destroy_process_group()

    return wrapped


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "model must not be wrapped yet, got DataParallel: insert first, wrap then"),
        (
            distributed(nn.parallel.DistributedDataParallel),
            "must not be wrapped yet, got DistributedDataParallel: insert",
        ),
        (distributed(fully_shard), "model must not be wrapped yet, got FSDPModule: insert first, wrap then"),
        (torch.compile, "model must not be compiled yet, got a compiled one: insert first, compile then"),
        (lambda model: model.compile() or model, "model must not be compiled yet, got a compiled one: insert first"),
        (
            lambda model: nn.Sequential(torch.compile(model)),
            r"got a compiled one \(at '0'\): insert first, compile then",
        ),
        (torch.jit.script, "model must not be scripted yet, got a ScriptModule: insert first, script then"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_do_first(wrap, message):
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 1)))
    for call in (insertion_points, lambda model: insert(model, {"0": SFE})):
        with pytest.raises(ValueError, match=message):
            call(model)


def test_a_block_without_effect_on_the_output_is_said():
    vit = timm.create_model("test_vit", img_size=32)
    with pytest.warns(
        UserWarning, match=r"output does not depend, as it stands, on the feature map at 'blocks.5': the block"
    ):
        insert(vit, {"blocks.4": SFE, "blocks.5": SFE}, example_input=images(32))
    for model in (
        timm.create_model("test_vit", img_size=32, global_pool="avg"),
        timm.create_model("test_vit", img_size=32, features_only=True),
        nn.Sequential(OrderedDict(blocks=nn.Sequential(*[nn.Identity()] * 5, nn.Conv2d(3, 4, 1)))),
    ):
        name = next(name for name, _ in model.named_modules() if name.endswith("blocks.5"))
        insert(model, {name: SFE}, example_input=images(32))  # a warning would be an error here


def test_nothing_is_said_where_the_head_starts_from_zeros():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    nn.init.zeros_(model[2].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        insert(model, {"0": SFE}, example_input=images(8))
    assert not caught
    assert type(model[0].kfde) is SFE


def test_other_hooks_see_the_blocks_output():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    expected = SFE()(model[0](images(8)))
    insert(model, {"0": SFE})
    seen.clear()
    model(images(8))
    assert torch.equal(seen[0], expected)


def test_remove_leaves_nothing_behind():
    for make in (lambda: timm.create_model("test_resnet"), lambda: timm.create_model("kfde_convnextv2_atto")):
        bare = make().eval()
        model = insert(copy.deepcopy(bare), dict.fromkeys(list(insertion_points(bare))[:3], CSFE))
        for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert remove(changed) is changed
            assert repr(changed) == repr(bare)
            assert list(changed.state_dict()) == list(bare.state_dict())
            for old, new in zip(bare.modules(), changed.modules(), strict=True):
                assert old.__dict__.keys() == new.__dict__.keys()
                assert not new._forward_hooks
            assert torch.equal(changed(images(64)), bare(images(64)))


def test_a_pickled_block_is_not_lost_to_hooks_of_another_process(tmp_path):
    """Torch numbers hooks anew in each process, and a number that is taken must be known as taken."""
    insert_it = "import sys, timm, torch; from kfde_layers import SFE, insert, insertion_points; path = sys.argv[1]\n"
    save = 'torch.save(insert(timm.create_model("test_convnext").eval(), {"stages.3": SFE}), path)'
    load = """
model, x = torch.load(path, weights_only=False), torch.ones(1, 3, 64, 64).cumsum(3)
before = model(x)
insertion_points(model)
[model.stages[3].register_forward_hook(lambda *args: None).remove() for _ in range(99)]
assert torch.equal(model(x), before)
assert len(model.stages[3]._forward_hooks) == 1
"""
    for code in (save, load):
        subprocess.run([sys.executable, "-c", insert_it + code, tmp_path / "model.pt"], check=True)


class LeavesOutTheLast(Series):
    """Does not run its last child."""

    def forward(self, x):
        for child in list(self.children())[:-1]:
            x = child(x)
        return x


def test_a_module_that_a_further_child_would_alter_is_refused():
    model = nn.Sequential(LeavesOutTheLast(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    before = model(images(8))
    with pytest.raises(ValueError, match="cannot insert at '0': LeavesOutTheLast runs its children in its own way"):
        insert(model, {"0": SFE})
    assert torch.equal(model(images(8)), before)


class SideEffects(nn.Module):
    """Counts, draws random numbers, and does something when it is set to eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("count", torch.zeros(()))
        self.merged = False

    def train(self, mode=True):
        self.merged |= not mode
        return super().train(mode)

    def forward(self, x):
        self.count += 1
        return self.conv(x + torch.randn_like(x))


def test_probing_leaves_no_trace():
    model, block = SideEffects(), nn.BatchNorm2d(4)
    state = torch.get_rng_state()
    insertion_points(model, example_input=images(8))
    insert(model, {"conv": block}, example_input=images(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert not model.merged
    assert model.training
    assert block.num_batches_tracked == 0


def test_probing_under_autocast_gives_the_block_the_format_of_the_model():
    with torch.autocast("cpu", torch.bfloat16):
        model = insert(plain_backbone(), {"1": CSFE})
    assert model[1].kfde.cfe.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: insert(3, {}), TypeError, "model must be a torch.Module, got 3 of type int"),
        (
            lambda model: insert(model, {1: SFE}),
            TypeError,
            "a name in blocks must be a builtins.str, got 1 of type int",
        ),
        (lambda model: insert(model, {"1": lambda c: c}), TypeError, "must be a module or make one .*, got 32"),
        (lambda model: insertion_points(model, example_input=(1,)), TypeError, "example_input must be a torch.Tensor"),
        (
            lambda model: insertion_points(model, example_input=torch.zeros(3, 8, 8)),
            ValueError,
            r"example_input must have shape \(N, C, H, W\), got \(3, 8, 8\)",
        ),
        (lambda model: insertion_points(nn.Sequential(nn.LazyConv2d(8, 3))), ValueError, "example_input is needed"),
        (lambda model: remove(model, "1"), TypeError, "names must be several names of modules, got the string '1'"),
        (lambda model: remove(nn.DataParallel(model)), ValueError, "model must not be wrapped yet, got DataParallel"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(plain_backbone())


def test_tokens_that_can_be_read_in_two_ways_are_refused():
    """25 tokens: 4 x 6 of 8 px behind one, or 4 x 5 of nearly 9 px behind five."""
    model, x = Patches(1, declared=False), torch.zeros(1, 3, 32, 48)
    model.conv = nn.Conv2d(3, 8, 8, stride=8)
    with pytest.raises(ValueError, match="its 25 tokens may stand for a map behind 1 or 5 prefix tokens; a square"):
        insert(model, {"tokens": SFE}, example_input=x)
    model.num_prefix_tokens = 1
    assert insertion_points(model, example_input=x)["tokens"] == Point(8, 8, "NLC", 1)


def test_inserted_tokens_can_be_scripted():
    model = insert(Patches(1), {"tokens": SFE}, example_input=images(16)).eval()
    assert torch.equal(torch.jit.script(model)(images(16)), model(images(16)))


def test_remove_takes_every_name_that_insert_takes():
    model = insert(aliased(), {"alias": SFE})
    remove(model, ["alias"])
    assert not any("kfde" in name for name, _ in model.named_modules())


def test_remove_takes_names():
    model = insert(plain_backbone(), {"0": SFE, "1": CFE, "2": SFE})
    remove(model, ["0", "2"])
    assert [name for name, _ in model.named_modules() if "kfde" in name] == ["1.kfde"]
    with pytest.raises(ValueError, match=r"names must be modules behind which a block was inserted \('1'\), got '0'"):
        remove(model, ["1", "0"])
    assert type(model[1].kfde) is CFE
    with pytest.raises(ValueError, match=r"inserted \(nowhere\), got 'x'"):
        remove(plain_backbone(), ["x"])


def test_models_that_do_not_run_ask_for_an_example():
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(1, 3, 224, 224\); pass a fitting"):
        insertion_points(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"example_input is needed: the model has no nn\.Conv2d"):
        insertion_points(nn.Sequential(nn.ReLU()))


def test_blend_is_what_identity_start_inserts():
    model = insert(plain_backbone(), {"1": CSFE}, identity_start=True)
    assert type(model[1].kfde) is Blend
