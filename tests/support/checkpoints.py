"""A ConvNeXt-V2 and the KFDE model with the same weights, and their files."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from kfde_layers.testing import scatter_parameters

SIZES = ["atto", "base", "femto", "huge", "large", "nano", "pico", "small", "tiny"]
SIDE = 96  # px: the stages have maps of 24, 12, 6 and 3


def backbone_and_kfde(identity_start: bool = False, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Make a backbone ConvNeXt-V2 and its KFDE model with the same weights of the backbone, in eval mode.

    The parameters of KFDE differ from their start, except with `identity_start`.
    """
    torch.manual_seed(0)
    backbone = timm.create_model("convnextv2_atto", **kwargs).eval()
    kfde = timm.create_model("kfde_convnextv2_atto", identity_start=identity_start, **kwargs).eval()
    result = kfde.load_state_dict(backbone.state_dict(), strict=False)
    assert not result.unexpected_keys
    if not identity_start:
        scatter_parameters(kfde.stages[3].kfde)
    return backbone, kfde


def save_weights(model: nn.Module, path: Path, **changes: Tensor | None) -> dict[str, str]:
    """Write the state dict to a file, and return the overlay that makes timm load it; a change of None drops a key."""
    state = {key: value for key, value in (model.state_dict() | changes).items() if value is not None}
    torch.save(state, path)
    return {"file": str(path)}


def load_pretrained(name: str, overlay: dict[str, str], **kwargs: Any) -> nn.Module:
    """Make a model with the weights of the file that `overlay` names, in eval mode."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
