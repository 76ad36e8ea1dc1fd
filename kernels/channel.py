"""Channels (B, C, S): statistics per channel over B and S. The contract of the channel_ functions is written in reference.py.

Where a slab fits the registers, training is slab.py. Else x is read twice: a first launch sums, over positions as well as
channels, and every program of it writes one partial row; the second one merges the rows of its channels, in a fixed order, and
reads x again. Many rows of many channels are merged by a launch of its own, and so are those of pieces that a collective comes
between.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics
from ..geometry import Channels
from .activations import number
from .chain import let_next_start, wait_for_previous
from .channel_parts import apply_tiles, grad_tiles, load_backwards, merged, store_statistics, store_sums, store_training
from .channel_tiles import SIZES, is_fused, like, load_statistics, planned, program_block, tile_inside
from .launch import accumulate_dtype, dense, float_pair, launch, leads, overlaps
from .math import pair_of, quotient, root, unscaled
from .partial import finalise, mean_of, total
from .slab import slab_bwd, slab_fwd
from .wanted import load_wanted, store_wanted


@triton.jit(do_not_specialize=SIZES)
def _channel_stats_kernel(x_ptr, partial_ptr, x_strides, P, B, S_v, C_v, X_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                          VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                          INDEX: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """partial (4, P, C), see store_statistics."""
    let_next_start(LEADS)
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    store_statistics(partial_ptr, p, P, x_ptr, x_strides, c0, tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX), B, S, C, X_FASTEST,
                     VEC_S, VEC_C, BLOCK_B, BLOCK_S, BLOCK_C, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["P", "C", "count", "eps", "eps_low", "momentum", "momentum_low"])
def _channel_merge_kernel(partial_ptr, mean_ptr, std_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, P, C, count,
                          eps, eps_low, momentum, momentum_low, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                          LEADS: tl.constexpr, FOLLOWS: tl.constexpr):  # fmt: skip
    """From all P rows of partial (4, P, C): mean pair and std, or, where rstd has a pointer, all that training stores."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    let_next_start(LEADS)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.cast(count, ACC)
    old_mean = load_wanted(running_mean_ptr, cols, cols < C)
    old_var = load_wanted(running_var_ptr, cols, cols < C)
    tracked = load_wanted(tracked_ptr, 0, True)
    wait_for_previous(FOLLOWS)
    high, low, m2, scale = merged(partial_ptr, cols, n, P, C, BLOCK_P)
    if rstd_ptr is not None:
        store_training(high, low, m2, scale, n, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, old_mean,
                       old_var, tracked, cols, C, C, pair_of(eps, eps_low, ACC),
                       pair_of(momentum, momentum_low, ACC))  # fmt: skip
    else:
        tl.store(mean_ptr + cols, high, mask=cols < C)
        tl.store(mean_ptr + C + cols, low, mask=cols < C)
        tl.store(std_ptr + cols, unscaled(root(quotient(m2, n)), scale), mask=cols < C)


