"""Channels of which some positions do not count: statistics over those that do, and the gradient of what is made with them.

Tensors are cut into tiles, and tiles summed, as in channel.py; the mask is one byte for each position (b, s) of all channels.
What does not count may be anything: it is chosen away, never multiplied by 0. The contract is written in reference.py.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from .chain import let_next_start, wait_for_previous
from .channel_parts import load_partial, merged, store_share
from .channel_tiles import (
    SIZES,
    like,
    load_statistics,
    planned,
    program_block,
    tile_corner,
    tile_count,
    tile_inside,
    tile_load,
    tile_places,
    tile_span,
    tile_store,
)
from .launch import accumulate_dtype, dense, launch, leads, overlaps
from .math import (
    BIG_SCALE,
    add_shifted,
    affine,
    grad_input,
    if_finite,
    normalize,
    quotient,
    root,
    shifted_moments,
    sum2,
    unscaled,
)
from .wanted import load_wanted


@triton.jit
def _counting(mask_ptr, corner, inside, places, B, S, FASTEST: tl.constexpr):
    """Whether the places of a tile count, [positions, 1]; of a SKEWED row they are each channel's own, [positions, BLOCK_C]."""
    b, place, _ = inside
    exists = places[1]
    if FASTEST != 3:
        exists = (b < B - corner[0]) & (place < S - corner[1])
    at = (tl.cast(corner[0], tl.int64) + b) * S + corner[1] + (place - places[0])
    return tl.load(mask_ptr + at, mask=exists, other=0) != 0


@triton.jit
def _load_tile(x_ptr, mask_ptr, tile, x_strides, c0, inside, B, S, C, FASTEST: tl.constexpr, VEC_S: tl.constexpr,
               VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """x, whatever it is where it does not count, and where it does."""
    corner = tile_corner(tile, c0, tile_span(x_ptr, S, FASTEST), BLOCK_B, BLOCK_S)
    places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, FASTEST)
    x = tile_load(x_ptr, x_strides, corner, inside, places, FASTEST, VEC_S, VEC_C)
    return x, _counting(mask_ptr, corner, inside, places, B, S, FASTEST)


