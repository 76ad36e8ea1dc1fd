"""Channels (B, C, S): statistics per channel over B and S. The contract of the channel_ functions is written in reference.py.

Kernels work on the tiles of channel_tiles.py. Statistics and sums are split over positions as well as channels: a program
writes one partial row, and one finalising launch merges them in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Channels
from .channel_tiles import (
    SIZES,
    groups,
    like,
    load_statistics,
    planned,
    program_tiles,
    tile_at,
    tile_corner,
    tile_exists,
    tile_inside,
    update_running,
)
from .launch import accumulate_dtype, dense, float_pair, launch
from .math import (
    BIG_SCALE,
    any_inf,
    centre,
    divide,
    grad_input,
    if_finite,
    normalize,
    pair_of,
    root,
    rstd_of,
    shifted_moments,
    sum2,
    tile_sum2,
)
from .partial import finalise
from .slab import slab_bwd, slab_fwd


@triton.jit
def _shifted_sums(x_ptr, x_strides, c0, inside, shift, scale, first, last, B, S, C, X_FASTEST: tl.constexpr,
                  VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """sum((x - shift) * scale) and the sum of its squares per channel over tiles first..last, and the count of positions."""
    shape: tl.constexpr = (BLOCK_B * BLOCK_S, inside[2].shape[1])
    s1 = tl.zeros(shape, shift.dtype)
    s2 = tl.zeros(shape, shift.dtype)
    count = tl.zeros((1, 1), shift.dtype)
    for tile in tl.range(first, last, num_stages=STAGES):
        corner = tile_corner(tile, c0, S, BLOCK_B, BLOCK_S)
        mask = tile_exists(corner, inside, B, S) & (inside[2] < C - c0)
        x = tl.load(tile_at(x_ptr, x_strides, corner, inside, X_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(shift.dtype)
        d = tl.where(mask, (x - shift) * scale, 0.0)
        s1 += d
        s2 += d * d
        count += (tl.minimum(B - corner[0], BLOCK_B) * tl.minimum(S - corner[1], BLOCK_S)).to(shift.dtype)
    s1, s2 = sum2(s1, s2, 0)
    return s1, s2, tl.sum(count, axis=0)


@triton.jit(do_not_specialize=[*SIZES, "P"])
def _channel_stats_kernel(x_ptr, partial_ptr, x_strides, P, B, S_v, C_v, tiles, first_block, blocks, X_FASTEST: tl.constexpr,
                          VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                          BLOCK_C: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """partial (4, P, C): mean pair, m2 (negative: it overflows, and stands there in units of BIG_SCALE^-2), and count."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0, first, last = program_tiles(tiles, first_block, blocks, B, S, BLOCK_B, BLOCK_S, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    corner = tile_corner(first, c0, S, BLOCK_B, BLOCK_S)
    exists = tile_exists(corner, inside, B, S)
    at = tile_at(x_ptr, x_strides, corner, inside, X_FASTEST, VEC_S, VEC_C)
    x = tl.load(at, mask=exists & (inside[2] < C - c0), other=0.0).to(ACC)
    shift = divide(tl.sum(x, axis=0), tl.sum(exists.to(ACC), axis=0))
    shift = if_finite(shift, shift)
    scale = tl.full((BLOCK_C,), 1.0, ACC)
    s1, s2, n = _shifted_sums(x_ptr, x_strides, c0, inside, shift[None, :], scale[None, :], first, last, B, S, C,
                              X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
    if any_inf(s2):
        scale = tl.where(s2 == float("inf"), BIG_SCALE, 1.0).to(ACC)
        s1, s2, n = _shifted_sums(x_ptr, x_strides, c0, inside, shift[None, :], scale[None, :], first, last, B, S, C,
                                  X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    cols = c0 + tl.arange(0, BLOCK_C)
    row = partial_ptr + p.to(tl.int64) * C + cols
    step = P.to(tl.int64) * C
    tl.store(row, high, mask=cols < C)
    tl.store(row + step, low, mask=cols < C)
    tl.store(row + 2 * step, tl.where(scale == 1.0, m2, -m2), mask=cols < C)
    tl.store(row + 3 * step, tl.zeros((BLOCK_C,), ACC) + n, mask=cols < C)


@triton.jit
def _load_partial(partial_ptr, first, cols, last_c, P, C, BLOCK_P: tl.constexpr):
    """high, low, m2 as it is stored, and count of BLOCK_P partial rows."""
    p = first + tl.arange(0, BLOCK_P)
    mask = (p < P)[:, None] & (cols < last_c)[None, :]
    at = partial_ptr + p.to(tl.int64)[:, None] * C + cols[None, :]
    step = P.to(tl.int64) * C
    high = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + step, mask=mask, other=0.0)
    return high, low, tl.load(at + 2 * step, mask=mask, other=0.0), tl.load(at + 3 * step, mask=mask, other=0.0)


@triton.jit
def _merged_m2(partial_ptr, high, low, scale, cols, last_c, P, C, BLOCK_P: tl.constexpr):
    """Chan: the m2 of the parts, and the parts' means about the common one; all deviations times scale."""
    m2 = tl.zeros((BLOCK_P, cols.shape[0]), high.dtype)
    for first in range(0, P, BLOCK_P):
        part_high, part_low, part_m2, n = _load_partial(partial_ptr, first, cols, last_c, P, C, BLOCK_P)
        unit = tl.where(part_m2 < 0, scale[None, :] * (1 / BIG_SCALE), scale[None, :])
        d = ((part_high - high[None, :]) + (part_low - low[None, :])) * scale[None, :]
        m2 += tl.where(n > 0, tl.abs(part_m2) * unit * unit + n * d * d, 0.0)
    return tl.sum(m2, axis=0)


@triton.jit(do_not_specialize=["first_c", "last_c", "P", "C", "count", "eps", "eps_low", "momentum", "momentum_low"])
def _channel_merge_kernel(partial_ptr, mean_ptr, std_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, first_c, last_c, P, C,
                          count, eps, eps_low, momentum, momentum_low, BLOCK_P: tl.constexpr,
                          BLOCK_C: tl.constexpr):  # fmt: skip
    """Merge P partial rows of channels first_c..last_c: mean pair, then std or rstd, whichever has a pointer.

    Running statistics are updated where they are given.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    cols = first_c + tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < last_c
    total = tl.cast(count, ACC)
    shift = tl.load(partial_ptr + cols, mask=mask, other=0.0)
    shift = if_finite(shift, shift)
    delta = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for first in range(0, P, BLOCK_P):
        part_high, part_low, _, n = _load_partial(partial_ptr, first, cols, last_c, P, C, BLOCK_P)
        delta += divide(n, total) * ((part_high - shift[None, :]) + part_low)
    delta = tl.sum(delta, axis=0)
    high = shift + delta
    low = if_finite((shift - high) + delta, high)
    scale = tl.full((BLOCK_C,), 1.0, ACC)
    m2 = _merged_m2(partial_ptr, high, low, scale, cols, last_c, P, C, BLOCK_P)
    if any_inf(m2):
        scale = tl.where(m2 == float("inf"), BIG_SCALE, 1.0).to(ACC)
        m2 = _merged_m2(partial_ptr, high, low, scale, cols, last_c, P, C, BLOCK_P)
    tl.store(mean_ptr + cols, high, mask=mask)
    tl.store(mean_ptr + C + cols, low, mask=mask)
    if std_ptr is not None:
        tl.store(std_ptr + cols, divide(root(divide(m2, total)), scale), mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + cols, rstd_of(m2, total, scale, pair_of(eps, eps_low, ACC)), mask=mask)
    part = pair_of(momentum, momentum_low, ACC)
    if running_mean_ptr is not None:
        update_running(running_mean_ptr, cols, last_c, high + low, part, 1.0 - part)
    if running_var_ptr is not None:
        update_running(running_var_ptr, cols, last_c, divide(divide(divide(m2, total - 1.0), scale), scale), part, 1.0 - part)


@triton.jit(do_not_specialize=["C", "eps", "eps_low"])
def _running_statistics_kernel(running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr, C, eps, eps_low, BLOCK_C: tl.constexpr):
    """Evaluation: mean pair and rstd from the running statistics."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    mean = tl.load(running_mean_ptr + cols, mask=mask, other=0.0)
    high = mean.to(ACC)
    var = tl.load(running_var_ptr + cols, mask=mask, other=0.0).to(ACC)
    tl.store(mean_ptr + cols, high, mask=mask)
    tl.store(mean_ptr + C + cols, (mean - high.to(mean.dtype)).to(ACC), mask=mask)
    tl.store(rstd_ptr + cols, rstd_of(var, 1.0, 1.0, pair_of(eps, eps_low, ACC)), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _channel_apply_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, x_strides, y_strides, B, S_v, C_v, tiles,
                          first_block, blocks, X_FASTEST: tl.constexpr, Y_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                          VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                          INDEX: tl.constexpr):  # fmt: skip
    """y; the parameters of a program's channels are loaded once."""
    S = S_v * VEC_S
    C = C_v * VEC_C
    _, c0, first, last = program_tiles(tiles, first_block, blocks, B, S, BLOCK_B, BLOCK_S, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, c, C)
    slope = rstd
    if weight_ptr is not None:  # once per channel, which also saves a rounding per element
        slope = rstd * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(rstd.dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(rstd.dtype)
    for tile in range(first, last):
        corner = tile_corner(tile, c0, S, BLOCK_B, BLOCK_S)
        mask = tile_exists(corner, inside, B, S) & (c < C)
        x = tl.load(tile_at(x_ptr, x_strides, corner, inside, X_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(rstd.dtype)
        y = normalize(x, high, low, slope)
        if bias_ptr is not None:
            y = y + bias
        at = tile_at(y_ptr, y_strides, corner, inside, Y_FASTEST, VEC_S, VEC_C)
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "P"])
def _channel_sums_kernel(dy_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr, dy_strides, x_strides, P, B, S_v, C_v, tiles,
                         first_block, blocks, DY_FASTEST: tl.constexpr, X_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                         VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                         INDEX: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """partial (2, P, C): sums of dz * x_hat and of dz; rstd is one factor of a whole channel, multiplied in at the end."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0, first, last = program_tiles(tiles, first_block, blocks, B, S, BLOCK_B, BLOCK_S, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    high, low, _ = load_statistics(mean_ptr, rstd_ptr, c, C)
    dw = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_C), ACC)
    for tile in tl.range(first, last, num_stages=STAGES):
        corner = tile_corner(tile, c0, S, BLOCK_B, BLOCK_S)
        mask = tile_exists(corner, inside, B, S) & (c < C)
        x = tl.load(tile_at(x_ptr, x_strides, corner, inside, X_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(ACC)
        dz = tl.load(tile_at(dy_ptr, dy_strides, corner, inside, DY_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(ACC)
        dw += dz * centre(x, high, low)
        db += dz
    dw, db = tile_sum2(dw, db, VEC_S if X_FASTEST == 0 else max(1, 32 * VEC_C // BLOCK_C), 2)
    cols = c0 + tl.arange(0, BLOCK_C)
    row = partial_ptr + p.to(tl.int64) * C + cols
    tl.store(row, dw * tl.load(rstd_ptr + cols, mask=cols < C, other=0.0), mask=cols < C)
    tl.store(row + P.to(tl.int64) * C, db, mask=cols < C)


@triton.jit(do_not_specialize=SIZES)
def _channel_grad_kernel(dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, c1_ptr, c2_ptr, dx_ptr, dy_strides, x_strides,
                         dx_strides, B, S_v, C_v, tiles, first_block, blocks, DY_FASTEST: tl.constexpr, X_FASTEST: tl.constexpr,
                         DX_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """dx; without c1 (evaluation) mean and rstd are constants, and x is not read."""
    S = S_v * VEC_S
    C = C_v * VEC_C
    _, c0, first, last = program_tiles(tiles, first_block, blocks, B, S, BLOCK_B, BLOCK_S, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, c, C)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(rstd.dtype)
    if c1_ptr is not None:
        c1 = tl.load(c1_ptr + c, mask=c < C, other=0.0)
        c2 = tl.load(c2_ptr + c, mask=c < C, other=0.0)
    for tile in range(first, last):
        corner = tile_corner(tile, c0, S, BLOCK_B, BLOCK_S)
        mask = tile_exists(corner, inside, B, S) & (c < C)
        g = tl.load(tile_at(dy_ptr, dy_strides, corner, inside, DY_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(rstd.dtype)
        if weight_ptr is not None:
            g = g * weight
        if c1_ptr is not None:
            x = tl.load(tile_at(x_ptr, x_strides, corner, inside, X_FASTEST, VEC_S, VEC_C), mask=mask, other=0.0).to(rstd.dtype)
            dx = grad_input(g, normalize(x, high, low, rstd), rstd, c1, c2)
        else:
            dx = g * rstd
        at = tile_at(dx_ptr, dx_strides, corner, inside, DX_FASTEST, VEC_S, VEC_C)
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def _merging(x, at_once, mean, momentum=0.0, eps=0.0, std=None, rstd=None, running_mean=None, running_var=None):
    """A function of a group of channels, two launches: the statistics of x go to the tensors given."""
    (plan, (view,)), C, count = planned(x, sums=True, at_once=at_once), x.shape[1], x.numel() // x.shape[1]
    partial, config = mean.new_empty((4, plan.P, C)), heuristics.finalise(C)

    def run(group):
        plan.launch(_channel_stats_kernel, group, view, partial, *plan.strides, plan.P, X_FASTEST=plan.fastest[0])
        launch(_channel_merge_kernel, heuristics.cdiv(group[1] - group[0], config.block_c), x.device, partial, mean, std, rstd,
               running_mean, running_var, *group, plan.P, C, count, *float_pair(eps), *float_pair(momentum),
               BLOCK_P=config.block_p, BLOCK_C=config.block_c, warps=config.warps)  # fmt: skip

    return run


def _applying(x, at_once, mean, rstd, weight, bias, y):
    """A function of a group of channels, one launch."""
    plan, (x, out) = planned(x, y, sums=False, at_once=at_once)
    return lambda group: plan.launch(_channel_apply_kernel, group, x, mean, rstd, weight, bias, out, *plan.strides,
                                     X_FASTEST=plan.fastest[0], Y_FASTEST=plan.fastest[1])  # fmt: skip


def _summing(dy, x, at_once, mean, rstd, weight, dw, db, c1=None, c2=None):
    """A function of a group of channels, two launches: the sums, and the means that dx needs, go to the tensors given."""
    (plan, (x, dy)), C, count = planned(x, dy, sums=True, at_once=at_once), x.shape[1], x.numel() // x.shape[1]
    (x_strides, dy_strides), (x_fastest, dy_fastest) = plan.strides, plan.fastest
    partial = rstd.new_empty((2, plan.P, C))

    def run(group):
        plan.launch(_channel_sums_kernel, group, dy, x, mean, rstd, partial, dy_strides, x_strides, plan.P,
                    DY_FASTEST=dy_fastest, X_FASTEST=x_fastest)  # fmt: skip
        finalise(partial, group, dw, db, weight=weight, c1=c1, c2=c2, count=count)

    return run


def _differentiating(dy, x, at_once, mean, rstd, weight, c1, c2, dx):
    """A function of a group of channels, one launch."""
    plan, (x, dy, out) = planned(x, dy, dx, sums=False, at_once=at_once)
    x_strides, dy_strides, dx_strides = plan.strides
    x_fastest, dy_fastest, dx_fastest = plan.fastest
    return lambda group: plan.launch(_channel_grad_kernel, group, dy, x, mean, rstd, weight, c1, c2, out, dy_strides, x_strides,
                                     dx_strides, DY_FASTEST=dy_fastest, X_FASTEST=x_fastest,
                                     DX_FASTEST=dx_fastest)  # fmt: skip


def _statistics(x):
    """Memory for a mean pair and one more number per channel."""
    acc, C = accumulate_dtype(x.dtype), x.shape[1]
    return torch.empty((2, C), dtype=acc, device=x.device), torch.empty(C, dtype=acc, device=x.device)


def channel_stats(x):
    (mean, std), C = _statistics(x), x.shape[1]
    _merging(x, C, mean, std=std)((0, C))
    return Channels.of(x.shape).count, mean, std


def channel_apply(x, mean, rstd, weight, bias):
    y, C = like(x), x.shape[1]
    _applying(x, C, dense(mean), dense(rstd), dense(weight), dense(bias), y)((0, C))
    return y


def channel_sums(dy, x, mean, rstd):
    sum_dz, sum_dz_x_hat, C = torch.empty_like(rstd), torch.empty_like(rstd), x.shape[1]
    _summing(dy, x, C, dense(mean), dense(rstd), None, sum_dz_x_hat, sum_dz)((0, C))
    return sum_dz, sum_dz_x_hat


def channel_grad(dy, x, mean, rstd, weight, c1, c2):
    dx, C = like(x), x.shape[1]
    _differentiating(dy, x, C, dense(mean), dense(rstd), dense(weight), dense(c1), dense(c2), dx)((0, C))
    return dx


def channel_fwd(x, weight, bias, running_mean, running_var, training, momentum, eps):
    y, (mean, rstd), weight, bias, C = like(x), _statistics(x), dense(weight), dense(bias), x.shape[1]
    running = [dense(running_mean), dense(running_var)]
    if not training:
        launch(_running_statistics_kernel, heuristics.cdiv(C, 1024), x.device, *running, mean, rstd, C, *float_pair(eps),
               BLOCK_C=1024, warps=4)  # fmt: skip
        _applying(x, C, mean, rstd, weight, bias, y)((0, C))
        return y, mean, rstd
    if not slab_fwd(x, weight, bias, *running, y, mean, rstd, momentum, eps):
        parts = groups(x)
        merge = _merging(x, parts[0][1], mean, momentum, eps, None, rstd, *running)
        apply = _applying(x, parts[0][1], mean, rstd, weight, bias, y)
        for group in parts:
            merge(group)
            apply(group)
    for new, old in zip(running, (running_mean, running_var), strict=True):
        if new is not old:  # the buffer is strided: dense made a copy
            old.data.copy_(new)
    return y, mean, rstd


def channel_bwd(dy, x, weight, mean, rstd, training, need):
    if not need[0] and need[1] is None and need[2] is None:
        return None, None, None
    weight, mean, rstd = dense(weight), dense(mean), dense(rstd)
    dx = like(x) if need[0] else None
    dw, db = (None if dtype is None else torch.empty(rstd.shape, dtype=dtype, device=x.device) for dtype in need[1:])
    if training and slab_bwd(dy, x, weight, mean, rstd, dx, dw, db):
        return dx, dw, db
    means = training and need[0]
    c1, c2 = (torch.empty_like(rstd), torch.empty_like(rstd)) if means else (None, None)
    parts, steps = [(0, x.shape[1])], []
    if means or need[1] is not None or need[2] is not None:
        parts = groups(x, dy)
        steps.append(_summing(dy, x, parts[0][1], mean, rstd, weight, dw, db, c1, c2))
    if need[0]:
        steps.append(_differentiating(dy, x, parts[0][1], mean, rstd, weight, c1, c2, dx))
    for group in parts:
        for step in steps:
            step(group)
    return dx, dw, db
