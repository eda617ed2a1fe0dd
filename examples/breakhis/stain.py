"""Stain augmentation: as if the slide had lain longer or shorter in haematoxylin and eosin."""

import numpy as np
import torch
from PIL import Image
from skimage.color import hed2rgb, rgb2hed
from torch import nn


class StainJitter(nn.Module):
    r"""Scales and shifts the amount of each stain in a picture, at random.

    \[ s' = \alpha s + \beta, \qquad \alpha \sim U(1 - j, 1 + j), \quad \beta \sim U(-j, j) / 40 \]   with s the amount
    of haematoxylin, eosin and DAB in each pixel after colour deconvolution (Ruifrok and Johnston, 2001), of which a
    nucleus has about 0.05, and j = `strength`, one draw of each for each stain.
    Source: Tellez et al. (2018), IEEE TMI 37(9). Differs from the paper: the shift is tied to the scale, and is a
    fortieth of it, because of the units of scikit-image's stains.
    """

    def __init__(self, strength: float) -> None:
        """Keeps the strength j, from 0 (nothing changes); 0.2 is moderate."""
        super().__init__()
        self.strength = strength

    def forward(self, picture: Image.Image) -> Image.Image:
        """Changes an RGB picture; draws from torch's global generator."""
        scale, shift = self.strength * (2 * torch.rand(2, 3).double().numpy() - 1)
        stains = rgb2hed(np.asarray(picture)) * (1 + scale) + shift / 40
        return Image.fromarray((hed2rgb(stains) * 255).round().astype(np.uint8))
