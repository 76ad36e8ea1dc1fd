"""Launch choices as data: (sizes, itemsize, SM count) in, a frozen configuration out. Nothing is measured at run time.

The ladders were chosen by reading compiled code (registers, spills, bytes in flight per SM); tests/test_audit.py
holds them to "no spill". What a row's result depends on (rows, block, warps) is a function of N and the itemsize alone, so
y and dx of a row never depend on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SMALLEST_BLOCK = 16
REGISTERS = 65536  # of one SM

Ladders = dict[int, dict[int, Any]]  # itemsize -> {a size: the numbers that its table tells of}


@dataclass(frozen=True)
class RowForward:
    """A program normalises `rows` rows held in registers at a time, or, when chunked, sweeps over one row twice.

    `early`: weight and bias are read with the rows, and not after the sums. `ahead`: the row that many rows later is asked for;
    0 for none. `programs` are persistent, and prefetch; 0: one for each `rows` rows.
    """

    rows: int
    block: int
    warps: int
    registers: int | None
    early: bool = False
    chunked: bool = False
    stages: int = 1
    ahead: int = 0
    programs: int = 0


@dataclass(frozen=True)
class RowBackward:
    """Persistent programs, partial_rows at the most, take `rows` rows at a time, and sum their dw and db in registers.

    Where one is enough, there are no partial rows: it writes dw and db itself.
    """

    rows: int
    block: int
    warps: int
    stages: int
    registers: int | None
    partial_rows: int


@dataclass(frozen=True)
class RowBackwardLong:
    """Persistent programs read each of their rows twice, in parts of `block` columns, and sum dw and db in registers.

    `shares` programs, each with as much of the columns, have the same rows and a partial row together. `ahead`: the next row is
    asked for.
    """

    block: int
    warps: int
    shares: int
    ahead: bool
    registers: int
    partial_rows: int


@dataclass(frozen=True)
class RowBackwardSplit:
    """Rows too long for the registers: row sums, then tiles of rows x block columns; partial_rows programs share a column."""

    sums_block: int
    sums_warps: int
    sums_stages: int
    rows: int
    block: int
    warps: int
    stages: int
    registers: int  # of the tiles: by itself the assembler aims at fewer and spills
    partial_rows: int


@dataclass(frozen=True)
class Channel:
    """Tiles of block_b samples x block_s positions x block_c channels.

    `programs` share the tiles of a block of channels; where they sum, each writes one partial row. `held`: a program has its
    next tile in registers, and the first one before its partial rows are there.
    """

    block_b: int
    block_s: int
    block_c: int
    warps: int
    stages: int
    registers: int | None
    programs: int
    held: bool = False


@dataclass(frozen=True)
class Slab:
    """One tile that holds all positions of block_c channels."""

    block_b: int
    block_s: int
    block_c: int
    warps: int
    registers: int


@dataclass(frozen=True)
class GroupBackward:
    """Tiles of block_c channels x block_s positions of a group; `whole`: one tile is all of it."""

    block_c: int
    block_s: int
    warps: int
    stages: int
    registers: int
    whole: bool


@dataclass(frozen=True)
class Finalise:
    """One program sums block_p partial rows at a time, for block_c columns."""

    block_p: int
    block_c: int
    warps: int = 8


# itemsize -> {bucket of N: (rows, warps, most registers)}; a longer row is chunked.
#
# Measured on an H200. 2 bytes are bound by instructions and by the latency of reductions: one row a program from 1024 on, with
# 16 to 64 elements a thread, so that what every thread does once is spread over more of them. 4 bytes: 8 to 16 elements a
# thread are as many bytes in fewer registers. Below, rows share a warp, 16 or 32 elements a thread.
FORWARD: Ladders = {
    2: {16: (128, 4, None), 32: (64, 4, None), 64: (16, 2, None), 128: (8, 4, None), 256: (8, 4, None), 512: (2, 1, None),
        1024: (1, 1, None), 2048: (1, 4, None), 4096: (1, 8, None), 8192: (1, 8, None), 16384: (1, 8, None)},
    # 16384 takes 32 warps: 16 spill on sm_80. 80: on sm_100 the assembler aims at 48 and spills.
    4: {16: (32, 2, None), 32: (32, 4, None), 64: (16, 2, None), 128: (4, 2, None), 256: (4, 2, None), 512: (1, 2, None),
        1024: (1, 4, None), 2048: (1, 4, 80), 4096: (1, 8, 80), 8192: (1, 16, None), 16384: (1, 32, None)},
    # float64 takes two registers per element. 96: the assembler aims at 64 and spills.
    8: {16: (32, 4, 96), 32: (16, 4, 96), 64: (8, 4, 96), 128: (4, 4, 96), 256: (2, 4, 96), 512: (1, 4, None),
        1024: (1, 4, None), 2048: (1, 8, None), 4096: (1, 16, None), 8192: (1, 32, None)},
}  # fmt: skip
# (itemsize, bucket of N) -> most registers of rows shorter than the bucket: on sm_80 the assembler aims at 40 and spills.
FORWARD_SHORTER = {(4, 8192): 48}
# (itemsize, bucket of N) -> stages, and programs that fit one SM, where persistent programs that prefetch were measured to be
# faster: 8192 x 1024 in 14.5 us without, 12.9 with, a copy 12.9. Longer rows lose 2 to 30 %.
FORWARD_PREFETCHED = {(2, 1024): (4, 12)}
# itemsize -> {bucket of N: KB that an SM asks for ahead}. Shorter rows, and those of programs that prefetch, were not
# faster by it; less than the programs that run at once are about to load is of no use. Measured on an H200.
AHEAD: Ladders = {2: {2048: 32, 4096: 32, 8192: 80, 16384: 64}, 4: {2048: 64, 4096: 64, 8192: 80, 16384: 64}, 8: {}}
# itemsize -> the longest rows whose parameters are read with them, which spares a short row a second wait for the memory. Held
# meanwhile, those of a longer one cost more registers than other programs beside it can do without.
EARLY = {2: 512, 4: 1024, 8: 512}
# itemsize -> (block, warps, stages). Several programs fit an SM, so that one reduces while the others read. 4096 elements of 4
# bytes and 16 warps are 3 % faster on an H200, but spill on sm_120.
CHUNK = {2: (4096, 8, 4), 4: (2048, 8, 4), 8: (2048, 8, 2)}

# itemsize -> {bucket of N: (rows, warps, stages, programs that fit one SM, and the most registers where the assembler would
# spill by itself)}; a longer row is split. Registers that are not needed are not offered: it would take half as many again.
#
# A program prefetches stages - 1 tiles of x and dy: (stages - 1) * 2 * rows * block * itemsize bytes are on their way while it
# reduces and stores. An SM needs 30 to 64 KB of them to keep the memory busy, within 99 KB of shared memory. Measured on an
# H200, 2 and 4 bytes:
# * Several programs of few warps do not wait for each other's reductions: 3 to 6 of 2 or 4 warps up to 1024, with 8 elements or
#   more a thread, 2 of 8 warps at 2048. 128 and below: as few as still fill the memory, for the partial rows.
# * 256 and 4096 of 2 bytes are one program of 8 warps, which prefetches more tiles instead.
# * 8192, and 4096 of 4 bytes: one program has the registers. 2 bytes hold 16 elements per thread, because 32 warps leave 64
#   registers; 8192 of 4 bytes need those 32 warps, at 64 registers, and prefetch one tile of 64 KB.
# * float64 is bound by its arithmetic.
BACKWARD: Ladders = {
    2: {16: (64, 4, 1, 7), 32: (32, 2, 2, 7), 64: (16, 2, 1, 7), 128: (8, 2, 3, 3), 256: (16, 8, 4, 1), 512: (1, 2, 4, 6),
        1024: (1, 4, 5, 3), 2048: (1, 8, 4, 2), 4096: (1, 8, 5, 1), 8192: (1, 16, 3, 1)},
    4: {16: (64, 4, 1, 7, 72), 32: (32, 4, 2, 7), 64: (16, 2, 1, 5), 128: (8, 2, 3, 3), 256: (4, 4, 4, 3), 512: (2, 4, 3, 4),
        1024: (1, 4, 4, 3), 2048: (1, 8, 3, 2), 4096: (1, 16, 3, 1), 8192: (1, 32, 2, 1)},
    8: {16: (16, 4, 1, 4), 32: (8, 4, 1, 4), 64: (4, 4, 1, 4), 128: (2, 4, 1, 4), 256: (1, 4, 1, 4), 512: (1, 4, 1, 4),
        1024: (1, 8, 1, 2), 2048: (1, 16, 1, 1)},
}  # fmt: skip

# itemsize -> {N: (block, warps, shares, ahead)}: rows whose sums take so many registers that the row is read again, from L1.
# Other lengths above the ladder are split, and those whose loads are narrower or whose parameters are wider than x: they spill.
# Measured on an H200, against the ladder (8192 of 4 bytes, 228 us for 8192 rows) or split rows (16384 of 2 bytes, 326 us):
# * 16 elements of a row and 8 of each of x and dy on the way are as many as 16 warps have registers for; 2 bytes below 16384
#   are faster with 8 warps that have twice as many.
# * 12288 and 16384 of 4 bytes spill, and two programs share a row: 474 -> 395 us, and 322 -> 253 for 4096 rows of the latter.
#   2 bytes would lose 20 % by it.
LONG: Ladders = {
    2: {10240: (2048, 8, 1, True), 12288: (2048, 8, 1, True), 16384: (4096, 16, 1, True)},
    4: {8192: (4096, 16, 1, True), 10240: (2048, 16, 1, False), 12288: (2048, 16, 2, True), 16384: (2048, 16, 2, True)},
    8: {},
}
# Where the assembler takes registers in pairs, these spill. None: split.
LONG_IN_PAIRS = {(2, 16384): (4096, 16, 2, True), (4, 16384): None}

# Split rows: block, warps and stages of the row sums. x, dy and a weight of 4 bytes take 96 KB at the most.
ROW_SUMS = {2: (4096, 8, 3), 4: (4096, 8, 3), 8: (2048, 8, 2)}
# Rows and columns of a tile, one row a warp: 16 KB of x and dy, 2 of them prefetched by each of 2 programs. The widest that
# was measured was the fastest; few programs leave few partial rows.
COLUMN_TILE = {2: (4, 1024), 4: (4, 512), 8: (4, 64)}
COLUMN_WARPS, COLUMN_STAGES, COLUMN_PROGRAMS_PER_SM = 4, 3, 2

# A partial row is two fp32 numbers per column, written and read: 16 bytes. Where several programs fit an SM, their partial rows
# may cost as much as 1/PARTIAL_SHARE of the ideal traffic of a backward, 3 * itemsize bytes per element: they stay in L2, and
# fewer programs leave an SM waiting.
PARTIAL_SHARE = 2

# Fused rows read up to four tensors and two parameters where plain ones read one or two and a parameter: fewer stages are as
# many bytes on the way, and 99 KB of shared memory hold no more.
# itemsize -> the longest rows whose kernels have the registers; longer ones are chunked, and split.
FUSED_FORWARD, FUSED_BACKWARD = {2: 16384, 4: 16384, 8: 4096}, {2: 8192, 4: 4096, 8: 1024}
FUSED_CHUNK_STAGES, FUSED_SUMS_STAGES = 3, 2
# Bytes that a program of a backward prefetches into at the most.
PREFETCHED = 64 << 10

# Groups of channels, backward. itemsize -> the most elements of a tile that is a whole group, GROUP_THREAD a thread; fewer with
# loads narrower than 8 bytes, each of which holds a pointer.
GROUP_WHOLE, GROUP_WHOLE_NARROW, GROUP_THREAD = {2: 8192, 4: 8192, 8: 4096}, {2: 4096, 4: 4096, 8: 2048}, 16
# itemsize -> (elements of a tile, warps, stages, programs per SM) of a larger group, which is read twice; 64 KB are prefetched.
GROUP_TILE = {2: (4096, 8, 3, 2), 4: (2048, 8, 3, 2), 8: (1024, 8, 1, 1)}

# Partial rows times channels of a block, up to which every program of the second reading merges those of its block itself, and
# how many at a time.
MERGED_WITH_READING, MERGED_AT_ONCE = 1024, 512

# Bytes of x up to which a launch lets the one that follows it start early, see kernels/chain.py: about what L2 holds. More take
# so long that nothing is to be gained.
LEADING = 60 << 20

# What reads a tensor of channels: itemsize -> (elements of a tile, warps, stages, programs per SM, most registers: without a
# word the assembler aims at a rounder number and spills, or takes so many that the programs do not run at once). Tiles are
# halved where loads are narrower than 8 bytes: every one in flight then holds a pointer of its own, two registers; and sums of
# several channels whose positions lie together, which have a set of sums for each of them. What is narrower than 4 bytes is not
# prefetched: there are as many more programs as there are stages. Measured on an H200:
# * "stats", the sums of a forward, and "sums", those of a backward: few programs, because every one is a partial row that is
#   merged later; each prefetches.
# * "y" of what L2 holds, and of SKEWED rows: as many programs as run at once, because each merges the partial rows of its
#   channels first; they are HELD, see Channel. Of a larger tensor: more programs than run at once, each with a few tiles.
# * "dx" prefetches: one tile, 32 elements a thread, and more where channels lie together. TURNED, where they do in x and not in
#   all of dy and dx: more programs with fewer tiles.
SUMS = ("stats", "sums")
READINGS: dict[str, dict[int, Any]] = {
    "stats": {2: (2048, 4, 4, 4, None), 4: (2048, 4, 3, 4, 128), 8: (1024, 8, 2, 2, None)},
    "stats, skewed": {4: (2048, 4, 4, 3, 168)},
    "stats, channels fastest": {2: (2048, 4, 4, 2, None), 4: (2048, 4, 4, 2, 255)},
    "sums": {2: (2048, 4, 4, 2, None), 4: (2048, 4, 4, 2, 255), 8: (1024, 8, 2, 2, None)},
    "y": {2: (4096, 4, 1, 16, None), 4: (4096, 8, 1, 32, None), 8: (1024, 4, 1, 8, 255)},
    "y, channels fastest": {4: (4096, 8, 1, 32, 80)},
    "dx": {2: (4096, 4, 2, 6, None), 4: (2048, 4, 2, 10, None), 8: (1024, 4, 1, 8, 255)},
    "dx, skewed": {2: (4096, 4, 1, 5, 96), 4: (1024, 4, 2, 8, 64)},
    "dx, channels fastest": {2: (2048, 4, 3, 4, None), 4: (2048, 4, 2, 5, None)},
    "dx, turned": {2: (2048, 4, 3, 8, None), 4: (2048, 4, 1, 32, 128)},
}
HELD: dict[str, dict[int, Any]] = {
    "y": {2: (4096, 4, 1, 8, None), 4: (4096, 8, 1, 4, None)},
    "y, skewed": {2: (4096, 4, 1, 4, 128), 4: (2048, 4, 1, 7, None)},
    "y, channels fastest": {2: (4096, 4, 1, 4, 128), 4: (4096, 8, 1, 2, 128)},
}
# Most registers, where loads are narrower than 8 bytes: by itself the assembler aims at 72 and spills.
NARROW = {("y", 2): 128}
# 64 bytes of a row at the least: a group of so few channels is still read at full speed. The backward of a larger tensor takes
# twice as many: whole lines of 128 bytes, and half as many partial rows.
CHANNELS_FASTEST_BLOCK, LARGE = 32, 8 << 20
# A program's sums are shifted by the mean of its first tile, which is off by at most sqrt(tiles) standard deviations: the
# cancellation then costs at most `tiles` units of the last place of the variance.
MOST_TILES = 64
# It reads that first tile twice, which is to be a small part of what it reads.
FEWEST_TILES = 4
# Bytes that one load of a warp reads.
WARP_READS = 512

# itemsize -> (elements of a slab, warps, and the most registers where a multiprocessor is to hold two), the smallest that fits.
SLAB_FORWARD = {2: ((4096, 4), (16384, 8, 128)), 4: ((4096, 4), (16384, 8, 128)), 8: ((4096, 8),)}
# Loads of a pointer each, and SKEWED rows, spill with so few.
SLAB_FORWARD_ODD = {2: ((4096, 4), (16384, 16)), 4: ((4096, 4), (16384, 16)), 8: ((4096, 8),)}
# 32 warps backward: with 16 the two tensors spill on sm_100 where their loads are of 8 bytes.
SLAB_BACKWARD = {2: ((4096, 8), (16384, 32)), 4: ((4096, 8), (16384, 16)), 8: ((2048, 8),)}
# 32 warps of SKEWED rows spill on sm_90.
SLAB_BACKWARD_SKEWED = {**SLAB_BACKWARD, 2: ((4096, 8), (16384, 16))}
# Loads of a pointer each: 16384 spill on sm_100. With an activation those of 4 bytes and SKEWED ones do, on sm_90 as well.
SLAB_BACKWARD_NARROW = {2: ((4096, 8), (8192, 16)), 4: ((4096, 8), (8192, 16))}
SLAB_CHANNELS_FASTEST = {2: ((8192, 8),), 4: ((8192, 8),), 8: ((2048, 4),)}
# Channels loaded one by one: 8192 of 4 bytes spill on sm_80.
SLAB_CHANNELS_FASTEST_NARROW = {2: ((8192, 8),), 4: ((4096, 8),)}
# Bytes of neighbouring channels that a slab takes at the least, one sector of memory.
SEGMENT = 32


def power_of_two(n: int) -> int:
    """The smallest power of two that is >= n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def registers(warps: int) -> int:
    """What a thread may have at the most. Told nothing, the assembler aims at a rounder number and may spill for it."""
    return min(255, REGISTERS // (32 * warps))


def most_rows(M: int) -> int:
    """The largest M in the same power of two, all of which one plan serves."""
    return (1 << M.bit_length()) - 1


def row_forward(N: int, itemsize: int, sm_count: int) -> RowForward:
    block = max(SMALLEST_BLOCK, power_of_two(N))
    rung = FORWARD[itemsize].get(block)
    if rung is None:
        block, warps, stages = CHUNK[itemsize]
        return RowForward(1, block, warps, None, chunked=True, stages=stages)
    rows, warps, most = rung
    if block > N:
        most = FORWARD_SHORTER.get((itemsize, block), most)
    whole = N * itemsize % 16 == 0
    stages, fit = FORWARD_PREFETCHED.get((itemsize, block), (1, 0)) if whole else (1, 0)
    return RowForward(
        rows, block, warps, most if whole else None,  # loads of less than 16 bytes hold a pointer each
        early=block <= EARLY[itemsize], stages=stages, programs=sm_count * fit,
        ahead=sm_count * (AHEAD[itemsize].get(block, 0) << 10) // (N * itemsize))  # fmt: skip


def row_backward(
    M: int, N: int, itemsize: int, sm_count: int, *, easy: bool = True, paired: bool = False
) -> RowBackward | RowBackwardLong | RowBackwardSplit:
    """`easy`: loads are of 16 bytes, and weight and dy of no wider dtype than x. `paired`: see launch.registers_in_pairs."""
    ladder = BACKWARD[itemsize]
    block = max(SMALLEST_BLOCK, power_of_two(N))
    long = LONG[itemsize].get(N) if easy else None
    if paired and long:
        long = LONG_IN_PAIRS.get((itemsize, N), long)
    if long:
        part, warps, shares, ahead = long
        return RowBackwardLong(part, warps, shares, ahead, registers(warps), min(sm_count // shares, most_rows(M)))
    # The top rung has no registers left for loads of less than 16 bytes, each of which holds a pointer of its own.
    if block > max(ladder) or (block == max(ladder) and N * itemsize % 16):
        return _row_backward_split(M, N, itemsize, sm_count)
    rows, warps, stages, fit, *told = ladder[block]
    most = most_rows(M)
    affordable = 3 * itemsize * (most // 2 + 1) // (PARTIAL_SHARE * 16 * sm_count)
    partial_rows = min(sm_count * min(fit, max(1, affordable)), cdiv(most, rows))
    limit = registers(warps) if fit == 1 else None
    if told and N * itemsize % 16 == 0:  # narrow loads need what they take: a pointer each
        limit = told[0]
    return RowBackward(rows, block, warps, stages, limit, partial_rows)


def row_fused_forward(N: int, itemsize: int, placed: bool = False) -> RowForward:
    """`placed`: parameters are of parts of the rows or of channels, whose places take registers. A thread has fewer elements
    then, or as many registers as there are, where the assembler aims at fewer and spills."""
    config = row_forward(N, itemsize, 0)
    if config.chunked or config.block > FUSED_FORWARD[itemsize]:
        block, warps, stages = CHUNK[itemsize]
        return RowForward(1, block, warps, registers(warps), chunked=True, stages=min(stages, FUSED_CHUNK_STAGES))
    most, warps = None, config.warps
    if placed:
        most = registers(warps) if config.rows > 1 else None
        warps *= 2 if config.block > 32 * 32 * warps else 1
    return replace(config, warps=warps, registers=most, stages=1, ahead=0, programs=0)


def row_fused_backward(
    M: int, N: int, itemsize: int, sm_count: int, tensors: int, parts: int = 1
) -> RowBackward | RowBackwardSplit:
    """`tensors`: how many are read. `parts`: of the rows, each with `partial_rows` programs of its own: one at the least, and
    together about as many as there are without."""
    config = row_backward(M, N, itemsize, sm_count, easy=False)
    assert not isinstance(config, RowBackwardLong)  # which takes easy ones
    if isinstance(config, RowBackwardSplit) or config.block > FUSED_BACKWARD[itemsize]:
        config = replace(_row_backward_split(M, N, itemsize, sm_count), sums_stages=FUSED_SUMS_STAGES)
    if parts > 1:
        programs = max(1, config.partial_rows // parts)
        config = replace(config, partial_rows=min(programs, cdiv(M // parts, config.rows)))
    if isinstance(config, RowBackwardSplit):
        return config
    tile = tensors * config.rows * config.block * itemsize
    stages = max(1, min(config.stages, 1 + PREFETCHED // tile))
    return replace(config, stages=stages, registers=registers(config.warps) if config.registers else None)


def row_masked_forward(N: int, itemsize: int) -> RowForward:
    """As fused rows. Of several rows, or 8 bytes, the assembler aims at fewer registers than the mask takes, and spills."""
    config = row_fused_forward(N, itemsize)
    return replace(config, registers=registers(config.warps)) if config.rows > 1 or itemsize == 8 else config


def row_masked_backward(M: int, N: int, itemsize: int, sm_count: int, narrow: bool = False) -> RowBackward | RowBackwardSplit:
    """As fused rows of two tensors; the assembler is told how many registers there are, as in row_masked_forward. `narrow`:
    loads of less than 16 bytes, or of less of the mask than goes with them. For those the longest rows have no registers, and a
    tile of columns has no more than 16 elements a thread."""
    config = row_fused_backward(M, N, itemsize, sm_count, tensors=2)
    if narrow and isinstance(config, RowBackward) and config.block == FUSED_BACKWARD[itemsize]:
        config = replace(_row_backward_split(M, N, itemsize, sm_count), sums_stages=FUSED_SUMS_STAGES)
    if isinstance(config, RowBackwardSplit):
        return replace(config, rows=min(config.rows, 16 * 32 * config.warps // config.block)) if narrow else config
    return replace(config, registers=config.registers or registers(2 * config.warps))


def group_backward(P: int, S: int, itemsize: int, width: int) -> GroupBackward:
    """P channels of S positions; `width`: bytes of a load. A function of the layer alone: no sample depends on its batch."""
    narrow = width < 8
    elements = power_of_two(P) * power_of_two(S)
    if elements <= (GROUP_WHOLE_NARROW if narrow else GROUP_WHOLE)[itemsize]:
        warps = max(1, elements // (32 * GROUP_THREAD))
        return GroupBackward(power_of_two(P), power_of_two(S), warps, 1, registers(warps), whole=True)
    elements, warps, stages, per_sm = GROUP_TILE[itemsize]
    if narrow:
        elements, stages, per_sm = elements // 2, 1, 1
    block_s = _positions(S, elements, itemsize)
    block_c = min(power_of_two(P), elements // block_s)
    return GroupBackward(block_c, block_s, warps, stages, registers(warps * per_sm), whole=False)


def _row_backward_split(M: int, N: int, itemsize: int, sm_count: int) -> RowBackwardSplit:
    rows, block = COLUMN_TILE[itemsize]
    most = cdiv(most_rows(M), rows)
    partial_rows = min(max(1, COLUMN_PROGRAMS_PER_SM * sm_count // cdiv(N, block)), most)
    return RowBackwardSplit(
        *ROW_SUMS[itemsize],
        rows,
        block,
        COLUMN_WARPS,
        COLUMN_STAGES,
        registers(COLUMN_WARPS * COLUMN_PROGRAMS_PER_SM),
        partial_rows,
    )


def _channel_block(C: int, S: int, elements: int, folded: bool, most: int) -> int:
    """`most`: of channels that lie together, else 0."""
    if most:
        return min(most, power_of_two(C))
    # Few positions: take neighbouring channels rather than many samples, they share cache lines; a thread holds the parameters
    # of all of them.
    return 1 if folded else min(8, max(1, elements // (8 * power_of_two(S))), power_of_two(C))


def _positions(S: int, most: int, itemsize: int) -> int:
    """The largest block of those that have the fewest places beyond S; none cuts the read of a warp."""
    sizes = [min(most, power_of_two(S))]
    while sizes[-1] * itemsize > WARP_READS:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: cdiv(S, size) * size)


def channel(
    B: int, C: int, S: int, itemsize: int, sm_count: int, reading: str, *, folded: bool, channels_fastest: bool, width: int,
    skewed: bool = False, turned: bool = False, fused: bool = False
) -> Channel:  # fmt: skip
    """`reading`: "stats", "sums", "y" or "dx". `folded`: the batch is part of S (B = 1), so S is a batch-like number that no
    block may depend on. `width`: bytes of the narrowest load. `turned`: the tensors of the launch lie in different ways.
    `fused`: with an activation or a residual, which take more registers than a plain norm does with or is told to."""
    sums = reading in SUMS
    name = reading + (", channels fastest" if channels_fastest else ", skewed" if skewed else "")
    if channels_fastest and turned and reading == "dx":
        name = "dx, turned"
    nbytes = B * C * S * itemsize
    held = itemsize in HELD.get(name, {}) and (skewed or nbytes <= LEADING) and width >= 8
    choices = HELD[name] if held else READINGS[name] if itemsize in READINGS.get(name, {}) else READINGS[reading]
    elements, warps, stages, per_sm, most = choices[itemsize]
    together = CHANNELS_FASTEST_BLOCK * (1 + (reading in ("sums", "dx") and nbytes >= LARGE)) if channels_fastest else 0
    block_c = _channel_block(C, S, elements, folded, together)
    if width < 4:
        per_sm, stages = per_sm * stages, 1
    if width < 8:
        most = NARROW.get((reading, itemsize), most)
    if width < 8 or (sums and block_c > 1 and not channels_fastest):
        elements //= 2
        block_c = _channel_block(C, S, elements, folded, together)
    positions = elements // block_c
    block_s = positions if folded else _positions(S, positions, itemsize) if skewed else min(positions, power_of_two(S))
    block_b = positions // block_s
    if fused or (most and block_c > 1 and not channels_fastest):
        most = registers(warps)  # what is of a channel takes as many more
    elif most and block_b > 1 and reading == "stats" and not channels_fastest and not skewed:
        stages -= 1  # with two prefetched tiles of several samples 128 registers are too few
    total = cdiv(B, block_b) * cdiv(S, block_s)
    # As many programs as run at once, or in the fewest turns that leave no more than a tenth idle, or for so many tiles.
    blocks, at_once = cdiv(C, block_c), per_sm * sm_count
    turns = 1
    if sums:
        turns = cdiv(cdiv(total, MOST_TILES) * blocks, at_once)
    elif not held:
        turns = max(range(1, 5), key=lambda n: min(0.9, n * at_once // blocks * blocks / (n * at_once)))
    tiles = cdiv(total, max(1, turns * at_once // blocks))
    if sums:
        tiles = max(tiles, min(total, FEWEST_TILES))
    return Channel(block_b, block_s, block_c, warps, stages, most, cdiv(total, tiles), held)


def slab(
    B: int, C: int, S: int, itemsize: int, *, folded: bool, channels_fastest: bool, width: int, backward: bool,
    skewed: bool = False, fused: bool = False
) -> Slab | None:  # fmt: skip
    """None where the slab of one segment of channels does not fit. A layer has few variants, whatever its batch sizes.
    `width`: bytes of the narrowest load; `fused`: see `channel`."""
    row = 1 if folded else power_of_two(S)  # positions that lie together whatever the batch is
    block_c = min(power_of_two(C), max(1, SEGMENT // (itemsize * (1 if channels_fastest else row))))
    ladder: dict[int, Any]
    if channels_fastest:
        ladder = SLAB_CHANNELS_FASTEST_NARROW if width < 8 else SLAB_CHANNELS_FASTEST
    elif backward:
        few = width < 8 or (fused and (itemsize == 4 or skewed))
        ladder = SLAB_BACKWARD_NARROW if few else SLAB_BACKWARD_SKEWED if skewed else SLAB_BACKWARD
    else:
        ladder = SLAB_FORWARD_ODD if skewed or width < 8 else SLAB_FORWARD
    for elements, warps, *most in ladder[itemsize]:
        positions = elements // block_c
        block_s = positions if folded else row
        if block_s >= S and B * block_s <= positions:
            return Slab(positions // block_s, block_s, block_c, warps, most[0] if most and not fused else registers(warps))
    return None


def finalise(C: int) -> Finalise:
    """Tall tiles of the narrowest segments of 32 bytes: one program has all partial rows of its columns on the way at once."""
    block_c = 8 if C <= 4096 else 32 if C <= 32768 else 256
    return Finalise(4096 // block_c, block_c)
