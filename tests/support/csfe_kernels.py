"""Compare the kernels of CFE, SFE and CSFE with the reference.

A test file that imports this module first skips itself where Triton is not installed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
from torch import Tensor

from kfde_layers.functional import cfe, csfe, sfe
from kfde_layers.fused.csfe.cuda import launch
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.testing import assert_error_budget, random_affine, random_tensor
from tests.support.agreement import with_gradients
from tests.support.gates import move_away_from_threshold
from tests.support.kernels import DEVICE

OPERATORS = ("cfe", "sfe", "csfe")
LAMBD, BETA, EPS = 1e-3, 0.2, 1e-4


def run_reference(
    operator: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    threshold: float,
    correction: int,
    scale: float,
) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in ((x,) if operator == "sfe" else (x, weight, bias))]
    if operator == "sfe":
        y = sfe(*inputs, LAMBD, BETA, correction, impl="reference")
    elif operator == "cfe":
        y = cfe(*inputs, num_groups, threshold, EPS, impl="reference")
    else:
        fusion = {1.0: "sum", 0.5: "mean"}[scale]
        y = csfe(*inputs, num_groups, threshold, LAMBD, BETA, correction, EPS, fusion=fusion, impl="reference")
    return with_gradients(y, inputs, dy)


def run_kernels(
    operator: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    threshold: float,
    correction: int,
    scale: float,
) -> list[Tensor]:
    affine = (None, None) if operator == "sfe" else (weight, bias)
    options = CsfeOptions(num_groups, threshold, LAMBD, BETA, correction, EPS, operator != "cfe", scale)
    y, mean, m2 = launch.launch_forward(x, *affine, options)
    gradients = launch.launch_backward(dy, x, *affine, mean, m2, options, True, True)
    return [y, *(gradient for gradient in gradients if gradient is not None)]


def check(
    operator: str,
    x: Tensor,
    num_groups: int = 1,
    *,
    threshold: float = 0.5,
    correction: int = 0,
    scale: float = 1.0,
    affine: tuple[Tensor, Tensor] | None = None,
    dy: Tensor | None = None,
    margin: float = 1e-5,
    factor: float = 4.0,
    ways: Sequence[str] = ("as in use", "steps"),
) -> None:
    """Compare the result and every gradient with the reference in float64.

    The budget is the error of the reference in the dtype of `x`. Elements near the threshold are moved first. As they
    are in use, small maps take one launch; with "steps" among the `ways`, they also take one launch for each step.
    """
    x = x.to(DEVICE)
    weight, bias = (p.to(DEVICE) for p in (affine or random_affine(x.shape[1], seed=1)))
    dy = random_tensor(*x.shape, seed=2, dtype=x.dtype, device=DEVICE) if dy is None else dy.to(DEVICE)
    if operator != "sfe":
        parameters = (weight.double(), bias.double(), num_groups, threshold, EPS)
        move_away_from_threshold(lambda x: cfe(x, *parameters, impl="reference"), x, margin)
    options = (num_groups, threshold, correction, scale)
    reference = run_reference(operator, dy, x, weight, bias, *options)
    exact = run_reference(operator, dy.double(), x.double(), weight.double(), bias.double(), *options)
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    for way in ways:
        with one_launch_for_each_step() if way == "steps" else nullcontext():
            actual = run_kernels(operator, dy, x, weight, bias, *options)
        assert len(actual) == len(exact)
        for name, *results in zip(("y", "dx", "dweight", "dbias"), actual, reference, exact, strict=False):
            assert_error_budget(*results, factor=factor, name=name)
        assert all(result.is_contiguous(memory_format=layout) for result in actual[:2])


def one_launch_for_each_step() -> AbstractContextManager[object]:
    """Let small maps take the way of large ones."""
    return mock.patch.object(launch, "small_tiling", return_value=None)
