"""Numerical guards of CFE and SFE."""

import math

import torch
from torch import Tensor

_SMALLEST_SUM = 1e-6  # of gamma; the inverse of a smaller sum would drive every gate to 0 or 1


def logit(probability: float) -> float:
    """Return z with sigmoid(z) = `probability`. The gate compares z with it, since r would be rounded."""
    return math.log(probability / (1 - probability))


def is_near_zero(gamma_sum: float) -> bool:
    """Return whether another number stands for this sum of gamma."""
    return abs(gamma_sum) < _SMALLEST_SUM


def away_from_zero(gamma_sum: Tensor) -> Tensor:
    """Return the sum of gamma, or the nearest number that is safe to divide by, as a constant for the gradient."""
    smallest = torch.full_like(gamma_sum, _SMALLEST_SUM)
    nearest = torch.where(gamma_sum < 0, -smallest, smallest)
    return torch.where(gamma_sum.abs() < _SMALLEST_SUM, nearest, gamma_sum)


def deviations(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return x less its mean over `dim`.

    The mean is rounded, which matters where it is large next to the deviations: their own mean is subtracted too.
    """
    u = x - x.mean(dim=dim, keepdim=True)
    return u - u.mean(dim=dim, keepdim=True)
