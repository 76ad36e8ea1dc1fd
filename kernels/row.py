"""Rows (M, N): statistics per row. The contract of row_fwd and row_bwd is written in reference.py.

Kernels get N and row strides divided by VEC, see launch.vector. A row starts at an int64 offset; inside a row offsets are
int32, so N < 2^31.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Rows
from .launch import Count, accumulate_dtype, dense, float_pair, launch, sm_count, vector
from .math import BIG_SCALE, any_inf, grad_input, moments, normalize, pair_of, rstd_of, shifted_moments, sum2
from .partial import finalise


@triton.jit
def _store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd):
    mask = rows < M
    tl.store(mean_ptr + rows, high, mask=mask)
    tl.store(mean_ptr + M + rows, low, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask)


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, rows, end, M):
    """high, low, rstd of rows, each [rows, 1]; 0 from row `end` on."""
    mask = rows < end
    high = tl.load(mean_ptr + rows, mask=mask, other=0.0)
    low = tl.load(mean_ptr + M + rows, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask, other=0.0)
    return high[:, None], low[:, None], rstd[:, None]


@triton.jit
def _load_parameter(ptr, cols, N, LONGEST: tl.constexpr):
    """In the layout of x, whatever the dtype: that takes `cols` of the shape of x, and vectors no longer than those of x."""
    return tl.load(tl.max_contiguous(ptr + cols, (1, LONGEST)), mask=cols < N, other=0.0)


@triton.jit
def _store_y(y_ptr, weight_ptr, bias_ptr, x_hat, cols, parameter_cols, N, mask, LONGEST: tl.constexpr):
    y = x_hat
    if weight_ptr is not None:
        y = y * _load_parameter(weight_ptr, parameter_cols, N, LONGEST).to(y.dtype)
    if bias_ptr is not None:
        y = y + _load_parameter(bias_ptr, parameter_cols, N, LONGEST).to(y.dtype)
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N_v", "x_stride_v", "eps", "eps_low"])
def _row_fwd_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, x_stride_v, eps, eps_low,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """ROWS whole rows in registers: one read, one write."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    r = tl.arange(0, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + r
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < N
    if ROWS > 1:
        mask = mask & (rows < M)[:, None]
    x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
    high, low, m2, scale = moments(x, cols < N, N.to(ACC))
    rstd = rstd_of(m2, N.to(ACC), scale, pair_of(eps, eps_low, ACC))
    _store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
    _store_y(y_ptr + rows[:, None] * N_v * VEC, weight_ptr, bias_ptr, x_hat, cols, cols + (r * 0)[:, None], N, mask,
             128 // x_ptr.dtype.element_ty.primitive_bitwidth)  # fmt: skip


@triton.jit
def _chunked_sums(x_ptr, shift, scale, N, BLOCK: tl.constexpr):
    """sum((x - shift) * scale) and the sum of its squares over one row, each [1]."""
    cols = tl.arange(0, BLOCK)[None, :]
    s1 = tl.zeros((1, BLOCK), shift.dtype)
    s2 = tl.zeros((1, BLOCK), shift.dtype)
    for start in range(0, N, BLOCK):
        mask = cols < N - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(shift.dtype)
        d = tl.where(mask, (x - shift) * scale, 0.0)
        s1 += d
        s2 += d * d
    return sum2(s1, s2, 1)


@triton.jit(do_not_specialize=["M", "N_v", "x_stride_v", "eps", "eps_low"])
def _row_fwd_chunked_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, x_stride_v, eps, eps_low,
                            BLOCK: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """One row of any length: a sweep for the statistics, and one that rereads the row (from L2) to normalise it."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    n = N.to(ACC)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride_v * VEC
    y_ptr += tl.program_id(0).to(tl.int64) * N_v * VEC
    first = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    shift = tl.sum(first, axis=1) / tl.minimum(N, BLOCK).to(ACC)
    scale = tl.full((1,), 1.0, ACC)
    s1, s2 = _chunked_sums(x_ptr, shift[:, None], scale[:, None], N, BLOCK)
    if any_inf(s2):
        scale = tl.full((1,), BIG_SCALE, ACC)
        s1, s2 = _chunked_sums(x_ptr, shift[:, None], scale[:, None], N, BLOCK)
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
    _store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    for start in range(0, N, BLOCK):
        mask = cols < N - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
        _store_y(y_ptr, weight_ptr, bias_ptr, x_hat, start + cols, start + cols, N, mask,
                 128 // x_ptr.dtype.element_ty.primitive_bitwidth)  # fmt: skip


@triton.jit
def _store_partials(partial_ptr, dw, db, p, P, cols, N_v, N, VEC: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr):
    """Row p of partial (2, P, N): the sums over axis 0 of dw and of db, each where it is wanted."""
    at = partial_ptr + p.to(tl.int64) * N_v * VEC + cols
    if DW:
        tl.store(at, tl.sum(dw, axis=0), mask=cols < N)
    if DB:
        tl.store(at + tl.cast(P, tl.int64) * N_v * VEC, tl.sum(db, axis=0), mask=cols < N)


@triton.jit(do_not_specialize=["P", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, P, M, N_v, dy_stride_v, x_stride_v,
                    DW: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Persistent single sweep: dx row by row, weight and bias gradients summed in registers, one partial row per program.

    Lanes outside a row hold dz = 0, which is all that keeps them out of the sums.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    pid = tl.program_id(0)
    r = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None and weight_ptr is not None:
        weight = _load_parameter(weight_ptr, cols + (r * 0)[:, None], N, VEC)
    for group in tl.range(pid, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (group * ROWS + r).to(tl.int64)
        mask = cols < N
        if ROWS > 1:
            mask = mask & (rows < M)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, M, M)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = dz
            if weight_ptr is not None:
                g = dz * weight.to(ACC)
            c1, c2 = sum2(g * x_hat, g, 1)
            dx = grad_input(g, x_hat, rstd, (c1 / N.to(ACC))[:, None], (c2 / N.to(ACC))[:, None])
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if DW:
            dw += dz * x_hat
        if DB:
            db += dz
    if partial_ptr is not None:
        _store_partials(partial_ptr, dw, db, pid, P, tl.arange(0, BLOCK), N_v, N, VEC, DW, DB)


@triton.jit(do_not_specialize=["first_row", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_sums_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, first_row, M, N_v, dy_stride_v, x_stride_v,
                         BLOCK: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """c (2, M): c1 and c2 of one long row."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    row = tl.program_id(0).to(tl.int64) + first_row
    rows = row + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    high, low, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, M, M)
    x_ptr += row * x_stride_v * VEC
    dy_ptr += row * dy_stride_v * VEC
    s1 = tl.zeros((1, BLOCK), ACC)
    s2 = tl.zeros((1, BLOCK), ACC)
    for start in range(0, N, BLOCK):
        mask = cols < N - start
        x_hat = normalize(tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(ACC), high, low, rstd)
        g = tl.load(dy_ptr + start + cols, mask=mask, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * _load_parameter(weight_ptr, start + cols, N, VEC).to(ACC)
        s1 += g * x_hat
        s2 += g
    c1, c2 = sum2(s1, s2, 1)
    tl.store(c_ptr + rows, c1 / N.to(ACC))
    tl.store(c_ptr + M + rows, c2 / N.to(ACC))


@triton.jit(do_not_specialize=["first_row", "last_row", "rows_per", "first_partial", "P", "M", "N_v", "dy_stride_v",
                               "x_stride_v"])  # fmt: skip
def _row_bwd_columns_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, dx_ptr, partial_ptr, first_row, last_row,
                            rows_per, first_partial, P, M, N_v, dy_stride_v, x_stride_v, DW: tl.constexpr, DB: tl.constexpr,
                            ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """BLOCK columns of rows_per rows: dx with the known c1 and c2, and one partial row of the weight and bias gradients."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    blocks = tl.cdiv(N, BLOCK)
    p = tl.program_id(0) // blocks
    first_col = (tl.program_id(0) % blocks) * BLOCK
    r = tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None and weight_ptr is not None:
        weight = _load_parameter(weight_ptr, cols + (r * 0)[:, None], N, VEC)
    begin = first_row + p * rows_per
    end = tl.minimum(begin + rows_per, last_row)
    for row in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = (row + r).to(tl.int64)
        mask = (cols < N) & (rows < end)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, end, M)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = dz
            if weight_ptr is not None:
                g = dz * weight.to(ACC)
            c1 = tl.load(c_ptr + rows, mask=rows < end, other=0.0)[:, None]
            c2 = tl.load(c_ptr + M + rows, mask=rows < end, other=0.0)[:, None]
            dx = grad_input(g, x_hat, rstd, c1, c2)
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if DW:
            dw += dz * x_hat
        if DB:
            db += dz
    if partial_ptr is not None:
        _store_partials(partial_ptr, dw, db, p + first_partial, P, first_col + tl.arange(0, BLOCK), N_v, N, VEC, DW, DB)


# ---------------------------------------------------------------- launchers


def _in_place(rows, x):
    """x as (M, N) with column stride 1, and its row stride; copies only where no such view exists."""
    x = rows.view(x)
    if rows.N > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if rows.M > 1 else rows.N


def row_fwd(x, weight, bias, eps, N, dtype=None):
    rows = Rows.of(x.shape, N)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    acc = accumulate_dtype(x.dtype)
    mean = torch.empty((2, rows.M), dtype=acc, device=x.device)
    rstd = torch.empty(rows.M, dtype=acc, device=x.device)
    source, stride = _in_place(rows, x)
    config = heuristics.row_forward(N, x.element_size())
    vec = vector(x.element_size(), N, stride)
    M = Count(rows.M)
    args = (source, dense(weight), dense(bias), y, mean, rstd, M, N // vec, stride // vec, *float_pair(eps))
    if config.chunked:
        launch(_row_fwd_chunked_kernel, M, x.device, *args, BLOCK=config.block, VEC=vec, warps=config.warps)
    else:
        launch(_row_fwd_kernel, Count(rows.M, config.rows), x.device, *args,
               ROWS=config.rows, BLOCK=config.block, VEC=vec, warps=config.warps)  # fmt: skip
    return y, mean, rstd


def row_bwd(dy, x, weight, mean, rstd, need):
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    wanted = need[1] is not None, need[2] is not None
    if not need[0] and not any(wanted):
        return None, None, None
    config = heuristics.row_backward(rows.M, rows.N, x.element_size(), sm_count(x.device))
    split = isinstance(config, heuristics.RowBackwardSplit)
    partial = None
    if any(wanted):
        partial = torch.empty((2, config.partial_rows, rows.N), dtype=rstd.dtype, device=x.device)
    dy, dy_stride = _in_place(rows, dy)
    x, x_stride = _in_place(rows, x)
    vec = vector(min(x.element_size(), dy.element_size()), rows.N, dy_stride, x_stride)
    inputs = (dy, x, dense(weight), dense(mean), dense(rstd))
    # The split's panels are others for another M, so that its M is a number like others.
    sizes = (rows.M if split else Count(rows.M), rows.N // vec, dy_stride // vec, x_stride // vec)
    programs = config.partial_rows if split else Count(rows.M, config.rows, config.partial_rows)
    if split:
        _row_bwd_split(config, rows, inputs, dx, partial, sizes, vec, wanted)
    else:
        launch(_row_bwd_kernel, programs, x.device, *inputs, dx, partial, config.partial_rows, *sizes,
               DW=wanted[0], DB=wanted[1], ROWS=config.rows, BLOCK=config.block, VEC=vec, STAGES=config.stages,
               warps=config.warps, stages=config.stages, registers=config.registers)  # fmt: skip
    if partial is None:
        return dx, None, None
    dw, db = (None if dtype is None else torch.empty(rows.N, dtype=dtype, device=x.device) for dtype in need[1:])
    finalise(partial, dw, db, filled=programs)
    return dx, dw, db


def _row_bwd_split(config, rows, inputs, dx, partial, sizes, vec, wanted):
    rstd = inputs[-1]
    c = None if dx is None else torch.empty((2, rows.M), dtype=rstd.dtype, device=rstd.device)
    partial_row = 0
    for first in range(0, rows.M, config.panel_rows):
        last = min(first + config.panel_rows, rows.M)
        programs = heuristics.cdiv(last - first, config.rows_per_program)
        if dx is not None:
            launch(_row_bwd_sums_kernel, last - first, rstd.device, *inputs, c, first, *sizes,
                   BLOCK=config.sums_block, VEC=vec, warps=config.sums_warps)  # fmt: skip
        launch(_row_bwd_columns_kernel, programs * heuristics.cdiv(rows.N, config.block), rstd.device, *inputs, c, dx, partial,
               first, last, config.rows_per_program, partial_row, config.partial_rows, *sizes, DW=wanted[0], DB=wanted[1],
               ROWS=config.rows, BLOCK=config.block, VEC=vec, STAGES=config.stages, warps=config.warps,
               stages=config.stages)  # fmt: skip
        partial_row += programs
