"""Addresses, tiles and sizes of feature maps, and the constants of the GPU, for the CUDA kernels of all families.

All kernels see a dense map (N, C, H, W) in either memory format; "hw" is the number of its positions.
"""

# Triton's language has no types, and constants of a kernel are in capitals.
# pyright: reportMissingParameterType=false, reportMissingTypeStubs=false
# ruff: noqa: N803

import math

import triton
import triton.language as tl

WARPS = 4  # per program
THREADS = 32 * WARPS
VECTOR, SECTOR, LINE = 16, 32, 128  # bytes: the widest load of a thread, the least that memory moves, a cache line
FILL = 1024  # programs of THREADS: enough to occupy a large GPU
BLOCK = 1024  # elements of a block of per-channel values
STAGES = tl.constexpr(3)  # tiles in flight: one is worked on, the others are being loaded


@triton.jit
def address(n, c, row, column, height, width, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the index of an element of the map; it can pass 2^31."""
    if CHANNELS_LAST:
        return ((n.to(tl.int64) * height + row) * width + column) * C + c
    return ((n.to(tl.int64) * C + c) * height + row) * width + column


@triton.jit
def tile(hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the indices of a tile's elements, counted from its first element."""
    p = tl.arange(0, BLOCK_HW)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return p * C + c if CHANNELS_LAST else p + c * hw  # [BLOCK_HW, BLOCK_C]


def sizes(channels: int, hw: int, channels_last: bool) -> dict[str, int]:
    """Return the constants with which a kernel is compiled for a map; it gets `hw // HW_UNIT` at run time."""
    return {"C": channels, "HW_UNIT": math.gcd(hw, VECTOR), "CHANNELS_LAST": channels_last}


def channel_block(channels: int, itemsize: int, widest: int) -> int:
    """Return the widest block of adjacent channels, up to `widest`, that wastes the fewest lanes beyond the last."""
    widths = [width for width in (64, 32, 16, 8) if width * itemsize >= SECTOR and width <= widest]
    return min(widths, key=lambda width: triton.cdiv(channels, width) * width)
