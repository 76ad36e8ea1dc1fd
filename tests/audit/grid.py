"""The calls whose kernels are compiled: functions of the backend contract over shapes, dtypes, layouts and options."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from unittest import mock

import fastnorm.kernels as K
import numpy as np
import torch
from torch import bfloat16, float16, float32, float64

from fastnorm import heuristics, heuristics_branch

LENGTHS = (
    10,
    64,
    96,
    256,
    512,
    768,
    1000,
    1001,
    1024,
    2048,
    4096,
    4098,
    5120,
    8190,
    8192,
    10240,
    12288,
    16384,
    20000,
    32768,
    40000,
)
ALL = ("loads", "stores")
FEW_LENGTHS = (64, 1000, 8192, 16384, 20000)  # the top rungs are the ones that spill first

# dtype of the input, of the parameters, of row_fwd's result (None: the input's)
ROW_DTYPES = (
    (bfloat16, bfloat16, None),
    (bfloat16, float32, None),
    (bfloat16, None, None),
    (bfloat16, float32, float32),  # autocast
    (float16, float16, None),
    (float16, None, None),
    (float16, float32, float32),
    (float32, float32, None),
    (float32, bfloat16, None),
    (float32, None, None),
    (float64, float64, None),
)
FEW_ROW_DTYPES = ((bfloat16, float32, None), (float32, float32, None), (float32, bfloat16, None))

CHANNEL_DTYPES = (
    (bfloat16, bfloat16),
    (bfloat16, float32),
    (bfloat16, None),
    (float16, float32),
    (float32, float32),
    (float32, bfloat16),
    (float32, None),
    (float64, float64),
)
FEW_CHANNEL_DTYPES = ((bfloat16, float32), (float32, float32))

CHANNEL_SHAPES = (
    ((32, 10), "dense"), ((64, 64), "dense"), ((2048, 512), "dense"), ((5, 65), "dense"), ((64, 64), "strided"),
    ((16, 64, 56, 56), "dense"), ((16, 64, 56, 56), "channels_last"), ((8, 64, 56, 56), "strided"),
    ((64, 256, 14, 14), "dense"), ((64, 256, 14, 14), "channels_last"), ((64, 512, 7, 7), "dense"),
    ((64, 512, 7, 7), "channels_last"), ((200, 512, 7, 7), "dense"), ((64, 64, 27, 27), "dense"),
    ((64, 64, 27, 27), "strided"), ((4096, 64, 3, 3), "dense"), ((8, 65, 27, 27), "dense"), ((24, 65, 27, 27), "dense"),
    ((8, 65, 7, 7), "dense"), ((8, 65, 7, 7), "channels_last"), ((7, 16, 3), "dense"), ((4096, 65), "dense"),
    ((16, 8, 7, 7), "far"), ((64, 8, 27, 27), "far"), ((64, 65, 28, 28), "channels_last"), ((16, 3, 224, 224), "channels_last"),
    ((16, 128, 1000), "dense"), ((16, 128, 1000), "mT"), ((2, 3, 480, 640), "dense"), ((1, 32, 8, 40, 40), "dense"),
    ((32, 64, 64, 64), "dense"), ((256, 64, 112, 112), "dense"), ((256, 64, 112, 112), "channels_last"),
)  # fmt: skip
FEW_CHANNEL_SHAPES = (
    ((2048, 512), "dense"), ((16, 64, 56, 56), "dense"), ((16, 64, 56, 56), "channels_last"), ((64, 512, 7, 7), "dense"),
    ((16, 128, 1000), "mT"), ((8, 65, 7, 7), "channels_last"), ((64, 8, 27, 27), "far"),
)  # fmt: skip


def modules():
    """All of the package's modules."""
    return [importlib.import_module(f"{K.__name__}.{module.name}") for module in pkgutil.iter_modules(K.__path__)]


