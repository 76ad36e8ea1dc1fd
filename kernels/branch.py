"""A branch onto a stream: h = addend + x * factor, of which a scale of the rows, one of the columns, and dropout are parts.

Elements are counted through the whole tensor, as those of dropout's random words are: a block of them begins with a whole
counter, whatever the length of a row, and which row and column they are of takes one division for a vector. The contract is
written in reference.py.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from .. import heuristics_branch
from ..reference import least_word
from .chain import let_next_start
from .launch import accumulate_dtype, dense, float_pair, launch, leads, sm_count, vector
from .math import pair_of
from .partial import finalise

SIZES = ["n_v", "R", "per_v", "N_v", "scale", "scale_low", "least"]


@triton.jit
def repeated(v, TIMES: tl.constexpr):
    """Each value of [rows, n] TIMES times, one after the other."""
    if TIMES > 1:
        v = tl.reshape(tl.broadcast_to(v[:, :, None], (v.shape[0], v.shape[1], TIMES)), (v.shape[0], v.shape[1] * TIMES))
    return v


@triton.jit
def _elements(vectors, VEC: tl.constexpr, WIDE: tl.constexpr):
    """How many elements so many vectors have; None of None. WIDE: 32 bits do not hold that."""
    n = None
    if vectors is not None:
        n = vectors * VEC
        if WIDE:
            n = tl.cast(vectors, tl.int64) * VEC
    return n


@triton.jit
def kept(seed, first, least, BLOCK: tl.constexpr):
    """Which of the BLOCK elements from each `first` [rows, 1] on, a multiple of 4, dropout keeps. `least`: bits of a uint32."""
    counters = (first >> 2) + tl.arange(0, BLOCK // 4)[None, :]
    zero = tl.cast(0, tl.uint32)
    high = zero
    if counters.dtype == tl.int64:
        high = (counters >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counters.to(tl.uint32), high, zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # a b c d in memory's order
    return tl.reshape(words, (counters.shape[0], BLOCK)) >= tl.cast(least, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _row_scale(ptr, first, R, per, BLOCK: tl.constexpr, VEC: tl.constexpr, ENDS: tl.constexpr):
    """row_scale of the BLOCK elements from each `first` [rows, 1] on, which are, as `per`, multiples of VEC; for ENDS see
    heuristics_branch."""
    row = first // per
    if ENDS == 2:
        along = tl.arange(0, BLOCK // VEC)[None, :] * VEC
        row = row + (((first - row * per) + along).to(tl.uint32) // per.to(tl.uint32)).to(tl.int32)
        scale = repeated(tl.load(ptr + row, mask=row < R, other=0.0), VEC)
    else:
        scale = tl.load(ptr + row, mask=row < R, other=0.0)
        if ENDS == 1:
            later = tl.load(ptr + row + 1, mask=row + 1 < R, other=0.0)
            scale = tl.where(tl.arange(0, BLOCK)[None, :] < (row + 1) * per - first, scale, later)
    return scale


@triton.jit
def _columns(first, N, BLOCK: tl.constexpr, VEC: tl.constexpr, ENDS: tl.constexpr):
    """The columns of the BLOCK elements from each `first` on, likewise; all exist, those of elements that do not as well."""
    place = (first % N).to(tl.int32)
    if ENDS == 2:
        along = tl.arange(0, BLOCK // VEC)[None, :] * VEC
        vectors = ((place + along).to(tl.uint32) % tl.cast(N, tl.uint32)).to(tl.int32)
        cols = repeated(vectors, VEC) + tl.arange(0, BLOCK)[None, :] % VEC
    else:
        cols = place + tl.arange(0, BLOCK)[None, :]
        if ENDS == 1:
            cols = tl.where(cols >= N, cols - N, cols)
    return tl.max_contiguous(tl.multiple_of(cols, (1, VEC)), (1, VEC))


@triton.jit
def _dropped(t, row_scale_ptr, seed, first, R, per, scale, scale_low, least, BLOCK: tl.constexpr, VEC: tl.constexpr,
             ENDS: tl.constexpr):  # fmt: skip
    """t * row_scale * kept / (1 - p); `scale` is the last factor."""
    factor = pair_of(scale, scale_low, t.dtype)
    if row_scale_ptr is not None:
        factor = _row_scale(row_scale_ptr, first, R, per, BLOCK, VEC, ENDS).to(t.dtype) * factor
    t = t * factor
    if seed is not None:
        t = tl.where(kept(seed, first, least, BLOCK), t, 0.0)
    return t


@triton.jit(do_not_specialize=SIZES)
def _branch_kernel(x_ptr, addend_ptr, row_scale_ptr, column_scale_ptr, seed_ptr, h_ptr, n_v, R, per_v, N_v, scale, scale_low,
                   least, BLOCK: tl.constexpr, VEC: tl.constexpr, VEC_P: tl.constexpr, ROW_ENDS: tl.constexpr,
                   COLUMN_ENDS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """BLOCK elements of n_v * VEC. VEC_P: of the elements of a row_scale, per_v * VEC_P, and of those of a row."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    left = tl.minimum(n_v - pid * (BLOCK // VEC), BLOCK // VEC).to(tl.int32) * VEC
    along = tl.arange(0, BLOCK)[None, :]
    mask = along < left
    at = pid * BLOCK + along
    first = pid * BLOCK + tl.zeros((1, 1), tl.int32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    if addend_ptr is not None:
        addend = tl.load(addend_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    per = _elements(per_v, VEC_P, WIDE)
    u = _dropped(x, row_scale_ptr, seed, first, R, per, scale, scale_low, least, BLOCK, VEC_P, ROW_ENDS)
    if column_scale_ptr is not None:
        cols = _columns(first, N_v * VEC_P, BLOCK, VEC_P, COLUMN_ENDS)
        u = u * tl.load(column_scale_ptr + cols).to(ACC)
    if addend_ptr is not None:
        u = u + addend
    tl.store(h_ptr + at, u.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "P", "N"])
def _branch_bwd_kernel(dh_ptr, x_ptr, row_scale_ptr, column_scale_ptr, seed_ptr, dx_ptr, partial_ptr, P, n_v, R, per_v, N_v, N,
                       scale, scale_low, least, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
                       VEC_P: tl.constexpr, VEC_N: tl.constexpr, FOLDED: tl.constexpr, ROW_ENDS: tl.constexpr,
                       WIDE: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """dx, and a block of columns of row p of partial (P, N_v * VEC_N): a persistent program's sum over every P-th ROWS rows.

    FOLDED: several rows of N columns follow each other in a row here, which is so a multiple of a counter and of a vector.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    let_next_start(LEADS)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    length = N_v * VEC_N
    n = _elements(n_v, VEC, WIDE)
    per = _elements(per_v, VEC_P, WIDE)
    blocks = tl.cdiv(length, BLOCK)
    p = tl.program_id(0) // blocks
    c0 = tl.program_id(0) % blocks * BLOCK
    r = tl.arange(0, ROWS)[:, None]
    along = tl.arange(0, BLOCK)[None, :]
    inside = c0 + along < length
    cols = c0 + along
    if dx_ptr is not None:
        if FOLDED:
            cols = cols % N
        column_scale = tl.load(column_scale_ptr + cols, mask=inside, other=0.0).to(ACC)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for group in tl.range(p, tl.cdiv(tl.cdiv(n, length), ROWS).to(tl.int32), P, num_stages=STAGES):
        rows = group * ROWS + r
        if WIDE:
            rows = rows.to(tl.int64)
        first = rows * N_v * VEC_N + c0
        at = first + along
        mask = inside & (at < n)
        dh = tl.load(dh_ptr + at, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        u = _dropped(dh, row_scale_ptr, seed, first, R, per, scale, scale_low, least, BLOCK, VEC_P, ROW_ENDS)
        total += u * x
        if dx_ptr is not None:
            tl.store(dx_ptr + at, (u * column_scale).to(dx_ptr.dtype.element_ty), mask=mask)
    cols = c0 + tl.arange(0, BLOCK)
    tl.store(partial_ptr + p.to(tl.int64) * length + cols, tl.sum(total, axis=0), mask=cols < length)


# ---------------------------------------------------------------- launchers


def branch_fwd(x, addend, row_scale, column_scale, p, seed, dtype):
    if p == 1:
        return addend.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
    return _scaled(x, addend, row_scale, column_scale, p, seed, dtype)


def branch_bwd(dh, x, row_scale, column_scale, p, seed, dx_dtype, dcolumn_dtype):
    if p == 1:
        zeros = lambda shape, dtype: None if dtype is None else torch.zeros(shape, dtype=dtype, device=dh.device)
        return zeros(dh.shape, dx_dtype), zeros(None if column_scale is None else column_scale.numel(), dcolumn_dtype)
    if dcolumn_dtype is not None:
        return _with_columns(dh, x, row_scale, column_scale, p, seed, dx_dtype, dcolumn_dtype)
    return None if dx_dtype is None else _scaled(dh, None, row_scale, column_scale, p, seed, dx_dtype), None


def _factors(p, seed):
    """The seed where there is dropout, 1 / (1 - p), and the least word that is kept, as an int32 whatever it is."""
    least = least_word(p)
    return seed if p > 0 else None, (*float_pair(1 / (1 - p)), least - (least >> 31 << 32))


def _scaled(x, addend, row_scale, column_scale, p, seed, dtype):
    """x * factor, and the addend where there is one, in this dtype."""
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    n, itemsize = x.numel(), min(t.element_size() for t in (x, addend, h) if t is not None)
    config = heuristics_branch.elements(itemsize)
    R, per = (None, None) if row_scale is None else (row_scale.numel(), n // row_scale.numel())
    N = None if column_scale is None else column_scale.numel()
    vec, vec_p = vector(itemsize, n), vector(itemsize, *(s for s in (per, N) if s is not None))
    seed, factors = _factors(p, seed)
    row_ends, column_ends = (s and heuristics_branch.ends(s, config.block, config.block) for s in (per, N))
    launch(_branch_kernel, heuristics_branch.cdiv(n, config.block), x.device, x.contiguous(), dense(addend), dense(row_scale),
           dense(column_scale), seed, h, n // vec, R, per and per // vec_p, N and N // vec_p, *factors, BLOCK=config.block,
           VEC=vec, VEC_P=vec_p, ROW_ENDS=row_ends, COLUMN_ENDS=column_ends, WIDE=n >= heuristics_branch.WIDE,
           warps=config.warps)  # fmt: skip
    return h


def _with_columns(dh, x, row_scale, column_scale, p, seed, dx_dtype, dcolumn_dtype):
    dx = None if dx_dtype is None else torch.empty(dh.shape, dtype=dx_dtype, device=dh.device)
    n, N, itemsize = x.numel(), column_scale.numel(), min(x.element_size(), dh.element_size())
    whole = max(4, 16 // itemsize)  # elements of a counter and of a vector
    folds = whole // gcd(whole, N)
    length, vec = folds * N, vector(itemsize, n)
    config = heuristics_branch.columns(heuristics_branch.cdiv(n, length), length, (x.element_size(), dh.element_size()),
                                       vec * itemsize, sm_count(x.device))  # fmt: skip
    R, per = (None, None) if row_scale is None else (row_scale.numel(), n // row_scale.numel())
    vec_p = vector(itemsize, *(() if per is None else (per,)))
    dcolumn = torch.empty(N, dtype=dcolumn_dtype, device=x.device)
    partial = torch.empty((config.programs, length), dtype=accumulate_dtype(x.dtype), device=x.device)
    seed, factors = _factors(p, seed)
    launch(_branch_bwd_kernel, config.programs * heuristics_branch.cdiv(length, config.block), x.device, dh.contiguous(),
           x.contiguous(), dense(row_scale), dense(column_scale), seed, dx, partial, config.programs, n // vec, R,
           per and per // vec_p, length // whole, N, *factors, ROWS=config.rows, BLOCK=config.block, VEC=vec, VEC_P=vec_p,
           VEC_N=whole, FOLDED=folds > 1, ROW_ENDS=per and heuristics_branch.ends(per, config.block, length),
           WIDE=n + config.rows * length >= heuristics_branch.WIDE, STAGES=config.stages, LEADS=leads(x.device, x.nbytes),
           warps=config.warps, stages=config.stages, registers=config.registers)  # fmt: skip
    finalise(partial.view(1, -1, N), dcolumn, None)
    return dx, dcolumn
