"""Positions: a norm over the C channels of each of the S positions of a sample, that ends in an activation (channels first).

x is dense. A tile is [BLOCK_C channels, BLOCK_S positions], and positions are counted through all samples, so that short ones
fill it as well. Where the registers hold all channels, x is read once, else by blocks of channels and twice, the second time
from what the caches still hold. The contract is written in reference.py.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics_positions
from ..geometry import Channels
from .activations import activate, number
from .chain import let_next_start
from .channel_tiles import load_statistics
from .launch import accumulate_dtype, dense, float_pair, launch, leads, sm_count, vector
from .math import (
    BIG_SCALE,
    add_shifted,
    affine,
    any_inf,
    centred_moments,
    grad_input,
    if_finite,
    inverse,
    normalize,
    pair_of,
    quotient,
    rstd_of,
    shifted_moments,
    sum2,
)
from .partial import finalise
from .row_fused import row_fused_bwd, row_fused_fwd
from .row_parts import load_dz, store_statistics, store_sums
from .wanted import load_wanted

SIZES = ["B", "C", "S_v", "alpha"]


@triton.jit
def _positions(tile, B, C, S, BLOCK_S: tl.constexpr, VEC: tl.constexpr, CROSSES: tl.constexpr, INDEX: tl.constexpr):
    """Of a tile: its positions [1, BLOCK_S] and which exist; where channel 0 of the first is, and of the others from there on.
    CROSSES: more than two samples may be in it.

    The hints are for Triton before 3.9, which sees no neighbours past `later` and would have a warp read one position of many
    channels. That two positions are neighbours is not true everywhere where VEC is 1, but there no load takes two.
    """
    first = tl.cast(tile, tl.int64) * BLOCK_S
    along = tl.arange(0, BLOCK_S)[None, :]
    sample = first // S
    place = (first % S).to(tl.int32)
    if CROSSES:
        later = (place + along).to(tl.uint32) // tl.cast(S, tl.uint32)
    else:
        later = place + along >= S
    i = first + along
    start = along.to(INDEX) + later.to(INDEX) * (tl.cast(C - 1, INDEX) * S)
    start = tl.max_contiguous(tl.multiple_of(start, (1, VEC)), (1, max(VEC, 2)))
    return i, i < tl.cast(B, tl.int64) * S, tl.multiple_of(sample * C * S + place, VEC), start


@triton.jit
def _of_channels(ptr, c, C):
    """A parameter's values of channels c, [BLOCK_C, 1]: loaded once a thread, as a vector. None where there is no pointer."""
    c = tl.reshape(c, (c.shape[0],))
    value = load_wanted(ptr, c, c < C)
    if value is not None:
        value = value[:, None]
    return value


