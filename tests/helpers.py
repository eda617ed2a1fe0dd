"""What several tests need: drawing inputs and comparing results."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

from kfde_layers.testing import random_tensor

needs_local_dir = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.26"),
    reason="timm before 1.0.26 reads the safetensors of a local directory with torch.load, which fails",
)

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)

# Primes, so that no two dimensions can be taken for each other; 1 x 1 maps and single samples among them.
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
    """Standard normal numbers, in float64 unless said otherwise."""
    return random_tensor(*shape, seed=seed, dtype=dtype, memory_format=memory_format)


def affine(channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """gamma and beta of a normalisation, away from one and zero."""
    return 1 + 0.3 * draw(channels, seed=seed + 1, dtype=dtype), 0.3 * draw(channels, seed=seed + 2, dtype=dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Largest difference over the largest expected magnitude; NaN anywhere makes it NaN, which is below no bound."""
    actual, expected = (as_numpy(a) if isinstance(a, Tensor) else a for a in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)) if actual.size else 0.0


def has_format(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=memory_format)
