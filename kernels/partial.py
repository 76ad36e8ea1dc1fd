"""The one finalising launch of every backward: partial rows -> gradients of weight and bias, and the means c1 and c2."""

import torch
import triton
import triton.language as tl

from .. import heuristics
from .launch import dense, launch


# The two partials share one allocation: where the second starts, and so its alignment, depends on the batch.
@triton.jit(do_not_specialize=["P", "N", "count"], do_not_specialize_on_alignment=["dw_partial_ptr", "db_partial_ptr"])
def _sums_kernel(dw_partial_ptr, db_partial_ptr, dw_ptr, db_ptr, weight_ptr, c1_ptr, c2_ptr, P, N, count,
                 BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dw and db are sums over P partial rows of N columns, in a fixed order; c1 and c2 are weight * sum / count."""
    ACC: tl.constexpr = (db_partial_ptr if dw_partial_ptr is None else dw_partial_ptr).dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (cols < N)[None, :]
        at = p.to(tl.int64)[:, None] * N + cols[None, :]
        if dw_partial_ptr is not None:
            dw += tl.load(dw_partial_ptr + at, mask=mask, other=0.0)
        if db_partial_ptr is not None:
            db += tl.load(db_partial_ptr + at, mask=mask, other=0.0)
    mask = cols < N
    if dw_partial_ptr is not None:
        _store_sum(dw, dw_ptr, c1_ptr, weight_ptr, cols, mask, count)
    if db_partial_ptr is not None:
        _store_sum(db, db_ptr, c2_ptr, weight_ptr, cols, mask, count)


@triton.jit
def _store_sum(parts, sum_ptr, mean_ptr, weight_ptr, cols, mask, count):
    """The sum over axis 0, and weight * sum / count, each where it has a pointer."""
    total = tl.sum(parts, axis=0)
    if sum_ptr is not None:
        tl.store(sum_ptr + cols, total.to(sum_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        tl.store(mean_ptr + cols, tl.cast(weight, total.dtype) * total / tl.cast(count, total.dtype), mask=mask)


def finalise_sums(dw_partial, db_partial, dw_dtype, db_dtype, weight=None, count=1, means=False, filled=None):
    """dw, db, c1, c2 from partials (P, N), of which `filled` rows are filled, all by default.

    A result that is not asked for (dtype None, means False) is None.
    """
    partial = db_partial if dw_partial is None else dw_partial
    P, N = partial.shape
    config = heuristics.finalise(N)
    empty = lambda dtype: None if dtype is None else torch.empty(N, dtype=dtype, device=partial.device)
    dw, db = empty(dw_dtype), empty(db_dtype)
    c1, c2 = (empty(partial.dtype), empty(partial.dtype)) if means else (None, None)
    launch(_sums_kernel, heuristics.cdiv(N, config.block_c), partial.device, dw_partial, db_partial, dw, db, dense(weight),
           c1, c2, P if filled is None else filled, N, count,
           BLOCK_P=config.block_p, BLOCK_C=config.block_c, warps=config.warps)  # fmt: skip
    return dw, db, c1, c2
