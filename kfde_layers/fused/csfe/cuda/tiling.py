"""How the kernels of CFE, SFE and CSFE cut a map: sizes of tiles and chunks, and the number of programs and warps."""

# pyright: reportMissingTypeStubs=false

from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor

from kfde_layers.fused.maps import BLOCK, FILL, LINE, THREADS, VECTOR, WARPS, channel_block


class Tiling(NamedTuple):
    """How a kernel cuts a map: into tiles, and the positions into chunks of tiles, one chunk per program."""

    block_hw: int
    """Positions of a tile."""
    block_c: int
    """Channels of a tile."""
    chunk: int
    """Positions of a chunk."""
    chunks: int
    """Number of chunks."""
    warps: int = WARPS
    """Warps of a program."""

    def grid(self, batch: int, channels: int) -> tuple[int, int]:
        """Return the programs for a batch of maps of so many channels, or pairs of channels."""
        return batch * triton.cdiv(channels, self.block_c), self.chunks

    def options(self) -> dict[str, int]:
        """Return the constants and the number of warps with which the kernel is compiled."""
        return {"BLOCK_HW": self.block_hw, "BLOCK_C": self.block_c, "num_warps": self.warps}


class Tilings(NamedTuple):
    """The tiling of each kernel.

    The two that reduce cut the positions only where each part is long and there are few programs otherwise, since
    another launch must combine the parts. The two of the backward pass keep more values per element, hence fewer
    elements per thread.
    """

    statistics: Tiling
    """Tiling of the statistics."""
    forward: Tiling
    """Tiling of the result."""
    sums: Tiling
    """Tiling of the sums that the gradient needs."""
    backward: Tiling
    """Tiling of the gradient."""


def tilings(x: Tensor, channels_last: bool) -> Tilings:
    """Return the tilings for a map."""
    batch, channels, height, width = x.shape
    pairs, hw, itemsize = (channels + 1) // 2, height * width, x.element_size()
    few, many = 4, VECTOR // itemsize if channels_last else 4
    return Tilings(
        statistics=cut_into_tiles(batch, channels, hw, channels_last, itemsize, many, FILL, 8),
        forward=cut_into_tiles(batch, pairs, hw, channels_last, itemsize, many, 2 * FILL, 1),
        sums=cut_into_tiles(batch, pairs, hw, channels_last, itemsize, few, FILL, 8),
        backward=cut_into_tiles(batch, pairs, hw, channels_last, itemsize, few, 2 * FILL, 1),
    )


@lru_cache(maxsize=1024)
def cut_into_tiles(
    batch: int, channels: int, hw: int, channels_last: bool, itemsize: int, elements: int, programs: int, least: int
) -> Tiling:
    """Cut a map of `channels` channels, or of as many pairs of them.

    Args:
        batch: N.
        channels: Channels, or pairs of them, of which each program takes a block.
        hw: Positions.
        channels_last: Whether the memory format of the map is channels_last.
        itemsize: Bytes of an element.
        elements: Elements of a tile per thread; more of them make wider loads and need more registers.
        programs: Wanted number of programs.
        least: Least number of tiles in a chunk.
    """
    size = elements * THREADS
    if channels_last:
        block_c = channel_block(channels, itemsize, LINE // itemsize)
        block_hw = min(size // block_c, triton.next_power_of_2(hw))
    else:
        block_hw = min(32 * elements, triton.next_power_of_2(hw))  # a warp to each channel
        block_c = min(size // block_hw, triton.next_power_of_2(channels), 32)
    tiles = triton.cdiv(hw, block_hw)
    chunks = min(tiles // least, programs // (batch * triton.cdiv(channels, block_c)))
    chunk = triton.cdiv(tiles, max(chunks, 1)) * block_hw
    return Tiling(block_hw, block_c, chunk, triton.cdiv(hw, chunk))


@lru_cache(maxsize=1024)
def group_sizes(channels: int, num_groups: int, block_c: int) -> dict[str, int]:
    """Return the constants with which a program finds the moments of the groups that its block of channels touches."""
    size, half = channels // num_groups, (channels + 1) // 2
    starts = [start for origin in (0, half) for start in range(origin, origin + half, block_c)]
    groups = triton.next_power_of_2(max((start + block_c - 1) // size - start // size + 1 for start in starts))
    members = min(triton.next_power_of_2(size), max(BLOCK // groups, 1))
    total = min(triton.next_power_of_2(channels), BLOCK)
    return {"GROUP_SIZE": size, "BLOCK_GROUPS": groups, "BLOCK_MEMBERS": members, "BLOCK_SUM": total}
