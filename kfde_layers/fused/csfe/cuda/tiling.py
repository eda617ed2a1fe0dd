"""How the kernels of CFE, SFE and CSFE cut a map: sizes of tiles and chunks, and the number of programs and warps."""

# pyright: reportMissingTypeStubs=false

from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor

from kfde_layers.fused.maps import BLOCK, FILL, LINE, THREADS, VECTOR, WARPS, channel_block

SMALL_MAP = 64  # positions; on an H200, one launch was measured to be faster at 49 of them
SMALL_LANES = 128  # channels of a program that handles all positions
SMALL_ELEMENTS = 2  # of a tile, per thread


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

    The two that reduce make fewer programs, since each ends with sums over its threads and stores a part that another
    launch must combine. The two of the backward pass keep more values per element, hence fewer elements per thread.
    These numbers were chosen by measurement on an H200.
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
    vector = VECTOR // itemsize
    many = vector if channels_last else 4

    def cut(count: int, elements: int, programs: int, least: int, widest: int) -> Tiling:
        return cut_into_tiles(batch, count, hw, channels_last, itemsize, elements, programs, least, widest)

    return Tilings(
        statistics=cut(channels, 2 * vector, FILL // 2, 4, LINE // 2),
        forward=cut(pairs, many, 2 * FILL, 1, LINE),
        sums=cut(pairs, 4, FILL // 2, 4, LINE // 2),
        backward=cut(pairs, 4, 2 * FILL, 1, LINE),
    )


@lru_cache(maxsize=1024)
def cut_into_tiles(
    batch: int, channels: int, hw: int, channels_last: bool, itemsize: int, elements: int, programs: int, least: int,
    widest: int,
) -> Tiling:  # fmt: skip
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
        widest: Most bytes of adjacent channels.
    """
    size = elements * THREADS
    if channels_last:
        block_c = channel_block(channels, itemsize, widest // itemsize)
        block_hw = min(size // block_c, triton.next_power_of_2(hw))
    else:
        block_hw = min(32 * elements, triton.next_power_of_2(hw))  # a warp to each channel
        block_c = min(size // block_hw, triton.next_power_of_2(channels), 32)
    tiles = triton.cdiv(hw, block_hw)
    chunks = min(tiles // least, programs // (batch * triton.cdiv(channels, block_c)))
    chunk = triton.cdiv(tiles, max(chunks, 1)) * block_hw
    return Tiling(block_hw, block_c, chunk, triton.cdiv(hw, chunk))


class Groups(NamedTuple):
    """How many groups of channels a program handles, and of how many lanes."""

    num_groups: int
    """Groups of a sample."""
    size: int
    """Channels of a group."""
    block: int
    """Groups of a program."""
    members: int
    """Lanes of a group."""
    block_sum: int
    """Channels that are summed at a time."""

    def grid(self, batch: int) -> tuple[int, int]:
        """Return the programs for a batch."""
        return batch, triton.cdiv(self.num_groups, self.block)

    def options(self) -> dict[str, int]:
        """Return the constants and the number of warps with which the kernel is compiled."""
        warps = min(max(self.block * self.members * WARPS // BLOCK, WARPS), 32)
        lanes = {"BLOCK_GROUPS": self.block, "BLOCK_MEMBERS": self.members}
        return {"GROUP_SIZE": self.size, **lanes, "BLOCK_SUM": self.block_sum, "num_warps": warps}


@lru_cache(maxsize=1024)
def cut_into_groups(channels: int, num_groups: int) -> Groups:
    """Cut the channels of a sample, so that each program has whole groups."""
    members = triton.next_power_of_2(channels // num_groups)
    block = min(triton.next_power_of_2(num_groups), max(BLOCK // members, 1))
    block_sum = min(triton.next_power_of_2(channels), BLOCK)
    return Groups(num_groups, channels // num_groups, block, members, block_sum)


def part_block(parts: int, groups: Groups) -> int:
    """Return how many parts of the positions a program reads at a time."""
    return min(triton.next_power_of_2(parts), max(4 * BLOCK // (groups.block * groups.members), 1))


class Small(NamedTuple):
    """How a small map is cut: a program handles groups of the first half and their partners."""

    groups: Groups
    """The groups of the first half."""
    block_hw: int
    """Positions of a tile."""

    def grid(self, batch: int) -> tuple[int, int]:
        """Return the programs for a batch."""
        return self.groups.grid(batch)

    def options(self) -> dict[str, int]:
        """Return the constants and the number of warps with which the kernel is compiled."""
        return {**self.groups.options(), "BLOCK_HW": self.block_hw}


@lru_cache(maxsize=1024)
def small_tiling(channels: int, num_groups: int | None, hw: int) -> Small | None:
    """Return how to cut a small map, or None if it is not small or its groups cannot be cut in this way.

    Args:
        channels: C.
        num_groups: Groups of CFE, which must stay together; None: there is no CFE.
        hw: Positions.
    """
    half = (channels + 1) // 2
    if hw > SMALL_MAP or (num_groups is not None and num_groups % 2):  # an odd one exchanges with parts of two others
        return None
    num_groups = half if num_groups is None else num_groups // 2
    members = triton.next_power_of_2(half // num_groups)
    if members > SMALL_LANES:
        return None
    block = min(triton.next_power_of_2(num_groups), SMALL_LANES // members)
    block_hw = min(triton.next_power_of_2(hw), SMALL_ELEMENTS * THREADS // (block * members))
    block_sum = min(triton.next_power_of_2(channels), BLOCK)
    return Small(Groups(num_groups, half // num_groups, block, members, block_sum), block_hw)
