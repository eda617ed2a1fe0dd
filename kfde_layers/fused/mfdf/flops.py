"""Floating-point operations of the operators, from the shapes of their arguments, for `torch.utils.flop_counter`.

As PyTorch counts them: two for each multiplication in a convolution or a product, and none for sums by themselves.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

Shape = Sequence[int]


def mean_of_convolution(x: Shape, kernel: Shape, *_: Any, **__: Any) -> int:
    """Count one product with each element of `x`, by the taps that meet it."""
    return 2 * prod(x)


def mean_of_convolution_backward(
    dp: Shape, x: Shape, kernel: Shape, tap_spacing: int, with_x: bool, with_kernel: bool, **__: Any
) -> int:
    """Count the gradients of `x` and of the taps."""
    return 2 * prod(x) * (with_x + with_kernel)


def merged_convolution(x: Shape, alpha: Shape, stacked_kernels: Shape, *_: Any, **__: Any) -> int:
    """Count the convolution by merged kernels, and their merging."""
    return _convolution(x, stacked_kernels) + _merging(alpha, stacked_kernels)


def merged_convolution_backward(
    dy: Shape,
    x: Shape,
    alpha: Shape,
    stacked_kernels: Shape,
    tap_spacing: int,
    *asked: bool,
    **__: Any,
) -> int:
    """Count the gradient of `x`, for which kernels are merged again; and those of merged kernels and their parts."""
    with_x, with_alpha, with_kernels, _ = asked
    convolution, merging = _convolution(x, stacked_kernels), _merging(alpha, stacked_kernels)
    of_kernels = convolution * (with_alpha or with_kernels) + merging * (with_alpha + with_kernels)
    return with_x * (convolution + merging) + of_kernels


def _convolution(x: Shape, stacked_kernels: Shape) -> int:
    return 2 * prod(x) * stacked_kernels[-1] ** 2


def _merging(alpha: Shape, stacked_kernels: Shape) -> int:
    """Count sum_k alpha_kc W_kc for all samples."""
    return 2 * prod(alpha) * stacked_kernels[-1] ** 2
