"""Build a timm model for histology, and save it so that timm alone can load it again."""

import argparse
import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

import breakhis.baselines  # noqa: F401 -- registers the compared systems with timm
import kfde_layers  # noqa: F401 -- registers the kfde_* models with timm
from breakhis.data.hashes import changed_files, hash_files
from breakhis.files import write_atomically
from breakhis.mappings import read_json
from breakhis.training.blocks import insert_blocks
from breakhis.training.model_config import read_config
from breakhis.training.stain import StainJitter
from breakhis.training.weights import check_start, load_exactly, read_weights, record_loads

FILES = ("config.json", "model.safetensors")
"""The files of a saved model."""
OWN_ENTRIES = ("inserted", "trained_on")
"""Entries of `config.json` that timm does not know."""
PRETRAINED_NOTE = "ImageNet weights of ConvNeXt V2 are licensed CC BY-NC 4.0: not for commercial use."


def build_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Create a model whose `pretrained_cfg` describes the input images.

    A model that starts from weights has its new blocks blended out (`identity_start`), unless a flag says otherwise, so
    that training starts from the function of these weights.

    Args:
        args: Flags of a run: `model`, `model_kwargs`, `insert`, `identity_start`, `drop_path`, `pretrained`,
            `checkpoint_path`, `img_size`, `crop_mode`.
        num_classes: Number of classes.

    Returns:
        The model, and what builds it again together with its name, as `config.json` has it: `model_args`, and
        `inserted` if there are blocks.

    Raises:
        ValueError: The model does not accept the arguments, or the weights or the blocks do not fit it.
    """
    model_args, path = dict(args.model_kwargs), args.checkpoint_path
    start = {} if path is None else read_weights(path)
    has_blocks = model_args.get("csfe", True) is not False or model_args.get("mfdf", True) is not False
    loads = args.pretrained or path is not None
    if loads and args.model.startswith("kfde_") and has_blocks:
        kfde_keys = [key for key in start if ".kfde." in key]  # a KFDE checkpoint keeps its own choice
        model_args.setdefault("identity_start", not kfde_keys or any(key.endswith(".blend") for key in kfde_keys))
    if args.identity_start is not None and args.model.startswith("kfde_"):
        model_args["identity_start"] = args.identity_start
    if args.drop_path is not None:
        model_args["drop_path_rate"] = args.drop_path
    source = None if path is None else {"file": str(path), "custom_load": False}  # not as timm's own files of weights
    try:
        if timm.models.get_pretrained_cfg(args.model).fixed_input_size:
            model_args["img_size"] = args.img_size
        with record_loads() as filled:
            model = timm.create_model(
                args.model, pretrained=loads, pretrained_cfg_overlay=source, num_classes=num_classes, **model_args
            )
    except Exception as error:  # with arguments of the user, a model can fail in any way
        raise ValueError(
            f"model {args.model} with arguments {model_args} cannot be built: {error or type(error).__name__}"
        ) from error
    if path is not None:
        check_start(model, filled, path)
    # Use the complete height of the field instead of timm's usual 7/8: a diagnosis may depend on the border.
    data_config = {"img_size": args.img_size, "crop_pct": 1.0, "crop_mode": args.crop_mode}
    # Drop config entries that describe ImageNet testing, and the origin and licence of weights that were not loaded.
    # Weights from a file may come from ImageNet's, so the licence stays.
    wrong = ["file", "test_input_size", "test_crop_pct"]
    if not args.pretrained:
        wrong += ["tag", "origin_url", "paper_name", "paper_ids"]
    if not loads:
        wrong.append("license")
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **resolve_data_config(data_config, model=model),
        **dict.fromkeys(wrong),
    }
    config: dict[str, Any] = {"model_args": model_args}
    if args.insert:
        identity_start = loads if args.identity_start is None else args.identity_start
        config["inserted"] = {"blocks": args.insert, "identity_start": identity_start}
        try:
            insert_blocks(model, config["inserted"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"--insert must fit model {args.model}, got {args.insert}: {error}") from error
    try:
        _try_image(model, num_classes)
    except Exception as error:  # as above
        raise ValueError(
            f"model {args.model} with arguments {model_args} must classify images of {args.img_size} px into "
            f"{num_classes} classes, got {error!r}"
        ) from error
    return model, config


@torch.no_grad()  # not inference mode: a model may keep a tensor, which Grad-CAM then needs in its backward pass
def _try_image(model: nn.Module, num_classes: int) -> None:
    """Classify one grey image, and look for tensors that cannot be saved. The model keeps its mode.

    Raises:
        Exception: Of any type, from the depths of the model, or because its output is not one row of scores.
    """
    names: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and not tensor.is_meta and names.setdefault(tensor.data_ptr(), name) != name:
            raise ValueError(f"{names[tensor.data_ptr()]} and {name}, which share memory: safetensors cannot hold them")
    training = model.training
    scores = model.eval()(eval_transform(model)(Image.new("RGB", (64, 48), "grey"))[None])
    model.train(training)
    if len(scores.tolist()) != 1 or scores.shape != (1, num_classes):
        raise ValueError(f"an output of shape {tuple(scores.shape)}")


def train_transform(args: argparse.Namespace, model: nn.Module, example: Image.Image) -> Callable[..., Tensor]:
    """Make the augmentation for histology, from an RGB image to a normalised (3, H, W) tensor.

    Tissue has no direction, so images are flipped both ways. Colour jitter imitates other lamps and cameras, stain
    jitter other laboratories. The crop zooms in by at most 1.4 from the largest square, because at one magnification
    the size of a nucleus matters for the diagnosis.

    Args:
        args: Flags of a run: `color_jitter`, `stain_jitter`.
        model: A model from `build_model`.
        example: Any of the images; its shape is that of a field.
    """
    square = min(example.size) / max(example.size)  # share of a field that the largest square covers
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
        transform.transforms.insert(1, StainJitter(args.stain_jitter))  # after the crop, when the image is small
    return transform


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Make the deterministic transform that the model's configuration describes."""
    return create_transform(**resolve_data_config(model=model), is_training=False)