@triton.jit
def _shifted_sums(x_ptr, mask_ptr, x_strides, c0, inside, shift, scale, p, P, B, S, C, FASTEST: tl.constexpr,
                  VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """The sums of add_shifted per channel over what counts of every P-th tile, and how many that are."""
    N: tl.constexpr = BLOCK_B * BLOCK_S
    s1 = tl.zeros((N, inside[2].shape[1]), shift.dtype)
    s2 = tl.zeros((N, inside[2].shape[1]), shift.dtype)
    n = tl.zeros((N, inside[2].shape[1] if FASTEST == 3 else 1), tl.int32)
    for tile in tl.range(p, tile_count(B, tile_span(x_ptr, S, FASTEST), BLOCK_B, BLOCK_S), P, num_stages=STAGES):
        x, counts = _load_tile(x_ptr, mask_ptr, tile, x_strides, c0, inside, B, S, C, FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S)
        s1, s2 = add_shifted(s1, s2, x.to(shift.dtype), shift, scale, counts)
        n += counts.to(tl.int32)
    s1, s2 = sum2(s1, s2, 0)
    return s1, s2, tl.sum(n, axis=0).to(shift.dtype)


@triton.jit(do_not_specialize=SIZES)
def _masked_stats_kernel(x_ptr, mask_ptr, partial_ptr, x_strides, P, B, S_v, C_v, X_FASTEST: tl.constexpr,
                         VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                         BLOCK_C: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """partial (4, P, C), see store_share; a share of which nothing counts has a mean of 0.

    The shift is the mean of what counts of the first tile, which may be little, or nothing. Where it is more than two standard
    deviations off, so that m2 cancels by more than the factor 5, the share is summed again about its own mean.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    let_next_start(LEADS)
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    x, counts = _load_tile(x_ptr, mask_ptr, p, x_strides, c0, inside, B, S, C, X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S)
    n = tl.sum(counts.to(tl.int32), axis=0).to(ACC)
    shift = quotient(tl.sum(tl.where(counts, x.to(ACC), 0.0), axis=0), tl.maximum(n, 1.0))
    shift = if_finite(shift, shift)
    scale = tl.full((BLOCK_C,), 1.0, ACC)
    s1, s2, n = _shifted_sums(x_ptr, mask_ptr, x_strides, c0, inside, shift[None, :], None, p, P, B, S, C, X_FASTEST, VEC_S,
                              VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
    n = tl.zeros((BLOCK_C,), ACC) + n
    high, low, m2 = shifted_moments(shift, s1, s2, tl.maximum(n, 1.0), scale)
    off = (high - shift) + low
    overflow = s2 == float("inf")
    if tl.max((overflow | (n * off * off > 4.0 * m2)).to(tl.int32), axis=0) > 0:
        scale = tl.where(overflow, BIG_SCALE, 1.0).to(ACC)
        shift = if_finite(high, high)
        s1, s2, _ = _shifted_sums(x_ptr, mask_ptr, x_strides, c0, inside, shift[None, :], scale[None, :], p, P, B, S, C,
                                  X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
        high, low, m2 = shifted_moments(shift, s1, s2, tl.maximum(n, 1.0), scale)
    store_share(partial_ptr, p, P, c0 + tl.arange(0, BLOCK_C), C, high, low, m2, scale, n)


@triton.jit
def _counted(partial_ptr, cols, P, C, BLOCK_P: tl.constexpr):
    """How many positions count, and the mean of one of the shares where any do."""
    n = tl.zeros((BLOCK_P, cols.shape[0]), tl.int32)
    mean = tl.full((BLOCK_P, cols.shape[0]), float("-inf"), partial_ptr.dtype.element_ty)
    for first in range(0, P, BLOCK_P):
        high, _, _, count = load_partial(partial_ptr, first, cols, P, C, BLOCK_P)
        n += count.to(tl.int32)
        mean = tl.where((count > 0) & (tl.abs(high) < float("inf")), tl.maximum(mean, high), mean)
    return tl.sum(n, axis=0), tl.max(mean, axis=0)


@triton.jit(do_not_specialize=["P", "C"])
def _masked_merge_kernel(partial_ptr, count_ptr, mean_ptr, std_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                         FOLLOWS: tl.constexpr):  # fmt: skip
    """Count, mean pair and std from all P rows of partial (4, P, C)."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    wait_for_previous(FOLLOWS)
    count, shift = _counted(partial_ptr, cols, P, C, BLOCK_P)
    n = tl.maximum(count, 1).to(ACC)
    high, low, m2, scale = merged(partial_ptr, cols, n[None, :], P, C, BLOCK_P, shift)
    tl.store(count_ptr + cols, count.to(ACC), mask=cols == 0)
    tl.store(mean_ptr + cols, high, mask=cols < C)
    tl.store(mean_ptr + C + cols, low, mask=cols < C)
    tl.store(std_ptr + cols, unscaled(root(quotient(m2, n)), scale), mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def _masked_grad_kernel(dy_ptr, x_ptr, mask_ptr, mean_ptr, rstd_ptr, weight_ptr, c1_ptr, c2_ptr, dx_ptr, dy_strides, x_strides,
                        dx_strides, P, B, S_v, C_v, DY_FASTEST: tl.constexpr, X_FASTEST: tl.constexpr,
                        DX_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr,
                        BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, INDEX: tl.constexpr,
                        STAGES: tl.constexpr):  # fmt: skip
    """dx of every P-th tile: what does not count is normalised by numbers that do not depend on it."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + inside[2]
    weight = load_wanted(weight_ptr, c, c < C)
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, c, C)
    c1 = tl.load(c1_ptr + c, mask=c < C, other=0.0)
    c2 = tl.load(c2_ptr + c, mask=c < C, other=0.0)
    span = tile_span(x_ptr, S, X_FASTEST)
    for tile in tl.range(p, tile_count(B, span, BLOCK_B, BLOCK_S), P, num_stages=STAGES):
        corner = tile_corner(tile, c0, span, BLOCK_B, BLOCK_S)
        places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
        g = tile_load(dy_ptr, dy_strides, corner, inside, places, DY_FASTEST, VEC_S, VEC_C).to(ACC)
        x = tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C).to(ACC)
        counts = _counting(mask_ptr, corner, inside, places, B, S, X_FASTEST)
        g = affine(g, weight, None)
        dx = tl.where(counts, grad_input(g, normalize(x, high, low, rstd), rstd, c1, c2), g * rstd)
        tile_store(dx_ptr, dx_strides, corner, inside, places, dx, DX_FASTEST, VEC_S, VEC_C)


# ---------------------------------------------------------------- launchers


def _bytes(mask):
    """The mask as (B * S) bytes; a bool is one."""
    return mask.contiguous().view(torch.uint8)


def channel_masked_stats(x, mask):
    acc, C = accumulate_dtype(x.dtype), x.shape[1]
    fresh = lambda *shape: torch.empty(shape, dtype=acc, device=x.device)
    count, mean, std = fresh(1), fresh(2, C), fresh(C)
    plan, (view,) = planned(x, reading="stats", fused=True)  # the mask takes registers
    partial = fresh(4, plan.P, C)
    plan.launch(_masked_stats_kernel, view, _bytes(mask), partial, *plan.strides, X_FASTEST=plan.fastest[0],
                LEADS=leads(x.device, x.nbytes))  # fmt: skip
    config = heuristics.finalise(C)
    launch(_masked_merge_kernel, heuristics.cdiv(C, config.block_c), x.device, partial, count, mean, std, plan.P, C,
           BLOCK_P=config.block_p, BLOCK_C=config.block_c, FOLLOWS=overlaps(x.device), warps=config.warps)  # fmt: skip
    return count, mean, std


def channel_masked_grad(dy, x, mask, mean, rstd, weight, c1, c2):
    dx = like(x)
    plan, (view, dy, out) = planned(x, dy, dx, reading="dx", fused=True)
    x_strides, dy_strides, dx_strides = plan.strides
    x_fastest, dy_fastest, dx_fastest = plan.fastest
    plan.launch(_masked_grad_kernel, dy, view, _bytes(mask), dense(mean), dense(rstd), dense(weight), dense(c1), dense(c2), out,
                dy_strides, x_strides, dx_strides, DY_FASTEST=dy_fastest, X_FASTEST=x_fastest,
                DX_FASTEST=dx_fastest)  # fmt: skip
    return dx
