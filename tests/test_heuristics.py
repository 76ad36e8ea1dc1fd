import dataclasses
import itertools
import math

import pytest

from fastnorm import heuristics as H

ITEMSIZES = (2, 4, 8)
SHARED = 99 << 10  # bytes a block may use on the smallest GPU that is served


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_every_row_length_has_a_forward(itemsize):
    for N in range(1, 2**20 + 1):
        c = H.row_forward(N, itemsize, 132)
        assert c.chunked or c.block >= N
        assert c.block < 2 * max(N, H.SMALLEST_BLOCK) or c.chunked


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_every_row_length_has_a_backward(itemsize):
    for N in itertools.chain(range(1, 20000), range(20000, 2**20 + 1, 997), [2**20]):
        c = H.row_backward(4096, N, itemsize, 132)
        assert not isinstance(c, H.RowBackward) or c.block >= N


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("ladder", [H.FORWARD, H.BACKWARD], ids=["forward", "backward"])
def test_ladders_fit_the_registers(ladder, itemsize):
    """The row tiles that are live at once must leave half of the registers to everything else."""
    live = 1 if ladder is H.FORWARD else 4  # x; or x, dy and two accumulators
    for block, (rows, warps, *_) in ladder[itemsize].items():
        assert power_of_two(block)
        assert power_of_two(rows)
        assert power_of_two(warps)
        assert warps <= 32
        words = live * rows * block * max(4, itemsize) // 4
        assert words / (32 * warps) <= min(255, H.REGISTERS // (32 * warps)) * 0.65


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_pipelined_backward_fits_shared_memory(itemsize):
    for block, (rows, _, stages, *_) in H.BACKWARD[itemsize].items():
        assert (stages - 1) * 2 * rows * block * itemsize <= SHARED


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_row_is_reduced_the_same_way_in_every_batch(itemsize):
    for N in (1, 10, 100, 768, 1000, 2048, 8192):
        kinds = {H.row_backward(M, N, itemsize, sms) for M in (1, 2, 33, 10**6) for sms in (8, 132)}
        assert len({dataclasses.replace(c, partial_rows=0) for c in kinds}) == 1


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_backward_of_all_numbers_of_rows_in_a_power_of_two(itemsize):
    """All of it is the same: one plan serves them, see plans.py."""
    for N, bits in itertools.product((10, 100, 600, 1024, 2048, 16384, 20000), range(17)):
        numbers = {2**bits, 2**bits + 2**bits // 3, 2 ** (bits + 1) - 1}
        (c,) = {H.row_backward(M, N, itemsize, 132) for M in numbers}
        assert 1 <= c.partial_rows <= H.cdiv(max(numbers), getattr(c, "rows", 1))


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_one_program_where_one_tile_holds_all_rows(itemsize):
    for N in (10, 64, 256, 1024, 20000):
        rows = H.row_backward(1, N, itemsize, 132).rows
        assert H.row_backward(max(1, rows // 2), N, itemsize, 132).partial_rows == 1
        assert H.row_backward(4 * rows, N, itemsize, 132).partial_rows > 1 or N == 20000  # few programs share a column


@pytest.mark.parametrize("M", [512, 100_000])
def test_partial_rows_cost_less_than_the_rows(M):
    for N, itemsize in itertools.product((16, 100, 1024, 8192), ITEMSIZES):
        c = H.row_backward(M, N, itemsize, 132)
        if isinstance(c, H.RowBackward):
            partial_traffic, ideal = 16 * c.partial_rows, 3 * itemsize * M
            assert c.partial_rows <= 132 or partial_traffic * H.PARTIAL_SHARE <= ideal


@pytest.mark.parametrize("M", [4096, 8192, 10**6])
@pytest.mark.parametrize("N", [256, 512, 1024, 2048, 4096, 8184])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_backward_keeps_the_memory_busy(itemsize, N, M):
    """30 KB of x and dy prefetched by every SM, which an H200 was seen to need no more than; no program is left over for a
    second round on an SM."""
    sms = 132
    c = H.row_backward(M, N, itemsize, sms)
    tile = 2 * c.rows * N * itemsize
    per_sm = c.partial_rows // sms
    assert c.partial_rows % sms == 0
    assert per_sm * (c.stages - 1) * tile >= 30 << 10
    assert per_sm * (c.stages - 1) * tile <= SHARED


def test_split_backward_writes_few_partial_rows():
    for N in (12280, 16000, 40000):
        c = H.row_backward(4096, N, 2, 132)
        assert 6 * 16 * c.partial_rows <= 3 * 2 * 4096
        assert c.partial_rows * H.cdiv(N, c.block) >= 1.8 * 132, "the GPU is not filled"


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("paired", [False, True])
def test_long_backward(itemsize, paired):
    """Whole loads of 16 bytes, equal shares of a row, sums in at most half of the registers, a program for every SM."""
    lengths = [N for N in range(1024, 40001, 1024) if isinstance(H.row_backward(8192, N, itemsize, 132), H.RowBackwardLong)]
    assert lengths == sorted(H.LONG[itemsize])
    for N in lengths:
        c = H.row_backward(8192, N, itemsize, 132, paired=paired)
        if paired and H.LONG_IN_PAIRS.get((itemsize, N), True) is None:
            assert isinstance(c, H.RowBackwardSplit)
            continue
        assert N % (c.block * c.shares) == 0
        assert c.block * itemsize % (c.warps * 32 * 16) == 0
        assert 2 * N // c.shares <= c.warps * 32 * c.registers // 2
        assert c.partial_rows * c.shares == 132
        assert isinstance(H.row_backward(8192, N, itemsize, 132, easy=False), H.RowBackwardSplit | H.RowBackward)


def test_rows_are_asked_for_ahead():
    """Far enough that those programs do not load them themselves, near enough that L2 still has them; persistent programs
    prefetch instead."""
    for N, itemsize in itertools.product((1000, 1024, 2048, 3000, 8192, 16384), (2, 4)):
        c = H.row_forward(N, itemsize, 132)
        assert not (c.ahead and c.programs)
        assert c.ahead == 0 or (c.rows == 1 and 4 << 20 <= c.ahead * N * itemsize <= 12 << 20)
    assert H.row_forward(1024, 2, 132).programs == 12 * 132
    assert H.row_forward(1001, 2, 132).programs == 0, "loads of 2 bytes are not prefetched"
    assert H.row_forward(4096, 8, 132).ahead == 0


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_long_rows_fit_shared_memory(itemsize):
    """x, dy and a weight; x; x with a weight and a bias, a stage less: parameters of 4 bytes at the least."""
    parameter = max(4, itemsize)
    block, _, stages = H.ROW_SUMS[itemsize]
    assert (stages - 1) * block * (2 * itemsize + parameter) <= SHARED
    block, _, stages = H.CHUNK[itemsize]
    assert (stages - 1) * block * itemsize <= SHARED
    assert (stages - 2) * block * (itemsize + 2 * parameter) <= SHARED
    rows, block = H.COLUMN_TILE[itemsize]
    assert H.COLUMN_PROGRAMS_PER_SM * (H.COLUMN_STAGES - 1) * 2 * rows * block * itemsize <= SHARED


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_every_fused_row_has_its_kernels(itemsize):
    """In registers, and with what is prefetched in shared memory; the same in every batch."""
    for N in itertools.chain(range(1, 20000, 7), (2**k for k in range(21))):
        c = H.row_fused_forward(N, itemsize)
        most = H.FUSED_FORWARD[itemsize]
        assert (most < N) == c.chunked
        assert c.chunked or c.block >= N
        most = H.FUSED_BACKWARD[itemsize]
        for tensors in (2, 3, 4):
            kinds = {H.row_fused_backward(M, N, itemsize, sms, tensors) for M in (1, 33, 10**6) for sms in (8, 132)}
            (c,) = {dataclasses.replace(c, partial_rows=0) for c in kinds}
            assert isinstance(c, H.RowBackwardSplit) or most >= N
            assert isinstance(c, H.RowBackward) or most < N or N * itemsize % 16
            if isinstance(c, H.RowBackward):
                assert c.block >= N
                assert (c.stages - 1) * tensors * c.rows * c.block * itemsize <= H.PREFETCHED


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_masked_rows_are_fused_ones_with_more_registers(itemsize):
    """And shorter ones, in smaller tiles, where loads are narrow; the same in every batch."""
    for N in (10, 64, 768, 1024, 2048, 4096, 5120, 8192, 10**5):
        plain = lambda c: dataclasses.replace(c, registers=None)
        assert plain(H.row_masked_forward(N, itemsize)) == plain(H.row_fused_forward(N, itemsize))
        c, fused = H.row_masked_backward(100, N, itemsize, 132), H.row_fused_backward(100, N, itemsize, 132, 2)
        assert plain(c) == plain(fused)
        assert c.registers == fused.registers or (fused.registers is None and c.registers == H.registers(2 * c.warps))
        kinds = {H.row_masked_backward(M, N, itemsize, sms, narrow=True) for M in (1, 33, 10**6) for sms in (8, 132)}
        (c,) = {dataclasses.replace(c, partial_rows=0) for c in kinds}
        longest = H.FUSED_BACKWARD[itemsize] // 2
        assert isinstance(c, H.RowBackward if longest >= N else H.RowBackwardSplit)
        assert longest >= N or 1 <= c.rows * c.block <= 16 * 32 * c.warps


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_long_fused_rows_fit_shared_memory(itemsize):
    """x, dy, residual and two parameters; x, addend; those with a residual and two parameters, a stage less; x, dz and dh."""
    parameter = max(4, itemsize)
    sums = H.row_fused_backward(100, 10**5, itemsize, 132, 4)
    assert (sums.sums_stages - 1) * sums.sums_block * (3 * itemsize + 2 * parameter) <= SHARED
    chunk = H.row_fused_forward(10**5, itemsize)
    assert (chunk.stages - 1) * chunk.block * 2 * itemsize <= SHARED
    assert (chunk.stages - 2) * chunk.block * (3 * itemsize + 2 * parameter) <= SHARED
    rows, block = H.COLUMN_TILE[itemsize]
    assert H.COLUMN_PROGRAMS_PER_SM * (H.COLUMN_STAGES - 1) * 3 * rows * block * itemsize <= SHARED


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_parts_of_rows_share_the_programs(itemsize):
    """As many as rows without parts have, or one a part; a part's rows are reduced as they are without parts."""
    for N, (M, parts) in itertools.product((16, 100, 1152, 20000), ((8192, 32), (8192, 8192), (6, 2), (4096, 1000), (300, 3))):
        whole, c = (H.row_fused_backward(M, N, itemsize, 132, 2, p) for p in (1, parts))
        assert dataclasses.replace(c, partial_rows=whole.partial_rows) == whole
        assert 1 <= c.partial_rows <= H.cdiv(M // parts, c.rows)
        assert c.partial_rows == 1 or c.partial_rows * parts <= whole.partial_rows
        if (M, parts, N) == (8192, 32, 1152) and isinstance(c, H.RowBackward):
            assert c.partial_rows * parts >= 132


# P, S
GROUPS = [(1, 1), (40, 64), (10, 4096), (16, 196), (16, 49), (10000, 1), (3, 35), (8, 333 * 333), (4, 1 << 18), (20, 1024)]


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("vector", [1, 2, 8])
def test_tiles_of_groups(group, itemsize, vector):
    """A whole group, or tiles whose x and dy are prefetched in shared memory; few elements a thread."""
    P, S = group
    c = H.group_backward(P, S, itemsize, min(16, vector * itemsize))
    assert power_of_two(c.block_c)
    assert power_of_two(c.block_s)
    assert power_of_two(c.warps)
    assert c.whole == (c.block_c >= P and c.block_s >= S)
    tile = c.block_c * c.block_s
    assert 2 * tile * max(4, itemsize) // 4 <= 0.65 * 32 * c.warps * c.registers
    if not c.whole:
        assert 2 * (c.stages - 1) * tile * itemsize <= H.PREFETCHED // H.GROUP_TILE[itemsize][3]
        assert c.block_s < 2 * S


@pytest.mark.parametrize("reading", ["sums", "y", "dx"])
def test_fused_channels_differ_in_registers_alone(reading):
    for itemsize, channels_fastest, width in itertools.product((2, 4), (False, True), (4, 16)):
        given = (8, 64, 3136, itemsize, 132, reading)
        plain, fused = (H.channel(*given, folded=False, channels_fastest=channels_fastest, width=width, fused=fused)
                        for fused in (False, True))  # fmt: skip
        assert fused == dataclasses.replace(plain, registers=H.registers(plain.warps))


SHAPES = [(32, 64, 3136), (8, 3, 50176), (256, 2048, 49), (1, 1, 1), (2, 5, 3), (5, 65, 49), (1, 64, 10**7), (10**6, 16, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("channels_fastest", [False, True])
@pytest.mark.parametrize("vector", [1, 2, 8])
@pytest.mark.parametrize("reading", ["stats", "sums", "y", "dx"])
def test_channel_tiles(shape, itemsize, channels_fastest, vector, reading):
    B, C, S = shape
    folded = B == 1 or S == 1
    if folded:
        B, S = 1, B * S
    width = min(16, vector * itemsize)
    options = dict(folded=folded, channels_fastest=channels_fastest, width=width)
    c = H.channel(B, C, S, itemsize, 132, reading, **options)
    name = f"{reading}, channels fastest" if channels_fastest else reading
    own = (H.HELD if c.held else H.READINGS).get(name, {})
    elements, _, stages, *_ = own.get(itemsize) or H.READINGS[reading][itemsize]
    sums = reading in H.SUMS
    several = sums and not folded and not channels_fastest and elements >= 16 * H.power_of_two(S) and C > 1
    assert c.block_b * c.block_s * c.block_c == elements // (2 if width < 8 or several else 1)
    assert c.stages == (1 if width == 2 else stages)
    total = H.cdiv(B, c.block_b) * H.cdiv(S, c.block_s)
    assert 1 <= c.programs <= total
    assert total <= H.MOST_TILES * c.programs or not sums


@pytest.mark.parametrize("C", [5, 64, 512])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("channels_fastest", [False, True])
@pytest.mark.parametrize("reading", ["stats", "sums", "y", "dx"])
def test_a_layer_changes_over_once(C, itemsize, channels_fastest, reading):
    """Whatever its batches are: at the size that counts as large, and at no other."""
    found = []
    for B in (*range(1, 40), 64, 100, 128, 257, 512, 1000, 4096):
        options = dict(folded=channels_fastest, channels_fastest=channels_fastest, width=16)
        B, S = (1, B * 784) if channels_fastest else (B, 784)
        c = H.channel(B, C, S, itemsize, 132, reading, **options)
        found.append((c.block_b, c.block_s, c.block_c, c.warps, c.stages, c.registers, c.held))
    assert [a != b for a, b in itertools.pairwise(found)].count(True) <= 1
    assert reading == "y" or not any(held for *_, held in found)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("S", [9, 49, 100, 196, 729, 1225, 3136, 16384, 16899])
def test_blocks_of_skewed_rows_have_few_places_beyond_them(S, itemsize):
    c = H.channel(8, 64, S, itemsize, 132, "stats", folded=False, channels_fastest=False, skewed=True, width=16)
    whole = H.channel(8, 64, S, itemsize, 132, "stats", folded=False, channels_fastest=False, width=16)
    places = lambda c: H.cdiv(S, c.block_s) * c.block_s
    assert places(c) <= places(whole)
    assert c.block_s * itemsize >= H.WARP_READS or c.block_s == H.power_of_two(S)
    if S == 729:
        assert c.block_s == 256  # three of them, and not one of 1024


def test_registers_and_stages_follow_what_a_tile_is_made_of():
    layer = dict(folded=False, channels_fastest=False)
    of = lambda S, width=16: H.channel(64, 64, S, 4, 132, "stats", width=width, **layer)
    limits = [(c.block_b > 1, c.block_c > 1, c.stages, c.registers) for c in (of(3136), of(784), of(9, 4))]
    assert limits == [(False, False, 3, 128), (True, False, 2, 128), (True, True, 3, H.registers(4))]


def test_gradients_of_turned_tensors_have_a_launch_of_their_own():
    for itemsize in (2, 4):
        c, turned = (
            H.channel(1, 128, 16000, itemsize, 132, "dx", folded=True, channels_fastest=True, width=16, turned=turned)
            for turned in (False, True)
        )
        assert (c.stages, turned.stages) == tuple(H.READINGS[f"dx, {n}"][itemsize][2] for n in ("channels fastest", "turned"))
        assert turned.programs > c.programs


@pytest.mark.parametrize("reading", ["stats", "sums", "y", "dx"])
def test_programs_run_in_whole_turns(reading):
    """A few more than a multiprocessor holds times their number, and most of the machine would wait for those few."""
    for C, S in ((64, 12544), (256, 3136), (512, 784), (1024, 196)):
        for itemsize in (2, 4):
            c = H.channel(256, C, S, itemsize, 132, reading, folded=False, channels_fastest=False, width=16)
            turns = c.programs * H.cdiv(C, c.block_c) / (H.READINGS[reading][itemsize][3] * 132)
            assert turns / math.ceil(turns) > 0.75


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_the_partial_rows_of_sums_are_few(itemsize):
    """One wave of programs, whose partial rows one tall tile of the finalising launch takes at once."""
    for sms, channels_fastest in itertools.product((108, 132, 148, 170), (False, True)):
        for B, C, S in [(1, 64, 16 * 3136), (1, 1024, 8192), (1, 64, 256)]:
            c = H.channel(B, C, S, itemsize, sms, "sums", folded=True, channels_fastest=channels_fastest, width=16)
            blocks = H.cdiv(C, c.block_c)
            assert c.programs * blocks < H.READINGS["sums"][itemsize][3] * sms + blocks
            assert c.programs <= H.finalise(C).block_p


def test_where_loads_cannot_be_prefetched_more_programs_are_on_their_way():
    layer = dict(folded=False, channels_fastest=False)
    prefetched, plain = (H.channel(256, 64, 729, 2, 132, "sums", width=width, **layer) for width in (4, 2))
    assert plain.programs >= 3 * prefetched.programs


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_prefetched_tiles_fit_shared_memory(itemsize):
    """x and dy of a program, on the GPU that has least."""
    for elements, _, stages, *_ in (of[itemsize] for of in (*H.READINGS.values(), *H.HELD.values()) if itemsize in of):
        assert (stages - 1) * 2 * elements * itemsize <= SHARED


@pytest.mark.parametrize("C", [1, 64, 4096, 5000, 32768, 10**6])
def test_finalising_tiles(C):
    c = H.finalise(C)
    assert power_of_two(c.block_p)
    assert power_of_two(c.block_c)
    assert c.block_c * 4 >= 32
    assert c.block_p * c.block_c / (32 * c.warps) <= 16


# C, S of one sample, whether the batch folds into S, whether channels are fastest
LAYERS = [(64, 3136, False, False), (512, 49, False, False), (3, 5, False, False), (65, 1, True, True), (3, 1, True, True),
          (256, 196, True, True), (64, 7, True, False)]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("vector", [1, 8])
@pytest.mark.parametrize("fused", [False, True])
def test_a_slab_holds_all_positions_and_a_layer_has_few(layer, itemsize, backward, vector, fused):
    C, S, folded, channels_fastest = layer
    width = vector * itemsize
    found = []
    for B in range(1, 20_000, 7):
        sizes = (1, C, B * S) if folded else (B, C, S)
        options = dict(channels_fastest=channels_fastest, width=width, backward=backward, fused=fused)
        c = H.slab(*sizes, itemsize, folded=folded, **options)
        found.append(c)
        if c is not None:
            assert c.block_b >= sizes[0]
            assert c.block_s >= sizes[2]
            assert power_of_two(c.block_b * c.block_s * c.block_c)
            assert c.block_c <= H.power_of_two(C)
            live = 2 if backward else 1
            words = live * c.block_b * c.block_s * c.block_c * max(4, itemsize) // 4
            assert words / (32 * c.warps) <= 0.65 * min(255, H.REGISTERS // (32 * c.warps))
    if found[0] is not None:  # once the slab is too large it stays so: a layer changes over at most twice
        assert found[-1] is None
    assert len({c for c in found if c is not None}) <= 2
    assert [a is None for a in found] == sorted(a is None for a in found)


def test_slabs_take_whole_sectors():
    for itemsize, channels_fastest, vector in itertools.product(ITEMSIZES, (False, True), (1, 8)):
        width = vector * itemsize
        c = H.slab(8, 64, 2, itemsize, folded=False, channels_fastest=channels_fastest, width=width, backward=False)
        assert c.block_c * itemsize * (1 if channels_fastest else 2) == H.SEGMENT


def test_two_large_slabs_fit_a_multiprocessor_where_their_loads_are_wide():
    layer = dict(folded=False, channels_fastest=False, backward=False)
    for itemsize in (2, 4):
        slab = H.slab(64, 256, 196, itemsize, width=8, **layer)
        assert 2 * 32 * slab.warps * slab.registers <= H.REGISTERS
        for odd in ({"width": 4}, {"width": 16, "skewed": True}):
            odd = H.slab(64, 256, 198, itemsize, **odd, **layer)
            assert odd.block_b * odd.block_s == slab.block_b * slab.block_s
            assert 32 * odd.warps * odd.registers == H.REGISTERS


def test_few_channels_still_fill_the_gpu():
    for channels_fastest, reading in itertools.product((False, True), ("stats", "sums", "y", "dx")):
        c = H.channel(1, 4, 256 * 3136, 4, 132, reading, folded=True, channels_fastest=channels_fastest, width=16)
        assert c.programs * H.cdiv(4, c.block_c) >= 132


def test_configurations_are_frozen_and_printable():
    configs = [H.row_forward(768, 2, 132), H.row_backward(10, 768, 2, 132), H.row_backward(10, 10**5, 2, 132), H.finalise(64),
               H.group_backward(40, 64, 2, 16),
               H.slab(8, 3, 49, 4, folded=False, channels_fastest=False, width=4, backward=True),
               H.channel(2, 3, 49, 4, 132, "sums", folded=False, channels_fastest=False, width=4)]  # fmt: skip
    for c in configs:
        assert type(c).__name__ in repr(c)
        assert hash(c) == hash(dataclasses.replace(c))
        with pytest.raises(dataclasses.FrozenInstanceError):
            c.warps = 1
    assert repr(H.finalise(64)) == "Finalise(block_p=512, block_c=8, warps=8)"
