"""Blocks in models that merge their modules for inference: they stay there, or they are refused."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from kfde_layers import CSFE, SFE, insert
from kfde_layers.layers import Blend
from kfde_layers.testing import scatter_parameters
from tests.support.inputs import images
from tests.support.networks import ConvNorm


class Replaced(ConvNorm):
    def fuse(self):
        return nn.utils.fuse_conv_bn_eval(self.conv, self.norm)


class ReplacedIfAlone(Replaced):
    """Stay as it is with one more child."""

    def fuse(self):
        return self if len(list(self.children())) > 2 else super().fuse()


class InPlace(ConvNorm):
    def reparameterize(self):
        self.conv, self.norm = nn.utils.fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Deployed(ConvNorm):
    def switch_to_deploy(self):
        self.conv, self.norm = nn.utils.fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Collected(ConvNorm):
    """Keep the names of its parts alone, so that a block is lost in place."""

    def reparameterize(self):
        conv = nn.utils.fuse_conv_bn_eval(self.conv, self.norm)
        self._modules.clear()
        self._forward_hooks.clear()
        self.conv, self.norm = conv, nn.Identity()


class Moved(ConvNorm):
    """Keep the block, but scale the map before it alone: other numbers."""

    def reparameterize(self):
        self.conv, self.norm = nn.utils.fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()
        if len(list(self.children())) > 2:
            self.conv.weight.data.mul_(2)


class Broken(ConvNorm):
    """Cannot be merged with another child."""

    def fuse(self):
        conv, norm = self.children()
        return nn.utils.fuse_conv_bn_eval(conv, norm)


class Unmergeable(ConvNorm):
    def fuse(self):
        raise RuntimeError("not trained yet")


def network(part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Sequential(part(8, 8), nn.ReLU()), nn.Conv2d(8, 4, 1))
    return scatter_parameters(model).eval()


KEPT = [
    *((part, "1") for part in (Replaced, InPlace, Deployed, Collected, Moved, Broken)),  # after the part
    *((part, "0") for part in (Replaced, InPlace, Deployed)),
    *((part, "1.0") for part in (ReplacedIfAlone, InPlace, Deployed, Unmergeable)),
    *((part, "1.0.norm") for part in (Unmergeable, ConvNorm)),
]
LOST = [
    *((part, "1.0") for part in (Replaced, Collected, Moved, Broken)),
    *((part, "1.0.conv") for part in (Replaced, ReplacedIfAlone, InPlace, Deployed)),
]


@pytest.mark.parametrize(("part", "point"), KEPT)
@torch.no_grad()
def test_a_block_stays(part, point):
    model, x = insert(network(part), {point: SFE}, example_input=images(16)), images(16)
    before = model(x)
    if part is not Unmergeable:
        merged = reparameterize_model(model)
        assert sum(isinstance(module, SFE) for module in merged.modules()) == 1
        torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("part", "point"), LOST)
def test_a_block_that_would_be_lost_is_refused(part, point):
    model = network(part)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"cannot insert at '{point}': the model merges this module into another"):
        insert(model, {point: SFE, "0": SFE}, example_input=images(16))
    assert list(model.state_dict()) == keys
    merged = insert(reparameterize_model(model), {"1.0": SFE}, example_input=images(16))  # as the message says
    assert sum(isinstance(module, SFE) for module in merged.modules()) == 1


class Ignored(nn.Module):
    """Let nothing through yet, as a gain that starts at zero does."""

    def forward(self, x):
        return 0 * x


def test_a_block_without_an_effect_must_stay_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Replaced(8, 8), Ignored(), nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(ValueError, match="cannot insert at '1': the model merges this module into another"):
        insert(model, {"1": SFE}, example_input=images(16))


# model, side of the image in px, whether a block can follow the point
POINTS = [
    ("repvgg_a0", 64, "stages.1.0", True),
    ("repvgg_a0", 64, "stages.1", True),
    ("repghostnet_050", 64, "blocks.1.0.ghost1.primary_conv", True),
    ("fastvit_t8", 64, "stages.1.blocks.0.token_mixer", True),
    ("levit_128s", 224, "stem.conv1", False),
    ("levit_128s", 224, "stages.0", True),
    ("efficientvit_m0", 224, "patch_embed.conv1", False),
    ("efficientvit_m0", 224, "stages.0", True),
    ("tiny_vit_5m_224", 224, "patch_embed.conv1", False),
    ("tiny_vit_5m_224", 224, "stages.1", True),
    ("shvit_s1", 64, "stages.1.blocks.0.conv", False),
    ("shvit_s1", 64, "stages.1", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "point", "stays"), POINTS)
@torch.no_grad()
def test_models_of_timm(name, side, point, stays):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=3).eval(), images(side)
    if not stays:
        with pytest.raises(ValueError, match=f"cannot insert at '{point}': the model merges this module"):
            insert(model, {point: SFE}, example_input=x)
        return
    insert(model, {point: SFE}, example_input=x)
    before, merged = model(x), reparameterize_model(model)
    assert sum(isinstance(module, SFE) for module in merged.modules()) == 1
    assert (merged(x) - before).abs().max() < 1e-3 * before.abs().max()


def test_a_trained_block_with_blend_stays_too():
    model = insert(network(InPlace), {"1.0": CSFE}, example_input=images(16), identity_start=True)
    scatter_parameters(model)
    merged = reparameterize_model(model)
    assert any(isinstance(module, Blend) for module in merged.modules())
    torch.testing.assert_close(merged(images(16)), model(images(16)), rtol=1e-4, atol=1e-5)
