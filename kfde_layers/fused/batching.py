"""Rules for `torch.vmap`: how an operator runs on tensors that have one more dimension than it takes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def batch_over_samples(operator: Any, per_sample: Iterable[int]) -> None:
    """Register a rule for an operator whose outputs, like some of its arguments, have the samples in dimension 0.

    The batch joins the samples. If another argument has the batch too, the operator runs once for each of its entries.

    Args:
        operator: Made by `torch.library.custom_op`.
        per_sample: Positions of the arguments that have samples.
    """
    positions = frozenset(per_sample)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int]:
        shared = [dim for position, dim in enumerate(in_dims) if position not in positions]
        if info.batch_size == 0 or any(dim is not None for dim in shared):
            return _one_by_one(operator, info.batch_size, in_dims, args)
        joined = [
            _join(argument, in_dims[position], info.batch_size) if position in positions else argument
            for position, argument in enumerate(args)
        ]

        def separate(output: Tensor) -> Tensor:
            return output.unflatten(0, (info.batch_size, output.shape[0] // info.batch_size))

        return tree_map(separate, operator(*joined)), 0

    operator.register_vmap(rule)


def batch_one_by_one(operator: Any) -> None:
    """Register a rule for an operator that sums over the samples: it runs once for each entry of the batch.

    Args:
        operator: Made by `torch.library.custom_op`.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int]:
        return _one_by_one(operator, info.batch_size, in_dims, args)

    operator.register_vmap(rule)


def _join(argument: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """Return an argument with batch and samples in one dimension."""
    batched = argument.expand(batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
    return batched.flatten(0, 1)


def _one_by_one(operator: Any, batch_size: int, in_dims: Iterable[int | None], args: Iterable[Any]) -> tuple[Any, int]:
    pairs = list(zip(args, in_dims, strict=True))

    def run(entry: Callable[[Tensor, int], Tensor]) -> Any:
        return operator(*(argument if dim is None else entry(argument, dim) for argument, dim in pairs))

    def stack(*entries: Tensor) -> Tensor:
        return torch.stack(entries)

    def empty(output: Tensor) -> Tensor:
        return output.new_empty((0, *output.shape))

    if batch_size == 0:  # an entry of zeros tells the shapes
        return tree_map(empty, run(lambda argument, dim: argument.new_zeros(argument.movedim(dim, 0).shape[1:]))), 0
    results = [run(lambda argument, dim, i=index: argument.select(dim, i)) for index in range(batch_size)]
    return tree_map(stack, *results), 0
