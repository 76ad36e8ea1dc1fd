"""The one finalising launch of every backward: partial rows -> gradients of weight and bias, and the means c1 and c2."""

import triton
import triton.language as tl

from .. import heuristics
from .launch import launch
from .math import divide, exact_sum2, folded, two_sum


@triton.jit(do_not_specialize=["first", "last", "P", "filled", "N", "count"])
def _finalise_kernel(partial_ptr, weight_ptr, dw_ptr, db_ptr, c1_ptr, c2_ptr, first, last, P, filled, N, count,
                     BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dw and db of columns first..last are sums over `filled` of the P rows of partial (2, P, N), in a fixed order; c1 and c2
    are weight * sum / count. A half of which nothing is wanted is not read."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    THREAD: tl.constexpr = min(16, BLOCK_P)  # rows of a thread
    cols = first + tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_P // THREAD, BLOCK_C), ACC)
    db, dw_low, db_low = dw, dw, dw
    for row in range(0, filled, BLOCK_P):
        p = row + tl.arange(0, BLOCK_P)
        mask = (p < filled)[:, None] & (cols < last)[None, :]
        at = partial_ptr + p.to(tl.int64)[:, None] * N + cols[None, :]
        if dw_ptr is not None or c1_ptr is not None:
            dw, error = two_sum(dw, folded(tl.load(at, mask=mask, other=0.0), 1, THREAD))
            dw_low += error
        if db_ptr is not None or c2_ptr is not None:
            db, error = two_sum(db, folded(tl.load(at + P.to(tl.int64) * N, mask=mask, other=0.0), 1, THREAD))
            db_low += error
    dw, db = exact_sum2(dw, dw_low, db, db_low)
    _store_sum(dw, dw_ptr, c1_ptr, weight_ptr, cols, cols < last, count)
    _store_sum(db, db_ptr, c2_ptr, weight_ptr, cols, cols < last, count)


@triton.jit
def _store_sum(total, sum_ptr, mean_ptr, weight_ptr, cols, mask, count):
    """The sum, and weight * sum / count, each where it has a pointer."""
    if sum_ptr is not None:
        tl.store(sum_ptr + cols, total.to(sum_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        if weight_ptr is not None:
            total = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(total.dtype) * total
        tl.store(mean_ptr + cols, divide(total, tl.cast(count, total.dtype)), mask=mask)


def finalise(partial, columns, dw, db, filled=None, weight=None, c1=None, c2=None, count=1):
    """dw, db, c1 and c2 (N,) of columns first..last from partial (2, P, N), of which `filled` rows are filled, all by default.

    A result that is not wanted is None.
    """
    _, P, N = partial.shape
    config = heuristics.finalise(N)
    launch(_finalise_kernel, heuristics.cdiv(columns[1] - columns[0], config.block_c), partial.device, partial, weight, dw, db,
           c1, c2, *columns, P, P if filled is None else filled, N, count,
           BLOCK_P=config.block_p, BLOCK_C=config.block_c, warps=config.warps)  # fmt: skip