@dataclass(frozen=True)
class Surroundings:
    """Of a fused norm: what surrounds it."""

    activation: str
    residual: bool
    addend: bool = False  # of rows
    centre: bool = True

    def tensors(self, x):
        """addend and residual, or None"""
        return x.clone() if self.addend else None, x.clone() if self.residual else None


# The most registers, by an error function and by a long series; and what a transformer is made of.
FUSED_ROWS = (
    Surroundings("gelu", residual=True, addend=True),
    Surroundings("tanh", residual=True, addend=True, centre=False),
    Surroundings("identity", residual=False, addend=True, centre=False),
)
FUSED_CHANNELS = Surroundings("gelu", residual=True), Surroundings("tanh", residual=False)
# Parts of the weights, and lengths: rows that share a program, whole loads of few warps, and split rows.
PARTS, PARTED_LENGTHS = 32, (64, 1000, 1152, 4096, 20000)
FEW_PARTED_LENGTHS = (64, 1152, 20000)
# (shape, groups): a group in one tile, in several, positions that vectors do not divide, and channels without positions.
GROUPS = (
    ((8, 1280, 8, 8), 32), ((8, 640, 32, 32), 32), ((8, 320, 64, 64), 32), ((8, 1280, 16, 16), 32), ((16, 512, 14, 14), 32),
    ((16, 512, 7, 7), 32), ((2, 64, 1000), 4), ((64, 4096), 32), ((2, 6, 5, 7), 3), ((2, 20000), 2), ((2, 32, 99, 99), 4),
    ((2, 32, 333, 333), 4), ((4, 64, 56, 56), 2),
)  # fmt: skip
FEW_GROUPS = GROUPS[0], GROUPS[2], GROUPS[4], GROUPS[10]
# Tiles with rows of a line and of a sector of memory, positions that vectors do not divide, few of them, channels read twice.
POSITIONS = (
    (32, 96, 56, 56), (32, 192, 28, 28), (32, 384, 14, 14), (32, 768, 7, 7), (32, 768, 8, 8), (16, 1024, 24, 24),
    (8, 3, 64, 64), (16, 32, 99, 99), (16, 256, 27, 27), (64, 640, 4), (64, 40, 3, 3), (8, 1536, 7, 7), (8, 1536, 8, 8),
    (4, 5000, 9), (4, 5000, 16),
)  # fmt: skip
FEW_POSITIONS = POSITIONS[0], POSITIONS[3], POSITIONS[4], POSITIONS[12]
# Rows shorter than a block of elements, that end with one, that vectors do not divide, and longer ones that end inside of it.
BRANCHES = (64, 197, 768), (8, 512, 4096), (16, 48, 1001), (8, 7, 5000)
FEW_BRANCHES = BRANCHES[:1]
# x's, and the stream's.
BRANCH_DTYPES = (bfloat16, bfloat16), (bfloat16, float32), (float16, float32), (float32, float32), (float64, float64)
FUSED_DTYPES = ((bfloat16, bfloat16), (bfloat16, float32), (float32, float32), (float64, float64))
FEW_FUSED_DTYPES = ((bfloat16, float32), (float32, float32))


# Lengths, and columns that a byte of the mask is for: rows that share a program, the top rungs, chunked and split ones.
MASKED_LENGTHS = (10, 64, 96, 256, 512, 768, 1000, 1001, 1024, 2048, 3072, 4096, 4098, 5120, 8190, 8192, 16384, 20000)
FEW_MASKED_LENGTHS = 64, 1000, 4096, 8192, 16384, 20000
MASKED_DTYPES = (*FUSED_DTYPES, (float32, bfloat16))


@dataclass(frozen=True)
class Call:
    """`wide`: "loads" and "stores", where sizes, strides and alignment allow 16-byte ones of x and dy, of y and dx."""

    name: str
    wide: tuple[str, ...]
    run: Callable[[], None]


