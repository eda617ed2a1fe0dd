import copy
import functools
import pickle

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CFE, CSFE, MFDF, SFE, insert, insertion_points
from kfde_layers.insertion import Point
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.helpers import draw


class Sequence(nn.Sequential):
    """Gives its children to itself, in a way of its own."""

    def forward(self, x):
        for child in self:
            x = child(x)
        return x


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
    with pytest.raises(ValueError, match="cannot insert at 'alias': it is one module with another of the names"):
        insert(aliased(), {"0": SFE, "alias": CSFE})
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
        self.own = Sequence(nn.Identity())
        self.pair = Pair()
        self.flat = nn.Flatten()

    def forward(self, x):
        x = self.own(self.twice(self.twice(self.conv(x))))
        return self.flat(self.pair(x)[0])


class Pair(nn.Module):
    def forward(self, x):
        return x, x


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
        ("own", SFE, "cannot insert at 'own': a Sequence runs its children in its own way"),
        ("pair", SFE, "cannot insert at 'pair': it returns a tuple, not a tensor"),
        ("flat", SFE, r"cannot insert at 'flat': it returns no feature map but torch.float32 of shape \(1, 1792\)"),
        ("conv", CSFE, "channels must be even, since CFE crosses two halves of them, got 7"),
    ],
)
def test_refusals_leave_the_model_unchanged(name, block, message):
    model = Odd()
    keys, expected = list(model.state_dict()), model(images(16))
    with pytest.raises(ValueError, match=message):
        insert(model, {"own.0": SFE, name: block}, example_input=torch.zeros(1, 3, 16, 16))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images(16)), expected)
    assert not any(hasattr(module, "kfde") or module._forward_hooks for module in model.modules())
    assert set(insertion_points(model, example_input=torch.zeros(1, 3, 16, 16))) == {"conv", "own.0"}


def test_a_point_takes_one_block():
    model = insert(plain_backbone(), {"1": SFE})
    with pytest.raises(ValueError, match="cannot insert at '1': it already holds a block"):
        insert(model, {"1": SFE})


def test_models_that_do_not_run_ask_for_an_example():
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(1, 3, 224, 224\); pass a fitting"):
        insertion_points(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"example_input is needed: the model has no nn\.Conv2d"):
        insertion_points(nn.Sequential(nn.ReLU()))


def test_every_layer_works_in_timms_own_slot_for_attention():
    for layer in (CFE, SFE, CSFE, MFDF):
        model = timm.create_model("resnet18", block_args={"attn_layer": layer})
        assert sum(isinstance(module, layer) for module in model.modules()) == 8
        assert model(images(64)).shape == (2, 1000)


def test_blend_is_what_identity_start_inserts():
    model = insert(plain_backbone(), {"1": CSFE}, identity_start=True)
    assert type(model[1].kfde) is Blend