@triton.jit
def _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, C, S, base, start, there, alpha,
               ACTIVATION: tl.constexpr):  # fmt: skip
    """x_hat and dz, both 0 outside, of channels c [BLOCK_C, 1], where they are from `base` on, and which exist."""
    at = start + c.to(start.dtype) * S
    mask = (c < C) & there
    x = tl.load(x_ptr + base + at, mask=mask, other=0.0).to(rstd.dtype)
    x_hat = tl.where(mask, normalize(x, high, low, rstd), 0.0)
    return x_hat, load_dz(dy_ptr + base, None, at, at, mask, x_hat, weight, bias, alpha, ACTIVATION), at, mask


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low"])
def _position_fwd_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, B, C, S_v, eps, eps_low, alpha,
                         BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr, CROSSES: tl.constexpr,
                         INDEX: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """All channels in registers."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    S = S_v * VEC
    n = C.to(ACC)
    i, there, base, start = _positions(tl.program_id(0), B, C, S, BLOCK_S, VEC, CROSSES, INDEX)
    x_ptr += base
    y_ptr += base
    c = tl.arange(0, BLOCK_C)[:, None]
    at = start + c.to(INDEX) * S
    mask = (c < C) & there
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    weight = _of_channels(weight_ptr, c, C)
    bias = _of_channels(bias_ptr, c, C)
    d, high, low, m2, scale = centred_moments(x, c < C, n, 0)
    low = if_finite(low, high)
    rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))[None, :]
    store_statistics(mean_ptr, rstd_ptr, i, tl.cast(B, tl.int64) * S, high[None, :], low[None, :], rstd)
    y = activate(affine((d - low[None, :]) * rstd, weight, bias), alpha, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shifted_sums(x_ptr, start, there, C, S, shift, scale, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """The sums of add_shifted over all channels, each [BLOCK_S]."""
    s1 = tl.zeros((BLOCK_C, BLOCK_S), shift.dtype)
    s2 = tl.zeros((BLOCK_C, BLOCK_S), shift.dtype)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)[:, None]
        mask = (c < C) & there
        x = tl.load(x_ptr + (start + c.to(start.dtype) * S), mask=mask, other=0.0).to(shift.dtype)
        s1, s2 = add_shifted(s1, s2, x, shift, scale, mask)
    return sum2(s1, s2, 0)


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low"])
def _position_fwd_long_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, B, C, S_v, eps, eps_low, alpha,
                              BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr, CROSSES: tl.constexpr,
                              INDEX: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Any number of channels: a sweep for the statistics, and one back that normalises."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    S = S_v * VEC
    n = C.to(ACC)
    i, there, base, start = _positions(tl.program_id(0), B, C, S, BLOCK_S, VEC, CROSSES, INDEX)
    x_ptr += base
    y_ptr += base
    inside = tl.arange(0, BLOCK_C)[:, None]
    some = tl.load(x_ptr + (start + inside.to(INDEX) * S), mask=(inside < C) & there, other=0.0).to(ACC)
    shift = quotient(tl.sum(some, axis=0), tl.minimum(C, BLOCK_C).to(ACC))
    scale = tl.full((BLOCK_S,), 1.0, ACC)
    s1, s2 = _shifted_sums(x_ptr, start, there, C, S, shift[None, :], None, BLOCK_C, BLOCK_S, STAGES)
    if any_inf(s2):
        scale = tl.where(s2 == float("inf"), BIG_SCALE, 1.0).to(ACC)
        s1, s2 = _shifted_sums(x_ptr, start, there, C, S, shift[None, :], scale[None, :], BLOCK_C, BLOCK_S, STAGES)
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    rstd = rstd_of(m2, n, scale, pair_of(eps, eps_low, ACC))
    high, low, rstd = high[None, :], low[None, :], rstd[None, :]
    store_statistics(mean_ptr, rstd_ptr, i, tl.cast(B, tl.int64) * S, high, low, rstd)
    blocks = tl.cdiv(C, BLOCK_C)
    for back in tl.range(0, blocks, num_stages=STAGES):
        c = (blocks - 1 - back) * BLOCK_C + inside
        at = start + c.to(INDEX) * S
        mask = (c < C) & there
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        weight = _of_channels(weight_ptr, c, C)
        bias = _of_channels(bias_ptr, c, C)
        y = activate(affine(normalize(x, high, low, rstd), weight, bias), alpha, ACTIVATION)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "P"])
def _position_bwd_kernel(dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P, B, C,
                         S_v, alpha, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr, CROSSES: tl.constexpr,
                         INDEX: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr, LEADS: tl.constexpr):  # fmt: skip
    """All channels in registers, persistent: a program sums dw and db over every P-th tile."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    S = S_v * VEC
    M = tl.cast(B, tl.int64) * S
    c = tl.arange(0, BLOCK_C)[:, None]
    weight = _of_channels(weight_ptr, c, C)
    bias = _of_channels(bias_ptr, c, C)
    share = inverse(C.to(ACC))
    dw = tl.zeros((BLOCK_C,), ACC)
    db = tl.zeros((BLOCK_C,), ACC)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_S).to(tl.int32), P, num_stages=STAGES):
        i, there, base, start = _positions(tile, B, C, S, BLOCK_S, VEC, CROSSES, INDEX)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, i, M)
        x_hat, dz, at, mask = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, C, S, base, start, there,
                                         alpha, ACTIVATION)  # fmt: skip
        if partial_ptr is not None:
            dw_tile, db_tile = sum2(dz * x_hat, dz, 1)
            dw += dw_tile
            db += db_tile
        if dx_ptr is not None:
            g = affine(dz, weight, None)
            c1, c2 = sum2(g * x_hat, g, 0)
            dx = grad_input(g, x_hat, rstd, (c1 * share)[None, :], (c2 * share)[None, :])
            tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    cols = tl.arange(0, BLOCK_C)
    store_sums(partial_ptr, dw_ptr, db_ptr, dw[None, :], db[None, :], tl.program_id(0), P, cols, cols < C, C)


