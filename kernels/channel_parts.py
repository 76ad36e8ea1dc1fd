"""What the kernels of channels do with a program's tiles: each pass of batch norm, forward and backward, has its home here."""

import triton
import triton.language as tl

from .activations import activate, slope
from .channel_tiles import (
    existing,
    load_statistics,
    tile_corner,
    tile_count,
    tile_load,
    tile_places,
    tile_positions,
    tile_span,
    tile_store,
    update_running,
)
from .math import (
    BIG_SCALE,
    add_shifted,
    any_inf,
    centre,
    grad_input,
    if_finite,
    inverse,
    normalize,
    quotient,
    rstd_of,
    shifted_moments,
    sum2,
    tile_sum2,
    unscaled,
)
from .wanted import load_wanted


@triton.jit
def _shifted_sums(x_ptr, x_strides, c0, inside, shift, scale, p, P, B, S, C, X_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                  VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The sums of add_shifted per channel over every P-th tile, and the count of positions."""
    shape: tl.constexpr = (BLOCK_B * BLOCK_S, inside[2].shape[1])
    s1 = tl.zeros(shape, shift.dtype)
    s2 = tl.zeros(shape, shift.dtype)
    count = tl.zeros((1, shape[1] if X_FASTEST == 3 else 1), tl.int32)
    span = tile_span(x_ptr, S, X_FASTEST)
    for tile in tl.range(p, tile_count(B, span, BLOCK_B, BLOCK_S), P, num_stages=STAGES):
        corner = tile_corner(tile, c0, span, BLOCK_B, BLOCK_S)
        places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
        x = tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C).to(shift.dtype)
        s1, s2 = add_shifted(s1, s2, x, shift, scale, places[1])
        count += tile_positions(corner, places, B, S, BLOCK_B, BLOCK_S).to(tl.int32)
    s1, s2 = sum2(s1, s2, 0)
    return s1, s2, tl.sum(count, axis=0).to(shift.dtype)


@triton.jit
def store_share(partial_ptr, p, P, cols, C, high, low, m2, scale, n):
    """Row p of partial (4, P, C): mean pair, m2 (negative: it overflows, and stands there in units of BIG_SCALE^-2), count."""
    row = partial_ptr + p.to(tl.int64) * C + cols
    step = P.to(tl.int64) * C
    tl.store(row, high, mask=cols < C)
    tl.store(row + step, low, mask=cols < C)
    tl.store(row + 2 * step, tl.where(scale == 1.0, m2, -m2), mask=cols < C)
    tl.store(row + 3 * step, n, mask=cols < C)


@triton.jit
def store_statistics(partial_ptr, p, P, x_ptr, x_strides, c0, inside, B, S, C, X_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
                     VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """Row p of partial (4, P, C), over every P-th tile, so that all programs are about as far at any time, see store_share."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    b0, s0, _ = tile_corner(p, c0, tile_span(x_ptr, S, X_FASTEST), BLOCK_B, BLOCK_S)
    corner = (b0, tl.where(s0 + BLOCK_S > S, 0, s0), c0)  # the last tile of a row may be too short for a mean of many
    places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
    x = tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C).to(ACC)
    x = existing(x, places, X_FASTEST)
    n = tl.zeros((1, 1), tl.int32) + tile_positions(corner, places, B, S, BLOCK_B, BLOCK_S).to(tl.int32)
    shift = quotient(tl.sum(x, axis=0), tl.sum(n, axis=0).to(ACC))
    shift = if_finite(shift, shift)
    scale = tl.full((BLOCK_C,), 1.0, ACC)
    s1, s2, n = _shifted_sums(x_ptr, x_strides, c0, inside, shift[None, :], None, p, P, B, S, C,
                              X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
    if any_inf(s2):
        scale = tl.where(s2 == float("inf"), BIG_SCALE, 1.0).to(ACC)
        s1, s2, n = _shifted_sums(x_ptr, x_strides, c0, inside, shift[None, :], scale[None, :], p, P, B, S, C,
                                  X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S, STAGES)  # fmt: skip
    high, low, m2 = shifted_moments(shift, s1, s2, n, scale)
    store_share(partial_ptr, p, P, c0 + tl.arange(0, BLOCK_C), C, high, low, m2, scale, tl.zeros((BLOCK_C,), ACC) + n)


@triton.jit
def load_partial(partial_ptr, first, cols, P, C, BLOCK_P: tl.constexpr):
    """high, low, m2 as it is stored, and count of BLOCK_P partial rows."""
    p = first + tl.arange(0, BLOCK_P)
    mask = (p < P)[:, None] & (cols < C)[None, :]
    at = partial_ptr + p.to(tl.int64)[:, None] * C + cols[None, :]
    step = P.to(tl.int64) * C
    high = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + step, mask=mask, other=0.0)
    return high, low, tl.load(at + 2 * step, mask=mask, other=0.0), tl.load(at + 3 * step, mask=mask, other=0.0)


