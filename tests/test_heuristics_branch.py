import dataclasses
import itertools

import pytest

from fastnorm import heuristics_branch as H
from fastnorm.heuristics import REGISTERS

ITEMSIZES = (2, 4, 8)
READ = ((2, 2), (2, 4), (4, 4), (8, 8))  # itemsizes of x and dh
LENGTHS = (4, 8, 40, 64, 256, 264, 320, 768, 1000, 1024, 1152, 4096, 5120, 8008, 40000)
SHARED = 99 << 10  # bytes a block may use on the smallest GPU that is served


def every():
    """M, N, itemsizes, width and configuration."""
    for N, read, M, width in itertools.product(LENGTHS, READ, (1, 3, 64, 10**6), (2, 4, 8, 16)):
        if width >= min(read):
            yield M, N, read, width, H.columns(M, N, read, width, 132)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_blocks_are_whole_vectors_and_counters(itemsize):
    c = H.elements(itemsize)
    assert c.block % max(4, 16 // itemsize) == 0
    assert c.block == 32 * c.warps * H.THREAD[itemsize]
    assert H.THREAD[itemsize] * itemsize == 32  # two vectors


def test_tiles():
    """Powers of two; little of a tile is beyond the last column. Another number of rows changes nothing."""
    for M, N, read, width, c in every():
        assert dataclasses.replace(c, programs=1) == dataclasses.replace(H.columns(M + 7, N, read, width, 99), programs=1)
        for n in (c.rows, c.block, c.warps):
            assert n & (n - 1) == 0
        assert c.rows * c.block == H.TILE[min(read)]
        assert c.block <= H.SHORTEST or H.cdiv(N, c.block) * c.block <= 1.125 * N
        assert c.block < 2 * N
        assert c.block >= min(N, H.SHORTEST)


def test_programs():
    """As many as run at once, or one for a block of columns; none without rows."""
    for M, N, _, _, c in every():
        assert 1 <= c.programs <= H.cdiv(M, c.rows)
        assert c.programs == 1 or c.programs * H.cdiv(N, c.block) <= H.PER_SM * 132


def test_tiles_fit_the_registers():
    """x, dh, the words and the sums; half is left to everything else."""
    for _, _, read, _, c in every():
        live = 4 if max(read) < 8 else 7
        assert live * c.rows * c.block <= 0.5 * 32 * c.warps * c.registers
        assert H.PER_SM * 32 * c.warps * c.registers <= REGISTERS


def test_what_is_prefetched_fits_shared_memory():
    for _, _, read, width, c in every():
        assert H.PER_SM * (c.stages - 1) * c.rows * c.block * sum(read) <= H.PREFETCHED < 0.7 * SHARED
        assert c.stages == 1 or width >= 4


def test_the_widths_of_models():
    """No column of theirs is beyond the last."""
    block = lambda N: H.columns(10**5, N, (2, 2), 16, 132).block
    assert [block(N) for N in (384, 768, 1024, 1152, 1280, 4096, 5120)] == [256, 256, 1024, 256, 256, 1024, 1024]


@pytest.mark.parametrize("block", [16, 256, 2048])
def test_ends(block):
    """Counted one by one: of blocks that follow each other, and of those that are in rows of a length."""
    for period in (1, 3, 8, 16, 48, 100, 256, 300, 2048, 3000, 4096, 10000):
        inside = lambda first, last, period=period: (last - 1) // period - first // period
        most = max(inside(i * block, (i + 1) * block) for i in range(3 * period))
        assert min(2, most) <= H.ends(period, block, block) <= (0 if most == 0 else 1 if block <= period else 2)
        for length in (48, 300, 4096):
            blocks = [(i, min(length, i + block)) for i in range(0, length, block)]
            most = max(inside(row * length + a, row * length + b) for row in range(period) for a, b in blocks)
            assert most <= H.ends(period, block, length) or H.ends(period, block, length) == 2


def test_configurations_are_frozen():
    c = H.elements(2)
    assert hash(c) == hash(dataclasses.replace(c))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.warps = 1
