import dataclasses
import itertools

import pytest

from fastnorm import heuristics_positions as H
from fastnorm.heuristics import REGISTERS

ITEMSIZES = (2, 4, 8)
SHARED = 99 << 10  # bytes a block may use on the smallest GPU that is served
WIDTHS = {itemsize: [itemsize * v for v in (1, 2, 4, 8) if itemsize * v <= 16] for itemsize in ITEMSIZES}


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def every(itemsize):
    """C, S, width and both configurations."""
    channels = (1, 2, 3, 16, 40, 64, 96, 129, 384, 768, 1024, 1025, 1536, 2049, 5000, 70000)
    for C, S, width in itertools.product(channels, (2, 3, 4, 9, 49, 64, 3136), WIDTHS[itemsize]):
        yield C, S, width, H.forward(32, C, S, itemsize, width), H.backward(32, C, S, itemsize, width, 132)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_tiles(itemsize):
    """All channels in one, or several; no row is shorter than a sector, but where a sample has no more; no load is cut."""
    for C, S, width, *configs in every(itemsize):
        for c in configs:
            assert power_of_two(c.block_c)
            assert power_of_two(c.block_s)
            assert power_of_two(c.warps)
            assert c.whole == (c.block_c >= C)
            assert c.block_s * itemsize >= min(H.SEGMENT, H.power_of_two(S) * itemsize)
            assert c.block_s * itemsize >= min(width, S * itemsize)
            assert c.block_c * c.block_s >= 1024  # fewer are no work for a program


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_tiles_fit_the_registers(itemsize):
    """x; or x and dz, and where channels are read twice two sums of each; half is left to everything else, as for rows."""
    for _, _, _, forward, backward in every(itemsize):
        for c, live in ((forward, 1 if forward.whole else 3), (backward, 2 if backward.whole else 4)):
            words = live * c.block_c * c.block_s * max(4, itemsize) // 4
            assert words <= 0.5 * 32 * c.warps * c.registers
            assert 32 * c.warps * c.registers <= REGISTERS


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_what_is_prefetched_fits_shared_memory(itemsize):
    """x; x and dy: of a program, with room for what the warps exchange. None of narrow loads."""
    for _, _, width, forward, backward in every(itemsize):
        for c, tensors in ((forward, 1), (backward, 2)):
            assert tensors * (c.stages - 1) * c.block_c * c.block_s * itemsize <= H.PREFETCHED < 0.7 * SHARED
            assert c.stages == 1 or width >= 4


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_what_is_read_twice_is_in_the_l2(itemsize):
    """Of 50 MB for 132 multiprocessors, for as many channels as models have."""
    for C in range(1025, 1537, 64):
        for tensors, c in ((3 * 2, H.forward(32, C, 64, itemsize, 16)), (5, H.backward(32, C, 64, itemsize, 16, 132))):
            assert c.whole or tensors * C * c.block_s * itemsize <= (50 << 20) // 132 or c.block_s * itemsize == H.SEGMENT


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_position_is_reduced_the_same_way_in_every_batch(itemsize):
    for C, S in ((5, 4), (96, 3136), (768, 49), (3000, 64)):
        plain = lambda c: dataclasses.replace(c, programs=0)
        assert len({plain(H.forward(B, C, S, itemsize, 16)) for B in (1, 2, 33, 10**6)}) == 1
        assert len({plain(H.backward(B, C, S, itemsize, 16, n)) for B in (1, 2, 33, 10**6) for n in (1, 8, 132)}) == 1


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_programs(itemsize):
    """Backward as many as run at once; what one adds up alone is one tile, because its sums are the results."""
    for C, S, sms in itertools.product((3, 96, 768, 3000), (4, 49, 3136), (1, 132)):
        for B in (1, 8, 1024):
            c = H.backward(B, C, S, itemsize, 16, sms)
            tiles = H.cdiv(B * S, c.block_s)
            assert 1 <= c.programs <= max(2, 4 * sms)
            assert c.programs <= tiles
            assert c.programs > 1 or tiles == 1
            assert H.forward(B, C, S, itemsize, 16).programs * H.forward(B, C, S, itemsize, 16).block_s >= B * S


@pytest.mark.parametrize(("C", "forward", "backward"), [
    (96, (True, 64), (True, 32)),
    (192, (True, 64), (True, 32)),
    (384, (True, 64), (True, 32)),
    (768, (True, 32), (False, 64)),
    (1536, (False, 32), (False, 32)),
])  # fmt: skip
def test_the_widths_of_models(C, forward, backward):
    """ConvNeXt's, bf16: what is one tile, and the bytes of its rows."""
    of = lambda c: (c.whole, 2 * c.block_s)
    assert of(H.forward(32, C, 3136, 2, 16)) == forward
    assert of(H.backward(32, C, 3136, 2, 16, 132)) == backward
    assert H.read_once(C, 3136, 2, 16, False) == forward[0]
    assert H.read_once(C, 3136, 2, 16, True) == backward[0]


def test_configurations_are_frozen():
    c = H.forward(8, 96, 49, 2, 2)
    assert hash(c) == hash(dataclasses.replace(c))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.warps = 1
