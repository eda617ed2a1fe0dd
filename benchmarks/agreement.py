"""Compare a result with the exact one, which the textbook implementation computes in float64."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SUM_FACTOR = 10  # times the tolerance: the allowed error of a parameter's gradient as a whole
MOST_FAR = 1e-3  # share of the elements that may differ more, because rounding can move a gate across the threshold


def agree(actual: Tensor, expected: Tensor, most_far: float = MOST_FAR) -> bool:
    """Return whether two maps are equal within the tolerance of `actual.dtype`, except at a few gates."""
    if actual.shape != expected.shape:
        return False
    return far_share(actual, expected, TOLERANCE[actual.dtype]) <= most_far


def sums_agree(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two gradients of a parameter are equal within the tolerance of `actual.dtype`."""
    return sum_error(actual, expected) <= SUM_FACTOR * TOLERANCE[actual.dtype]


def far_share(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the share of elements whose error, over their own size plus the root mean square, is above `tolerance`."""
    actual, expected = actual.double(), expected.double()
    size = expected.abs() + expected.square().mean().sqrt()
    return (~((actual - expected).abs() <= tolerance * size)).double().mean().item()  # NaN counts as far


def sum_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error of a parameter's gradient as a whole: every gate of the map contributes to it."""
    difference = torch.linalg.vector_norm(actual.double() - expected)
    return (difference / torch.linalg.vector_norm(expected)).item()
