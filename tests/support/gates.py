"""Inputs none of whose gates is near its threshold, where rounding or a finite difference would flip it.

CFE jumps at the threshold, so at such an element neither two implementations nor two nearby inputs can be compared.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from kfde_layers.ops import cfe as cfe_operation
from tests.support.inputs import draw


def groups_of_one_value(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return a map of two groups, one of ones and one of threes, and a gamma of ones: z is a quarter of beta."""
    x = torch.tensor([1.0, 1.0, 3.0, 3.0], device=device)[:, None, None].expand(1, 4, 2, 2).contiguous()
    return x, torch.ones(4, device=device)


# (beta, output of CFE at a threshold of 0.5): z below, at and just above it. Where the gate is closed, both halves get
# half of each other: 0.5 + 1.5. sigmoid(1e-9) is 0.5 in float32, but z is above the threshold, so the gate is open.
AT_THRESHOLD = [(-1e-9, [2.0, 2.0, 2.0, 2.0]), (0.0, [2.0, 2.0, 2.0, 2.0]), (4e-9, [1.0, 1.0, 3.0, 3.0])]


def distances_from_threshold(call: Callable[[Tensor], object], x: Tensor) -> list[Tensor]:
    """Return |logit - logit of the threshold| for every gate that `call(x)` computes, one tensor for each CFE.

    `call` must run the plain equations, in float64.
    """
    distances: list[Tensor] = []
    cfe_gate = cfe_operation.cfe_gate

    def recording_gate(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, threshold: float, eps: float):
        r, is_open = cfe_gate(x, weight, bias, num_groups, threshold, eps)
        distances.append((r.logit() - torch.tensor(threshold, dtype=r.dtype, device=r.device).logit()).abs())
        return r, is_open

    with mock.patch.object(cfe_operation, "cfe_gate", recording_gate), torch.no_grad():
        call(x.to(torch.float64))
    return distances


def input_away_from_threshold(
    call: Callable[[Tensor], object],
    *shape: int,
    margin: float,
    first_seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw inputs until no gate of `call` is near its threshold, and return the first such input.

    Args:
        call: The plain equations, in float64.
        shape: Shape of the input.
        margin: Smallest distance allowed, relative to the largest distance of the same CFE.
        first_seed: Seed of the first input.
        dtype: Dtype of the input.
    """
    for seed in range(first_seed, first_seed + 99):
        x = draw(*shape, seed=seed, dtype=dtype)
        if all(distance.min() > margin * distance.max() for distance in distances_from_threshold(call, x)):
            return x
    raise AssertionError("no input found without a gate near its threshold")


def move_away_from_threshold(call: Callable[[Tensor], object], x: Tensor, margin: float) -> None:
    """Change in place those elements of `x` whose gate is nearer than `margin` to its threshold.

    Args:
        call: CFE by the plain equations, alone or with SFE, in float64.
        x: Feature map. Its strides stay as they are.
        margin: Smallest distance allowed, in units of the logit.
    """
    for _ in range(100):
        near = torch.stack(distances_from_threshold(call, x)).amin(0) < margin
        if not near.any():
            return
        x[near] += 0.1
    raise AssertionError("no input found without a gate near its threshold")