def save_model(model: nn.Module, folder: Path, classes: Sequence[str], built: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`, for `timm.create_model(f"local-dir:{folder}", pretrained=True)`.

    timm does not know of inserted blocks: it refuses the weights of a model that has some. `load_model` puts them in.
    Each file is replaced in one step, so that after a kill there is the old or the new one.

    Args:
        model: A model from `build_model`, not wrapped.
        folder: Folder for the files; made if needed.
        classes: Class names in the order of the outputs.
        built: What `build_model` returned, with `trained_on` if it is known, or the `config.json` of the same model.
    """
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed here
    config = {"label_names": list(classes)} | {key: built[key] for key in OWN_ENTRIES if key in built}
    if not all(tensor.is_contiguous() for tensor in model.state_dict().values()):
        # safetensors takes contiguous tensors alone, and the weights of convolutions may be in channels_last.
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    try:
        save_for_hf(
            model, str(part), model_config=config, model_args=built.get("model_args", {}), safe_serialization=True
        )
        _name_classes_once(part / "config.json")
        # safetensors gives its file mode 0600. The other one was made with the mode that the user's umask gives.
        (part / "model.safetensors").chmod((part / "config.json").stat().st_mode)
        for file in part.iterdir():
            write_atomically(folder / file.name, file.replace)
    except SafetensorError as error:  # for a full disk too
        raise OSError(f"{folder} must have room for the model, which cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _name_classes_once(path: Path) -> None:
    """Take the number of classes out of the model's arguments: transformers passes it too, from the top level."""
    config = read_json(path)
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hash_checkpoint(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of each file that `save_model` wrote, by name."""
    return {path.name: digest for path, digest in hash_files(folder / name for name in FILES).items()}


def check_checkpoint(folder: Path, hashes: Any) -> None:
    """Refuse a checkpoint whose files are not those that `hash_checkpoint` has seen.

    Args:
        folder: Folder of the checkpoint.
        hashes: What `hash_checkpoint` returned, or what a file holds in its place.

    Raises:
        ValueError: `hashes` does not map each name to a SHA-256, or a file is missing or has another content. The
            message names it.
    """
    digests = [hashes.get(name) for name in FILES] if isinstance(hashes, dict) else [None]
    if not all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise ValueError(
            f"best_sha256 must have 64 hexadecimal digits for each of {' and '.join(FILES)} of {folder}, "
            f"got {hashes!r:.200}"
        )
    if changed := changed_files({folder / name: hashes[name] for name in FILES}):
        raise ValueError(f"{folder} must be the checkpoint that its run wrote, got another {changed[0].name}")


def load_model(folder: Path) -> nn.Module:
    """Load a model that `save_model` wrote, in evaluation mode. Every weight of the file and of the model is checked.

    Raises:
        OSError: A file cannot be opened.
        ValueError: A file is damaged, or the two do not describe the same model. The message names the file.
    """
    path = folder / "config.json"
    config = read_config(path)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
        if "inserted" in config:
            insert_blocks(model, config["inserted"])
        model.eval()
    except Exception as error:  # arguments from a file can make a model fail in any way
        raise ValueError(f"{path} must describe a model that timm can build, got {error!r}") from error
    if model.num_classes != config["num_classes"]:
        raise ValueError(f"{path} must have num_classes {model.num_classes}, as its model, got {config['num_classes']}")
    weights = folder / "model.safetensors"
    load_exactly(model, read_weights(weights), weights)
    try:
        _try_image(model, model.num_classes)
    except Exception as error:  # as above
        raise ValueError(f"{path} must describe how images become inputs of its model, got {error!r}") from error
    return model