def rows(M, N, dtype, parameter, y_dtype=None, needs=((True, True, True),), strided=False):
    """row_fwd, and row_bwd for each of `needs`: whether dx, dweight and dbias are wanted."""
    x = torch.empty(M, 2 * N if strided else N, dtype=dtype)[:, :N]
    p = None if parameter is None else torch.empty(N, dtype=parameter)
    y, mean, rstd = K.row_fwd(x, p, p, 1e-5, N, y_dtype)
    for dx, *wanted in needs:
        K.row_bwd(y, x, p, mean, rstd, (dx, *(parameter if want else None for want in wanted)))


def channels(shape, layout, dtype, parameter, pieces=False):
    """Training, and with `pieces` evaluation, every piece, and gradients that are wanted alone."""
    x = _laid_out(shape, layout, dtype)
    p = None if parameter is None else torch.empty(shape[1], dtype=parameter)
    _, mean, rstd = K.channel_fwd(x, p, p, p, p, True, 0.1, 1e-5)
    K.channel_bwd(x, x, p, mean, rstd, True, (True, parameter, parameter))
    if pieces:
        running = torch.empty(shape[1], dtype=parameter or float32)
        K.channel_fwd(x, p, p, running, running, False, 0.1, 1e-5)
        for need in ((True, None, None), (True, parameter, parameter), (False, parameter, None), (False, None, parameter)):
            for training in (True, False):
                K.channel_bwd(x, x, p, mean, rstd, training, need)
        K.channel_stats(x)
        K.channel_apply(x, mean, rstd, p, p)
        K.channel_sums(x, x, mean, rstd)
        K.channel_grad(x, x, mean, rstd, p, rstd, rstd)


def fused_rows(M, N, dtype, parameter, around, alone=False):
    """Forward and backward, and with `alone` the gradient of the residual and those of the parameters by themselves."""
    x, p = torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=parameter)
    addend, residual = around.tensors(x)
    y, h, mean, rstd = K.row_fused_fwd(x, addend, p, p, residual, around.activation, 0.0, 1e-5, N, around.centre)
    needs = [(True, parameter, parameter, around.residual)]
    needs += [(False, None, None, True), (False, parameter, parameter, False)] if alone else []
    for need in needs:
        K.row_fused_bwd(y, h, x, residual, p, p, around.activation, 0.0, mean, rstd, need, around.centre)


def parted_rows(M, N, dtype, parameter, around, parts=PARTS):
    """As fused_rows, with weight and bias in parts."""
    x, p = torch.empty(M, N, dtype=dtype), torch.empty(parts, N, dtype=parameter)
    addend, residual = around.tensors(x)
    y, h, mean, rstd = K.row_fused_fwd(x, addend, p, p, residual, around.activation, 0.0, 1e-5, N, around.centre)
    need = (True, parameter, parameter, around.residual)
    K.row_fused_bwd(y, h, x, residual, p, p, around.activation, 0.0, mean, rstd, need, around.centre)


def groups(shape, count, dtype, parameter, activation, alone=False):
    """Forward and backward of `count` groups, and with `alone` gradients that are wanted alone."""
    x, p = torch.empty(shape, dtype=dtype), torch.empty(shape[1], dtype=parameter)
    y, mean, rstd = K.group_fwd(x, p, p, activation, 0.0, 1e-5, count)
    for need in ((True, parameter, parameter), *(((True, None, None), (False, parameter, parameter)) if alone else ())):
        K.group_bwd(y, x, p, p, activation, 0.0, mean, rstd, need)


def positions(shape, dtype, parameter, activation, alone=False):
    """Forward and backward, and with `alone` gradients that are wanted alone."""
    x, p = torch.empty(shape, dtype=dtype), torch.empty(shape[1], dtype=parameter)
    y, mean, rstd = K.position_fwd(x, p, p, activation, 0.0, 1e-5)
    for need in ((True, parameter, parameter), *(((True, None, None), (False, parameter, parameter)) if alone else ())):
        K.position_bwd(y, x, p, p, activation, 0.0, mean, rstd, need)