@triton.jit(do_not_specialize=[*SIZES, "P"])
def _position_bwd_long_kernel(dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, dw_ptr, db_ptr, P,
                              B, C, S_v, alpha, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr,
                              CROSSES: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
                              LEADS: tl.constexpr):  # fmt: skip
    """Any number of channels, persistent: for every P-th tile a sweep for the sums, and one back for dx. A program adds to its
    own partial row, which is in L2, as is what so few programs read again."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    let_next_start(LEADS)
    S = S_v * VEC
    M = tl.cast(B, tl.int64) * S
    share = inverse(C.to(ACC))
    blocks = tl.cdiv(C, BLOCK_C)
    p = tl.program_id(0)
    for tile in range(p, tl.cdiv(M, BLOCK_S).to(tl.int32), P):
        tl.debug_barrier()  # other threads may have stored what a thread adds to
        i, there, base, start = _positions(tile, B, C, S, BLOCK_S, VEC, CROSSES, INDEX)
        high, low, rstd = load_statistics(mean_ptr, rstd_ptr, i, M)
        s1 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        s2 = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            cols = first + tl.arange(0, BLOCK_C)
            c = cols[:, None]
            weight = _of_channels(weight_ptr, c, C)
            bias = _of_channels(bias_ptr, c, C)
            x_hat, dz, _, _ = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, C, S, base, start, there,
                                         alpha, ACTIVATION)  # fmt: skip
            if partial_ptr is not None:
                dw, db = sum2(dz * x_hat, dz, 1)
                later = cols < tl.where(tl.cast(tile, tl.int32) >= P, C, 0)
                dw += tl.load(partial_ptr + p.to(tl.int64) * C + cols, mask=later, other=0.0)
                db += tl.load(partial_ptr + (p.to(tl.int64) + P) * C + cols, mask=later, other=0.0)
                store_sums(partial_ptr, dw_ptr, db_ptr, dw[None, :], db[None, :], p, P, cols, cols < C, C)
            g = affine(dz, weight, None)
            s1 += g * x_hat
            s2 += g
        if dx_ptr is not None:
            c1, c2 = sum2(s1, s2, 0)
            c1, c2 = (c1 * share)[None, :], (c2 * share)[None, :]
            for back in tl.range(0, blocks, num_stages=STAGES):
                c = (blocks - 1 - back) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
                weight = _of_channels(weight_ptr, c, C)
                bias = _of_channels(bias_ptr, c, C)
                x_hat, dz, at, mask = _load_tile(dy_ptr, x_ptr, weight, bias, high, low, rstd, c, C, S, base, start, there,
                                                 alpha, ACTIVATION)  # fmt: skip
                dx = grad_input(affine(dz, weight, None), x_hat, rstd, c1, c2)
                tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def position_pays(x, differentiable):
    """Whether these kernels are known to take less time than two permuted copies and a norm of rows between them: on an H200
    those that read once, by 1.3 to 3.3 times, while the others took up to 2.1 times as long."""
    channels, itemsize = Channels.of(x.shape), x.element_size()
    width = vector(itemsize, channels.S) * itemsize
    return heuristics_positions.read_once(channels.C, channels.S, itemsize, width, differentiable)


def position_fwd(x, weight, bias, activation, alpha, eps):
    channels, x = Channels.of(x.shape), x.contiguous()
    B, C, S = channels.B, channels.C, channels.S
    if S == 1:  # a sample is a row
        y, _, mean, rstd = row_fused_fwd(x, None, weight, bias, None, activation, alpha, eps, C)
        return y, mean, rstd
    acc, vec = accumulate_dtype(x.dtype), vector(x.element_size(), S)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty((2, B * S), dtype=acc, device=x.device)
    rstd = torch.empty(B * S, dtype=acc, device=x.device)
    config = heuristics_positions.forward(B, C, S, x.element_size(), vec * x.element_size())
    args = x, dense(weight), dense(bias), y, mean, rstd, B, C, S // vec, *float_pair(eps), number(activation, alpha)
    options = _options(config, C, S, vec, activation)
    if config.whole:
        launch(_position_fwd_kernel, config.programs, x.device, *args, **options)
    else:
        launch(_position_fwd_long_kernel, config.programs, x.device, *args, STAGES=config.stages, **options)
    return y, mean, rstd


def _options(config, C, S, vec, activation):
    samples = config.block_s // S + 2  # of which positions may be in a tile
    index = tl.int32 if (samples * C + config.block_c) * S < 2**31 else tl.int64
    return dict(BLOCK_C=config.block_c, BLOCK_S=config.block_s, VEC=vec, CROSSES=config.block_s > S, INDEX=index,
                ACTIVATION=activation, warps=config.warps, stages=config.stages, registers=config.registers)  # fmt: skip


def position_bwd(dy, x, weight, bias, activation, alpha, mean, rstd, need):
    if not any(need):
        return None, None, None
    channels, x = Channels.of(x.shape), x.contiguous()
    B, C, S = channels.B, channels.C, channels.S
    if S == 1:
        return row_fused_bwd(dy, None, x, None, weight, bias, activation, alpha, mean, rstd, (*need, False))[:3]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need[0] else None
    dw, db = (None if dtype is None else torch.empty(C, dtype=dtype, device=x.device) for dtype in need[1:])
    vec = vector(x.element_size(), S)
    config = heuristics_positions.backward(B, C, S, x.element_size(), vec * x.element_size(), sm_count(x.device))
    partial = None
    if dw is not None or db is not None:
        partial = torch.empty((2, config.programs, C), dtype=rstd.dtype, device=x.device)
    launch(_position_bwd_kernel if config.whole else _position_bwd_long_kernel, config.programs, x.device, dy.contiguous(), x,
           dense(weight), None if activation == "identity" else dense(bias), dense(mean), dense(rstd), dx, partial, dw, db,
           config.programs, B, C, S // vec, number(activation, alpha), STAGES=config.stages,
           LEADS=leads(x.device, x.nbytes), **_options(config, C, S, vec, activation))  # fmt: skip
    if partial is not None and config.programs > 1:
        finalise(partial, dw, db)
    return dx, dw, db
