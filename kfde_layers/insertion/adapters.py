"""Adapt a block for maps (N, C, H, W) to the output of any module."""

import copy
import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Key = int | str  # index or name of a tensor in an output that holds several


class ChannelsFirst(nn.Module):
    """Run a block on (N, H, W, C)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Grid:
    """Into how many rows and columns of patches the last image was cut.

    It is a forward hook of a module that cuts images of any size, and returns (N, H, W, C).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size: tuple[int, int] = size

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.size = (output.shape[1], output.shape[2])


class Tokens(nn.Module):
    """Run a block on a sequence of tokens (N, L, C): prefix tokens, which bypass it, and then the rows of a map.

    Args:
        block: Maps (N, C, H, W) to the same shape.
        grid: Height and width of the map. They cannot be read off a sequence: one of another length is taken for a map
            of the same aspect ratio.
        num_prefix_tokens: Number of tokens before the map.
        last_grid: Height and width of each image's map, where the model takes images of any size; it overrides `grid`.
    """

    def __init__(
        self, block: nn.Module, grid: tuple[int, int], num_prefix_tokens: int, last_grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.last_grid: Any = last_grid

    def forward(self, x: Tensor) -> Tensor:
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        height, width = self._map_size(tokens.shape[1])
        x = tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
        tokens = self.block(x).flatten(2).transpose(1, 2)
        return torch.cat((prefix, tokens), 1) if self.num_prefix_tokens else tokens

    def _map_size(self, length: int) -> tuple[int, int]:
        if self.last_grid is not None:
            height, width = self.last_grid.size
            if height * width != length:
                raise ValueError(
                    f"x must have {self.num_prefix_tokens} prefix tokens and a map of {height} x {width}, as the image "
                    f"was cut, got {length + self.num_prefix_tokens} tokens"
                )
            return height, width
        scale = math.sqrt(length / (self.grid[0] * self.grid[1]))
        # TorchScript's round gives no int
        height, width = int(self.grid[0] * scale + 0.5), int(self.grid[1] * scale + 0.5)
        if height * width != length:
            raise ValueError(
                f"x must have {self.num_prefix_tokens} prefix tokens and a map with the aspect ratio of {self.grid}, "
                f"as in the example at insertion, got {length + self.num_prefix_tokens} tokens"
            )
        return height, width


class Item(nn.Module):
    """Run a block on one tensor of an output that holds several; return the others unchanged."""

    def __init__(self, block: nn.Module, key: Key) -> None:
        super().__init__()
        self.block = block
        self.key = key

    def forward(self, output: Any) -> Any:
        return with_item(output, self.key, self.block(items(output)[self.key]))


def items(output: Any) -> dict[Key, Any]:
    """Return the values of a tuple, list, dict or dataclass by index or name, and of anything else an empty dict."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def with_item(output: Any, key: Any, value: Any) -> Any:
    """Return a copy of the output with another value at `key`."""
    if dataclasses.is_dataclass(output):  # before dicts: an output of the library transformers is both
        return dataclasses.replace(output, **{key: value})  # pyright: ignore[reportArgumentType]
    if isinstance(output, MutableMapping):
        changed = copy.copy(output)
        changed[key] = value
        return changed
    changed = items(output) | {key: value}
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*changed.values())
    return type(output)(changed.values())
