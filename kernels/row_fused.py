"""Rows with what surrounds a norm: h = x + addend is normalised, y = act(z + residual); RMSNorm where CENTRE is not set.

The contract is written in reference.py; the kernels are those of row.py with more tensors, and without what long measurement
has added to those for one shape or another.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Rows
from .activations import activate, number
from .chain import let_next_start
from .launch import accumulate_dtype, dense, float_pair, launch, leads, sm_count, vector
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
    squares,
    sum2,
)
from .partial import finalise
from .row_long import columns_bwd
from .row_parts import (
    chunked_sums,
    in_place,
    load_dz,
    load_parameter,
    load_statistics,
    load_sum,
    parameter_places,
    part_of,
    store_statistics,
    store_sums,
)
from .wanted import load_wanted, store_wanted

SIZES = ["P", "M", "N_v", "T", "S_v", "x_stride_v", "addend_stride_v", "residual_stride_v", "dy_stride_v", "dh_stride_v"]


@triton.jit
def _finish(x_hat, weight, bias, residual, alpha, ACTIVATION: tl.constexpr):
    """y; weight, bias and residual may be None."""
    z = affine(x_hat, weight, bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return activate(z, alpha, ACTIVATION)


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low", "alpha"])
def _row_fused_fwd_kernel(x_ptr, addend_ptr, residual_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v,
                          T, S_v, x_stride_v, addend_stride_v, residual_stride_v, eps, eps_low, alpha, ROWS: tl.constexpr,
                          BLOCK: tl.constexpr, VEC: tl.constexpr, EARLY: tl.constexpr, CENTRE: tl.constexpr,
                          ACTIVATION: tl.constexpr, OF: tl.constexpr, VEC_S: tl.constexpr):  # fmt: skip
    """ROWS whole rows in registers. EARLY: parameters and residual are read with x. T, S_v, OF, VEC_S: see parameter_places."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 1 if OF == "group" else 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    N = N_v * VEC
    n = N.to(ACC)
    r = tl.arange(0, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + r
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < N
    mask = inside
    if ROWS > 1:
        mask = mask & (rows < M)[:, None]
    at, exists = parameter_places(rows, 0, N, M, T, S_v, OF, BLOCK, VEC_S)
    residual_at = rows[:, None] * residual_stride_v * VEC + cols
    out = rows[:, None] * N + cols
    x = load_sum(x_ptr, addend_ptr, rows[:, None] * x_stride_v * VEC + cols, rows[:, None] * addend_stride_v * VEC + cols, mask,
                 ACC, "evict_first")  # fmt: skip
    store_wanted(h_ptr, out, x, mask)
    if EARLY:
        weight = load_parameter(weight_ptr, at, exists, LONGEST, VEC_S)
        bias = load_parameter(bias_ptr, at, exists, LONGEST, VEC_S)
        residual = load_wanted(residual_ptr, residual_at, mask)
    if CENTRE:
        d, high, low, m2, scale = centred_moments(x, inside, n)
        rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
        x_hat = (d - low[:, None]) * rstd[:, None]
    else:
        m2, scale = squares(x)
        rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
        high = tl.zeros_like(rstd)
        low = high
        x_hat = x * rstd[:, None]
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    if not EARLY:
        weight = load_parameter(weight_ptr, at, exists, LONGEST, VEC_S)
        bias = load_parameter(bias_ptr, at, exists, LONGEST, VEC_S)
        residual = load_wanted(residual_ptr, residual_at, mask)
    y = _finish(x_hat, weight, bias, residual, alpha, ACTIVATION)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low", "alpha"])
def _row_fused_fwd_chunked_kernel(x_ptr, addend_ptr, residual_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr, M,
                                  N_v, T, S_v, x_stride_v, addend_stride_v, residual_stride_v, eps, eps_low, alpha,
                                  BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr, CENTRE: tl.constexpr,
                                  ACTIVATION: tl.constexpr, OF: tl.constexpr, VEC_S: tl.constexpr):  # fmt: skip
    """One row of any length: a sweep for the statistics, and one that adds again, rather than to wait for h, and normalises."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 1 if OF == "group" else 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    N = N_v * VEC
    n = N.to(ACC)
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    x_ptr += row * x_stride_v * VEC
    if addend_ptr is not None:
        addend_ptr += row * addend_stride_v * VEC
    shift = tl.zeros((1,), ACC)
    if CENTRE:
        first = load_sum(x_ptr, addend_ptr, cols, cols, cols < N, ACC, "")
        shift = quotient(tl.sum(first, axis=1), tl.minimum(N, BLOCK).to(ACC))
    scale = tl.full((1,), 1.0, ACC)
    s1, s2 = chunked_sums(x_ptr, addend_ptr, shift[:, None], None, N, BLOCK, STAGES)
    if any_inf(s2):
        scale = tl.full((1,), BIG_SCALE, ACC)
        s1, s2 = chunked_sums(x_ptr, addend_ptr, shift[:, None], scale[:, None], N, BLOCK, STAGES)
    if CENTRE:
        high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    else:
        high, low, m2 = shift, shift, s2
    rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES - 1):
        at = start + cols
        mask = cols < N - start
        x = load_sum(x_ptr, addend_ptr, at, at, mask, ACC, "evict_first")
        store_wanted(h_ptr, row * N + at, x, mask)
        x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
        parameter_at, exists = parameter_places(rows, start, N, M, T, S_v, OF, BLOCK, VEC_S)
        weight = load_parameter(weight_ptr, parameter_at, exists, LONGEST, VEC_S)
        bias = load_parameter(bias_ptr, parameter_at, exists, LONGEST, VEC_S)
        residual = load_wanted(residual_ptr, row * residual_stride_v * VEC + at, mask)
        y = _finish(x_hat, weight, bias, residual, alpha, ACTIVATION)
        tl.store(y_ptr + row * N + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "alpha"])
def _row_fused_bwd_kernel(dy_ptr, dh_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
                          partial_ptr, dw_ptr, db_ptr, P, M, N_v, T, dy_stride_v, dh_stride_v, x_stride_v, residual_stride_v,
                          alpha, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
                          CENTRE: tl.constexpr, ACTIVATION: tl.constexpr, LEADS: tl.constexpr,
                          PARTED: tl.constexpr):  # fmt: skip
    """Persistent single sweep, as _row_bwd_kernel; dz goes into the sums at once, so that g alone is kept beside x_hat. PARTED:
    a program has rows of one part alone."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    N = N_v * VEC
    part, first, end, p, sharing, parts = part_of(tl.program_id(0), tl.num_programs(0), M, T, PARTED)
    r = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    parameter_at = part * N + cols + (r * 0)[:, None]
    weight = load_parameter(weight_ptr, parameter_at, cols < N, VEC)
    bias = load_parameter(bias_ptr, parameter_at, cols < N, VEC)
    share = inverse(N.to(ACC))
    for group in tl.range(p, tl.cdiv(T if PARTED else M, ROWS), sharing, num_stages=STAGES):
        rows = first + (group * ROWS + r).to(tl.int64)
        mask = cols < N
        if ROWS > 1:
            mask = mask & (rows < end)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M, end)
        x_hat = normalize(x, high, low, rstd)
        dz = load_dz(dy_ptr, residual_ptr, rows[:, None] * dy_stride_v * VEC + cols,
                     rows[:, None] * residual_stride_v * VEC + cols, mask, x_hat, weight, bias, alpha,
                     ACTIVATION)  # fmt: skip
        out = rows[:, None] * N_v * VEC + cols
        store_wanted(dresidual_ptr, out, dz, mask)
        if dw_ptr is not None:
            dw += dz * x_hat
        if db_ptr is not None:
            db += dz
        if dx_ptr is not None:
            g = affine(dz, weight, None)
            if CENTRE:
                c1, c2 = sum2(g * x_hat, g, 1)
                dx = grad_input(g, x_hat, rstd, (c1 * share)[:, None], (c2 * share)[:, None])
            else:
                dx = grad_input(g, x_hat, rstd, (tl.sum(g * x_hat, axis=1) * share)[:, None], 0.0)
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + rows[:, None] * dh_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = tl.arange(0, BLOCK)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, p, P, part * N + at, at < N, parts * N)