def masked(shape, layout, dtype, parameter):
    """The pieces of a batch norm of which some positions do not count."""
    x, p = _laid_out(shape, layout, dtype), torch.empty(shape[1], dtype=parameter)
    mask = torch.empty(shape[0], *shape[2:], dtype=torch.bool)
    _, mean, rstd = K.channel_masked_stats(x, mask)
    K.channel_masked_grad(x, x, mask, mean, rstd, p, rstd, rstd)


def masked_rows(M, N, R, P, dtype, parameter, alone=False):
    """Forward and backward of rows of which some columns do not count, and with `alone` gradients that are wanted alone."""
    x, p, mask = torch.empty(M, N, dtype=dtype), torch.empty(N, dtype=parameter), torch.empty(R, P, dtype=torch.bool)
    y, mean, rstd = K.row_masked_fwd(x, mask, p, p, 1e-5, N)
    for need in ((True, parameter, parameter), *(((True, None, None), (False, parameter, parameter)) if alone else ())):
        K.row_masked_bwd(y, x, mask, p, mean, rstd, need)


def branches(shape, dtype, stream, row_scales, columns, p, alone=False):
    """Forward and backward, and with `alone` a gradient of the scale that is wanted alone."""
    x, h, acc = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=stream), torch.promote_types(dtype, float32)
    R = {"samples": shape[0], "rows": prod(shape[:-1])}.get(row_scales)
    scales = None if R is None else torch.empty(R, dtype=acc), torch.empty(shape[-1], dtype=stream) if columns else None
    seed = torch.empty(1, dtype=torch.int64) if p else None
    K.branch_fwd(x, h, *scales, p, seed, stream)
    K.branch_bwd(h, x if columns else None, *scales, p, seed, dtype, stream if columns else None)
    if alone:
        K.branch_bwd(h, x, *scales, p, seed, None, stream)


def wide_branches(*args):
    """As if offsets took 64 bits."""
    with mock.patch.object(heuristics_branch, "WIDE", 0):
        branches(*args)


def fused_channels(shape, layout, dtype, parameter, around, pieces=False):
    """Training; with `pieces` evaluation, a residual that takes no gradient, and gradients that are wanted alone."""
    x, p = _laid_out(shape, layout, dtype), torch.empty(shape[1], dtype=parameter)
    residual = _laid_out(shape, layout, dtype) if around.residual else None
    forward = lambda training: K.channel_fused_fwd(x, p, p, residual, around.activation, 0.0, p, p, training, 0.1, 1e-5)
    _, mean, rstd, _ = forward(True)
    backward = lambda *how: K.channel_fused_bwd(x, x, residual, p, p, around.activation, 0.0, mean, rstd, how[0], how[1:])
    backward(True, True, parameter, parameter, around.residual)
    if pieces:
        forward(False)
        backward(True, True, parameter, parameter, False)
        backward(True, False, None, None, True)
        backward(False, True, parameter, parameter, around.residual)
        backward(False, True, None, None, around.residual)


def _laid_out(shape, layout, dtype):
    if layout == "strided":  # in the batch
        return torch.empty(2 * shape[0], *shape[1:], dtype=dtype)[::2]
    if layout == "far":  # samples so far apart that their offsets take 64 bits; no memory is behind them
        few = np.empty(16, dtype=np.int64).view(f"u{dtype.itemsize}")
        strides = [stride * dtype.itemsize for stride in (1 << 31, prod(shape[2:]), shape[3], 1)]
        return torch.from_numpy(np.lib.stride_tricks.as_strided(few, shape, strides)).view(dtype)
    if layout in ("channels_last", "mT"):
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    return torch.empty(shape, dtype=dtype)


