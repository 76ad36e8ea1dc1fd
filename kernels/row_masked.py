"""Rows of which some columns do not count: statistics over those that do, and the gradient of what is made with them.

The kernels are those of row.py with a mask, one byte for each of the D neighbouring rows and Q neighbouring columns that it is
the same for. What does not count may be anything: it is chosen away, never multiplied by 0. The contract is written in
reference.py.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Rows
from .chain import let_next_start, wait_for_previous
from .launch import accumulate_dtype, dense, float_pair, launch, leads, overlaps, sm_count, vector
from .math import (
    BIG_SCALE,
    add_shifted,
    affine,
    centred_moments,
    grad_input,
    if_finite,
    inverse,
    normalize,
    pair_of,
    quotient,
    rstd_of,
    shifted_moments,
    sum2,
)
from .partial import finalise
from .row_parts import in_place, load_parameter, load_statistics, store_statistics, store_sums

SIZES = ["P", "M", "N_v", "D", "S", "Q_v", "x_stride_v", "dy_stride_v"]


@triton.jit
def _first_byte(rows, N, D, S, OF: tl.constexpr):
    """Where the bytes of rows begin in the mask (R, S), D rows of x to one of its own. OF: see _counting."""
    if OF == "row":
        return rows // D
    elif OF == "element":
        return rows // D * N
    else:
        return rows // D * S


@triton.jit
def _counting(mask_ptr, first, exists, start, N, Q_v, OF: tl.constexpr, BLOCK: tl.constexpr, VEC_Q: tl.constexpr):
    """Whether BLOCK columns from `start` on count, [rows, columns]; nothing does outside. `first`, `exists`: of rows.

    OF: what there is a byte for. "row": a whole row, and the result is [rows, 1]. "element": each column. "part": each
    Q_v * VEC_Q columns, of which VEC_Q take one load; N and `start` are multiples of VEC_Q.
    """
    if OF == "row":
        return tl.load(mask_ptr + first, mask=exists, other=0)[:, None] != 0
    elif OF == "element":
        cols = start + tl.arange(0, BLOCK)[None, :]
        return tl.load(mask_ptr + (first[:, None] + cols), mask=exists[:, None] & (cols < N), other=0) != 0
    else:
        tl.static_assert(OF == "part")
        cols = tl.arange(0, BLOCK // VEC_Q)[None, :]
        inside = exists[:, None] & (cols * VEC_Q < N - start)
        part = (start // VEC_Q + cols).to(tl.uint32) // tl.cast(Q_v, tl.uint32)  # one division for a vector
        return load_parameter(mask_ptr, first[:, None] + part.to(tl.int32), inside, 1, VEC_Q) != 0


@triton.jit
def _count(counts, N, OF: tl.constexpr):
    """How many columns of each row count, int32"""
    if OF == "row":
        return tl.sum(tl.where(counts, N, 0), axis=1)
    else:
        return tl.sum(counts.to(tl.int32), axis=1)


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _means(g, x_hat, counts, N, OF: tl.constexpr):
    """c1 and c2 of each row, [rows, 1]: sums over all of it, divided by the count of what counts, which is 1 at the least."""
    if OF == "row":
        c1, c2 = sum2(g * x_hat, g, 1)
        n = N.to(g.dtype)  # of a row that does not count c1 and c2 are not used
    else:
        c1, c2, n = tl.reduce((g * x_hat, g, counts.to(g.dtype)), 1, _add3)  # exact: a row in registers has few columns
    share = inverse(tl.maximum(n, 1.0))
    return (c1 * share)[:, None], (c2 * share)[:, None]


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low"])
def _row_masked_fwd_kernel(x_ptr, mask_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, D, S, Q_v, x_stride_v, eps,
                           eps_low, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EARLY: tl.constexpr,
                           OF: tl.constexpr, VEC_Q: tl.constexpr):  # fmt: skip
    """ROWS whole rows in registers. EARLY: the parameters are read with x. OF, Q_v, VEC_Q: see _counting."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    N = N_v * VEC
    r = tl.arange(0, ROWS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + r
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < N
    mask = inside
    if ROWS > 1:
        mask = mask & (rows < M)[:, None]
    parameter_cols = cols + (r * 0)[:, None]
    x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    counts = _counting(mask_ptr, _first_byte(rows, N, D, S, OF), rows < M, 0, N, Q_v, OF, BLOCK, VEC_Q)
    if EARLY:
        weight = load_parameter(weight_ptr, parameter_cols, inside, LONGEST)
        bias = load_parameter(bias_ptr, parameter_cols, inside, LONGEST)
    count = _count(counts, N, OF)
    n = tl.maximum(count, 1).to(ACC)
    _, high, low, m2, scale = centred_moments(tl.where(counts, x, 0.0), counts & inside, n)
    rstd = rstd_of(tl.where(count > 0, m2, 1.0), n, scale, pair_of(eps, eps_low, ACC))
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
    if not EARLY:
        weight = load_parameter(weight_ptr, parameter_cols, inside, LONGEST)
        bias = load_parameter(bias_ptr, parameter_cols, inside, LONGEST)
    y = affine(x_hat, weight, bias)
    tl.store(y_ptr + rows[:, None] * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chunked_sums(x_ptr, mask_ptr, first, exists, shift, scale, N, Q_v, OF: tl.constexpr, BLOCK: tl.constexpr,
                  VEC_Q: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The sums of add_shifted over what counts of one row, and how many columns that are, each [1]."""
    cols = tl.arange(0, BLOCK)[None, :]
    s1 = tl.zeros((1, BLOCK), shift.dtype)
    s2 = tl.zeros((1, BLOCK), shift.dtype)
    count = tl.zeros((1, BLOCK), tl.int32)
    if OF == "row":
        whole = _counting(mask_ptr, first, exists, 0, N, Q_v, OF, BLOCK, VEC_Q)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        inside = cols < N - start
        x = tl.load(x_ptr + start + cols, mask=inside, other=0.0).to(shift.dtype)
        if OF == "row":
            counts = inside & whole
        else:
            counts = _counting(mask_ptr, first, exists, start, N, Q_v, OF, BLOCK, VEC_Q)
        s1, s2 = add_shifted(s1, s2, x, shift, scale, counts)
        count += counts.to(tl.int32)
    s1, s2 = sum2(s1, s2, 1)
    return s1, s2, tl.sum(count, axis=1)


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low"])
def _row_masked_fwd_chunked_kernel(x_ptr, mask_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N_v, D, S, Q_v,
                                   x_stride_v, eps, eps_low, BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
                                   OF: tl.constexpr, VEC_Q: tl.constexpr):  # fmt: skip
    """One row of any length: a sweep for the statistics, and one that rereads the row to normalise it.

    The shift is the mean of what counts of the first chunk, which may be little, or nothing. Where it is more than two standard
    deviations off, so that m2 cancels by more than the factor 5, the row is summed again about its own mean.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    LONGEST: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    N = N_v * VEC
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    exists = rows < M
    cols = tl.arange(0, BLOCK)[None, :]
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride_v * VEC
    y_ptr += tl.program_id(0).to(tl.int64) * N_v * VEC
    byte = _first_byte(rows, N, D, S, OF)
    counts = _counting(mask_ptr, byte, exists, 0, N, Q_v, OF, BLOCK, VEC_Q) & (cols < N)
    first = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    count = tl.sum(counts.to(tl.int32), axis=1)
    shift = quotient(tl.sum(tl.where(counts, first, 0.0), axis=1), tl.maximum(count, 1).to(ACC))
    shift = if_finite(shift, shift)
    scale = tl.full((1,), 1.0, ACC)
    s1, s2, count = _chunked_sums(x_ptr, mask_ptr, byte, exists, shift[:, None], None, N, Q_v, OF, BLOCK, VEC_Q, STAGES)
    n = tl.maximum(count, 1).to(ACC)
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    off = (high - shift) + low
    overflow = s2 == float("inf")
    if tl.max((overflow | (n * off * off > 4.0 * m2)).to(tl.int32), axis=0) > 0:
        scale = tl.where(overflow, BIG_SCALE, 1.0).to(ACC)
        shift = if_finite(high, high)
        s1, s2, _ = _chunked_sums(x_ptr, mask_ptr, byte, exists, shift[:, None], scale[:, None], N, Q_v, OF, BLOCK, VEC_Q,
                                  STAGES)  # fmt: skip
        high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
        scale = tl.where(m2 == 0, 1.0, scale)  # all are alike: eps in those units would be 0 as well
    rstd = rstd_of(tl.where(count > 0, m2, 1.0), n, scale, pair_of(eps, eps_low, ACC))
    store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES - 1):
        mask = cols < N - start
        x = tl.load(x_ptr + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x_hat = normalize(x, high[:, None], low[:, None], rstd[:, None])
        weight = load_parameter(weight_ptr, start + cols, mask, LONGEST)
        bias = load_parameter(bias_ptr, start + cols, mask, LONGEST)
        y = affine(x_hat, weight, bias)
        tl.store(y_ptr + (start + cols), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _row_masked_bwd_kernel(dy_ptr, x_ptr, mask_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P, M,
                           N_v, D, S, Q_v, dy_stride_v, x_stride_v, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                           VEC: tl.constexpr, STAGES: tl.constexpr, OF: tl.constexpr, VEC_Q: tl.constexpr,
                           LEADS: tl.constexpr):  # fmt: skip
    """Persistent single sweep, as _row_bwd_kernel; dz goes into the sums at once, so that g alone is kept beside x_hat."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    N = N_v * VEC
    pid = tl.program_id(0)
    r = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None:
        weight = load_parameter(weight_ptr, cols + (r * 0)[:, None], cols < N, VEC)
    for group in tl.range(pid, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (group * ROWS + r).to(tl.int64)
        mask = cols < N
        if ROWS > 1:
            mask = mask & (rows < M)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
        x_hat = normalize(x, high, low, rstd)
        if dw_ptr is not None:
            dw += dz * x_hat
        if db_ptr is not None:
            db += dz
        if dx_ptr is not None:
            g = affine(dz, weight, None)
            counts = _counting(mask_ptr, _first_byte(rows, N, D, S, OF), rows < M, 0, N, Q_v, OF, BLOCK, VEC_Q)
            c1, c2 = _means(g, x_hat, counts, N, OF)
            dx = tl.where(counts, grad_input(g, x_hat, rstd, c1, c2), g * rstd)
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = tl.arange(0, BLOCK)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, pid, P, at, at < N, N)


@triton.jit(do_not_specialize=SIZES)
def _row_masked_bwd_sums_kernel(dy_ptr, x_ptr, mask_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, M, N_v, D, S, Q_v, dy_stride_v,
                                x_stride_v, BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr, OF: tl.constexpr,
                                VEC_Q: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """c1 and c2 of one long row, in c: M of the one, then M of the other."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    let_next_start(LEADS)
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)[None, :]
    byte = _first_byte(rows, N, D, S, OF)
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
    x_ptr += row * x_stride_v * VEC
    dy_ptr += row * dy_stride_v * VEC
    s1 = tl.zeros((1, BLOCK), ACC)
    s2 = tl.zeros((1, BLOCK), ACC)
    count = tl.zeros((1, BLOCK), tl.int32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        mask = cols < N - start
        x_hat = normalize(tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(ACC), high, low, rstd)
        g = tl.load(dy_ptr + start + cols, mask=mask, other=0.0).to(ACC)
        if weight_ptr is not None:
            g = g * load_parameter(weight_ptr, start + cols, mask, VEC).to(ACC)
        s1 += g * x_hat
        s2 += g
        if OF != "row":
            count += _counting(mask_ptr, byte, rows < M, start, N, Q_v, OF, BLOCK, VEC_Q).to(tl.int32)
    c1, c2 = sum2(s1, s2, 1)
    n = N.to(ACC)  # of a row that does not count c1 and c2 are not used
    if OF != "row":
        n = tl.maximum(tl.sum(count, axis=1), 1).to(ACC)
    tl.store(c_ptr + rows, quotient(c1, n))
    tl.store(c_ptr + M + rows, quotient(c2, n))


@triton.jit(do_not_specialize=SIZES)
def _row_masked_bwd_columns_kernel(dy_ptr, x_ptr, mask_ptr, weight_ptr, mean_ptr, rstd_ptr, c_ptr, dx_ptr, partial_ptr, dw_ptr,
                                   db_ptr, P, M, N_v, D, S, Q_v, dy_stride_v, x_stride_v, ROWS: tl.constexpr,
                                   BLOCK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr, OF: tl.constexpr,
                                   VEC_Q: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr):  # fmt: skip
    """BLOCK columns of every P-th tile of rows, as _row_bwd_columns_kernel: dx with the known c1 and c2, and one partial row.

    From the last row on: those are in L2, if any are.
    """
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    N = N_v * VEC
    blocks = tl.cdiv(N, BLOCK)
    p = tl.program_id(0) // blocks
    first_col = (tl.program_id(0) % blocks) * BLOCK
    r = tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    if dx_ptr is not None:
        weight = load_parameter(weight_ptr, cols + (r * 0)[:, None], cols < N, VEC)
    let_next_start(LEADS)
    wait_for_previous(FOLLOWS)
    groups = tl.cdiv(M, ROWS)
    for i in tl.range(p, groups, P, num_stages=STAGES):
        rows = ((groups - 1 - i) * ROWS + r).to(tl.int64)
        mask = (cols < N) & (rows < M)[:, None]
        x = tl.load(x_ptr + rows[:, None] * x_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        dz = tl.load(dy_ptr + rows[:, None] * dy_stride_v * VEC + cols, mask=mask, other=0.0).to(ACC)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M)
        x_hat = normalize(x, high, low, rstd)
        if dx_ptr is not None:
            g = affine(dz, weight, None)
            counts = _counting(mask_ptr, _first_byte(rows, N, D, S, OF), rows < M, first_col, N, Q_v, OF, BLOCK, VEC_Q)
            c1 = tl.load(c_ptr + rows, mask=rows < M, other=0.0)[:, None]
            c2 = tl.load(c_ptr + M + rows, mask=rows < M, other=0.0)[:, None]
            dx = tl.where(counts, grad_input(g, x_hat, rstd, c1, c2), g * rstd)
            tl.store(dx_ptr + rows[:, None] * N_v * VEC + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dz * x_hat
        if db_ptr is not None:
            db += dz
    at = first_col + tl.arange(0, BLOCK)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, p, P, at, at < N, N)


# ---------------------------------------------------------------- launchers


def _described(mask, rows, vec):
    """The mask as bytes, a bool is one; D, S and Q_v; and the options of _counting."""
    R, S = mask.shape
    Q = rows.N // S
    of = "row" if S == 1 else "element" if Q == 1 else "part"
    vec_q = vector(1, vec, Q) if of == "part" else 1
    return mask.view(torch.uint8), (rows.M // R, S, Q // vec_q), dict(OF=of, VEC_Q=vec_q)


def row_masked_fwd(x, mask, weight, bias, eps, N):
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty((2, rows.M), dtype=acc, device=x.device)
    rstd = torch.empty(rows.M, dtype=acc, device=x.device)
    x, stride = in_place(rows, x)
    vec = vector(x.element_size(), N, stride)
    mask, places, options = _described(mask, rows, vec)
    config = heuristics.row_masked_forward(N, x.element_size())
    args = (x, mask, dense(weight), dense(bias), y, mean, rstd, rows.M, N // vec, *places, stride // vec, *float_pair(eps))
    options |= dict(BLOCK=config.block, VEC=vec, warps=config.warps, stages=config.stages, registers=config.registers)
    if config.chunked:
        launch(_row_masked_fwd_chunked_kernel, rows.M, x.device, *args, STAGES=config.stages, **options)
    else:
        launch(_row_masked_fwd_kernel, heuristics.cdiv(rows.M, config.rows), x.device, *args, ROWS=config.rows,
               EARLY=config.early, **options)  # fmt: skip
    return y, mean, rstd


def _split_bwd(config, inputs, results, sizes, options):
    """Returns how many partial rows are filled."""
    x, rstd, dx, M, N = inputs[1], inputs[5], results[0], sizes[0], sizes[1] * options["VEC"]
    c = None
    if dx is not None:
        c = torch.empty((2, M), dtype=rstd.dtype, device=x.device)
        launch(_row_masked_bwd_sums_kernel, M, x.device, *inputs, c, *sizes, BLOCK=config.sums_block,
               STAGES=config.sums_stages, **options, warps=config.sums_warps, stages=config.sums_stages,
               registers=heuristics.registers(config.sums_warps))  # fmt: skip
    launch(_row_masked_bwd_columns_kernel, config.partial_rows * heuristics.cdiv(N, config.block), x.device, *inputs, c,
           *results, *sizes, ROWS=config.rows, BLOCK=config.block, STAGES=config.stages,
           FOLLOWS=c is not None and overlaps(x.device), **options, warps=config.warps, stages=config.stages,
           registers=config.registers)  # fmt: skip
    return config.partial_rows


def row_masked_bwd(dy, x, mask, weight, mean, rstd, need):
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    if not any(need):
        return None, None, None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    dw, db = (None if dtype is None else torch.empty(rows.N, dtype=dtype, device=x.device) for dtype in need[1:])
    dy, dy_stride = in_place(rows, dy)
    x, x_stride = in_place(rows, x)
    vec = vector(x.element_size(), rows.N, dy_stride, x_stride)
    mask, places, options = _described(mask, rows, vec)
    narrow = vec * x.element_size() < 16 or (options["OF"] == "part" and options["VEC_Q"] < vec)
    config = heuristics.row_masked_backward(rows.M, rows.N, x.element_size(), sm_count(x.device), narrow)
    partial = None
    if dw is not None or db is not None:
        partial = torch.empty((2, config.partial_rows, rows.N), dtype=rstd.dtype, device=x.device)
    inputs = (dy, x, mask, dense(weight), dense(mean), dense(rstd))
    results = (dx, partial, dw, db, config.partial_rows)
    sizes = (rows.M, rows.N // vec, *places, dy_stride // vec, x_stride // vec)
    options |= dict(VEC=vec, LEADS=leads(x.device, x.nbytes))
    if isinstance(config, heuristics.RowBackwardSplit):
        filled = _split_bwd(config, inputs, results, sizes, options)
    else:
        filled = min(config.partial_rows, heuristics.cdiv(rows.M, config.rows))
        launch(_row_masked_bwd_kernel, filled, x.device, *inputs, *results, *sizes, ROWS=config.rows, BLOCK=config.block,
               STAGES=config.stages, **options, warps=config.warps, stages=config.stages,
               registers=config.registers)  # fmt: skip
    if partial is not None and config.partial_rows > 1:
        finalise(partial, dw, db, filled=filled)
    return dx, dw, db
