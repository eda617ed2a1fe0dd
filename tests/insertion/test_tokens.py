"""Tokens are laid out in the rows and columns in which the model cut the image."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from kfde_layers import CSFE, MFDF, SFE, insert, insertion_points, remove
from kfde_layers.insertion import Point
from kfde_layers.testing import random_tensor
from tests.support.inputs import images

NARROW = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 3}


class Spy(nn.Module):
    """Keep the last map."""

    def forward(self, x):
        self.__dict__["map"] = x.detach()
        return x


def vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **NARROW, **options).eval()


def image(*size):
    return random_tensor(2, 3, *size)


def map_at(model, x, point="blocks.0"):
    """Return the map that a block sees, and the tokens that it is made of."""
    tokens = []
    handle = model.get_submodule(point).register_forward_hook(lambda module, args, output: tokens.append(output))
    model(x)
    handle.remove()
    (spy,) = (module for module in model.modules() if isinstance(module, Spy))
    return spy.map, tokens[0]


def assert_laid_out(model, x, grid, prefix):
    feature_map, tokens = map_at(model, x)
    assert feature_map.shape[2:] == grid
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert torch.equal(feature_map[:, :, row, column], tokens[:, prefix + row * grid[1] + column])


@pytest.mark.parametrize(
    ("patch", "size"),
    [
        ((16, 16), (64, 64)),
        ((32, 8), (64, 64)),
        ((8, 32), (64, 64)),
        ((16, 16), (32, 128)),
        ((16, 16), (128, 32)),
        ((4, 16), (16, 64)),
        ((32, 16), (64, 96)),
        ((7, 9), (63, 63)),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_patches_and_images_that_are_no_squares(patch, size, dynamic):
    model = vit(patch_size=patch, img_size=size, dynamic_img_size=dynamic)
    insert(model, {"blocks.0": Spy()})
    grid = size[0] // patch[0], size[1] // patch[1]
    assert model.blocks[0].kfde.grid == grid
    assert_laid_out(model, image(*size), grid, prefix=1)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("vit_small_patch16_dinov3", 5)],
)
@pytest.mark.parametrize("size", [(64, 64), (32, 128), (128, 32), (96, 64), (16, 16), (48, 192)])
def test_a_model_for_images_of_any_size_says_each_grid(name, prefix, size):
    model = insert(vit(name, dynamic_img_size=True), {"blocks.0": Spy()}, example_input=image(64, 64))
    grid = size[0] // 16, size[1] // 16
    assert_laid_out(model, image(*size), grid, prefix)  # 32 x 128 has as many tokens as 64 x 64
    assert_laid_out(copy.deepcopy(model), image(*size), grid, prefix)
    assert_laid_out(model, image(64, 64), (4, 4), prefix)


def test_the_example_decides_where_the_model_was_made_for_another_image():
    model = insert(vit(img_size=64, dynamic_img_size=True), {"blocks.0": Spy()}, example_input=image(32, 128))
    assert model.patch_embed.grid_size == (4, 4)
    assert model.blocks[0].kfde.grid == (2, 8)


def test_other_tokens_than_those_of_the_image_are_refused():
    model = insert(vit(dynamic_img_size=True), {"blocks.0": SFE}, example_input=image(64, 64))
    model(image(32, 128))
    with pytest.raises(ValueError, match="1 prefix tokens and a map of 2 x 8, as the image was cut, got 10 tokens"):
        model.blocks[0](random_tensor(1, 10, 48))


def test_the_grid_travels_with_the_model():
    model = insert(vit(dynamic_img_size=True), {"blocks.0": CSFE, "blocks.1": "MFDF"}, example_input=image(64, 64))
    assert len(model.patch_embed._forward_hooks) == 2
    again, x = pickle.loads(pickle.dumps(model)), image(32, 128)
    assert torch.equal(again(x), model(x))
    again(image(128, 32))  # leaves the other model alone
    assert model.blocks[0].kfde.last_grid.size == (2, 8)
    remove(model, ["blocks.0"])
    assert len(model.patch_embed._forward_hooks) == 1
    remove(model)
    assert not model.patch_embed._forward_hooks


@pytest.mark.slow
def test_a_compiled_model_asks_for_each_grid_too():
    model = insert(vit(dynamic_img_size=True), {"blocks.1": MFDF}, example_input=image(64, 64)).requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 128), (128, 32)):
        torch.testing.assert_close(compiled(image(*size)), model(image(*size)))


def test_a_model_for_one_size_of_image_refuses_others_as_before():
    model = vit(img_size=64)
    hooks = len(model.patch_embed._forward_hooks)
    insert(model, {"blocks.0": SFE})
    assert len(model.patch_embed._forward_hooks) == hooks
    with pytest.raises(ValueError, match="as in the example at insertion, got 9 tokens"):
        model.blocks[0](random_tensor(1, 9, 48))


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96, "depth": 1, "embed_dim": 48}, (96, 96)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 1, "embed_dim": 48}, (64, 96)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, (64, 64)),
        ("mixer_s16_224", {"img_size": 64}, (64, 64)),
        ("test_efficientnet", {}, (160, 160)),
        ("test_resnet", {}, (160, 160)),
    ],
)
def test_the_example_has_the_size_for_which_the_model_was_made(name, options, size):
    model, seen = timm.create_model(name, **options), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    insertion_points(model)
    assert seen == [(1, 3, *size)]


class Dropping(nn.Module):
    """Leave out every second token in training, as masked training does."""

    def __init__(self, keep=2):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        return x[:, :: self.keep] if self.training else x


class Masked(nn.Module):
    """Replace every second token in training: the others keep their places."""

    def forward(self, x):
        return x * (torch.arange(x.shape[1]) % 2)[:, None] if self.training else x


def tokens_of_patches(change):
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.change, self.mix = nn.Conv2d(3, 8, 4, stride=4), change, nn.Linear(8, 8)

        def forward(self, x):
            return self.mix(self.change(self.conv(x).flatten(2).transpose(1, 2)))

    return Patches()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])  # 0.75 leaves 4 x 4 of 8 x 8
@pytest.mark.parametrize("block", [SFE, MFDF])
def test_a_model_that_drops_tokens_is_refused(training, rate, block):
    model = vit(img_size=128, patch_drop_rate=rate).train(training)
    left = round(64 * (1 - rate)) + 1
    with pytest.raises(ValueError, match=rf"at 'blocks.0': in training it returns {left} tokens instead of 65, and"):
        insert(model, {"blocks.0": block})
    assert model.training == training
    model.patch_drop = nn.Identity()  # as the message says: without dropping
    insert(model, {"blocks.0": block})


@pytest.mark.parametrize("point", ["change", "mix"])
def test_other_modules_that_drop_tokens_are_refused(point):
    with pytest.raises(ValueError, match=rf"at '{point}': in training it returns 8 tokens instead of 16"):
        insert(tokens_of_patches(Dropping()), {point: SFE}, example_input=images(16))


@pytest.mark.parametrize("point", ["change", "mix"])
def test_tokens_that_are_masked_in_their_place_are_a_map(point):
    model = insert(tokens_of_patches(Masked()), {point: SFE}, example_input=images(16))
    assert model.train()(images(16)).shape == (2, 16, 8)


def test_points_of_a_model_with_patches_of_other_sides():
    points = insertion_points(vit(patch_size=(32, 8), img_size=64))
    assert points["blocks.0"] == Point(48, 16, "NLC", 1)


class Two(nn.Module):
    """Run one transformer on the image, and another one on the image turned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = vit(dynamic_img_size=True), vit(dynamic_img_size=True)

    def forward(self, x):
        return self.a(x) + self.b(x.transpose(2, 3))