@triton.jit(do_not_specialize=[*SIZES, "alpha"])
def _row_fused_bwd_sums_kernel(dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dz_ptr, c_ptr, M, N_v,
                               T, dy_stride_v, x_stride_v, residual_stride_v, alpha, BLOCK: tl.constexpr, VEC: tl.constexpr,
                               STAGES: tl.constexpr, CENTRE: tl.constexpr, ACTIVATION: tl.constexpr, LEADS: tl.constexpr,
                               PARTED: tl.constexpr):  # fmt: skip
    """dz of one long row, and its c1 and c2, in c: M of the one, then M of the other."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    let_next_start(LEADS)
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
    s1 = tl.zeros((1, BLOCK), ACC)
    s2 = tl.zeros((1, BLOCK), ACC)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        at = start + cols
        mask = cols < N - start
        x_hat = normalize(tl.load(x_ptr + row * x_stride_v * VEC + at, mask=mask, other=0.0).to(ACC), high, low, rstd)
        parameter_at, exists = parameter_places(rows, start, N, M, T, 0, "part" if PARTED else "row", BLOCK, 1)
        weight = load_parameter(weight_ptr, parameter_at, exists, VEC)
        bias = load_parameter(bias_ptr, parameter_at, exists, VEC)
        dz = load_dz(dy_ptr, residual_ptr, row * dy_stride_v * VEC + at, row * residual_stride_v * VEC + at, mask, x_hat,
                     weight, bias, alpha, ACTIVATION)  # fmt: skip
        store_wanted(dz_ptr, row * N + at, dz, mask)
        g = affine(dz, weight, None)
        s1 += g * x_hat
        s2 += g
    c1, c2 = sum2(s1, s2, 1)
    tl.store(c_ptr + rows, quotient(c1, N.to(ACC)))
    tl.store(c_ptr + M + rows, quotient(c2, N.to(ACC)) if CENTRE else tl.zeros_like(c2))


# ---------------------------------------------------------------- launchers


def _views(rows, *tensors):
    """Each as in_place gives it, its row stride apart; None, and 0, where there is none."""
    pairs = [(None, 0) if t is None else in_place(rows, t) for t in tensors]
    return [t for t, _ in pairs], [stride for _, stride in pairs]


def row_fused_fwd(x, addend, weight, bias, residual, activation, alpha, eps, N, centre=True):
    rows = Rows.of(x.shape, N)
    parts = _parts(weight, bias, N)
    of = ("part", rows.M // parts) if parts > 1 else ("row", None)
    return normalize_rows(rows, x, addend, weight, bias, residual, activation, alpha, eps, centre, *of)


def _parts(weight, bias, N):
    return next((p.numel() // N for p in (weight, bias) if p is not None), 1)


def normalize_rows(rows, x, addend, weight, bias, residual, activation, alpha, eps, centre, of, T, S=1):
    """y, h, mean and rstd; `of` and `T`: see parameter_places. S: columns of a channel."""
    N = rows.N
    acc, fresh = accumulate_dtype(x.dtype), lambda: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y, h = fresh(), None if addend is None else fresh()
    mean = torch.empty((2, rows.M), dtype=acc, device=x.device)
    rstd = torch.empty(rows.M, dtype=acc, device=x.device)
    inputs, strides = _views(rows, x, addend, residual)
    vec = vector(x.element_size(), N, *strides)
    vec_s = vector(x.element_size(), S)
    config = heuristics.row_fused_forward(N, x.element_size(), placed=of != "row")
    args = (*inputs, dense(weight), dense(bias), h, y, mean, rstd, rows.M, N // vec, T, S // vec_s if of == "group" else None,
            *(s // vec for s in strides), *float_pair(eps), number(activation, alpha))  # fmt: skip
    options = dict(BLOCK=config.block, VEC=vec, CENTRE=centre, ACTIVATION=activation, OF=of, VEC_S=vec_s, warps=config.warps,
                   stages=config.stages, registers=config.registers)  # fmt: skip
    if config.chunked:
        launch(_row_fused_fwd_chunked_kernel, rows.M, x.device, *args, STAGES=config.stages, **options)
    else:
        launch(_row_fused_fwd_kernel, heuristics.cdiv(rows.M, config.rows), x.device, *args, ROWS=config.rows,
               EARLY=config.early, **options)  # fmt: skip
    return y, h, mean, rstd


def _split_bwd(config, given, dresidual, results, sizes, alpha, options, parts):
    """dz is stored for the second launch, in dresidual where that is wanted; returns how many partial rows are filled."""
    (dy, dh, x, residual, weight, bias, mean, rstd), (M, N_v, T, dy_stride_v, dh_stride_v, *strides_v) = given, sizes
    identity = options["ACTIVATION"] == "identity"
    dz = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dresidual is None and not identity else dresidual
    c = None
    if results[0] is not None or dz is not None:
        c = torch.empty((2, M), dtype=rstd.dtype, device=x.device)
        launch(_row_fused_bwd_sums_kernel, M, x.device, dy, x, residual, weight, bias, mean, rstd, dz, c, M, N_v, T,
               dy_stride_v, *strides_v, alpha, BLOCK=config.sums_block, STAGES=config.sums_stages, **options,
               warps=config.sums_warps, stages=config.sums_stages,
               registers=heuristics.registers(config.sums_warps))  # fmt: skip
    if results[0] is None and results[1] is None:
        return 0
    dy, dy_stride_v = (dy, dy_stride_v) if identity else (dz, N_v)
    return columns_bwd(config, (dy, x, weight, mean, rstd), c, results, (M, N_v, dy_stride_v, strides_v[0]), options["VEC"],
                       options["LEADS"], dh, dh_stride_v, parts)  # fmt: skip


def row_fused_bwd(dy, dh, x, residual, weight, bias, activation, alpha, mean, rstd, need, centre=True):
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    if not any(need):
        return None, None, None, None
    parts = _parts(weight, bias, rows.N)
    columns = parts * rows.N
    fresh = lambda wanted: torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
    dx, dresidual = fresh(need[0]), fresh(need[3])
    dw, db = (None if dtype is None else torch.empty(columns, dtype=dtype, device=x.device) for dtype in need[1:3])
    if activation == "identity":
        bias = residual = None  # z is not asked for
    inputs, strides = _views(rows, dy, dh if need[0] else None, x, residual)
    vec = vector(x.element_size(), rows.N, *strides)
    tensors = sum(t is not None for t in inputs)
    config = heuristics.row_fused_backward(rows.M, rows.N, x.element_size(), sm_count(x.device), tensors, parts)
    partial = None
    if dw is not None or db is not None:
        partial = torch.empty((2, config.partial_rows, columns), dtype=rstd.dtype, device=x.device)
    given = (*inputs, dense(weight), dense(bias), dense(mean), dense(rstd))
    sizes = rows.M, rows.N // vec, None if parts == 1 else rows.M // parts, *(s // vec for s in strides)
    options = dict(CENTRE=centre, ACTIVATION=activation, VEC=vec, LEADS=leads(x.device, x.nbytes), PARTED=parts > 1)
    if isinstance(config, heuristics.RowBackwardSplit):
        results = dx, partial, dw, db, config.partial_rows
        filled = _split_bwd(config, given, dresidual, results, sizes, number(activation, alpha), options, parts)
    else:
        filled = min(config.partial_rows, heuristics.cdiv(rows.M // parts, config.rows))
        launch(_row_fused_bwd_kernel, parts * filled, x.device, *given, dx, dresidual, partial, dw, db, config.partial_rows,
               *sizes, number(activation, alpha), ROWS=config.rows, BLOCK=config.block, STAGES=config.stages, **options,
               warps=config.warps, stages=config.stages, registers=config.registers)  # fmt: skip
    if partial is not None and config.partial_rows > 1:
        finalise(partial, dw, db, filled=filled)
    return dx, dw, db, dresidual
