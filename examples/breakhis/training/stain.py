"""Augment the stain, as if the slide had been kept in haematoxylin and eosin for another time."""

import numpy as np
import torch
from PIL import Image
from skimage.color import hed2rgb, rgb2hed
from torch import nn


class StainJitter(nn.Module):
    r"""Scale and shift the amount of each stain in an image, at random.

    \[ s' = \alpha s + \beta, \qquad \alpha \sim U(1 - j, 1 + j), \quad \beta \sim U(-j, j) / 40 \]   with s the amount
    of haematoxylin, eosin and DAB in each pixel after colour deconvolution (Ruifrok and Johnston, 2001), about 0.05 in
    a nucleus, and j = `strength`. Each stain has its own alpha and beta.
    Source: Tellez et al. (2018), IEEE TMI 37(9). Differs from the paper: one j sets both ranges, and that of the shift
    is a fortieth, because of the units of scikit-image's stains.
    """

    def __init__(self, strength: float) -> None:
        """Keep the strength j, from 0 (nothing changes); 0.2 is moderate."""
        super().__init__()
        self.strength = strength

    def forward(self, image: Image.Image) -> Image.Image:
        """Change an RGB image, with random numbers from torch's global generator."""
        scale, shift = self.strength * (2 * torch.rand(2, 3).double().numpy() - 1)
        stains = rgb2hed(np.asarray(image)) * (1 + scale) + shift / 40
        return Image.fromarray((hed2rgb(stains) * 255).round().astype(np.uint8))
