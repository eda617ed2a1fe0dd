"""Builds a timm model for BreakHis, and saves it so that timm alone can load it again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

PRETRAINED_NOTE = "ImageNet weights of ConvNeXt V2 are licensed CC BY-NC 4.0: not for commercial use."


def build_model(name: str, num_classes: int, img_size: int, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Creates a model whose `pretrained_cfg` says how BreakHis images are to be presented to it.

    A pretrained KFDE model starts with its fresh blocks blended out (`identity_start`), so that training begins at
    the network that ImageNet trained.

    Args:
        name: A timm model.
        num_classes: Number of classes.
        img_size: Height and width of the input, px.
        pretrained: Whether to download ImageNet weights.

    Returns:
        The model, and the arguments besides the name that are needed to build it again.
    """
    model_args = {"identity_start": True} if pretrained and name.startswith("kfde_") else {}
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **model_args)
    # The whole height of the field, rather than timm's usual 7/8 of it: a diagnosis may hang on the rim.
    presentation = resolve_data_config({"img_size": img_size, "crop_pct": 1.0, "crop_mode": "center"}, model=model)
    # The sizes that ImageNet testing would use contradict this one, and without ImageNet's weights their origin and
    # licence say nothing about the model.
    untrue = ["test_input_size", "test_crop_pct"]
    if not pretrained:
        untrue += ["tag", "license", "origin_url", "paper_name", "paper_ids"]
    model.pretrained_cfg = {**model.pretrained_cfg, **presentation, **dict.fromkeys(untrue)}
    return model, model_args


def train_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Augmentation for histology, from an RGB image to a normalised (3, H, W) tensor.

    Tissue has no up and no left, so both flips are free. Colour jitter stands for differences in stain. The crop zooms
    in by 1.4 at most, because at one magnification the size of a nucleus is a sign; 0.65 of a 700 x 460 field is its
    largest square.
    """
    return create_transform(
        **resolve_data_config(model=model),
        is_training=True,
        scale=(0.33, 0.65),
        ratio=(0.9, 1 / 0.9),
        hflip=0.5,
        vflip=0.5,
        color_jitter=(0.2, 0.2, 0.2, 0.04),
    )


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The deterministic transform that a saved model's own configuration asks for."""
    return create_transform(**resolve_data_config(model=model), is_training=False)


def save_model(model: nn.Module, folder: Path, classes: Sequence[str], model_args: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json`, for `timm.create_model(f"local-dir:{folder}", pretrained=True)`.

    Args:
        model: A model from `build_model`, not wrapped.
        folder: Where to write; made if need be.
        classes: Class names in the order of the outputs.
        model_args: What `build_model` returned.
    """
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(classes)},
        model_args=model_args,
        safe_serialization=True,
    )


def load_model(folder: Path) -> nn.Module:
    """Loads what `save_model` wrote, weights and all, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