@triton.jit(do_not_specialize=[*SIZES, "rows", "count", "eps", "eps_low", "momentum", "momentum_low"])
def _channel_apply_kernel(x_ptr, residual_ptr, partial_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                          weight_ptr, bias_ptr, y_ptr, x_strides, residual_strides, y_strides, alpha, rows, count, eps, eps_low,
                          momentum, momentum_low, P, B, S_v, C_v, X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr,
                          Y_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr,
                          BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, INDEX: tl.constexpr,
                          HELD: tl.constexpr, FOLLOWS: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """y. Mean pair and rstd come from the partial rows of training, else from the running statistics where they are given:
    each program makes them of its channels, and one stores them. Else they are loaded."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    cols = c0 + tl.arange(0, BLOCK_C)
    end = tl.where(p == 0, C, 0)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + inside[2]
    weight = load_wanted(weight_ptr, c, c < C)
    bias = load_wanted(bias_ptr, c, c < C)
    old_mean = load_wanted(running_mean_ptr, cols, cols < C)
    old_var = load_wanted(running_var_ptr, cols, cols < C)
    tracked = load_wanted(tracked_ptr, 0, True)
    first = None
    if HELD:
        first = load_backwards(x_ptr, x_strides, p, c0, inside, B, S, C, X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S)
    wait_for_previous(FOLLOWS)
    if partial_ptr is not None:
        n = tl.cast(count, ACC)
        high, low, m2, scale = merged(partial_ptr, cols, n, rows, C, BLOCK_P)
        rstd = store_training(high, low, m2, scale, n, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                              old_mean, old_var, tracked, cols, end, C, pair_of(eps, eps_low, ACC),
                              pair_of(momentum, momentum_low, ACC))  # fmt: skip
    elif running_mean_ptr is not None:
        high = old_mean.to(ACC)
        low = (old_mean - high.to(old_mean.dtype)).to(ACC)
        one = tl.cast(1.0, ACC)
        rstd = store_training(high, low, old_var.to(ACC), one, one, mean_ptr, rstd_ptr, None, None, None, None, None, None,
                              cols, end, C, pair_of(eps, eps_low, ACC), 0.0)  # fmt: skip
    else:
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, cols, C)
    factor = rstd[None, :]
    if weight is not None:  # once per channel, which also saves a rounding per element
        factor = factor * weight.to(ACC)
    apply_tiles(first, x_ptr, residual_ptr, y_ptr, x_strides, residual_strides, y_strides, c0, inside, high[None, :],
                low[None, :], factor, bias, alpha, p, P, B, S, C, X_FASTEST, R_FASTEST, Y_FASTEST, VEC_S, VEC_C, BLOCK_B,
                BLOCK_S, ACTIVATION)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _channel_sums_kernel(dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dz_ptr, partial_ptr, dy_strides,
                         x_strides, residual_strides, dz_strides, alpha, P, B, S_v, C_v, DY_FASTEST: tl.constexpr,
                         X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr, DZ_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                         VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                         INDEX: tl.constexpr, STAGES: tl.constexpr, LEADS: tl.constexpr,
                         ACTIVATION: tl.constexpr):  # fmt: skip
    """partial (2, P, C), and dz where it has a pointer, see store_sums."""
    let_next_start(LEADS)
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    store_sums(partial_ptr, p, P, dy_ptr, x_ptr, residual_ptr, dz_ptr, dy_strides, x_strides, residual_strides, dz_strides, c0,
               tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX), mean_ptr, rstd_ptr, weight_ptr, bias_ptr, alpha, B, S, C,
               DY_FASTEST, X_FASTEST, R_FASTEST, DZ_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, BLOCK_C, STAGES,
               ACTIVATION)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "rows", "count"])
def _channel_grad_kernel(dy_ptr, x_ptr, residual_ptr, partial_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c1_ptr, c2_ptr,
                         dx_ptr, dz_ptr, dw_ptr, db_ptr, dy_strides, x_strides, residual_strides, dx_strides, alpha, rows,
                         count, P, B, S_v, C_v, DY_FASTEST: tl.constexpr, X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr,
                         DX_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, INDEX: tl.constexpr,
                         STAGES: tl.constexpr, FOLLOWS: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """dx, and dz where it has a pointer. With the partial rows of training each program adds up those of its channels, and one
    stores dw and db. Else the means are loaded; evaluation has none."""
    S = S_v * VEC_S
    C = C_v * VEC_C
    p, c0 = program_block(C, BLOCK_C)
    cols = c0 + tl.arange(0, BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    c = c0 + inside[2]
    weight = load_wanted(weight_ptr, c, c < C)
    bias = load_wanted(bias_ptr, c, c < C)
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, c, C)
    wait_for_previous(FOLLOWS)
    means = None
    if partial_ptr is not None:
        dw, db = total(partial_ptr, cols, cols < C, rows, rows, C, BLOCK_P, True, True)
        end = tl.where(p == 0, C, 0)
        store_wanted(dw_ptr, cols, dw, cols < end)
        store_wanted(db_ptr, cols, db, cols < end)
        means = (mean_of(dw[None, :], weight, count), mean_of(db[None, :], weight, count))
    elif c1_ptr is not None:
        means = (tl.load(c1_ptr + c, mask=c < C, other=0.0), tl.load(c2_ptr + c, mask=c < C, other=0.0))
    grad_tiles(dy_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, dy_strides, x_strides, residual_strides, dx_strides, c0, inside,
               high, low, rstd, weight, bias, alpha, means, p, P, B, S, C, DY_FASTEST, X_FASTEST, R_FASTEST, DX_FASTEST, VEC_S,
               VEC_C, BLOCK_B, BLOCK_S, STAGES, ACTIVATION)  # fmt: skip


# ---------------------------------------------------------------- launchers


def _statistics(x):
    """Memory for a mean pair and one more number per channel."""
    acc, C = accumulate_dtype(x.dtype), x.shape[1]
    return torch.empty((2, C), dtype=acc, device=x.device), torch.empty(C, dtype=acc, device=x.device)


def _count(x):
    return Channels.of(x.shape).count


def _stats(x, mean):
    """Partial rows (4, P, C), and whether the second reading may merge them."""
    plan, (x,) = planned(x, reading="stats")
    partial = mean.new_empty((4, plan.P, mean.shape[1]))
    plan.launch(_channel_stats_kernel, x, partial, *plan.strides, X_FASTEST=plan.fastest[0], LEADS=leads(x.device, x.nbytes))
    return partial, plan.few


def _merge(partial, mean, count, std=None, rstd=None, running=(None, None, None), eps=0.0, momentum=0.0):
    """`running`: running_mean, running_var and num_batches_tracked."""
    _, P, C = partial.shape
    config, follows = heuristics.finalise(C), overlaps(partial.device)
    launch(_channel_merge_kernel, heuristics.cdiv(C, config.block_c), partial.device, partial, mean, std, rstd, *running, P, C,
           count, *float_pair(eps), *float_pair(momentum), BLOCK_P=config.block_p, BLOCK_C=config.block_c,
           LEADS=follows and rstd is not None, FOLLOWS=follows, warps=config.warps)  # fmt: skip


def _apply(x, mean, rstd, weight, bias, y, partial=None, running=(None, None, None), eps=0.0, momentum=0.0, follows=False,
           residual=None, activation="identity", alpha=None):  # fmt: skip
    plan, (view, out, residual) = planned(x, y, residual, reading="y", fused=is_fused(residual, activation))
    (x_strides, y_strides, residual_strides), (x_fastest, y_fastest, residual_fastest) = plan.strides, plan.fastest
    plan.launch(_channel_apply_kernel, view, residual, partial, mean, rstd, *running, weight, bias, out, x_strides,
                residual_strides, y_strides, alpha, 1 if partial is None else partial.shape[1], _count(x), *float_pair(eps),
                *float_pair(momentum), X_FASTEST=x_fastest, R_FASTEST=residual_fastest, Y_FASTEST=y_fastest,
                FOLLOWS=follows and overlaps(x.device), ACTIVATION=activation)  # fmt: skip
    return y


def _sums(dy, x, mean, rstd, weight=None, bias=None, residual=None, dz=None, activation="identity", alpha=None):
    """As _stats, partial rows (2, P, C); dz is filled where there is one."""
    plan, (x, dy, residual, dz) = planned(x, dy, residual, dz, reading="sums", fused=is_fused(residual, activation))
    (x_strides, *strides), (x_fastest, dy_fastest, residual_fastest, dz_fastest) = plan.strides, plan.fastest
    partial = rstd.new_empty((2, plan.P, rstd.numel()))
    plan.launch(_channel_sums_kernel, dy, x, residual, mean, rstd, weight, bias, dz, partial, strides[0], x_strides,
                *strides[1:], alpha, DY_FASTEST=dy_fastest, X_FASTEST=x_fastest, R_FASTEST=residual_fastest,
                DZ_FASTEST=dz_fastest, LEADS=leads(x.device, x.nbytes), ACTIVATION=activation)  # fmt: skip
    return partial, plan.few


def _grad(dy, x, mean, rstd, weight, dx, partial=None, dw=None, db=None, c1=None, c2=None, follows=False, bias=None,
          residual=None, dz=None, activation="identity", alpha=None):  # fmt: skip
    plan, (view, dy, out, residual) = planned(x, dy, dx, residual, reading="dx", fused=is_fused(residual, activation))
    x_strides, dy_strides, dx_strides, residual_strides = plan.strides
    x_fastest, dy_fastest, dx_fastest, residual_fastest = plan.fastest
    plan.launch(_channel_grad_kernel, dy, view, residual, partial, mean, rstd, weight, bias, c1, c2, out, dz, dw, db,
                dy_strides, x_strides, residual_strides, dx_strides, alpha, 1 if partial is None else partial.shape[1],
                _count(x), DY_FASTEST=dy_fastest, X_FASTEST=x_fastest, R_FASTEST=residual_fastest, DX_FASTEST=dx_fastest,
                FOLLOWS=follows and overlaps(x.device), ACTIVATION=activation)  # fmt: skip
    return dx


def channel_stats(x):
    mean, std = _statistics(x)
    _merge(_stats(x, mean)[0], mean, _count(x), std=std)
    return _count(x), mean, std


def channel_apply(x, mean, rstd, weight, bias):
    return _apply(x, dense(mean), dense(rstd), dense(weight), dense(bias), like(x))


def channel_sums(dy, x, mean, rstd):
    sum_dz, sum_dz_x_hat = torch.empty_like(rstd), torch.empty_like(rstd)
    finalise(_sums(dy, x, dense(mean), dense(rstd))[0], sum_dz_x_hat, sum_dz)
    return sum_dz, sum_dz_x_hat


def channel_grad(dy, x, mean, rstd, weight, c1, c2):
    return _grad(dy, x, dense(mean), dense(rstd), dense(weight), like(x), c1=dense(c1), c2=dense(c2))


def channel_fwd(x, weight, bias, running_mean, running_var, training, momentum, eps, num_batches_tracked=None):
    return channel_fused_fwd(x, weight, bias, None, "identity", 0.0, running_mean, running_var, training, momentum, eps,
                             num_batches_tracked)[:3]  # fmt: skip


def channel_bwd(dy, x, weight, mean, rstd, training, need):
    return channel_fused_bwd(dy, x, None, weight, None, "identity", 0.0, mean, rstd, training, (*need, False))[:3]


def channel_fused_fwd(x, weight, bias, residual, activation, alpha, running_mean, running_var, training, momentum, eps,
                      num_batches_tracked=None, keep=False):  # fmt: skip
    kept = residual if keep else None
    y, (mean, rstd), weight, bias = like(x), _statistics(x), dense(weight), dense(bias)
    running = [dense(running_mean), dense(running_var), num_batches_tracked if training else None]
    end = {"residual": residual, "activation": activation, "alpha": number(activation, alpha)}
    if not training:
        return _apply(x, mean, rstd, weight, bias, y, None, running, eps, **end), mean, rstd, kept
    if not slab_fwd(x, weight, bias, running, y, mean, rstd, momentum, eps, **end):
        partial, few = _stats(x, mean)
        if few:
            _apply(x, mean, rstd, weight, bias, y, partial, running, eps, momentum, True, **end)
        else:
            _merge(partial, mean, _count(x), None, rstd, running, eps, momentum)
            _apply(x, mean, rstd, weight, bias, y, follows=True, **end)
    for new, old in zip(running[:2], (running_mean, running_var), strict=True):
        if new is not old:  # the buffer is strided: dense made a copy
            old.data.copy_(new)
    return y, mean, rstd, kept


def channel_fused_bwd(dy, x, residual, weight, bias, activation, alpha, mean, rstd, training, need):
    weight, bias, mean, rstd = dense(weight), dense(bias), dense(mean), dense(rstd)
    dx, dresidual = like(x) if need[0] else None, like(x) if need[3] else None
    dw, db = (None if dtype is None else torch.empty(rstd.shape, dtype=dtype, device=x.device) for dtype in need[1:3])
    if activation == "identity":
        bias = residual = None  # z is not asked for
    end = {"bias": bias, "residual": residual, "dz": dresidual, "activation": activation, "alpha": number(activation, alpha)}
    sums, means = dw is not None or db is not None, training and dx is not None
    if training and (sums or means) and slab_bwd(dy, x, weight, mean, rstd, dx, dw, db, **end):
        return dx, dw, db, dresidual
    partial, few = None, False
    if sums or means or (dx is None and dresidual is not None):
        if dx is not None and residual is not None and dresidual is None:
            end["dz"] = like(x)
        partial, few = _sums(dy, x, mean, rstd, None if activation == "identity" else weight, **end)
        if end["dz"] is not None:  # instead of dy and residual, of which it is made
            dy, end = end["dz"], {}
    if means and few:
        return _grad(dy, x, mean, rstd, weight, dx, partial, dw, db, follows=True, **end), dw, db, dresidual
    c1, c2 = (torch.empty_like(rstd), torch.empty_like(rstd)) if means else (None, None)
    if sums or means:
        finalise(partial, dw, db, weight=weight, c1=c1, c2=c2, count=_count(x), leads=dx is not None)
    if dx is not None:
        _grad(dy, x, mean, rstd, weight, dx, c1=c1, c2=c2, follows=partial is not None, **end)
    return dx, dw, db, dresidual
