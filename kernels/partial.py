"""The one finalising launch of every backward: partial rows -> gradients of weight and bias, and the means c1 and c2."""

import triton
import triton.language as tl

from .. import heuristics
from .launch import launch


@triton.jit(do_not_specialize=["first", "last", "P", "filled", "N", "count"])
def _finalise_kernel(partial_ptr, weight_ptr, dw_ptr, db_ptr, c1_ptr, c2_ptr, first, last, P, filled, N, count,
                     BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dw and db of columns first..last are sums over `filled` of the P rows of partial (2, P, N), in a fixed order; c1 and c2
    are weight * sum / count. A half of which nothing is wanted is not read."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    cols = first + tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for row in range(0, filled, BLOCK_P):
        p = row + tl.arange(0, BLOCK_P)
        mask = (p < filled)[:, None] & (cols < last)[None, :]
        at = partial_ptr + p.to(tl.int64)[:, None] * N + cols[None, :]
        if dw_ptr is not None or c1_ptr is not None:
            dw += tl.load(at, mask=mask, other=0.0)
        if db_ptr is not None or c2_ptr is not None:
            db += tl.load(at + P.to(tl.int64) * N, mask=mask, other=0.0)
    _store_sum(dw, dw_ptr, c1_ptr, weight_ptr, cols, cols < last, count)
    _store_sum(db, db_ptr, c2_ptr, weight_ptr, cols, cols < last, count)


@triton.jit
def _store_sum(parts, sum_ptr, mean_ptr, weight_ptr, cols, mask, count):
    """The sum over axis 0, and weight * sum / count, each where it has a pointer."""
    if sum_ptr is not None or mean_ptr is not None:
        total = tl.sum(parts, axis=0)
        if sum_ptr is not None:
            tl.store(sum_ptr + cols, total.to(sum_ptr.dtype.element_ty), mask=mask)
        if mean_ptr is not None:
            weight = 1.0
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
            tl.store(mean_ptr + cols, tl.cast(weight, total.dtype) * total / tl.cast(count, total.dtype), mask=mask)


def finalise(partial, columns, dw, db, filled=None, weight=None, c1=None, c2=None, count=1):
    """dw, db, c1 and c2 (N,) of columns first..last from partial (2, P, N), of which `filled` rows are filled, all by default.

    A result that is not wanted is None.
    """
    _, P, N = partial.shape
    config = heuristics.finalise(N)
    launch(_finalise_kernel, heuristics.cdiv(columns[1] - columns[0], config.block_c), partial.device, partial, weight, dw, db,
           c1, c2, *columns, P, P if filled is None else filled, N, count,
           BLOCK_P=config.block_p, BLOCK_C=config.block_c, warps=config.warps)  # fmt: skip
