"""Partial rows -> gradients of weight and bias, and the means c1 and c2: where a backward's sums over programs are finished."""

import triton
import triton.language as tl

from .. import heuristics
from .chain import let_next_start, wait_for_previous
from .launch import launch, overlaps
from .math import exact_sum2, folded, quotient, two_sum
from .wanted import load_wanted, store_wanted


@triton.jit
def total(partial_ptr, cols, mask, filled, P, N, BLOCK_P: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr):
    """Sums of columns `cols` over `filled` of the P rows of partial (2, P, N), in a fixed order.

    A half that is not wanted is not read, and its sum is 0.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    THREAD: tl.constexpr = min(16, BLOCK_P)  # rows of a thread
    dw = tl.zeros((BLOCK_P // THREAD, cols.shape[0]), ACC)
    db, dw_low, db_low = dw, dw, dw
    for row in range(0, filled, BLOCK_P):
        p = row + tl.arange(0, BLOCK_P)
        inside = (p < filled)[:, None] & mask[None, :]
        at = partial_ptr + p.to(tl.int64)[:, None] * N + cols[None, :]
        if DW:
            dw, error = two_sum(dw, folded(tl.load(at, mask=inside, other=0.0), 1, THREAD))
            dw_low += error
        if DB:
            db, error = two_sum(db, folded(tl.load(at + P.to(tl.int64) * N, mask=inside, other=0.0), 1, THREAD))
            db_low += error
    return exact_sum2(dw, dw_low, db, db_low)


@triton.jit
def mean_of(total, weight, count):
    """weight * total / count; weight may be None."""
    if weight is not None:
        total = weight.to(total.dtype) * total
    return quotient(total, tl.cast(count, total.dtype))


@triton.jit(do_not_specialize=["P", "filled", "N", "count"])
def _finalise_kernel(partial_ptr, weight_ptr, dw_ptr, db_ptr, c1_ptr, c2_ptr, P, filled, N, count, BLOCK_P: tl.constexpr,
                     BLOCK_C: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr):  # fmt: skip
    """dw, db, and their means c1 and c2."""
    let_next_start(LEADS)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < N
    weight = load_wanted(weight_ptr, cols, mask)
    wait_for_previous(FOLLOWS)
    dw, db = total(partial_ptr, cols, mask, filled, P, N, BLOCK_P, dw_ptr is not None or c1_ptr is not None,
                   db_ptr is not None or c2_ptr is not None)  # fmt: skip
    store_wanted(dw_ptr, cols, dw, mask)
    store_wanted(db_ptr, cols, db, mask)
    if c1_ptr is not None:
        tl.store(c1_ptr + cols, mean_of(dw, weight, count), mask=mask)
        tl.store(c2_ptr + cols, mean_of(db, weight, count), mask=mask)


def finalise(partial, dw, db, filled=None, weight=None, c1=None, c2=None, count=1, leads=False):
    """dw, db, c1 and c2 (N,) from partial (2, P, N), of which `filled` rows are filled, all by default.

    dw or db, and c1 and c2, are None where they are not wanted. `leads`: another launch of the call follows.
    """
    _, P, N = partial.shape
    config = heuristics.finalise(N)
    launch(_finalise_kernel, heuristics.cdiv(N, config.block_c), partial.device, partial, weight, dw, db, c1, c2, P,
           P if filled is None else filled, N, count, BLOCK_P=config.block_p, BLOCK_C=config.block_c,
           LEADS=leads and overlaps(partial.device), FOLLOWS=overlaps(partial.device), warps=config.warps)  # fmt: skip
