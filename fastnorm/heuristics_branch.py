"""Launch choices of a branch on its way onto a stream: as heuristics.py, for blocks of neighbouring elements."""

from __future__ import annotations

from dataclasses import dataclass

from .heuristics import cdiv, power_of_two, registers


@dataclass(frozen=True)
class Elements:
    """A program has `block` elements that follow each other."""

    block: int
    warps: int


@dataclass(frozen=True)
class Columns:
    """Tiles of rows x block columns; `programs` share the tiles of a block of columns, and each has a partial row."""

    rows: int
    block: int
    warps: int
    stages: int
    registers: int
    programs: int


# itemsize -> elements of a thread: two whole vectors of each tensor are asked for before one is waited for.
THREAD, WARPS = {2: 16, 4: 8, 8: 4}, 4
# itemsize -> elements of a tile, of which there are x, dh, the random words and the sums.
TILE, TILE_WARPS, PER_SM = {2: 4096, 4: 4096, 8: 1024}, 8, 2
# The most columns of a tile; the fewest, but where there are no more; and the part of them that may be beyond the last.
LONGEST, SHORTEST, WASTED = 1024, 256, 1 / 8
# Bytes that the programs of a multiprocessor prefetch at the most.
PREFETCHED = 64 << 10
# From so many elements on, offsets take 64 bits: twice as many are the most that 32 hold.
WIDE = 1 << 30


def elements(itemsize: int) -> Elements:
    return Elements(32 * WARPS * THREAD[itemsize], WARPS)


def columns(M: int, N: int, itemsizes: tuple[int, ...], width: int, sm_count: int) -> Columns:
    """`itemsizes` of the tensors that are read, `width`: bytes of the narrowest load, which are not prefetched below 4."""
    tile, block = TILE[min(itemsizes)], _columns(N)
    rows = tile // block
    stages = 1 if width < 4 else 1 + min(2, PREFETCHED // (PER_SM * tile * sum(itemsizes)))
    programs = min(cdiv(M, rows), max(1, PER_SM * sm_count // cdiv(N, block)))
    return Columns(rows, block, TILE_WARPS, stages, registers(PER_SM * TILE_WARPS), programs)


def _columns(N: int) -> int:
    block = min(LONGEST, power_of_two(N))
    while block > SHORTEST and cdiv(N, block) * block > (1 + WASTED) * N:
        block //= 2
    return block


def ends(period: int, block: int, within: int) -> int:
    """How many ends of a period may be inside a block: 0, 1, or 2 for more. A block is in one stretch of `within` elements,
    which follow each other from the first on."""
    if period % within == 0:
        return 0
    return 1 if block <= period else 2
