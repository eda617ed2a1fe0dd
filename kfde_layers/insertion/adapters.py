"""What lets a block made for (N, C, H, W) run on the output of any module."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Key = int | str  # of a tensor within an output that holds several


class ChannelsFirst(nn.Module):
    """Run a block on (N, H, W, C)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """Run a block on a sequence of tokens (N, L, C): prefix tokens, which pass by, and the rows of a map.

    Args:
        block: Maps (N, C, H, W) to the same shape.
        grid: Height and width of the map. Of a sequence of another length, the map has the same aspect ratio.
        num_prefix_tokens: How many tokens stand before the map.
    """

    def __init__(self, block: nn.Module, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = tokens.transpose(1, 2).unflatten(2, self._grid(tokens.shape[1]))
        tokens = self.block(x).flatten(2).transpose(1, 2)
        return torch.cat((prefix, tokens), 1) if self.num_prefix_tokens else tokens

    def _grid(self, length: int) -> tuple[int, int]:
        scale = math.sqrt(length / math.prod(self.grid))
        height, width = (round(side * scale) for side in self.grid)
        if height * width != length:
            raise ValueError(
                f"x must have {self.num_prefix_tokens} tokens and a map with the aspect ratio of {self.grid}, for "
                f"which the block was inserted, got {length + self.num_prefix_tokens} tokens"
            )
        return height, width


class Item(nn.Module):
    """Run a block on one tensor of an output that holds several; the others pass by."""

    def __init__(self, block: nn.Module, key: Key) -> None:
        super().__init__()
        self.block = block
        self.key = key

    def forward(self, output: Any) -> Any:
        return with_item(output, self.key, self.block(items(output)[self.key]))


def items(output: Any) -> dict[Key, Any]:
    """The values in a tuple, list, dict or dataclass by index or name; none in anything else."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def with_item(output: Any, key: Any, value: Any) -> Any:
    """A copy of the output with another value at `key`."""
    if dataclasses.is_dataclass(output):  # before dicts: an output of transformers is both
        return dataclasses.replace(output, **{key: value})  # pyright: ignore[reportArgumentType]
    changed = items(output) | {key: value}
    if isinstance(output, Mapping):
        return type(output)(changed)  # pyright: ignore[reportCallIssue]
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*changed.values())
    return type(output)(changed.values())
