"""Launch choices of the layer norm over the channels of every position: as heuristics.py, for tiles of channels x positions.

What the result of a position depends on (block_c, and where a tile is cut) is a function of C, S and the itemsize alone, so y
and dx of a sample never depend on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .heuristics import cdiv, power_of_two, registers


@dataclass(frozen=True)
class Positions:
    """Tiles of block_c channels x block_s positions, counted through all samples; `whole`: one tile has all channels.

    `programs`: one a tile; those of a backward share the tiles, and each has a partial row. One of them has one tile.
    """

    block_c: int
    block_s: int
    warps: int
    stages: int
    registers: int
    whole: bool
    programs: int


# Bytes of a channel's positions in a tile: a sector of memory at the least. Forward whole lines where there is room; backward
# two smaller tiles on a multiprocessor do not wait for each other.
SEGMENT, FORWARD_ROW, BACKWARD_ROW = 32, 128, 64
# Fewer elements than this are no work for a program.
SMALLEST_TILE = 1024
# itemsize -> the most elements of a tile with all channels, and elements a thread; the former with loads narrower than 8 bytes,
# each of which holds a pointer. Backward there are two tensors.
FORWARD, FORWARD_NARROW, FORWARD_THREAD = {2: 16384, 4: 16384, 8: 8192}, {2: 8192, 4: 8192, 8: 8192}, {2: 32, 4: 32, 8: 16}
BACKWARD, BACKWARD_NARROW, BACKWARD_THREAD = {2: 8192, 4: 8192, 8: 4096}, {2: 4096, 4: 4096, 8: 4096}, {2: 16, 4: 16, 8: 8}
# itemsize -> (elements of a tile, warps, stages) where more channels are read twice; the elements with narrow loads, which are
# not prefetched. Backward two sums for each of them are kept.
FORWARD_LONG = {2: (8192, 16, 3, 4096), 4: (4096, 16, 3, 4096), 8: (2048, 16, 2, 2048)}
BACKWARD_LONG = {2: (4096, 16, 3, 4096), 4: (4096, 16, 2, 4096), 8: (2048, 16, 2, 2048)}
# Bytes that a multiprocessor reads, reads again and writes of its tiles, so that L2 still has those of all of them: x and y of
# two programs, and x, dy and dx of one.
BETWEEN, FORWARD_BETWEEN, BACKWARD_BETWEEN = 300 << 10, 6, 5
# Bytes that the programs of a multiprocessor prefetch at the most.
PREFETCHED = 64 << 10


def forward(B: int, C: int, S: int, itemsize: int, width: int) -> Positions:
    """`width`: bytes of a load."""
    narrow = width < 8
    tile = _whole(C, S, itemsize, (FORWARD_NARROW if narrow else FORWARD)[itemsize], FORWARD_ROW)
    if tile is None:
        tile, warps, stages = _long(C, itemsize, narrow, FORWARD_LONG, FORWARD_BETWEEN)
    else:
        warps, stages = _warps(tile, FORWARD_THREAD[itemsize]), 1
    return Positions(*tile, warps, stages, registers(warps), tile[0] >= C, cdiv(B * S, tile[1]))


def backward(B: int, C: int, S: int, itemsize: int, width: int, sm_count: int) -> Positions:
    """As forward; `programs` are persistent."""
    narrow = width < 8
    tile, per_sm = _whole(C, S, itemsize, (BACKWARD_NARROW if narrow else BACKWARD)[itemsize], BACKWARD_ROW), 1
    if tile is None:
        tile, warps, stages = _long(C, itemsize, narrow, BACKWARD_LONG, BACKWARD_BETWEEN)
    else:
        warps = _warps(tile, BACKWARD_THREAD[itemsize])
        per_sm = 2 if warps < 16 else 1
        stages = 1 if width < 4 else 1 + min(2, PREFETCHED // (per_sm * 2 * tile[0] * tile[1] * itemsize))
    programs = min(cdiv(B * S, tile[1]), max(2, per_sm * sm_count))
    return Positions(*tile, warps, stages, registers(warps * per_sm), tile[0] >= C, programs)


def _whole(C: int, S: int, itemsize: int, most: int, row: int) -> tuple[int, int] | None:
    """Channels and positions of a tile that has all channels and at most so many elements; None where its rows were too short.
    Few positions of a sample are all of its memory: a tile takes no more than them."""
    block_c = power_of_two(C)
    fitting = most // block_c
    if fitting < min(SEGMENT // itemsize, power_of_two(S)):
        return None
    block_s = min(row // itemsize, power_of_two(S), fitting)
    return block_c, max(block_s, min(fitting, SMALLEST_TILE // block_c))


def _warps(tile: tuple[int, int], thread: int) -> int:
    return max(1, tile[0] * tile[1] // (32 * thread))


def _long(C: int, itemsize: int, narrow: bool, ladder: dict, between: int) -> tuple[tuple[int, int], int, int]:
    """Tile, warps and stages; `between`: tiles of all channels that go through L2 between the two readings of one."""
    elements, warps, stages, fewer = ladder[itemsize]
    if narrow:
        elements, stages = fewer, 1
    block_s = 2 * SEGMENT // itemsize
    if between * C * block_s * itemsize > BETWEEN:
        block_s //= 2
    return (elements // block_s, block_s), warps, stages
