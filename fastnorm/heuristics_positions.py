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

    `programs` share the tiles of a backward, `partial_rows` of which are written: one a program, or one a tile.
    """

    block_c: int
    block_s: int
    warps: int
    stages: int
    registers: int
    whole: bool
    programs: int
    partial_rows: int


# Bytes of a channel's positions in a tile: a sector of memory at the least, whole lines of it where there is room.
SEGMENT, LINE = 32, 128
# Fewer elements than this are no work for a program.
SMALLEST_TILE = 1024
# itemsize -> the most elements of a tile with all channels, and elements a thread; the former with loads narrower than 8 bytes,
# each of which holds a pointer. Backward there are two tensors.
FORWARD, FORWARD_NARROW, FORWARD_THREAD = {2: 16384, 4: 16384, 8: 8192}, {2: 8192, 4: 8192, 8: 8192}, {2: 32, 4: 32, 8: 16}
BACKWARD, BACKWARD_NARROW, BACKWARD_THREAD = {2: 16384, 4: 16384, 8: 4096}, {2: 8192, 4: 8192, 8: 4096}, {2: 32, 4: 32, 8: 8}
# itemsize -> (elements of a tile, warps, stages) where more channels are read twice.
LONG = {2: (8192, 16, 3), 4: (4096, 16, 3), 8: (2048, 16, 2)}
# Bytes that the programs of a multiprocessor have between two readings, so that all of them together leave them in L2.
BETWEEN = 256 << 10
# Bytes that a program prefetches at the most, and programs of a multiprocessor, each of which writes a partial row.
PREFETCHED, PER_SM = 64 << 10, 2


def forward(B: int, C: int, S: int, itemsize: int, width: int) -> Positions:
    """`width`: bytes of a load."""
    narrow = width < 8
    tile = _whole(C, S, itemsize, (FORWARD_NARROW if narrow else FORWARD)[itemsize])
    if tile is None:
        return _long(B, C, S, itemsize, narrow, 1, None)
    warps = _warps(tile, FORWARD_THREAD[itemsize])
    programs = cdiv(B * S, tile[1])
    return Positions(*tile, warps, 1, registers(warps), whole=True, programs=programs, partial_rows=0)


def backward(B: int, C: int, S: int, itemsize: int, width: int, sm_count: int) -> Positions:
    """As forward; `programs` are persistent."""
    narrow = width < 8
    tile = _whole(C, S, itemsize, (BACKWARD_NARROW if narrow else BACKWARD)[itemsize])
    if tile is None:
        return _long(B, C, S, itemsize, narrow, 2, sm_count)
    warps, ahead = _warps(tile, BACKWARD_THREAD[itemsize]), 2 * tile[0] * tile[1] * itemsize
    per_sm = max(1, min(PER_SM, 16 // warps))
    stages = 1 if width < 4 else 1 + min(2, PREFETCHED // (per_sm * ahead))
    programs = min(cdiv(B * S, tile[1]), per_sm * sm_count)
    return Positions(*tile, warps, stages, registers(warps * per_sm), whole=True, programs=programs, partial_rows=programs)


def _whole(C: int, S: int, itemsize: int, most: int) -> tuple[int, int] | None:
    """Channels and positions of a tile that has all channels and at most so many elements; None where its rows were too short.
    Few positions of a sample are all of its memory: a tile takes no more than them."""
    block_c = power_of_two(C)
    fitting = most // block_c
    if fitting < min(SEGMENT // itemsize, power_of_two(S)):
        return None
    block_s = min(LINE // itemsize, power_of_two(S), fitting)
    return block_c, max(block_s, min(fitting, SMALLEST_TILE // block_c))


def _warps(tile: tuple[int, int], thread: int) -> int:
    return max(1, tile[0] * tile[1] // (32 * thread))


def _long(B: int, C: int, S: int, itemsize: int, narrow: bool, tensors: int, sm_count: int | None) -> Positions:
    elements, warps, stages = LONG[itemsize]
    if narrow:
        elements, stages = elements // 2, 1
    block_s = 2 * SEGMENT // itemsize
    if tensors * C * block_s * itemsize > BETWEEN:
        block_s //= 2
    tiles = cdiv(B * S, block_s)
    programs = tiles if sm_count is None else min(tiles, sm_count)
    return Positions(elements // block_s, block_s, warps, stages, registers(warps), whole=False, programs=programs,
                     partial_rows=tiles)  # fmt: skip