def _row_calls(few: bool) -> Iterator[Call]:
    ladders = (*heuristics.FORWARD.values(), *heuristics.BACKWARD.values())
    lengths = FEW_LENGTHS if few else sorted({*LENGTHS, *itertools.chain(*ladders)})
    kinds = itertools.product(lengths, FEW_ROW_DTYPES if few else ROW_DTYPES)
    for N, dtypes in (*kinds, *([(16384, (bfloat16, bfloat16, None))] if few else [])):  # which has the fewest registers left
        parts = not few and dtypes[0] == dtypes[1] != float16
        needs = ((True, True, True), *(((True, False, False), (False, True, True), (True, True, False)) if parts else ()))
        wide = ALL if N % (16 // dtypes[0].itemsize) == 0 else ()
        yield Call(f"rows {N} {dtypes}", wide, lambda N=N, d=dtypes, needs=needs: rows(512, N, *d, needs))
    for N, dtype in itertools.product((768, 20000), () if few else (bfloat16, float32)):
        parts = ((False, True, False), (False, False, True), (True, True, False), (True, False, True))
        call = lambda N=N, dtype=dtype, parts=parts: rows(512, N, dtype, float32, None, parts, strided=True)
        yield Call(f"strided rows {N} {dtype}", ALL, call)


def _channel_calls(few: bool) -> Iterator[Call]:
    shapes, kinds = (FEW_CHANNEL_SHAPES, FEW_CHANNEL_DTYPES) if few else (CHANNEL_SHAPES, CHANNEL_DTYPES)
    for (shape, layout), (dtype, parameter) in itertools.product(shapes, kinds):
        pieces = dtype == float32 == parameter if few else parameter in (dtype, float32)
        call = lambda args=(shape, layout, dtype, parameter, pieces): channels(*args)
        yield Call(f"channels {shape} {layout} {dtype} {parameter}", _wide(shape, layout, dtype), call)


def _fused_calls(few: bool) -> Iterator[Call]:
    dtypes = FEW_FUSED_DTYPES if few else FUSED_DTYPES
    ladders = (*heuristics.FORWARD.values(), *heuristics.BACKWARD.values())
    lengths = FEW_LENGTHS if few else sorted({*LENGTHS, *itertools.chain(*ladders)})
    for N, (dtype, parameter), around in itertools.product(lengths, dtypes, FUSED_ROWS[:1] if few else FUSED_ROWS):
        wide = ALL if N % (16 // dtype.itemsize) == 0 else ()
        alone = around.residual and N in FEW_LENGTHS and not few
        call = lambda args=(512, N, dtype, parameter, around, alone): fused_rows(*args)
        yield Call(f"fused rows {N} {dtype} {parameter} {around}", wide, call)
    shapes = FEW_CHANNEL_SHAPES if few else CHANNEL_SHAPES
    for (shape, layout), (dtype, parameter), around in itertools.product(shapes, dtypes, FUSED_CHANNELS[: 1 if few else 2]):
        pieces = dtype == float32 if few else parameter in (dtype, float32)
        call = lambda args=(shape, layout, dtype, parameter, around, pieces): fused_channels(*args)
        yield Call(f"fused channels {shape} {layout} {dtype} {parameter} {around}", _wide(shape, layout, dtype), call)


def _parted_calls(few: bool) -> Iterator[Call]:
    kinds = itertools.product(FEW_PARTED_LENGTHS if few else PARTED_LENGTHS, FEW_FUSED_DTYPES if few else FUSED_DTYPES)
    for (N, (dtype, parameter)), around in itertools.product(kinds, FUSED_ROWS[:1] if few else FUSED_ROWS):
        wide = ALL if N % (16 // dtype.itemsize) == 0 else ()
        call = lambda args=(1024, N, dtype, parameter, around): parted_rows(*args)
        yield Call(f"rows {N} in parts {dtype} {parameter} {around}", wide, call)
    kinds, ends = (
        itertools.product(FEW_GROUPS if few else GROUPS, FEW_FUSED_DTYPES if few else FUSED_DTYPES),
        ("gelu", "identity"),
    )
    for ((shape, count), (dtype, parameter)), activation in itertools.product(kinds, ends[: 1 if few else 2]):
        wide = ALL if prod(shape[2:]) % (16 // dtype.itemsize) == 0 else ()
        call = lambda args=(shape, count, dtype, parameter, activation, not few): groups(*args)
        yield Call(f"{count} groups {shape} {dtype} {parameter} {activation}", wide, call)


def _position_calls(few: bool) -> Iterator[Call]:
    dtypes = FEW_FUSED_DTYPES if few else FUSED_DTYPES
    kinds = itertools.product(FEW_POSITIONS if few else POSITIONS, dtypes, ("gelu", "identity")[: 1 if few else 2])
    for shape, (dtype, parameter), activation in kinds:
        wide = ALL if prod(shape[2:]) % (16 // dtype.itemsize) == 0 else ()
        call = lambda args=(shape, dtype, parameter, activation, not few): positions(*args)
        yield Call(f"positions {shape} {dtype} {parameter} {activation}", wide, call)
    for (shape, layout), (dtype, parameter) in itertools.product(FEW_CHANNEL_SHAPES if few else CHANNEL_SHAPES, dtypes):
        call = lambda args=(shape, layout, dtype, parameter): masked(*args)
        yield Call(f"masked {shape} {layout} {dtype} {parameter}", _wide(shape, layout, dtype), call)


def _masked_row_calls(few: bool) -> Iterator[Call]:
    kinds = itertools.product(FEW_MASKED_LENGTHS if few else MASKED_LENGTHS, FEW_FUSED_DTYPES if few else MASKED_DTYPES)
    for N, (dtype, parameter) in kinds:
        wide = ALL if N % (16 // dtype.itemsize) == 0 else ()
        # For a row, for a column, for as many as a vector holds, and for an odd number of them.
        for P in dict.fromkeys((1, N, *([N // 8] if N % 8 == 0 else []), *([] if few else [N & -N]))):
            call = lambda args=(512, N, 512, P, dtype, parameter, not few): masked_rows(*args)
            yield Call(f"masked rows {N} in {P} {dtype} {parameter}", wide, call)


def _branch_calls(few: bool) -> Iterator[Call]:
    dtypes = BRANCH_DTYPES[:4:3] if few else BRANCH_DTYPES
    scales = (None, False, 0.1), ("rows", True, 0.1)
    if not few:
        scales += (None, True, 0.1), (None, True, 0.0), ("samples", False, 0.0), ("samples", True, 0.1), ("rows", False, 0.1)
    kinds = itertools.product(FEW_BRANCHES if few else BRANCHES, dtypes, scales)
    for shape, (dtype, stream), (row_scales, columns, p) in kinds:
        wide = ALL if prod(shape) % (16 // dtype.itemsize) == 0 else ()
        args = shape, dtype, stream, row_scales, columns, p
        call = lambda args=args: branches(*args, alone=args[-2] and not few)
        yield Call(f"branch {args}", wide, call)
        if shape == BRANCHES[0] and dtype == stream and not few:
            yield Call(f"branch of more elements {args}", wide, lambda args=args: wide_branches(*args))


def _wide(shape, layout, dtype):
    vector, (C, *positions) = 16 // dtype.itemsize, shape[1:]
    S = prod(positions)
    if (C if layout in ("channels_last", "mT") or not positions else S) % vector == 0:
        return ALL
    # Rows that start anywhere, of samples that do not: they are loaded from the whole vector before.
    anywhere = positions and layout in ("dense", "strided", "far") and C * S % vector == 0 and S * dtype.itemsize % 8
    return ("loads",) if anywhere and S + vector - 1 <= heuristics.power_of_two(S) else ()


def calls(few: bool = False) -> list[Call]:
    """A variant is judged by the first call that reaches it: those that allow wide accesses come first."""
    kinds = _row_calls, _channel_calls, _fused_calls, _parted_calls, _position_calls, _masked_row_calls, _branch_calls
    every = itertools.chain.from_iterable(kind(few) for kind in kinds)
    return sorted(every, key=lambda call: -len(call.wide))
