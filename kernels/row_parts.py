"""What the kernels of rows share: reading rows, statistics and parameters of a tile [rows, columns], and what sums become."""

import triton
import triton.language as tl

from .activations import slope
from .math import add_shifted, affine, sum2


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
def load_statistics(mean_ptr, rstd_ptr, rows, M, end=None):
    """high, low, rstd of rows, each [rows, 1]; 0 from row `end` on, which is M where it is not given."""
    mask = rows < (M if end is None else end)
    high = tl.load(mean_ptr + rows, mask=mask, other=0.0)
    low = tl.load(mean_ptr + M + rows, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask, other=0.0)
    return high[:, None], low[:, None], rstd[:, None]


@triton.jit
def load_parameter(ptr, cols, mask, LONGEST: tl.constexpr, TIMES: tl.constexpr = 1):
    """In the layout of x, whatever the dtype: that takes `cols` of the shape of x, and vectors no longer than those of x.

    Each value TIMES times, one after the other. None where there is no pointer.
    """
    value = None
    if ptr is not None:
        value = tl.load(tl.max_contiguous(ptr + cols, (1, LONGEST)), mask=mask, other=0.0)
        if TIMES > 1:
            several = tl.broadcast_to(value[:, :, None], (value.shape[0], value.shape[1], TIMES))
            value = tl.reshape(several, (value.shape[0], value.shape[1] * TIMES))
    return value


@triton.jit
def parameter_places(rows, start, N, end, T, S_v, OF: tl.constexpr, BLOCK: tl.constexpr, VEC_S: tl.constexpr):
    """Where the parameters of BLOCK columns from `start` on are, one for VEC_S columns, and whether they exist; `end`: of rows.

    OF: of what a row has its parameters. "row": all rows have the same, one of a column. "part": each T rows have N of their
    own. "group": a row is one of the T groups of a sample, and its parameters are of channels, each of S_v * VEC_S columns;
    `start` is a multiple of VEC_S. For the others VEC_S is 1.
    """
    cols = tl.arange(0, BLOCK // VEC_S)[None, :]
    inside = cols * VEC_S < N - start
    if OF == "part":
        return (rows // T)[:, None] * N + (start + cols), inside & (rows < end)[:, None]
    elif OF == "group":
        channel = (start // VEC_S + cols).to(tl.uint32) // tl.cast(S_v, tl.uint32)  # one division for a vector
        return (rows % T * (N // (S_v * VEC_S))).to(tl.int32)[:, None] + channel.to(tl.int32), inside & (rows < end)[:, None]
    else:
        tl.static_assert(OF == "row")
        return start + cols + (rows * 0).to(tl.int32)[:, None], inside


@triton.jit
def part_of(pid, programs, M, T, PARTED: tl.constexpr):
    """Of a program: its part of the rows, the first of these and the one after them, its number among the programs of that part
    and how many those are, and how many parts there are. Without PARTED there is one, else T rows are one."""
    if PARTED:
        parts = M // T
        sharing = programs // parts
        part = (pid // sharing).to(tl.int64)
        first = part * T
        return part, first, first + T, pid % sharing, sharing, parts
    else:
        return 0, 0, M, pid, programs, 1


@triton.jit
def load_dz(dy_ptr, residual_ptr, dy_at, residual_at, mask, x_hat, weight, bias, alpha, ACTIVATION: tl.constexpr):
    """dz = dy * act'(z + residual), 0 outside."""
    dz = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(x_hat.dtype)
    if ACTIVATION != "identity":
        z = affine(x_hat, weight, bias)
        if residual_ptr is not None:
            z = z + tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(z.dtype)
        dz = dz * slope(z, alpha, ACTIVATION)
    return dz


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
