"""What the kernels of rows share: reading rows, statistics and parameters of a tile [rows, columns], and what sums become."""

import triton
import triton.language as tl

from .math import add_shifted, sum2


@triton.jit
def load_sum(x_ptr, addend_ptr, x_at, addend_at, mask, ACC: tl.constexpr, EVICT: tl.constexpr):
    """x + addend as it is stored, in the accumulate dtype; there may be no addend."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0, eviction_policy=EVICT).to(ACC)
    if addend_ptr is not None:
        addend = tl.load(addend_ptr + addend_at, mask=mask, other=0.0, eviction_policy=EVICT).to(ACC)
        x = (x + addend).to(x_ptr.dtype.element_ty).to(ACC)
    return x


@triton.jit
def chunked_sums(x_ptr, addend_ptr, shift, scale, N, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The sums of add_shifted over one row, each [1]."""
    cols = tl.arange(0, BLOCK)[None, :]
    s1 = tl.zeros((1, BLOCK), shift.dtype)
    s2 = tl.zeros((1, BLOCK), shift.dtype)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        mask = cols < N - start
        x = load_sum(x_ptr + start, addend_ptr, cols, start + cols, mask, shift.dtype, "")
        s1, s2 = add_shifted(s1, s2, x, shift, scale, mask)
    return sum2(s1, s2, 1)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, rows, M, high, low, rstd):
    mask = rows < M
    tl.store(mean_ptr + rows, high, mask=mask)
    tl.store(mean_ptr + M + rows, low, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=mask)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, rows, M):
    """high, low, rstd of rows, each [rows, 1]; 0 from row M on."""
    mask = rows < M
    high = tl.load(mean_ptr + rows, mask=mask, other=0.0)
    low = tl.load(mean_ptr + M + rows, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask, other=0.0)
    return high[:, None], low[:, None], rstd[:, None]


@triton.jit
def load_parameter(ptr, cols, mask, LONGEST: tl.constexpr):
    """In the layout of x, whatever the dtype: that takes `cols` of the shape of x, and vectors no longer than those of x.

    None where there is no pointer.
    """
    value = None
    if ptr is not None:
        value = tl.load(tl.max_contiguous(ptr + cols, (1, LONGEST)), mask=mask, other=0.0)
    return value


@triton.jit
def store_sums(partial_ptr, dw_ptr, db_ptr, dw, db, p, P, cols, mask, N):
    """The sums over axis 0 of dw and of db, each where it is wanted, in row p of partial (2, P, N); where P is 1 they are all
    there is, and dw_ptr and db_ptr get them."""
    if dw_ptr is not None:
        _store_sum(partial_ptr + p.to(tl.int64) * N, dw_ptr, dw, P, cols, mask)
    if db_ptr is not None:
        _store_sum(partial_ptr + (p.to(tl.int64) + P) * N, db_ptr, db, P, cols, mask)


@triton.jit
def _store_sum(partial_ptr, result_ptr, parts, P, cols, mask):
    total = tl.sum(parts, axis=0)
    if P == 1:
        tl.store(result_ptr + cols, total.to(result_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + cols, total, mask=mask)


# ---------------------------------------------------------------- launchers


def in_place(rows, x):
    """x as (M, N) with column stride 1, and its row stride; copies only where no such view exists."""
    x = rows.view(x)
    if rows.N > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if rows.M > 1 else rows.N
