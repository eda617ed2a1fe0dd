"""Random maps, and the sizes that hypothesis draws from."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from kfde_layers.testing import random_tensor

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# Primes, so that no two dimensions can be mistaken for each other; 1 x 1 maps and single samples are among them.
batches = st.sampled_from([1, 2, 3])
sides = st.sampled_from([1, 2, 5, 7])
even_channels = st.sampled_from([2, 6, 10, 16, 34])
seeds = st.integers(0, 2**16)
memory_formats = st.sampled_from(MEMORY_FORMATS)


def draw(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Draw standard normal numbers, in float64 by default."""
    return random_tensor(*shape, seed=seed, dtype=dtype, memory_format=memory_format)


def draw_affine(channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw gamma and beta of a normalisation, different from one and zero."""
    return 1 + 0.3 * draw(channels, seed=seed + 1, dtype=dtype), 0.3 * draw(channels, seed=seed + 2, dtype=dtype)


def images(side: int, batch: int = 2, channels: int = 3) -> Tensor:
    """Draw square images of `side` px in float32."""
    return draw(batch, channels, side, side, dtype=torch.float32)
