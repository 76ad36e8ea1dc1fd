"""Rows (M, N): statistics per row. The contract of row_fwd and row_bwd is written in reference.py.

Kernels get N and row strides divided by VEC, see launch.vector. A row starts at an int64 offset; inside a row offsets are
int32, so N < 2^31.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Rows
from .launch import accumulate_dtype, dense, float_pair, launch, sm_count, vector
from .math import BIG_SCALE, any_inf, grad_input, moments, normalize, pair_of, rstd_of, shifted_moments, sum2
from .partial import finalise_sums


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
def _store_y(y_ptr, weight_ptr, bias_ptr, x_hat, cols, weight_cols, N, mask):
    """weight_cols has the shape of x_hat: the parameters are then loaded in its layout, whatever their dtype."""
    y = x_hat
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + weight_cols, mask=weight_cols < N, other=0.0).to(y.dtype)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + weight_cols, mask=weight_cols < N, other=0.0).to(y.dtype)
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
    _store_y(y_ptr + rows[:, None] * N_v * VEC, weight_ptr, bias_ptr, x_hat, cols, cols + (r * 0)[:, None], N, mask)


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
        _store_y(y_ptr, weight_ptr, bias_ptr, x_hat, start + cols, start + cols, N, mask)


@triton.jit(do_not_specialize=["M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_partial_ptr, db_partial_ptr, M, N_v,
                    dy_stride_v, x_stride_v, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Persistent single sweep: dx row by row, weight and bias gradients summed in registers, one partial row per program.

    What is not wanted has no pointer. Lanes outside a row hold dz = 0, which is all that keeps them out of the sums.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    pid = tl.program_id(0)
    r = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0)
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
        if dw_partial_ptr is not None:
            dw += dz * x_hat
        if db_partial_ptr is not None:
            db += dz
    partial = pid.to(tl.int64) * N_v * VEC + tl.arange(0, BLOCK)
    if dw_partial_ptr is not None:
        tl.store(dw_partial_ptr + partial, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < N)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < N)


@triton.jit(do_not_specialize=["first_row", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_sums_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, first_row, M, N_v,
                         dy_stride_v, x_stride_v, BLOCK: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """c1 and c2 of one long row."""
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
            g = g * tl.load(weight_ptr + start + cols, mask=mask, other=0.0).to(ACC)
        s1 += g * x_hat
        s2 += g
    c1, c2 = sum2(s1, s2, 1)
    tl.store(c1_ptr + rows, c1 / N.to(ACC))
    tl.store(c2_ptr + rows, c2 / N.to(ACC))


@triton.jit(do_not_specialize=["first_row", "last_row", "rows_per", "first_partial", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_columns_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, c1_ptr, c2_ptr, dx_ptr, dw_partial_ptr,
                            db_partial_ptr, first_row, last_row, rows_per, first_partial, M, N_v, dy_stride_v, x_stride_v,
                            BLOCK: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """BLOCK columns of rows_per rows: dx with the known c1 and c2, and one partial row of the weight and bias gradients."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    blocks = tl.cdiv(N, BLOCK)
    p = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = cols < N
    dw = tl.zeros((1, BLOCK), ACC)
    db = tl.zeros((1, BLOCK), ACC)
    if dx_ptr is not None and weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(ACC)
    begin = first_row + p * rows_per
    for row in range(begin, tl.minimum(begin + rows_per, last_row)):
        rows = row + tl.arange(0, 1).to(tl.int64)
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = _load_statistics(mean_ptr, rstd_ptr, rows, last_row, M)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = dz
            if weight_ptr is not None:
                g = dz * weight
            dx = grad_input(g, x_hat, rstd, tl.load(c1_ptr + rows)[:, None], tl.load(c2_ptr + rows)[:, None])
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_partial_ptr is not None:
            dw += dz * x_hat
        if db_partial_ptr is not None:
            db += dz
    partial = (p + first_partial).to(tl.int64) * N_v * VEC + cols
    if dw_partial_ptr is not None:
        tl.store(dw_partial_ptr + partial, dw, mask=mask)
    if db_partial_ptr is not None:
        tl.store(db_partial_ptr + partial, db, mask=mask)


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
    args = (source, dense(weight), dense(bias), y, mean, rstd, rows.M, N // vec, stride // vec, *float_pair(eps))
    if config.chunked:
        launch(_row_fwd_chunked_kernel, rows.M, x.device, *args, BLOCK=config.block, VEC=vec, warps=config.warps)
    else:
        launch(_row_fwd_kernel, heuristics.cdiv(rows.M, config.rows), x.device, *args,
               ROWS=config.rows, BLOCK=config.block, VEC=vec, warps=config.warps)  # fmt: skip
    return y, mean, rstd


def row_bwd(dy, x, weight, mean, rstd, need):
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    if not need[0] and need[1] is None and need[2] is None:
        return None, None, None
    config = heuristics.row_backward(rows.M, rows.N, x.element_size(), sm_count(x.device))
    split = isinstance(config, heuristics.RowBackwardSplit)
    partial_rows = sum(programs for _, _, programs in _panels(rows.M, config)) if split else config.programs
    partial = lambda dtype: None if dtype is None else rstd.new_empty((partial_rows, rows.N))
    dw_partial, db_partial = partial(need[1]), partial(need[2])
    dy, dy_stride = _in_place(rows, dy)
    x, x_stride = _in_place(rows, x)
    vec = vector(min(x.element_size(), dy.element_size()), rows.N, dy_stride, x_stride)
    sizes = (rows.M, rows.N // vec, dy_stride // vec, x_stride // vec)
    inputs = (dy, x, dense(weight), dense(mean), dense(rstd))
    if split:
        _row_bwd_split(config, rows, inputs, dx, dw_partial, db_partial, sizes, vec)
    else:
        launch(_row_bwd_kernel, config.programs, x.device, *inputs, dx, dw_partial, db_partial, *sizes, ROWS=config.rows,
               BLOCK=config.block, VEC=vec, STAGES=config.stages, warps=config.warps, stages=config.stages)  # fmt: skip
    if dw_partial is None and db_partial is None:
        return dx, None, None
    dweight, dbias, _, _ = finalise_sums(dw_partial, db_partial, need[1], need[2])
    return dx, dweight, dbias


def _panels(M, config):
    """(first row, last row, row programs) of every panel."""
    panels = [(first, min(first + config.panel_rows, M)) for first in range(0, M, config.panel_rows)]
    return [(first, last, heuristics.cdiv(last - first, config.rows_per_program)) for first, last in panels]


def _row_bwd_split(config, rows, inputs, dx, dw_partial, db_partial, sizes, vec):
    rstd = inputs[-1]
    c1, c2 = (None, None) if dx is None else (torch.empty_like(rstd), torch.empty_like(rstd))
    partial = 0
    for first, last, programs in _panels(rows.M, config):
        if dx is not None:
            launch(_row_bwd_sums_kernel, last - first, rstd.device, *inputs, c1, c2, first, *sizes,
                   BLOCK=config.sums_block, VEC=vec, warps=config.sums_warps)  # fmt: skip
        launch(_row_bwd_columns_kernel, programs * heuristics.cdiv(rows.N, config.block), rstd.device, *inputs, c1, c2, dx,
               dw_partial, db_partial, first, last, config.rows_per_program, partial, *sizes,
               BLOCK=config.block, VEC=vec, warps=config.warps)  # fmt: skip
        partial += programs
