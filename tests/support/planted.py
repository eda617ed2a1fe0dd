"""A data set with a watermark of the class, a network that cannot see it, and blocks that can and cannot."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

WATERMARK = 12  # grey levels by which each pixel of a malignant field is brighter


def draw_watermarked_tree(root: Path, cases_per_class: int, images_per_case: int) -> None:
    """Draw fields of noise in the folders and names of BreakHis; malignant ones are brighter by the watermark."""
    rng = np.random.default_rng(0)
    for letter, diagnosis, kind, mark in (("B", "benign", "A", 0), ("M", "malignant", "DC", WATERMARK)):
        for case in range(cases_per_class):
            slide = f"14-{1000 * (1 + (kind == 'DC')) + case}"
            folder = (
                root / f"BreaKHis_v1/histology_slides/breast/{diagnosis}/SOB/adenosis/SOB_{letter}_{kind}_{slide}/100X"
            )
            folder.mkdir(parents=True)
            for image in range(images_per_case):
                pixels = rng.normal(120 + mark, 30, size=(40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"SOB_{letter}_{kind}-{slide}-100-{image:03d}.png")


class Blind(nn.Module):
    """A network that no offset of the brightness can change: it centres its first map.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the image.
    """

    def __init__(self, num_classes: int = 2, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 16
        self.stem = nn.Conv2d(in_chans, 16, 1, bias=False)
        self.centre = nn.InstanceNorm2d(16)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.centre(self.stem(x))))


default_cfgs = generate_default_cfgs(
    {
        "blind": {
            "input_size": (3, 32, 32),
            "mean": (0.5,) * 3,
            "std": (0.25,) * 3,
            "first_conv": "stem",
            "classifier": "fc",
        }
    }
)


@register_model
def blind(pretrained: bool = False, **kwargs: Any) -> Blind:
    return build_model_with_cfg(Blind, "blind", pretrained, **kwargs)


class Reader(nn.Module):
    """Write the mean brightness of each channel into the map as a ramp, which no centring removes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        return x + self.gain * x.mean(dim=(2, 3), keepdim=True) * ramp


class Scale(nn.Module):
    """Multiply by one learned number: a block from which a network gains nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain
