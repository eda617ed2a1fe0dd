"""Compare the kernels of MFDF with the equations that they merge: the mean of the convolutions, and their merged sum.

A test file that imports this module first skips itself where Triton is not installed.
"""

import pytest
import torch
from torch import Tensor

from kfde_layers.fused.mfdf.asked import Asked
from kfde_layers.fused.mfdf.cuda import launch
from kfde_layers.fused.mfdf.merging import convolve_each, mean_by_coverage, merge_kernels
from kfde_layers.ops.formats import as_input, upcast
from kfde_layers.testing import assert_error_budget, random_tensor
from tests.support.agreement import with_gradients
from tests.support.kernels import DEVICE

RESULTS = ("p", "dx of the mean", "dkernel", "y", "dx", "dalpha", "dstacked", "dbias")

each_small_map = pytest.mark.parametrize(
    ("height", "width", "size", "tap_spacing"),
    [(1, 1, 7, 1), (1, 1, 9, 3), (1, 5, 7, 2), (3, 2, 7, 1), (3, 2, 9, 1), (6, 7, 7, 3)],
)
"""Maps that are smaller than the kernel."""


def draw(*shape: int, seed: int) -> Tensor:
    return random_tensor(*shape, seed=seed, device=DEVICE)


def run_mean_reference(dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, kernel)]
    p = mean_by_coverage(upcast(inputs[0]), inputs[1], tap_spacing)
    return with_gradients(p, inputs, dp)


def run_merged_reference(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, bias: Tensor, tap_spacing: int
) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, alpha, stacked_kernels, bias)]
    merged_kernels = merge_kernels(inputs[1], inputs[2])
    y = as_input(convolve_each(upcast(inputs[0]), merged_kernels, inputs[3], tap_spacing), x)
    return with_gradients(y, inputs, dy)


def run_mean(dp: Tensor, x: Tensor, kernel: Tensor, tap_spacing: int) -> list[Tensor]:
    return [
        launch.launch_mean(x, kernel, tap_spacing),
        *launch.launch_mean_backward(dp, x, kernel, tap_spacing, True, True),
    ]


def run_merged(
    dy: Tensor, x: Tensor, alpha: Tensor, stacked_kernels: Tensor, bias: Tensor, tap_spacing: int
) -> list[Tensor]:
    y = launch.launch_merged(x, alpha, stacked_kernels, bias, tap_spacing)
    return [y, *launch.launch_merged_backward(dy, x, alpha, stacked_kernels, tap_spacing, Asked())]


def assert_within_budget(
    names: tuple[str, ...], run, run_reference, inputs: tuple[Tensor, ...], tap_spacing: int
) -> None:
    """Judge the result and every gradient by the reference's error on the same inputs."""
    actual, reference = run(*inputs, tap_spacing), run_reference(*inputs, tap_spacing)
    exact = run_reference(*(tensor.double() for tensor in inputs), tap_spacing)
    assert len(actual) == len(exact) == len(names)
    for name, *results in zip(names, actual, reference, exact, strict=True):
        assert_error_budget(*results, name=name)
        if results[0].shape == inputs[1].shape and name in ("y", "dx", "dx of the mean"):
            layout = torch.channels_last if inputs[1].stride(1) == 1 else torch.contiguous_format
            assert results[0].is_contiguous(memory_format=layout), name
        else:
            assert results[0].is_contiguous(), name


def check_mean(x: Tensor, size: int = 3, tap_spacing: int = 1) -> None:
    x = x.to(DEVICE)
    inputs = (draw(*x.shape[:2], seed=1), x, draw(x.shape[1], size, size, seed=2))
    assert_within_budget(RESULTS[:3], run_mean, run_mean_reference, inputs, tap_spacing)


def check_merged(x: Tensor, branches: int = 2, size: int = 3, tap_spacing: int = 1) -> None:
    x = x.to(DEVICE)
    dy = torch.empty_like(x).copy_(random_tensor(*x.shape, seed=3))
    alpha, stacked_kernels = (
        draw(x.shape[0], branches, x.shape[1], seed=4),
        draw(branches, x.shape[1], size, size, seed=5),
    )
    assert_within_budget(
        RESULTS[3:],
        run_merged,
        run_merged_reference,
        (dy, x, alpha, stacked_kernels, draw(*x.shape[:2], seed=6)),
        tap_spacing,
    )