@pytest.mark.parametrize(("name", "grid"), [("a", (2, 8)), ("b", (8, 2))])
def test_each_of_two_transformers_says_its_own_grid(name, grid):
    model = insert(Two(), {f"{name}.blocks.0": Spy()}, example_input=image(64, 64))
    feature_map, _ = map_at(model, image(32, 128), f"{name}.blocks.0")
    assert feature_map.shape[2:] == grid


class Sequence(nn.Module):
    """Cut an image of any size, as it declares, into a sequence of patches."""

    def __init__(self):
        super().__init__()
        self.dynamic_img_size, self.num_prefix_tokens = True, 0
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.Flatten(2), Transposed())
        self.block = nn.Linear(16, 16)

    def forward(self, x):
        return self.block(self.patch_embed(x))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_a_patch_embedding_that_returns_a_sequence_says_no_grid():
    model = insert(Sequence(), {"block": Spy()}, example_input=image(64, 16))
    assert not model.patch_embed._forward_hooks
    assert map_at(model, image(64, 16), "block")[0].shape[2:] == (8, 2)


class Shuffled(nn.Module):
    """Choose tokens at random, in evaluation too."""

    def forward(self, x):
        return x[:, torch.randperm(x.shape[1])[: x.shape[1] // 4]]


@pytest.mark.parametrize("point", ["change", "mix"])
def test_tokens_that_are_chosen_at_random_are_refused(point):
    with pytest.raises(ValueError, match=f"at '{point}': its tokens depend on random numbers, in evaluation too"):
        insert(tokens_of_patches(Shuffled()), {point: SFE}, example_input=images(32))


def test_a_masked_autoencoder_of_transformers_is_refused():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(image_size=64, patch_size=8, **sizes)).eval()
    name = next(name for name in insertion_points(model) if "layer" in name)
    with pytest.raises(ValueError, match="its tokens depend on random numbers"):
        insert(model, {name: SFE})


def test_tokens_that_are_dropped_are_seen_where_training_fails_later():
    model = vit(img_size=128, patch_drop_rate=0.75)
    model.head = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 3))  # which one image is too few for
    with pytest.raises(ValueError, match="in training it returns 17 tokens instead of 65"):
        insert(model, {"blocks.0": SFE})


class Otherwise(nn.Module):
    """Return something else in training."""

    def __init__(self, in_training, in_evaluation):
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 1), (in_evaluation, in_training)

    def forward(self, x):
        return self.make[self.training](self.conv(x))


@pytest.mark.parametrize(
    "returns",
    [
        (lambda y: {"aux": y}, lambda y: {"map": y}),
        (lambda y: (y, y.sum()), lambda y: y),
        (lambda y: y.flatten(1), lambda y: y),
        (lambda y: None, lambda y: y),
    ],
)
def test_a_module_that_returns_something_else_in_training_is_refused(returns):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Otherwise(*returns)

        def forward(self, x):
            output = self.part(x)
            return output.get("map", output.get("aux")) if isinstance(output, dict) else output

    with pytest.raises(ValueError, match="cannot insert at 'part': in training it does not return the map that"):
        insert(Outer(), {"part": SFE}, example_input=images(8))
