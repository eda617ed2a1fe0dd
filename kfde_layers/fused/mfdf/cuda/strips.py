"""The strips of a lattice, in which lanes walk down the rows."""

# Triton's language is not the Python that the checker reads: parameters have no types, constants are given as numbers,
# launches take more than the kernel's parameters, and its ranges are no iterators.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingTypeStubs=false
# ruff: noqa: N803, N806  (constants of a kernel are in capitals)

import triton
import triton.language as tl


@triton.jit
def lanes(C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return sample, channel and place in the strip of each lane, one lane to a thread, in the order of memory."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    lane = tl.arange(0, BLOCK_P * BLOCK_C)
    n = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * BLOCK_C
    if CHANNELS_LAST:
        return n, first + lane % BLOCK_C, lane // BLOCK_C
    return n, first + lane // BLOCK_P, lane % BLOCK_P


@triton.jit
def strip_of(strip, place, height, rows, across, SPACING: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return first row and number of rows of a strip's lattice, the rows of the strip, and each lane's first column.

    `across` strips of `rows` rows of the lattice are adjacent; a lane has every SPACING-th column.
    """
    lattice_row = strip // across % SPACING
    begin = strip // (across * SPACING) * rows
    count = (height - lattice_row + SPACING - 1) // SPACING
    lane_index = strip % across * BLOCK_P + place
    column = lane_index % SPACING + lane_index // SPACING * (SEGMENT * SPACING)
    return lattice_row, count, begin, tl.minimum(begin + rows, count), column


@triton.jit
def load_row(ptr, column, width, active, stride, SPACING: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT numbers, SPACING columns apart, from `column` on; zeros outside the map and if not `active`."""
    row = ()
    for j in tl.static_range(COUNT):
        inside = (column + j * SPACING >= 0) & (column + j * SPACING < width)
        row += (tl.load(ptr + j * SPACING * stride, mask=active & inside, other=0.0).to(tl.float32),)
    return row
