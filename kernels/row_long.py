"""The backward of rows that do not fit the registers beside the sums of their columns; launched by row.py."""

import torch
import triton
import triton.language as tl

from .. import heuristics
from .chain import let_next_start, wait_for_previous
from .launch import assembles, launch, overlaps
from .math import grad_input, inverse, normalize, quotient, sum2
from .prefetch import hidden, prefetch_row
from .row_parts import load_parameter, load_statistics, part_of, store_sums


@triton.jit
def _load_part(dy_ptr, x_ptr, weight_ptr, cols, ACC: tl.constexpr):
    """x, dz and g = dz * weight at some columns of a row."""
    x = tl.load(x_ptr + cols).to(ACC)
    dz = tl.load(dy_ptr + cols).to(ACC)
    g = dz
    if weight_ptr is not None:
        g = dz * tl.load(weight_ptr + cols).to(ACC)
    return x, dz, g


@triton.jit
def _row_sums(dy_ptr, x_ptr, weight_ptr, high, low, rstd, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """What a thread has of the sums of g * x_hat and g over the row of PARTS * BLOCK columns that the pointers point to."""
    ACC: tl.constexpr = rstd.dtype
    NEAR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # columns of one load, added up within a thread
    cols = tl.arange(0, BLOCK)[None, :]
    s1 = tl.zeros((1, BLOCK // NEAR), ACC)
    s2 = s1
    for k in tl.static_range(PARTS):
        x, _, g = _load_part(dy_ptr, x_ptr, weight_ptr, k * BLOCK + cols, ACC)
        s1 += tl.sum(tl.reshape(g * normalize(x, high, low, rstd), (1, BLOCK // NEAR, NEAR)), axis=2)
        s2 += tl.sum(tl.reshape(g, (1, BLOCK // NEAR, NEAR)), axis=2)
    return s1, s2


@triton.jit(do_not_specialize=["P", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_long_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P, M, N_v,
                         dy_stride_v, x_stride_v, BLOCK: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr,
                         ROW: tl.constexpr, VEC: tl.constexpr, ASSEMBLES: tl.constexpr, AHEAD: tl.constexpr,
                         LEADS: tl.constexpr):  # fmt: skip
    """Persistent sweep over rows of PARTS * BLOCK columns, each of which is read twice, the second time from L1.

    A program takes the means of whole rows, and dx and the sums of OWN parts of them: PARTS // OWN neighbours share a row.
    AHEAD: the next row is asked for. ROW: N or the next power of two.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    SHARES: tl.constexpr = PARTS // OWN
    let_next_start(LEADS)
    N = N_v * VEC
    p = tl.program_id(0) // SHARES
    first_col = tl.program_id(0) % SHARES * (OWN * BLOCK)
    cols = tl.arange(0, BLOCK)[None, :]
    dw, db = (), ()
    for _ in tl.static_range(OWN):
        dw += (tl.zeros((1, BLOCK), ACC),)
        db += (tl.zeros((1, BLOCK), ACC),)
    for row in tl.range(p, M, P, num_stages=1):
        dy_row = dy_ptr + tl.cast(row, tl.int64) * dy_stride_v * VEC
        x_row = x_ptr + tl.cast(row, tl.int64) * x_stride_v * VEC
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, tl.cast(row, tl.int64) + tl.arange(0, 1), M)
        if dx_ptr is not None:
            # What is hidden keeps the compiler from keeping x, dy and weight, for which there are no registers.
            here = weight_ptr
            if weight_ptr is not None:
                here = weight_ptr + hidden(0, ASSEMBLES) * VEC
            s1, s2 = _row_sums(dy_row, x_row, here, high, low, rstd, BLOCK, PARTS)
        if AHEAD:  # after the loads of this row, and before they are waited for
            prefetch_row(x_ptr, row + P, M, N, x_stride_v, ROW, VEC)
            prefetch_row(dy_ptr, row + P, M, N, dy_stride_v, ROW, VEC)
        if dx_ptr is not None:
            c1, c2 = sum2(s1, s2, 1)
            share = inverse(N.to(ACC))
            c1, c2 = (c1 * share)[:, None], (c2 * share)[:, None]
        own = hidden(first_col // VEC, ASSEMBLES) * VEC
        here = weight_ptr
        if weight_ptr is not None:
            here = weight_ptr + own
        new_dw, new_db = (), ()
        for k in tl.static_range(OWN):
            x, dz, g = _load_part(dy_row + own, x_row + own, here, k * BLOCK + cols, ACC)
            x_hat = normalize(x, high, low, rstd)
            if dx_ptr is not None:
                dx = grad_input(g, x_hat, rstd, c1, c2)
                tl.store(dx_ptr + tl.cast(row, tl.int64) * N + own + k * BLOCK + cols, dx.to(dx_ptr.dtype.element_ty))
            new_dw += (dw[k] + dz * x_hat,)
            new_db += (db[k] + dz,)
        dw, db = new_dw, new_db
    for k in tl.static_range(OWN):
        at = first_col + k * BLOCK + tl.arange(0, BLOCK)
        store_sums(partial_ptr, dw_ptr, db_ptr, dw[k], db[k], p, P, at, at < N, N)


@triton.jit(do_not_specialize=["M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_sums_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, M, N_v, dy_stride_v, x_stride_v,
                         BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """c1 and c2 of one long row, in c: M of the one, then M of the other."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    let_next_start(LEADS)
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
    x_ptr += row * x_stride_v * VEC
    dy_ptr += row * dy_stride_v * VEC
    s1 = tl.zeros((1, BLOCK), ACC)
    s2 = tl.zeros((1, BLOCK), ACC)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        mask = cols < N - start
        x_hat = normalize(tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(ACC), high, low, rstd)
        g = tl.load(dy_ptr + start + cols, mask=mask, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * load_parameter(weight_ptr, start + cols, mask, VEC).to(ACC)
        s1 += g * x_hat
        s2 += g
    c1, c2 = sum2(s1, s2, 1)
    tl.store(c_ptr + rows, quotient(c1, N.to(ACC)))
    tl.store(c_ptr + M + rows, quotient(c2, N.to(ACC)))


@triton.jit(do_not_specialize=["P", "M", "N_v", "dy_stride_v", "x_stride_v", "dh_stride_v", "T"])
def _row_bwd_columns_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P, M,
                            N_v, dy_stride_v, x_stride_v, dh_ptr, dh_stride_v, T, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                            VEC: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
                            PARTED: tl.constexpr):  # fmt: skip
    """BLOCK columns of every P-th tile of rows, of one part where PARTED is set: dx with the known c1 and c2, plus dh where it
    is given, and one partial row of dw and db.

    From the last row on: those are in L2, if any are.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    blocks = tl.cdiv(N, BLOCK)
    part, first, end, p, _, parts = part_of(tl.program_id(0) // blocks, tl.num_programs(0) // blocks, M, T, PARTED)
    first_col = (tl.program_id(0) % blocks) * BLOCK
    r = tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None and weight_ptr is not None:
        weight = load_parameter(weight_ptr, part * N + cols + (r * 0)[:, None], cols < N, VEC)
    let_next_start(LEADS)
    wait_for_previous(FOLLOWS)
    groups = tl.cdiv(T if PARTED else M, ROWS)
    for i in tl.range(p, groups, P, num_stages=STAGES):
        rows = first + ((groups - 1 - i) * ROWS + r).to(tl.int64)
        mask = (cols < N) & (rows < end)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M, end)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = dz
            if weight_ptr is not None:
                g = dz * weight.to(ACC)
            c1 = tl.load(c_ptr + rows, mask=rows < end, other=0.0)[:, None]
            c2 = tl.load(c_ptr + M + rows, mask=rows < end, other=0.0)[:, None]
            dx = grad_input(g, x_hat, rstd, c1, c2)
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + rows[:, None] * dh_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dz * x_hat
        if db_ptr is not None:
            db += dz
    at = first_col + tl.arange(0, BLOCK)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, p, P, part * N + at, at < N, parts * N)


# ---------------------------------------------------------------- launchers


def long_bwd(config, inputs, results, sizes, vec, early):
    """Takes what row_bwd has, and returns how many partial rows are filled."""
    x, N = inputs[1], sizes[1] * vec
    ASSEMBLES = assembles(x.device)
    launch(_row_bwd_long_kernel, config.partial_rows * config.shares, x.device, *inputs, *results, *sizes, BLOCK=config.block,
           PARTS=N // config.block, OWN=N // config.block // config.shares, ROW=heuristics.power_of_two(N), VEC=vec,
           ASSEMBLES=ASSEMBLES, AHEAD=config.ahead and ASSEMBLES, LEADS=early, warps=config.warps, stages=1,
           registers=config.registers)  # fmt: skip
    return config.partial_rows


def split_bwd(config, inputs, results, sizes, vec, early):
    """As long_bwd."""
    x, rstd, dx, M = inputs[1], inputs[4], results[0], sizes[0]
    c = None
    if dx is not None:
        c = torch.empty((2, heuristics.most_rows(M)), dtype=rstd.dtype, device=x.device)
        launch(_row_bwd_sums_kernel, M, x.device, *inputs, c, *sizes, BLOCK=config.sums_block, VEC=vec, LEADS=early,
               STAGES=config.sums_stages, warps=config.sums_warps, stages=config.sums_stages)  # fmt: skip
    return columns_bwd(config, inputs, c, results, sizes, vec, early)


def columns_bwd(config, inputs, c, results, sizes, vec, early, dh=None, dh_stride_v=None, parts=1):
    """The second half of split_bwd; `c` is what a launch just before it fills, None where dx is not wanted.

    `parts`: of the rows, each of which has parameters and partial rows of its own.
    """
    x, N = inputs[1], sizes[1] * vec
    launch(_row_bwd_columns_kernel, parts * config.partial_rows * heuristics.cdiv(N, config.block), x.device, *inputs, c,
           *results, *sizes, dh, dh_stride_v, None if parts == 1 else sizes[0] // parts, ROWS=config.rows, BLOCK=config.block,
           VEC=vec, STAGES=config.stages, LEADS=early, FOLLOWS=c is not None and overlaps(x.device), PARTED=parts > 1,
           warps=config.warps, stages=config.stages, registers=config.registers)  # fmt: skip
    return config.partial_rows
