"""A checkpoint, images of patients, and the command line that predicts them."""

from pathlib import Path

import numpy as np
import timm
import torch
from breakhis.training.checkpoints import save_model
from PIL import Image

CLASSES = ["A", "F", "DC"]
QUIET = ["--num-workers", "0", "--batch-size", "2", "--device", "cpu"]


def save_checkpoint(folder: Path, name: str) -> Path:
    """Save a timm model with random weights."""
    torch.manual_seed(0)
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "center"}
    model = timm.create_model(name, num_classes=len(CLASSES), pretrained_cfg_overlay=config)
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)  # so that the images get different predictions
    save_model(model, folder, CLASSES, {})
    return folder


def write_images(root: Path) -> Path:
    """Write seven images: five of three patients, in three file formats, and two without a patient."""
    rng = np.random.default_rng(0)
    names = [
        "SOB_B_A-14-1-100-001.png",
        "deep/er/SOB_B_A-14-1-400-002.png",
        "deep/SOB_B_A-14-1-400-003.jpg",
        "SOB_M_DC-14-2-40-001.png",
        "SOB_M_DC-14-3AB-40-001.tif",
        "deep/field one.png",
        "deep/field one.jpg",
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        colours = rng.integers(255, size=(3, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((70, 46), Image.Resampling.BICUBIC).save(root / name)
    return root


def arguments(checkpoint: Path, images: Path, output: Path, *more: str) -> list[str]:
    """Make the command line."""
    return ["--checkpoint", str(checkpoint), "--images", str(images), "--output", str(output), *QUIET, *more]
