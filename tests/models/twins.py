"""A bare ConvNeXt-V2 and the KFDE model with the same weights, and their files."""

import timm
import torch

from kfde_layers.testing import scatter_parameters
from tests.helpers import draw

SIZES = ["atto", "base", "femto", "huge", "large", "nano", "pico", "small", "tiny"]
SIDE = 96  # px: maps of 24, 12, 6 and 3


def images(batch=2, channels=3):
    return draw(batch, channels, SIDE, SIDE, dtype=torch.float32)


def twins(identity_start=False, **kwargs):
    """A bare ConvNeXt-V2 and its KFDE model, with the same backbone weights and KFDE away from its start."""
    torch.manual_seed(0)
    bare = timm.create_model("convnextv2_atto", **kwargs).eval()
    kfde = timm.create_model("kfde_convnextv2_atto", identity_start=identity_start, **kwargs).eval()
    result = kfde.load_state_dict(bare.state_dict(), strict=False)
    assert not result.unexpected_keys
    if not identity_start:
        scatter_parameters(kfde.stages[3].kfde)
    return bare, kfde


def saved(model, path, **changes):
    """Write the state dict to a file; a change of None drops the key."""
    state = {key: value for key, value in (model.state_dict() | changes).items() if value is not None}
    torch.save(state, path)
    return {"file": str(path)}


def loaded(name, overlay, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
