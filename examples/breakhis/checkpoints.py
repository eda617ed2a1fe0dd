"""Builds a timm model for histology, and saves it so that timm alone can load it again."""

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import load_state_dict, save_for_hf
from torch import Tensor, nn

from breakhis.stain import StainJitter
from breakhis.state import write_atomically

PRETRAINED_NOTE = "ImageNet weights of ConvNeXt V2 are licensed CC BY-NC 4.0: not for commercial use."


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Creates a model whose `pretrained_cfg` says how images are to be presented to it.

    A KFDE model that starts from weights has its fresh blocks blended out (`identity_start`), so that training begins
    at the network that the weights are of.

    Args:
        args: A run's flags, of which `model`, `model_kwargs`, `drop_path`, `pretrained`, `checkpoint_path`, `img_size`.
        num_classes: Number of classes.

    Returns:
        The model, and the arguments besides the name that are needed to build it again.

    Raises:
        ValueError: The model does not take its arguments, or the weights do not fit it.
    """
    model_args = dict(args.model_kwargs)
    has_blocks = model_args.get("csfe", True) is not False or model_args.get("mfdf", True) is not False
    loads = args.pretrained or args.checkpoint_path is not None
    if loads and args.model.startswith("kfde_") and has_blocks:
        keys = [] if args.checkpoint_path is None else load_state_dict(str(args.checkpoint_path), device="cpu")
        own = [key for key in keys if ".kfde." in key]  # a KFDE checkpoint goes on as it was, blended or not
        model_args.setdefault("identity_start", not own or any(key.endswith(".blend") for key in own))
    if args.drop_path is not None:
        model_args["drop_path_rate"] = args.drop_path
    if timm.models.get_pretrained_cfg(args.model).fixed_input_size:
        model_args["img_size"] = args.img_size
    source = None if args.checkpoint_path is None else {"file": str(args.checkpoint_path)}
    try:
        model = timm.create_model(
            args.model, pretrained=loads, pretrained_cfg_overlay=source, num_classes=num_classes, **model_args
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model {args.model} with arguments {model_args} cannot be built: {error}") from error
    # The whole height of the field, rather than timm's usual 7/8 of it: a diagnosis may hang on the rim.
    wanted = {"img_size": args.img_size, "crop_pct": 1.0, "crop_mode": "center"}
    # The sizes that ImageNet testing would use contradict this one, and without ImageNet's weights their origin and
    # licence say nothing about the model. Weights from a file may come from ImageNet's, so the licence stays.
    untrue = ["file", "test_input_size", "test_crop_pct"]
    if not args.pretrained:
        untrue += ["tag", "origin_url", "paper_name", "paper_ids"]
    if not loads:
        untrue.append("license")
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **resolve_data_config(wanted, model=model),
        **dict.fromkeys(untrue),
    }
    return model, model_args


def train_transform(args: argparse.Namespace, model: nn.Module, picture: Image.Image) -> Callable[..., Tensor]:
    """Augmentation for histology, from an RGB image to a normalised (3, H, W) tensor.

    Tissue has no up and no left, so both flips are free. Colour jitter stands for lamps and cameras, stain jitter for
    laboratories. The crop zooms in by 1.4 at most from the largest square, because at one magnification the size of a
    nucleus is a sign.

    Args:
        args: A run's flags, of which `color_jitter`, `stain_jitter`.
        model: From `build_model`.
        picture: Any of the images, for the shape of a field.
    """
    square = min(picture.size) / max(picture.size)  # the largest one's share of a field
    jitter = args.color_jitter
    transform = create_transform(
        **resolve_data_config(model=model),
        is_training=True,
        scale=(square / 2, square),
        ratio=(0.9, 1 / 0.9),
        hflip=0.5,
        vflip=0.5,
        color_jitter=(jitter, jitter, jitter, jitter / 5) if jitter else None,
    )
    if args.stain_jitter:
        transform.transforms.insert(1, StainJitter(args.stain_jitter))  # behind the crop, which makes it cheap
    return transform


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The deterministic transform that a saved model's own configuration asks for."""
    return create_transform(**resolve_data_config(model=model), is_training=False)


def save_model(model: nn.Module, folder: Path, classes: Sequence[str], model_args: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json`, for `timm.create_model(f"local-dir:{folder}", pretrained=True)`.

    Each file is replaced in one step, so that a kill leaves the old one or the new one.

    Args:
        model: A model from `build_model`, not wrapped.
        folder: Where to write; made if need be.
        classes: Class names in the order of the outputs.
        model_args: What `build_model` returned.
    """
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
    config = {"label_names": list(classes)}
    save_for_hf(model, str(part), model_config=config, model_args=model_args, safe_serialization=True)
    for file in part.iterdir():
        write_atomically(folder / file.name, file.replace)
    part.rmdir()


def load_model(folder: Path) -> nn.Module:
    """Loads what `save_model` wrote, weights and all, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
