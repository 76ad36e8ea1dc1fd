"""Launch choices of the layer norm over the channels of every position: as heuristics.py, for tiles of channels x positions.

What the result of a position depends on (block_c, and where a tile is cut) is a function of C, S and the itemsize alone, so y
and dx of a sample never depend on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .heuristics import REGISTERS, cdiv, power_of_two, registers


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


# Bytes of a channel's positions in a tile: a sector of memory at the least; two forward, where there is room.
SEGMENT = 32
FORWARD_RUN, BACKWARD_RUN = 64, 32
# itemsize -> the most elements of a tile with all channels, the fewest that are work for a program, and elements a thread; both
# with loads narrower than 8 bytes, each of which holds a pointer. Backward there are two tensors: a thread with 255 registers
# holds more than two with 128 each. Few threads to a program, and many programs to a multiprocessor: while one waits for its
# sums the others load. On an H200 64 elements a thread took 0.6 to 0.9 times the time of 32 forward, 32 0.8 times that of 16
# backward.
FORWARD = {2: (16384, 4096, 64), 4: (16384, 4096, 64), 8: (4096, 1024, 8)}
FORWARD_NARROW = {2: (8192, 1024, 32), 4: (8192, 1024, 32)}
BACKWARD = {2: (8192, 2048, 32), 4: (8192, 4096, 32), 8: (2048, 1024, 8)}
BACKWARD_NARROW = {2: (4096, 1024, 8), 4: (4096, 1024, 8)}
# itemsize -> (elements of a tile, warps, stages) where more channels are read twice; the elements with narrow loads, which are
# not prefetched. Backward two sums for each of them are kept.
FORWARD_LONG = {2: (8192, 16, 3, 4096), 4: (4096, 16, 3, 4096), 8: (2048, 16, 2, 2048)}
BACKWARD_LONG = {2: (4096, 16, 3, 4096), 4: (4096, 16, 2, 4096), 8: (1024, 8, 2, 1024)}
# Bytes that a multiprocessor reads, reads again and writes of its tiles, so that L2 still has those of all of them: x and y of
# two programs, and x, dy and dx of one.
BETWEEN, FORWARD_BETWEEN, BACKWARD_BETWEEN = 300 << 10, 6, 5
# Bytes that a program prefetches at the most. float64 is bound by its arithmetic.
PREFETCHED = 64 << 10


def forward(B: int, C: int, S: int, itemsize: int, width: int) -> Positions:
    """`width`: bytes of a load."""
    narrow = width < 8
    most, least, thread = (FORWARD_NARROW if narrow else FORWARD)[itemsize]
    tile = _whole(C, S, itemsize, most, least, FORWARD_RUN)
    if tile is None:
        tile, warps, stages = _long(C, itemsize, narrow, FORWARD_LONG, FORWARD_BETWEEN)
    else:
        warps, stages = max(1, tile[0] * tile[1] // (32 * thread)), 1
    return Positions(*tile, warps, stages, registers(warps), tile[0] >= C, cdiv(B * S, tile[1]))


def backward(B: int, C: int, S: int, itemsize: int, width: int, sm_count: int) -> Positions:
    """As forward; `programs` are persistent."""
    narrow, per_sm = width < 8, 1
    most, least, thread = (BACKWARD_NARROW if narrow else BACKWARD)[itemsize]
    tile = _whole(C, S, itemsize, most, least, BACKWARD_RUN)
    if tile is None:
        tile, warps, stages = _long(C, itemsize, narrow, BACKWARD_LONG, BACKWARD_BETWEEN)
    else:
        warps = max(1, tile[0] * tile[1] // (32 * thread))
        per_sm = min(4, max(1, REGISTERS // (32 * 255 * warps)))
        stages = 1 if narrow or itemsize == 8 else 1 + min(2, PREFETCHED // (2 * tile[0] * tile[1] * itemsize))
    programs = min(cdiv(B * S, tile[1]), max(2, per_sm * sm_count))
    return Positions(*tile, warps, stages, registers(warps), tile[0] >= C, programs)


@lru_cache(1024)
def read_once(C: int, S: int, itemsize: int, width: int, differentiable: bool) -> bool:
    """Whether one tile has all channels, forward and, of what is differentiable, backward."""
    return forward(1, C, S, itemsize, width).whole and (not differentiable or backward(1, C, S, itemsize, width, 1).whole)


def _whole(C: int, S: int, itemsize: int, most: int, least: int, run: int) -> tuple[int, int] | None:
    """Channels and positions of a tile that has all channels and at most so many elements; None where its rows were too short.
    Few positions of a sample are all of its memory: a tile takes no more than them, unless it were too small."""
    block_c = power_of_two(C)
    fitting = most // block_c
    if fitting < min(SEGMENT // itemsize, power_of_two(S)):
        return None
    block_s = min(run // itemsize, power_of_two(S), fitting)
    return block_c, max(block_s, min(fitting, least // block_c))


def _long(C: int, itemsize: int, narrow: bool, ladder: dict, between: int) -> tuple[tuple[int, int], int, int]:
    """Tile, warps and stages; `between`: tiles of all channels that go through L2 between the two readings of one."""
    elements, warps, stages, fewer = ladder[itemsize]
    if narrow:
        elements, stages = fewer, 1
    block_s = 2 * SEGMENT // itemsize
    if between * C * block_s * itemsize > BETWEEN:
        block_s //= 2
    return (elements // block_s, block_s), warps, stages