@triton.jit
def _merged_m2(partial_ptr, high, low, scale, cols, P, C, BLOCK_P: tl.constexpr):
    """Chan: the m2 of the parts, and the parts' means about the common one; all deviations times scale."""
    m2 = tl.zeros((BLOCK_P, cols.shape[0]), high.dtype)
    for first in range(0, P, BLOCK_P):
        part_high, part_low, part_m2, n = load_partial(partial_ptr, first, cols, P, C, BLOCK_P)
        unit = tl.where(part_m2 < 0, scale[None, :] * (1 / BIG_SCALE), scale[None, :])
        d = ((part_high - high[None, :]) + (part_low - low[None, :])) * scale[None, :]
        m2 += tl.where(n > 0, tl.abs(part_m2) * unit * unit + n * d * d, 0.0)
    return tl.sum(m2, axis=0)


@triton.jit
def merged(partial_ptr, cols, total, P, C, BLOCK_P: tl.constexpr, shift=None):
    """Mean pair, m2 and its scale of channels `cols` from all P rows of partial (4, P, C). `shift`: the mean of one of them,
    where that is not to be the first."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    if shift is None:
        shift = tl.load(partial_ptr + cols, mask=cols < C, other=0.0)
    shift = if_finite(shift, shift)
    delta = tl.zeros((BLOCK_P, cols.shape[0]), ACC)
    share = inverse(total)
    for first in range(0, P, BLOCK_P):
        part_high, part_low, _, n = load_partial(partial_ptr, first, cols, P, C, BLOCK_P)
        # A part without a position of a channel, see SKEWED, has no mean of it.
        delta += tl.where(n > 0, (n * share) * ((part_high - shift[None, :]) + part_low), 0.0)
    delta = tl.sum(delta, axis=0)
    high = shift + delta
    low = if_finite((shift - high) + delta, high)
    scale = tl.full((cols.shape[0],), 1.0, ACC)
    m2 = _merged_m2(partial_ptr, high, low, scale, cols, P, C, BLOCK_P)
    if any_inf(m2):
        scale = tl.where(m2 == float("inf"), BIG_SCALE, 1.0).to(ACC)
        m2 = _merged_m2(partial_ptr, high, low, scale, cols, P, C, BLOCK_P)
    return high, low, m2, scale


@triton.jit
def store_training(high, low, m2, scale, n, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, old_mean,
                   old_var, tracked, cols, last, C, eps, momentum):  # fmt: skip
    """Mean pair, rstd, and running statistics where they are given, of those of `cols` that are below `last`; returns rstd.

    old_mean, old_var and tracked are what stood behind the three pointers. The first program counts the batch.
    """
    rstd = rstd_of(m2, n, scale, eps)
    tl.store(mean_ptr + cols, high, mask=cols < last)
    tl.store(mean_ptr + C + cols, low, mask=cols < last)
    tl.store(rstd_ptr + cols, rstd, mask=cols < last)
    update_running(running_mean_ptr, cols, last, old_mean, high + low, momentum)
    var = unscaled(unscaled(quotient(m2, n - 1.0), scale), scale)
    update_running(running_var_ptr, cols, last, old_var, var, momentum)
    if tracked_ptr is not None:
        tl.store(tracked_ptr, tracked + 1, mask=tl.program_id(0) == 0)
    return rstd


@triton.jit
def load_backwards(x_ptr, x_strides, i, c0, inside, B, S, C, X_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """Tile i from the end on, and nothing where there is none."""
    span = tile_span(x_ptr, S, X_FASTEST)
    tiles = tile_count(B, span, BLOCK_B, BLOCK_S)
    b, s, c = tile_corner(tiles - 1 - i, c0, span, BLOCK_B, BLOCK_S)
    corner = (tl.where(i < tiles, b, B), s, c)  # there is no sample B
    places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
    return tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C)


@triton.jit
def apply_tiles(first, x_ptr, residual_ptr, y_ptr, x_strides, residual_strides, y_strides, c0, inside, high, low, factor, bias,
                alpha, p, P, B, S, C, X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr, Y_FASTEST: tl.constexpr,
                VEC_S: tl.constexpr, VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
                ACTIVATION: tl.constexpr):  # fmt: skip
    """y of every P-th tile; mean pair, factor = rstd * weight, and bias, which may be None, are [1, BLOCK_C].

    `first` is what load_backwards gave of the first tile; then the next one is always loaded before one is stored. Or None.

    From the last tile to the first, because the end is what the sums have read last: L2 may still have it.
    """
    span = tile_span(x_ptr, S, X_FASTEST)
    tiles = tile_count(B, span, BLOCK_B, BLOCK_S)
    for i in range(p, tiles, P):
        if first is None:
            x = load_backwards(x_ptr, x_strides, i, c0, inside, B, S, C, X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S)
        else:
            x = first
            first = load_backwards(x_ptr, x_strides, i + P, c0, inside, B, S, C, X_FASTEST, VEC_S, VEC_C, BLOCK_B, BLOCK_S)
        y = normalize(x.to(factor.dtype), high, low, factor)
        if bias is not None:
            y = y + bias.to(factor.dtype)
        corner = tile_corner(tiles - 1 - i, c0, span, BLOCK_B, BLOCK_S)
        places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
        if residual_ptr is not None:
            y += tile_load(residual_ptr, residual_strides, corner, inside, places, R_FASTEST, VEC_S, VEC_C).to(y.dtype)
        y = activate(y, alpha, ACTIVATION)
        tile_store(y_ptr, y_strides, corner, inside, places, y, Y_FASTEST, VEC_S, VEC_C)


@triton.jit
def dz_of(dy, centred, factor, bias, residual_ptr, residual_strides, corner, inside, places, alpha, R_FASTEST: tl.constexpr,
          VEC_S: tl.constexpr, VEC_C: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """dz = dy * act'(z + residual), of an activation; centred is x - mean, factor = rstd * weight as in the forward."""
    z = centred * factor
    if bias is not None:
        z = z + bias.to(z.dtype)
    if residual_ptr is not None:
        z += tile_load(residual_ptr, residual_strides, corner, inside, places, R_FASTEST, VEC_S, VEC_C).to(z.dtype)
    return dy * slope(z, alpha, ACTIVATION)


