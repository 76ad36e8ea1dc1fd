"""Channels whose slab, all positions of a few channels, fits the registers of one program: one launch each way.

x (and dy) are read once and everything of a channel is known on the spot: the forward and the backward of training are one
kernel each, with the math and the roundings of the kernels in channel.py.
"""

from functools import lru_cache

import triton
import triton.language as tl

from .. import heuristics
from .activations import activate
from .channel_parts import dz_of, store_training
from .channel_tiles import (
    CHANNELS,
    SIZES,
    SKEWED,
    Layout,
    as_planned,
    described,
    existing,
    is_fused,
    load_statistics,
    presence,
    spread,
    tile_inside,
    tile_load,
    tile_places,
    tile_store,
)
from .launch import float_pair, launch
from .math import centre, centred_moments, grad_input, if_finite, normalize, pair_of, tile_sum2
from .partial import mean_of
from .wanted import load_wanted, store_wanted


@triton.jit(do_not_specialize=[*SIZES, "eps", "eps_low", "momentum", "momentum_low"])
def _slab_fwd_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, y_ptr, mean_ptr,
                     rstd_ptr, x_strides, residual_strides, y_strides, alpha, B, S_v, C_v, eps, eps_low, momentum, momentum_low,
                     X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr, Y_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                     VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                     INDEX: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """y, mean pair, rstd; running statistics and the counter where they are given."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    S = S_v * VEC_S
    C = C_v * VEC_C
    corner = (0, 0, tl.program_id(0) * BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
    x = existing(tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C), places, X_FASTEST).to(ACC)
    cols = corner[2] + tl.arange(0, BLOCK_C)
    weight = load_wanted(weight_ptr, cols, cols < C)
    bias = load_wanted(bias_ptr, cols, cols < C)
    old_mean = load_wanted(running_mean_ptr, cols, cols < C)
    old_var = load_wanted(running_var_ptr, cols, cols < C)
    tracked = load_wanted(tracked_ptr, 0, True)
    n = (B * S).to(ACC)
    d, high, low, m2, scale = centred_moments(x, places[1], n, 0)
    low = if_finite(low, high)
    rstd = store_training(high, low, m2, scale, n, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, old_mean,
                          old_var, tracked, cols, C, C, pair_of(eps, eps_low, ACC),
                          pair_of(momentum, momentum_low, ACC))  # fmt: skip
    factor = rstd
    if weight is not None:
        factor = rstd * weight.to(ACC)
    y = (d - low[None, :]) * factor[None, :]
    if bias is not None:
        y = y + bias.to(ACC)[None, :]
    if residual_ptr is not None:
        y += tile_load(residual_ptr, residual_strides, corner, inside, places, R_FASTEST, VEC_S, VEC_C).to(ACC)
    y = activate(y, alpha, ACTIVATION)
    tile_store(y_ptr, y_strides, corner, inside, places, y, Y_FASTEST, VEC_S, VEC_C)


@triton.jit(do_not_specialize=SIZES)
def _slab_bwd_kernel(dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, dz_ptr, dw_ptr, db_ptr,
                     dy_strides, x_strides, residual_strides, dx_strides, alpha, B, S_v, C_v, DY_FASTEST: tl.constexpr,
                     X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr, DX_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                     VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                     INDEX: tl.constexpr, REPEATS: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """dx, dz in its format, dw and db; what is not wanted has no pointer."""
    ACC: tl.constexpr = rstd_ptr.dtype.element_ty
    VEC_X: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth if X_FASTEST == 3 else VEC_S
    S = S_v * VEC_S
    C = C_v * VEC_C
    corner = (0, 0, tl.program_id(0) * BLOCK_C)
    inside = tile_inside(BLOCK_B, BLOCK_S, BLOCK_C, INDEX)
    places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
    x = existing(tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C), places, X_FASTEST).to(ACC)
    dz = existing(tile_load(dy_ptr, dy_strides, corner, inside, places, DY_FASTEST, VEC_S, VEC_C), places, DY_FASTEST).to(ACC)
    cols = corner[2] + tl.arange(0, BLOCK_C)
    high, low, rstd = load_statistics(mean_ptr, rstd_ptr, cols, C)
    weight = load_wanted(weight_ptr, cols, cols < C)
    if ACTIVATION != "identity":
        bias = load_wanted(bias_ptr, cols[None, :], (cols < C)[None, :])
        factor = rstd
        if weight is not None:
            factor = rstd * weight.to(ACC)
        dz = dz_of(dz, centre(x, high[None, :], low[None, :]), factor[None, :], bias, residual_ptr, residual_strides, corner,
                   inside, places, alpha, R_FASTEST, VEC_S, VEC_C, ACTIVATION)  # fmt: skip
        dz = existing(dz, places, X_FASTEST)
    if dz_ptr is not None:
        tile_store(dz_ptr, dx_strides, corner, inside, places, dz, DX_FASTEST, VEC_S, VEC_C)
    dw, db = tile_sum2(dz * centre(x, high[None, :], low[None, :]), dz, X_FASTEST, VEC_X, REPEATS)
    dw = dw * rstd
    store_wanted(dw_ptr, cols, dw, cols < C)
    store_wanted(db_ptr, cols, db, cols < C)
    if dx_ptr is not None:
        n = (B * S).to(ACC)
        g = dz
        if weight is not None:
            g = dz * weight.to(ACC)[None, :]
        c1, c2 = mean_of(dw, weight, n), mean_of(db, weight, n)
        x_hat = normalize(x, high[None, :], low[None, :], rstd[None, :])
        dx = grad_input(g, x_hat, rstd[None, :], c1[None, :], c2[None, :])
        tile_store(dx_ptr, dx_strides, corner, inside, places, dx, DX_FASTEST, VEC_S, VEC_C)


# ---------------------------------------------------------------- launchers


class Plan:
    """The launch of one slab kernel."""

    def __init__(self, layout, config, there):
        self.fastest, self.strides = spread(layout.fastest, there), spread(layout.divided(), there)
        self.copied = spread(layout.copied, there)
        self.programs = heuristics.cdiv(layout.C, config.block_c)
        self.sizes = (layout.B, layout.S // layout.vec_s, layout.C // layout.vec_c)
        # How often the warps pass over the slab's positions, a vector of x a thread each time.
        self.repeats = max(1, config.block_b * config.block_s // (32 * config.warps * layout.vectors[0]))
        self.constants = dict(VEC_S=layout.vec_s, VEC_C=layout.vec_c, BLOCK_B=config.block_b, BLOCK_S=config.block_s,
                              BLOCK_C=config.block_c, INDEX=layout.index((config.block_b, config.block_c, config.block_s)),
                              warps=config.warps, registers=config.registers)  # fmt: skip

    def launch(self, kernel, device, *args, **fastest):
        launch(kernel, self.programs, device, *args, **fastest, **self.constants)


@lru_cache(maxsize=1024)
def _plan(shape, strides, itemsizes, there, fused, backward):
    layout = Layout.of(shape, strides, itemsizes)
    config = heuristics.slab(layout.B, layout.C, layout.span, layout.itemsize, folded=layout.folded,
                             channels_fastest=layout.fastest[0] == CHANNELS, width=layout.width,
                             skewed=layout.fastest[0] == SKEWED, backward=backward, fused=fused)  # fmt: skip
    return None if config is None else Plan(layout, config, there)


def _planned(*tensors, fused, backward):
    """As channel_tiles.planned, but None where the slab does not fit."""
    plan = _plan(*described(tensors), presence(tensors), fused, backward)
    return plan, None if plan is None else as_planned(plan, tensors)


def slab_fwd(x, weight, bias, running, y, mean, rstd, momentum, eps, residual, activation, alpha):
    """`running`: running_mean, running_var and num_batches_tracked. One launch, or False where the slab does not fit."""
    plan, tensors = _planned(x, y, residual, fused=is_fused(residual, activation), backward=False)
    if plan is None:
        return False
    (x, y, residual), (x_strides, y_strides, residual_strides) = tensors, plan.strides
    x_fastest, y_fastest, residual_fastest = plan.fastest
    plan.launch(_slab_fwd_kernel, x.device, x, residual, weight, bias, *running, y, mean, rstd, x_strides, residual_strides,
                y_strides, alpha, *plan.sizes, *float_pair(eps), *float_pair(momentum), X_FASTEST=x_fastest,
                R_FASTEST=residual_fastest, Y_FASTEST=y_fastest, ACTIVATION=activation)  # fmt: skip
    return True


def slab_bwd(dy, x, weight, mean, rstd, dx, dw, db, bias, residual, dz, activation, alpha):
    """One launch, or False where the slab does not fit; dx, dz, dw and db are None where they are not wanted."""
    out = x if dx is None and dz is None else dz if dx is None else dx
    plan, tensors = _planned(x, dy, out, residual, fused=is_fused(residual, activation), backward=True)
    if plan is None:
        return False
    x, dy, out, residual = tensors
    x_strides, dy_strides, out_strides, residual_strides = plan.strides
    x_fastest, dy_fastest, out_fastest, residual_fastest = plan.fastest
    plan.launch(_slab_bwd_kernel, x.device, dy, x, residual, weight, bias, mean, rstd, dx, dz, dw, db, dy_strides, x_strides,
                residual_strides, out_strides, alpha, *plan.sizes, DY_FASTEST=dy_fastest, X_FASTEST=x_fastest,
                R_FASTEST=residual_fastest, DX_FASTEST=out_fastest, REPEATS=plan.repeats, ACTIVATION=activation)  # fmt: skip
    return True
