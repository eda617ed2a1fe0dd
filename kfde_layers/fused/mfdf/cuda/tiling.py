"""How the kernels of MFDF cut a map: sizes of tiles and strips, and the number of programs and warps."""

# pyright: reportMissingTypeStubs=false

from functools import lru_cache
from typing import NamedTuple

import triton

from kfde_layers.fused.maps import BLOCK, FILL, LINE, THREADS, VECTOR, WARPS, channel_block

UNROLLED = 7  # side of the largest square of taps that fits in registers
SEGMENT_COLUMNS = 4  # columns of a lane's strip: more of them share more loads and need more registers
SAMPLES = 8  # least number of samples whose sum is written once
SCRATCH = 2**22  # elements that the gradient of the taps may take where the map is not larger


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
    samples: int
    """Samples that a program handles."""

    def options(self) -> dict[str, int]:
        """Return the constants and the number of warps with which the kernel is compiled."""
        return {"BLOCK_HW": self.block_hw, "BLOCK_C": self.block_c, "num_warps": WARPS}


@lru_cache(maxsize=1024)
def cut_into_tiles(batch: int, channels: int, hw: int, channels_last: bool, itemsize: int) -> Tiling:
    """Cut a map whose elements are read once, into tiles that make the widest loads."""
    elements = VECTOR // itemsize if channels_last else 4
    size = elements * THREADS
    if channels_last:
        block_c = channel_block(channels, itemsize, LINE // itemsize)
        block_hw = min(size // block_c, triton.next_power_of_2(hw))
    else:
        block_hw = min(32 * elements, triton.next_power_of_2(hw))  # a warp to each channel
        block_c = min(size // block_hw, triton.next_power_of_2(channels), 32)
    tiles, blocks = triton.cdiv(hw, block_hw), triton.cdiv(channels, block_c)
    most = max(tiles // 4, 1)  # chunks of fewer tiles leave many sums to add
    samples = 4 if triton.cdiv(batch, 4) * blocks * most >= FILL // 2 else 1
    chunks = min(most, max(FILL // (triton.cdiv(batch, samples) * blocks), 1))
    chunk = triton.cdiv(tiles, chunks) * block_hw
    return Tiling(block_hw, block_c, chunk, triton.cdiv(hw, chunk), samples)


class Strips(NamedTuple):
    """How the lattices of a map are cut into strips, of which each program takes several."""

    segment: int
    """Columns of a lane."""
    block_p: int
    """Lanes across a strip."""
    block_c: int
    """Channels of a strip."""
    rows: int
    """Rows of a strip."""
    across: int
    """Adjacent strips along the width, of all lattices."""
    strips: int
    """Number of strips of a sample's block of channels."""
    strips_per_program: int
    """Strips that each program takes."""

    def parts(self) -> int:
        """Return the programs of a sample's block of channels."""
        return triton.cdiv(self.strips, self.strips_per_program)

    def arguments(self) -> dict[str, int]:
        """Return the arguments that a kernel gets at run time."""
        names = ("rows", "across", "strips", "strips_per_program")
        return {name: value for name, value in self._asdict().items() if name in names}

    def options(self) -> dict[str, int]:
        """Return the constants and the number of warps with which the kernel is compiled."""
        warps = max(self.block_p * self.block_c // 32, 1)
        return {"SEGMENT": self.segment, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c, "num_warps": warps}


@lru_cache(maxsize=1024)
def cut_into_strips(
    batch: int, channels: int, height: int, width: int, channels_last: bool, itemsize: int, tap_spacing: int,
    neighbours: int, warps: int, least: int,
) -> Strips:  # fmt: skip
    """Cut the lattices of a map.

    Args:
        batch: N.
        channels: C.
        height: H.
        width: W.
        channels_last: Whether the memory format of the map is channels_last.
        itemsize: Bytes of an element.
        tap_spacing: Spacing of the taps in px.
        neighbours: Most lanes across a strip of a channels_last map; their common columns are then in the nearest
            cache, but the lanes are in different warps.
        warps: Wanted number of warps, in all.
        least: Number of rows below which no strip is cut.
    """
    columns = triton.cdiv(width, tap_spacing)
    segment = min(SEGMENT_COLUMNS, triton.next_power_of_2(columns))
    places = tap_spacing * triton.cdiv(columns, segment)
    if channels_last:
        block_c = min(channel_block(channels, itemsize, 32), 32)
        counts = [count for count in (4, 2, 1) if count <= neighbours]
    else:
        most = triton.next_power_of_2(places)
        counts = [count for count in (16, 8, 4) if count <= most] or [most]
        block_c = 0
    block_p = min(counts, key=lambda count: triton.cdiv(places, count) * count)
    if not channels_last:
        block_c = min(64 // block_p, triton.next_power_of_2(channels))
    across = triton.cdiv(places, block_p)
    fewest_warps = max(batch * triton.cdiv(channels, block_c) * block_p * block_c // 32, 1)  # if each took all strips
    rows = triton.cdiv(height, tap_spacing)
    # Strips are cut where there are few warps only, since each piece reads some rows of its neighbours again.
    cuts = min(FILL // (fewest_warps * across * tap_spacing), rows // least)
    rows = triton.cdiv(rows, max(cuts, 1))
    strips = across * tap_spacing * triton.cdiv(triton.cdiv(height, tap_spacing), rows)
    strips_per_program = max(strips // max(warps // fewest_warps, 1), 1)
    return Strips(segment, block_p, block_c, rows, across, strips, strips_per_program)


def block_rows(count: int, block_c: int) -> int:
    """Return the rows of a block of values of `block_c` channels each."""
    return min(triton.next_power_of_2(count), max(BLOCK // block_c, 1))
