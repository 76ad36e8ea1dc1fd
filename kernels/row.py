"""Rows (M, N): statistics per row. The contract of row_fwd and row_bwd is written in reference.py.

Kernels get N and row strides divided by VEC, see launch.vector. A row starts at an int64 offset; inside a row offsets are
int32, so N < 2^31.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Rows
from .chain import let_next_start
from .launch import Count, accumulate_dtype, assembles, dense, float_pair, launch, leads, registers_in_pairs, sm_count, vector
from .math import (
    BIG_SCALE,
    affine,
    any_inf,
    centred_moments,
    grad_input,
    inverse,
    normalize,
    pair_of,
    quotient,
    rstd_of,
    shifted_moments,
    sum2,
)
from .partial import finalise
from .prefetch import prefetch_row
from .row_long import long_bwd, split_bwd
from .row_parts import chunked_sums, in_place, load_parameter, load_statistics, store_statistics, store_sums


@triton.jit
def _normalize_rows(group, x_ptr, weight_ptr, bias_ptr, kept_weight, kept_bias, y_ptr, mean_ptr, rstd_ptr, M, N, x_stride_v,
                    eps, ahead, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr,
                    EARLY: tl.constexpr, KEPT: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """The group-th ROWS rows. KEPT: weight and bias are in registers already."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    r = tl.arange(0, ROWS)
    rows = tl.cast(group, tl.int64) * ROWS + r
    cols = tl.arange(0, BLOCK)[None, :]
    inside = tl.full((1, BLOCK), True, tl.int1) if WHOLE else cols < N
    mask = inside
    if ROWS > 1:
        mask = mask & (rows < M)[:, None]
    parameter_cols = cols + (r * 0)[:, None]
    # Parameters are what L1 is to keep.
    x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    if AHEAD:
        prefetch_row(x_ptr, group + ahead, M, N, x_stride_v, BLOCK, VEC)
    weight, bias = kept_weight, kept_bias
    if EARLY and not KEPT:
        weight = load_parameter(weight_ptr, parameter_cols, inside, LONGEST)
        bias = load_parameter(bias_ptr, parameter_cols, inside, LONGEST)
    d, high, low, m2, scale = centred_moments(x, inside, N.to(ACC))
    rstd = rstd_of(m2, N.to(ACC), scale, eps)
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    x_hat = (d - low[:, None]) * rstd[:, None]
    if not EARLY and not KEPT:
        weight = load_parameter(weight_ptr, parameter_cols, inside, LONGEST)
        bias = load_parameter(bias_ptr, parameter_cols, inside, LONGEST)
    y = affine(x_hat, weight, bias)
    tl.store(y_ptr + rows[:, None] * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N_v", "x_stride_v", "eps", "eps_low", "ahead"])
def _row_fwd_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, x_stride_v, eps, eps_low, ahead,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
                    AHEAD: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """ROWS whole rows in registers: one read, one write. WHOLE: N is BLOCK. EARLY: the parameters are read with x. AHEAD: the
    row `ahead` rows later, another program's, is asked for. With more STAGES than one programs are persistent."""
    N = N_v * VEC
    eps = pair_of(eps, eps_low, rstd_ptr.dtype.element_ty)
    if STAGES > 1:
        LONGEST: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        cols = tl.arange(0, BLOCK)[None, :] + (tl.arange(0, ROWS) * 0)[:, None]
        weight = load_parameter(weight_ptr, cols, cols < N, LONGEST)
        bias = load_parameter(bias_ptr, cols, cols < N, LONGEST)
        for group in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
            _normalize_rows(group, x_ptr, weight_ptr, bias_ptr, weight, bias, y_ptr, mean_ptr, rstd_ptr, M, N, x_stride_v,
                            eps, ahead, ROWS, BLOCK, VEC, WHOLE, EARLY, True, AHEAD)  # fmt: skip
    else:
        _normalize_rows(tl.program_id(0), x_ptr, weight_ptr, bias_ptr, None, None, y_ptr, mean_ptr, rstd_ptr, M, N, x_stride_v,
                        eps, ahead, ROWS, BLOCK, VEC, WHOLE, EARLY, False, AHEAD)  # fmt: skip


@triton.jit(do_not_specialize=["M", "N_v", "x_stride_v", "eps", "eps_low"])
def _row_fwd_chunked_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, x_stride_v, eps, eps_low,
                            BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One row of any length: a sweep for the statistics, and one that rereads the row (from L2) to normalise it.

    The second has three tensors to prefetch, and prefetches one chunk less of them.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    N = N_v * VEC
    n = N.to(ACC)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride_v * VEC
    y_ptr += tl.program_id(0).to(tl.int64) * N_v * VEC
    first = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    shift = quotient(tl.sum(first, axis=1), tl.minimum(N, BLOCK).to(ACC))
    scale = tl.full((1,), 1.0, ACC)
    s1, s2 = chunked_sums(x_ptr, None, shift[:, None], None, N, BLOCK, STAGES)
    if any_inf(s2):
        scale = tl.full((1,), BIG_SCALE, ACC)
        s1, s2 = chunked_sums(x_ptr, None, shift[:, None], scale[:, None], N, BLOCK, STAGES)
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES - 1):
        mask = cols < N - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
        weight = load_parameter(weight_ptr, start + cols, mask, LONGEST)
        bias = load_parameter(bias_ptr, start + cols, mask, LONGEST)
        y = affine(x_hat, weight, bias)
        tl.store(y_ptr + (start + cols), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "M", "N_v", "dy_stride_v", "x_stride_v"])