@triton.jit
def store_sums(partial_ptr, p, P, dy_ptr, x_ptr, residual_ptr, dz_ptr, dy_strides, x_strides, residual_strides, dz_strides, c0,
               inside, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, alpha, B, S, C, DY_FASTEST: tl.constexpr,
               X_FASTEST: tl.constexpr, R_FASTEST: tl.constexpr, DZ_FASTEST: tl.constexpr, VEC_S: tl.constexpr,
               VEC_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
               ACTIVATION: tl.constexpr):  # fmt: skip
    """Row p of partial (2, P, C), over every P-th tile: sums of dz * x_hat and of dz; rstd is one factor of a whole channel,
    multiplied in at the end. dz is stored where it has a pointer."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    VEC_X: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth if X_FASTEST == 3 else VEC_S
    c = c0 + inside[2]
    high, low, factor = load_statistics(mean_ptr, rstd_ptr, c, C)
    if weight_ptr is not None:
        factor = factor * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    bias = load_wanted(bias_ptr, c, c < C)
    dw = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_C), ACC)
    span = tile_span(x_ptr, S, X_FASTEST)
    for tile in tl.range(p, tile_count(B, span, BLOCK_B, BLOCK_S), P, num_stages=STAGES):
        corner = tile_corner(tile, c0, span, BLOCK_B, BLOCK_S)
        places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
        x = tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C).to(ACC)
        dz = tile_load(dy_ptr, dy_strides, corner, inside, places, DY_FASTEST, VEC_S, VEC_C).to(ACC)
        x, dz = existing(x, places, X_FASTEST), existing(dz, places, DY_FASTEST)
        centred = centre(x, high, low)
        if ACTIVATION != "identity":
            dz = dz_of(dz, centred, factor, bias, residual_ptr, residual_strides, corner, inside, places, alpha, R_FASTEST,
                       VEC_S, VEC_C, ACTIVATION)  # fmt: skip
            dz = existing(dz, places, X_FASTEST)
        if dz_ptr is not None:
            tile_store(dz_ptr, dz_strides, corner, inside, places, dz, DZ_FASTEST, VEC_S, VEC_C)
        dw += dz * centred
        db += dz
    dw, db = tile_sum2(dw, db, X_FASTEST, VEC_X, 2)
    cols = c0 + tl.arange(0, BLOCK_C)
    row = partial_ptr + p.to(tl.int64) * C + cols
    tl.store(row, dw * tl.load(rstd_ptr + cols, mask=cols < C, other=0.0), mask=cols < C)
    tl.store(row + P.to(tl.int64) * C, db, mask=cols < C)


@triton.jit
def grad_tiles(dy_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, dy_strides, x_strides, residual_strides, dx_strides, c0, inside,
               high, low, rstd, weight, bias, alpha, means, p, P, B, S, C, DY_FASTEST: tl.constexpr, X_FASTEST: tl.constexpr,
               R_FASTEST: tl.constexpr, DX_FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr,
               BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """dx of every P-th tile, in the order of apply_tiles; what is of a channel is [1, BLOCK_C]. dz, in the format of dx, is
    stored where it has a pointer.

    `means` are those of g * x_hat and of g; None in evaluation, where mean and rstd are constants, and x is read for z alone.
    """
    if means is not None:
        c1, c2 = means
    factor = rstd
    if weight is not None:
        factor = rstd * weight.to(rstd.dtype)
    span = tile_span(x_ptr, S, X_FASTEST)
    tiles = tile_count(B, span, BLOCK_B, BLOCK_S)
    for i in tl.range(p, tiles, P, num_stages=STAGES):
        corner = tile_corner(tiles - 1 - i, c0, span, BLOCK_B, BLOCK_S)
        places = tile_places(x_ptr, x_strides, corner, inside, B, S, C, X_FASTEST)
        g = tile_load(dy_ptr, dy_strides, corner, inside, places, DY_FASTEST, VEC_S, VEC_C).to(rstd.dtype)
        if means is not None or ACTIVATION != "identity":
            x = tile_load(x_ptr, x_strides, corner, inside, places, X_FASTEST, VEC_S, VEC_C).to(rstd.dtype)
        if ACTIVATION != "identity":
            g = dz_of(g, centre(x, high, low), factor, bias, residual_ptr, residual_strides, corner, inside, places, alpha,
                      R_FASTEST, VEC_S, VEC_C, ACTIVATION)  # fmt: skip
        if dz_ptr is not None:
            tile_store(dz_ptr, dx_strides, corner, inside, places, g, DX_FASTEST, VEC_S, VEC_C)
        if weight is not None:
            g = g * weight.to(rstd.dtype)
        if means is not None:
            dx = grad_input(g, normalize(x, high, low, rstd), rstd, c1, c2)
        else:
            dx = g * rstd
        tile_store(dx_ptr, dx_strides, corner, inside, places, dx, DX_FASTEST, VEC_S, VEC_C)
