"""Launch choices as data: (sizes, itemsize, SM count) in, a frozen configuration out. Nothing is measured at run time.

The ladders were chosen by reading compiled code (registers, spills, bytes in flight per SM); tests/test_audit.py
holds them to "no spill". What a row's result depends on (rows, block, warps) is a function of N and the itemsize alone, so
y and dx of a row never depend on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_BLOCK = 16
REGISTERS = 65536  # of one SM


@dataclass(frozen=True)
class RowForward:
    """One program normalises `rows` rows held in registers, or, when chunked, sweeps over one row twice."""

    rows: int
    block: int
    warps: int
    chunked: bool = False


@dataclass(frozen=True)
class RowBackward:
    """`programs` persistent programs take `rows` rows at a time, with fp32 weight and bias gradients of those in registers."""

    rows: int
    block: int
    warps: int
    stages: int
    registers: int | None
    programs: int
    partial_rows: int  # the most programs for any M in the same power of two


@dataclass(frozen=True)
class RowBackwardSplit:
    """Rows too long for the registers: row sums, then tiles of rows x block columns, in panels of rows that stay in L2 between
    the two."""

    sums_block: int
    sums_warps: int
    rows: int
    block: int
    warps: int
    stages: int
    panel_rows: int
    rows_per_program: int
    partial_rows: int


@dataclass(frozen=True)
class Channel:
    """Tiles of block_b samples x block_s positions x block_c channels; a program takes `tiles` of them, one after another.

    `programs` share the positions of a block of channels; where they sum, each writes one partial row.
    """

    block_b: int
    block_s: int
    block_c: int
    warps: int
    stages: int
    registers: int | None
    tiles: int
    programs: int


@dataclass(frozen=True)
class Slab:
    """One tile that holds all positions of block_c channels."""

    block_b: int
    block_s: int
    block_c: int
    warps: int
    registers: int


@dataclass(frozen=True)
class Finalise:
    """One program sums block_p partial rows at a time, for block_c columns."""

    block_p: int
    block_c: int
    warps: int = 8


# itemsize -> {bucket of N: (rows, warps)}; a longer row is chunked.
FORWARD = {
    # Rows share a warp up to 256: as many rows as fill 4 warps. 512, 1024: 2 warps, fewest barriers, most programs per SM.
    2: {16: (128, 4), 32: (64, 4), 64: (32, 4), 128: (16, 4), 256: (8, 4), 512: (2, 2), 1024: (1, 2), 2048: (1, 4),
        4096: (1, 8), 8192: (1, 16), 16384: (1, 16)},
    # 16384 takes 32 warps: 16 spill on sm_80.
    4: {16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (1, 2), 1024: (1, 4), 2048: (1, 4),
        4096: (1, 8), 8192: (1, 16), 16384: (1, 32)},
    # float64 takes two registers per element.
    8: {16: (32, 4), 32: (16, 4), 64: (8, 4), 128: (4, 4), 256: (2, 4), 512: (1, 4), 1024: (1, 4), 2048: (1, 8),
        4096: (1, 16), 8192: (1, 32)},
}  # fmt: skip
CHUNK_BLOCK, CHUNK_WARPS = {2: 4096, 4: 4096, 8: 2048}, 8

# itemsize -> {bucket of N: (rows, warps, stages, programs that fit one SM)}; a longer row is split.
#
# A program prefetches stages - 1 tiles of x and dy: (stages - 1) * 2 * rows * block * itemsize bytes are on their way while it
# reduces and stores. An SM needs about 32 KB of them to keep the memory busy, whatever M is.
# * From 256 on one program of 16 warps gives them alone: 4096 elements are 8 per thread and at most 118 registers, and sm_count
#   programs write the fewest partial rows. 2 bytes: 3 tiles of 16 KB; 4 bytes: 2 tiles of 32 KB, but 2048 takes 3 of
#   16 KB, because two rows without a weight spill on sm_90; all fit 99 KB.
# * 8192: 2 bytes hold 16 elements per thread, because 32 warps leave 64 registers; 4 bytes need those 32 warps, at 64
#   registers, and prefetch one tile of 64 KB.
# * Below 256 a row lies within a warp, so that programs of 4 warps hardly wait for each other: 4 or 8 KB each, as many as the
#   share of partial rows allows.
# * float64 is bound by its arithmetic.
BACKWARD = {
    2: {16: (64, 4, 2, 7), 32: (32, 4, 2, 7), 64: (16, 4, 2, 7), 128: (8, 4, 3, 7), 256: (16, 16, 4, 1), 512: (8, 16, 4, 1),
        1024: (4, 16, 4, 1), 2048: (2, 16, 4, 1), 4096: (1, 16, 4, 1), 8192: (1, 16, 3, 1)},
    4: {16: (32, 4, 2, 10), 32: (16, 4, 2, 10), 64: (8, 4, 2, 10), 128: (4, 4, 2, 10), 256: (16, 16, 3, 1), 512: (8, 16, 3, 1),
        1024: (4, 16, 3, 1), 2048: (1, 16, 4, 1), 4096: (1, 16, 3, 1), 8192: (1, 32, 2, 1)},
    8: {16: (16, 4, 1, 4), 32: (8, 4, 1, 4), 64: (4, 4, 1, 4), 128: (2, 4, 1, 4), 256: (1, 4, 1, 4), 512: (1, 4, 1, 4),
        1024: (1, 8, 1, 2), 2048: (1, 16, 1, 1)},
}  # fmt: skip

# Split rows: rows and columns of a tile, one row a warp. Narrow tiles leave few programs to a column, and so few partial rows.
# 4 KB of x and dy, 2 of them prefetched by each of 4 programs: 32 KB on their way.
COLUMN_TILE = {2: (4, 256), 4: (4, 128), 8: (4, 64)}
COLUMN_WARPS, COLUMN_STAGES, COLUMN_PROGRAMS_PER_SM = 4, 3, 4
# x and dy of one panel, in bytes: half of a 50 MB L2, so that the second kernel still finds them there.
PANEL_BYTES = 25 << 20

# A partial row is two fp32 numbers per column, written and read: 16 bytes. Where several programs fit an SM, their partial rows
# may cost 1/6 of the ideal traffic of a backward, 3 * itemsize bytes per element; half of that, the reading, comes from L2.
PARTIAL_SHARE = 6

# Partial rows times channels of a block, up to which every program of the second reading merges those of its block itself.
MERGED_WITH_READING = 512

# Elements of a tile, warps, and programs per SM. Halved where loads are narrower than 8 bytes: every load in flight then holds
# a pointer of its own, two registers; and sums of several channels whose positions lie together, which have a set of sums for
# each of them.
APPLY_TILE, APPLY_WARPS, APPLY_STAGES, APPLY_PROGRAMS_PER_SM = {2: 2048, 4: 2048, 8: 1024}, 4, 1, 8
# Sums: few programs, because every one is a partial row that the finalising launch walks through; each prefetches, so that
# the two that fit keep 32 KB on their way to an SM.
SUMS_TILE, SUMS_WARPS, SUMS_PROGRAMS_PER_SM = {2: 4096, 4: 4096, 8: 2048}, 8, 2
SUMS_STAGES = {2: 3, 4: 2, 8: 2}
# 64 bytes of a row at the least: a group of so few channels is still read at full speed.
CHANNELS_FASTEST_BLOCK = 32
# A program's sums are shifted by the mean of its first tile, which is off by at most sqrt(tiles) standard deviations: the
# cancellation then costs at most `tiles` units of the last place of the variance.
MOST_TILES = 64

# itemsize -> (elements of a slab, warps), the smallest that fits.
SLAB_FORWARD = {2: ((4096, 4), (16384, 16)), 4: ((4096, 4), (16384, 16)), 8: ((4096, 8),)}
# 32 warps backward: with 16 the two tensors spill on sm_100 where their loads are of 8 bytes.
SLAB_BACKWARD = {2: ((4096, 8), (16384, 32)), 4: ((4096, 8), (16384, 16)), 8: ((2048, 8),)}
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


def row_forward(N: int, itemsize: int) -> RowForward:
    block = max(SMALLEST_BLOCK, power_of_two(N))
    rung = FORWARD[itemsize].get(block)
    if rung is None:
        return RowForward(1, CHUNK_BLOCK[itemsize], CHUNK_WARPS, chunked=True)
    rows, warps = rung
    return RowForward(rows, block, warps)


def row_backward(M: int, N: int, itemsize: int, sm_count: int) -> RowBackward | RowBackwardSplit:
    ladder = BACKWARD[itemsize]
    block = max(SMALLEST_BLOCK, power_of_two(N))
    # The top rung has no registers left for loads of less than 16 bytes, each of which holds a pointer of its own.
    if block > max(ladder) or (block == max(ladder) and N * itemsize % 16):
        return _row_backward_split(M, N, itemsize, sm_count)
    rows, warps, stages, fit = ladder[block]
    least = 1 << (M.bit_length() - 1)
    affordable = 3 * itemsize * least // (PARTIAL_SHARE * 16 * sm_count)
    partial_rows = min(sm_count * min(fit, max(1, affordable)), cdiv(2 * least - 1, rows))
    most = registers(warps) if fit == 1 else None
    return RowBackward(rows, block, warps, stages, most, min(partial_rows, cdiv(M, rows)), partial_rows)


def _row_backward_split(M: int, N: int, itemsize: int, sm_count: int) -> RowBackwardSplit:
    panel_rows = cdiv(M, cdiv(M, max(1, PANEL_BYTES // (2 * N * itemsize))))
    rows, block = COLUMN_TILE[itemsize]
    row_programs = max(1, COLUMN_PROGRAMS_PER_SM * sm_count // cdiv(N, block))
    rows_per_program = rows * cdiv(panel_rows, rows * row_programs)
    panels, rest = divmod(M, panel_rows)
    return RowBackwardSplit(
        sums_block=CHUNK_BLOCK[itemsize],
        sums_warps=CHUNK_WARPS,
        rows=rows,
        block=block,
        warps=COLUMN_WARPS,
        stages=COLUMN_STAGES,
        panel_rows=panel_rows,
        rows_per_program=rows_per_program,
        partial_rows=panels * cdiv(panel_rows, rows_per_program) + cdiv(rest, rows_per_program),
    )


def _channel_block(C: int, S: int, elements: int, folded: bool, channels_fastest: bool) -> int:
    if channels_fastest:
        return min(CHANNELS_FASTEST_BLOCK, power_of_two(C))
    # Few positions: take neighbouring channels rather than many samples, they share cache lines; a thread holds the parameters
    # of all of them.
    return 1 if folded else min(8, max(1, elements // (8 * power_of_two(S))), power_of_two(C))


def _tile(
    C: int, S: int, elements: int, folded: bool, channels_fastest: bool, narrow: bool, sums: bool
) -> tuple[int, int, int]:
    """Samples, positions and channels of a tile."""
    block_c = _channel_block(C, S, elements, folded, channels_fastest)
    if narrow or (sums and block_c > 1 and not channels_fastest):
        elements //= 2
        block_c = _channel_block(C, S, elements, folded, channels_fastest)
    positions = elements // block_c
    block_s = positions if folded else min(positions, power_of_two(S))
    return positions // block_s, block_s, block_c


def channel(
    B: int, C: int, S: int, itemsize: int, sm_count: int, *, folded: bool, channels_fastest: bool, narrow: bool, sums: bool
) -> Channel:
    """`folded`: the batch is part of S (B = 1), so S is a batch-like number that no block may depend on."""
    elements = (SUMS_TILE if sums else APPLY_TILE)[itemsize]
    block_b, block_s, block_c = _tile(C, S, elements, folded, channels_fastest, narrow, sums)
    total = cdiv(B, block_b) * cdiv(S, block_s)
    everything = total * cdiv(C, block_c)
    if sums:
        tiles = cdiv(everything, SUMS_PROGRAMS_PER_SM * sm_count)
        warps, stages, most = SUMS_WARPS, SUMS_STAGES[itemsize], None
    else:
        tiles = max(1, everything // (APPLY_PROGRAMS_PER_SM * sm_count))
        warps, stages = APPLY_WARPS, APPLY_STAGES
        most = registers(warps) if itemsize == 8 else None
    tiles = min(MOST_TILES, tiles)
    return Channel(block_b, block_s, block_c, warps, stages, most, tiles, cdiv(total, tiles))


def slab(
    B: int, C: int, S: int, itemsize: int, *, folded: bool, channels_fastest: bool, narrow: bool, backward: bool
) -> Slab | None:
    """None where the slab of one segment of channels does not fit. A layer has few variants, whatever its batch sizes."""
    row = 1 if folded else power_of_two(S)  # positions that lie together whatever the batch is
    block_c = min(power_of_two(C), max(1, SEGMENT // (itemsize * (1 if channels_fastest else row))))
    if channels_fastest:
        ladder = SLAB_CHANNELS_FASTEST_NARROW if narrow else SLAB_CHANNELS_FASTEST
    else:
        ladder = SLAB_BACKWARD if backward else SLAB_FORWARD
    for elements, warps in ladder[itemsize]:
        positions = elements // block_c
        block_s = positions if folded else row
        if block_s >= S and B * block_s <= positions:
            return Slab(positions // block_s, block_s, block_c, warps, registers(warps))
    return None


def finalise(C: int) -> Finalise:
    """Tall tiles of the narrowest segments of 32 bytes: one program has all partial rows of its columns on the way at once."""
    block_c = 8 if C <= 4096 else 32 if C <= 32768 else 256
    return Finalise(4096 // block_c, block_c)