def _row_bwd_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P, M, N_v, dy_stride_v,
                    x_stride_v, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
                    LEADS: tl.constexpr):  # fmt: skip
    """Persistent single sweep: dx row by row, weight and bias gradients summed in registers, one partial row per program.

    Lanes outside a row hold dz = 0, which is all that keeps them out of the sums.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    N = N_v * VEC
    pid = tl.program_id(0)
    r = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None and weight_ptr is not None:
        weight = load_parameter(weight_ptr, cols + (r * 0)[:, None], cols < N, VEC)
    share = inverse(N.to(ACC))
    for group in tl.range(pid, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (group * ROWS + r).to(tl.int64)
        mask = cols < N
        if ROWS > 1:
            mask = mask & (rows < M)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = dz
            if weight_ptr is not None:
                g = dz * weight.to(ACC)
            c1, c2 = sum2(g * x_hat, g, 1)
            dx = grad_input(g, x_hat, rstd, (c1 * share)[:, None], (c2 * share)[:, None])
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dz * x_hat
        if db_ptr is not None:
            db += dz
    at = tl.arange(0, BLOCK)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, pid, P, at, at < N, N)


# ---------------------------------------------------------------- launchers


def row_fwd(x, weight, bias, eps, N, dtype=None):
    rows = Rows.of(x.shape, N)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    acc = accumulate_dtype(x.dtype)
    mean = torch.empty((2, rows.M), dtype=acc, device=x.device)
    rstd = torch.empty(rows.M, dtype=acc, device=x.device)
    source, stride = in_place(rows, x)
    vec = vector(x.element_size(), N, stride)
    config = heuristics.row_forward(N, x.element_size(), sm_count(x.device))
    M = Count(rows.M)
    args = (source, dense(weight), dense(bias), y, mean, rstd, M, N // vec, stride // vec, *float_pair(eps))
    if config.chunked:
        launch(_row_fwd_chunked_kernel, M, x.device, *args, BLOCK=config.block, VEC=vec, STAGES=config.stages,
               warps=config.warps, stages=config.stages)  # fmt: skip
    else:
        programs = Count(rows.M, config.rows, *([config.programs] if config.programs else []))
        launch(_row_fwd_kernel, programs, x.device, *args, config.ahead, ROWS=config.rows,
               BLOCK=config.block, VEC=vec, WHOLE=N == config.block, EARLY=config.early,
               AHEAD=config.ahead > 0 and assembles(x.device), STAGES=config.stages, warps=config.warps, stages=config.stages,
               registers=config.registers)  # fmt: skip
    return y, mean, rstd


def row_bwd(dy, x, weight, mean, rstd, need):
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    if not any(need):
        return None, None, None
    dw, db = (None if dtype is None else torch.empty(rows.N, dtype=dtype, device=x.device) for dtype in need[1:])
    dy, dy_stride = in_place(rows, dy)
    x, x_stride = in_place(rows, x)
    vec = vector(min(x.element_size(), dy.element_size()), rows.N, dy_stride, x_stride)
    alike = dy.element_size() == x.element_size() >= (0 if weight is None else weight.element_size())
    config = heuristics.row_backward(
        rows.M, rows.N, x.element_size(), sm_count(x.device), easy=alike and vec * x.element_size() == 16,
        paired=registers_in_pairs(x.device))  # fmt: skip
    partial = None
    if dw is not None or db is not None:
        partial = torch.empty((2, config.partial_rows, rows.N), dtype=rstd.dtype, device=x.device)
    inputs = (dy, x, dense(weight), dense(mean), dense(rstd))
    results = (dx, partial, dw, db, config.partial_rows)
    sizes = (Count(rows.M), rows.N // vec, dy_stride // vec, x_stride // vec)
    early = leads(x.device, heuristics.most_rows(rows.M) * rows.N * x.element_size())
    if isinstance(config, heuristics.RowBackwardSplit):
        filled = split_bwd(config, inputs, results, sizes, vec, early)
    elif isinstance(config, heuristics.RowBackwardLong):
        filled = long_bwd(config, inputs, results, sizes, vec, early)
    else:
        filled = Count(rows.M, config.rows, config.partial_rows)
        launch(_row_bwd_kernel, filled, x.device, *inputs, *results, *sizes, ROWS=config.rows, BLOCK=config.block, VEC=vec,
               STAGES=config.stages, LEADS=early, warps=config.warps, stages=config.stages,
               registers=config.registers)  # fmt: skip
    if partial is not None and config.partial_rows > 1:
        finalise(partial, dw, db, filled=filled)
    return dx, dw, db
