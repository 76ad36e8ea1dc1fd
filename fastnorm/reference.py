"""The backend contract in plain torch: a backend for any device, which is right rather than fast, in any floating dtype.

This file is also where the contract is written down. Every backend has these functions with these shapes:

* `x`, `dy`, `y`, `dx`: any strides in; `y` and `dx` are fresh tensors (no views) of x's shape and dtype, contiguous for rows,
  in x's own memory format (contiguous or channels_last) for channels, as torch.nn's are.
* accumulate dtype: float64 for float64 inputs, else float32. Every statistic is in it.
* `mean`: (2, M) or (2, C), a pair high + low, because at mean/std = 1e4 one float32 cannot hold the mean.
* `rstd`: (M,) or (C,), 1 / sqrt(var + eps) with the biased variance.
* `weight`, `bias`: N or C elements in any floating dtype, or None.
* `dtype` of row_fwd: y's, float32 where autocast asks for it, or None for x's. `dy` of row_bwd then has it as well.
* `num_batches_tracked` of channel_fwd: an int64 tensor without dimensions, one more after training, or None.
* `need`: (dx, dweight, dbias): True or False for dx; the dtype wanted, or None when it is not wanted, for the other two.

The functions with `fused` in their names are a norm with what surrounds it, see section `fused`:

* h = x + addend is what is normalised (rows only); y = act(z + residual) with z = x_hat * weight + bias. `addend`, `residual`
  and `dh` may be None; they, `dy`, `h` and `y` have x's shape and dtype, any strides in.
* `activation` is a name of `activations.ACTIVATIONS`, and `alpha` its number. z is never stored: backward computes it anew.
* `weight` and `bias` of rows may be P * N elements, P parts of which each is for the next M / P rows (adaptive layer norm).
  The gradients have as many. Where there are both, they are alike; where P is not 1, there is a weight.
* `centre`: False for RMSNorm, whose mean (and c2) is 0.
* `kept` of channel_fused_bwd is the residual, or what the same backend's channel_fused_fwd gave in its place: for relu it may
  be uint8, of which bit i % 8 of byte i / 8 is 1 where z + residual is not <= 0 for element i of y, in memory's order.
* `need` has a fourth entry, True where dresidual is wanted: dz, rounded once to x's dtype, in the format of dx.

Those with `group` in their names are a norm over `groups` of neighbouring channels of each sample (group norm), ended by an
activation: x is (B, C, *), what it gives is contiguous; weight and bias have C elements, mean (2, B * groups) and rstd.
Those with `position` are a layer norm over the C channels of every position (channels first), likewise, with mean (2, B * S).

Those with `masked` are pieces of a batch norm of which some positions do not count: `mask` is bool and (B, *), x without its
channels, True where they do. All of x is normalised, and all of dy is in the sums of channel_sums.

`row_masked_fwd` and `row_masked_bwd` are a layer norm of which some columns do not count: `mask` is bool, contiguous and
(R, P), True where column i of row m does, at [m / (M / R), i / (N / P)]. A row of which nothing counts has mean 0 and variance
1. All of x is normalised, and all of dy is in c1 and c2.

`branch_fwd` and `branch_bwd` add a branch to a stream: h = addend + x * row_scale * column_scale * kept / (1 - p). row_scale is
R elements, each for the next numel / R elements, and column_scale N, or None. addend, h and dh are in x's dtype or in its
accumulate dtype. Element i is kept where word i % 4 of Philox4x32-10's counter i / 4 with the key `seed`, an int64 tensor of
one element or None where p is 0, is at least p * 2^32: backward computes that anew.

No element count is ever zero here: functional.py hands empty inputs to torch.
"""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

from .activations import ACTIVATIONS
from .geometry import Channels, Rows

# From this magnitude on, squares are summed after an exact scaling, so that |x| = 1e30 does not overflow float32.
BIG, BIG_SCALE = 1e15, 2.0**-100


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unavailable(device_type: str) -> str | None:
    return None


# ---------------------------------------------------------------- the math of the project, once


def normalize(x, mean, rstd):
    """x_hat; `mean` is the pair (high, low)."""
    return ((x - mean[0]) - mean[1]) * rstd


def affine(x_hat, weight, bias):
    z = x_hat if weight is None else x_hat * weight
    return z if bias is None else z + bias


def grad_input(g, x_hat, rstd, c1, c2):
    """The derivative of a norm by its input, with g = dz * weight, c1 = mean(g * x_hat), c2 = mean(g).

    x_hat = (x - mean) * rstd, and mean and rstd depend on x too: d mean = mean(dx) and d rstd = -rstd^2 * mean(x_hat * dx),
    so dL/dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)). The small terms are added first: one rounding less at g's size.
    """
    return (g - (c2 + x_hat * c1)) * rstd


def moments(x, dims, mask=None):
    """count, mean pair, m2 (the sum of squares about the mean, float64), rstd's factor `scale`; every tensor keeps `dims`.

    Two passes; sums and what is one number per row or channel are in float64, so that they cost x_hat no accuracy.
    m2 is in units of 1 / scale^2, see BIG. With a mask, which broadcasts to x, the count is a tensor, and at least 1.
    """
    n, kept = 1, lambda t: t if mask is None else torch.where(mask, t, 0)
    for d in dims:
        n *= x.shape[d]
    if mask is not None:
        n = mask.expand(x.shape).sum(dims, keepdim=True).double().clamp(min=1)
    total = lambda t: kept(t).sum(dims, keepdim=True, dtype=torch.float64)
    high = (total(x) / n).to(x.dtype)
    centred = x - high
    low = total(centred) / n
    big = kept(centred.detach().abs()).amax(dims, keepdim=True) > BIG
    scale = torch.where(big, BIG_SCALE, 1.0).to(torch.float64)
    low = torch.where(high.isfinite(), low.to(x.dtype), 0)  # the mean of an infinite row is infinite, as torch's
    m2 = total(((centred - low) * scale.to(x.dtype)).square())
    return n, torch.stack((high, low)), m2, scale


def squares(x, dims):
    """The same about zero instead of the mean."""
    n = 1
    for d in dims:
        n *= x.shape[d]
    scale = torch.where(x.detach().abs().amax(dims, keepdim=True) > BIG, BIG_SCALE, 1.0).to(torch.float64)
    m2 = (x * scale.to(x.dtype)).square().sum(dims, keepdim=True, dtype=torch.float64)
    zero = torch.zeros_like(m2, dtype=x.dtype)
    return n, torch.stack((zero, zero)), m2, scale


def rstd_of(n, m2, scale, eps, dtype):
    return (scale * torch.rsqrt(m2 / n + eps * scale * scale)).to(dtype)


def split(value, dtype):
    """The pair high + low of `dtype` for a value that may be of a wider one."""
    high = value.to(dtype)
    return torch.stack((high, (value - high).to(dtype)))


def _like(t, x, memory_format, dtype=None):
    """t, in a canonical shape, rounded once into a fresh tensor (no view) of x's shape and dtype, or of another dtype."""
    return t.view(x.shape).to(dtype=dtype or x.dtype, memory_format=memory_format, copy=True)


def _mean(t, dims):
    return t.mean(dims, keepdim=True, dtype=torch.float64).to(t.dtype)


def needed(t, dtype):
    return None if dtype is None else t.to(dtype)


# ---------------------------------------------------------------- rows


def row_fwd(x, weight, bias, eps, N, dtype=None):
    """y, mean (2, M), rstd (M,)"""
    acc, rows = accumulate_dtype(x.dtype), Rows.of(x.shape, N)
    xf = rows.view(x).to(acc)
    n, mean, m2, scale = moments(xf, (1,))
    rstd = rstd_of(n, m2, scale, eps, acc)
    flat = lambda p: None if p is None else p.reshape(N).to(acc)
    y = affine(normalize(xf, mean, rstd), flat(weight), flat(bias))
    return _like(y, x, torch.contiguous_format, dtype), mean.squeeze(2), rstd.squeeze(1)


def row_bwd(dy, x, weight, mean, rstd, need):
    """dx, dweight (N,), dbias (N,)"""
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    acc = rstd.dtype
    dz, rstd = rows.view(dy).to(acc), rstd[:, None]
    x_hat = normalize(rows.view(x).to(acc), mean[:, :, None], rstd)
    dx = None
    if need[0]:
        g = dz if weight is None else dz * weight.reshape(rows.N).to(acc)
        dx = grad_input(g, x_hat, rstd, _mean(g * x_hat, (1,)), _mean(g, (1,)))
        dx = _like(dx, x, torch.contiguous_format)
    dweight = None if need[1] is None else (dz * x_hat).sum(0, dtype=torch.float64).to(need[1])
    return dx, dweight, None if need[2] is None else dz.sum(0, dtype=torch.float64).to(need[2])


def counting(mask, rows):
    """(M, N), of a mask (R, P)"""
    R, P = mask.shape
    return mask.view(R, 1, P, 1).expand(R, rows.M // R, P, rows.N // P).reshape(rows.M, rows.N)


def row_masked_fwd(x, mask, weight, bias, eps, N):
    """y, mean (2, M), rstd (M,)"""
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    mean, rstd = masked_statistics(rows.view(x).to(acc), counting(mask, rows), eps)
    w, b = (None if p is None else p.reshape(N).to(acc) for p in (weight, bias))
    y = affine(normalize(rows.view(x).to(acc), mean, rstd), w, b)
    return _like(y, x, torch.contiguous_format), mean.squeeze(2), rstd.squeeze(1)


def masked_statistics(xf, counts, eps):
    """The mean pair (2, M, 1) and rstd (M, 1) of rows of which some columns count."""
    n, mean, m2, scale = moments(xf, (1,), counts)
    some = counts.any(1, keepdim=True)
    return torch.where(some, mean, 0), torch.where(some, rstd_of(n, m2, scale, eps, xf.dtype), (1 + eps) ** -0.5)


def row_masked_bwd(dy, x, mask, weight, mean, rstd, need):
    """dx, dweight (N,), dbias (N,)"""
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    acc, counts = rstd.dtype, counting(mask, rows)
    dz, rstd = rows.view(dy).to(acc), rstd[:, None]
    x_hat = normalize(rows.view(x).to(acc), mean[:, :, None], rstd)
    dx = None
    if need[0]:
        g = dz if weight is None else dz * weight.reshape(rows.N).to(acc)
        n = counts.sum(1, keepdim=True).double().clamp(min=1)
        c1, c2 = ((t.sum(1, keepdim=True, dtype=torch.float64) / n).to(acc) for t in (g * x_hat, g))
        dx = torch.where(counts, grad_input(g, x_hat, rstd, c1, c2), g * rstd)
        dx = _like(dx, x, torch.contiguous_format)
    return dx, needed((dz * x_hat).sum(0, dtype=torch.float64), need[1]), needed(dz.sum(0, dtype=torch.float64), need[2])


# ---------------------------------------------------------------- channels: pieces, cut where a collective can go between


def channel_stats(x):
    """count (int), mean (2, C), std (C,): the root of the biased variance, which does not overflow where squares do"""
    c = Channels.of(x.shape)
    n, mean, m2, scale = moments(c.view(x).to(accumulate_dtype(x.dtype)), (0, 2))
    return n, mean.view(2, c.C), ((m2 / n).sqrt() / scale).view(c.C).to(mean.dtype)


def channel_apply(x, mean, rstd, weight, bias):
    """y"""
    c, acc = Channels.of(x.shape), rstd.dtype
    column = lambda p: None if p is None else p.to(acc).view(c.C, 1)
    y = affine(normalize(c.view(x).to(acc), mean.view(2, c.C, 1), column(rstd)), column(weight), column(bias))
    return _like(y, x, suggest_memory_format(x))


def channel_sums(dy, x, mean, rstd):
    """sum_dz (C,), sum_dz_x_hat (C,): dbias and dweight, and what the backward of training needs"""
    c, acc = Channels.of(x.shape), rstd.dtype
    dz = c.view(dy).to(acc)
    x_hat = normalize(c.view(x).to(acc), mean.view(2, c.C, 1), rstd.view(c.C, 1))
    total = lambda t: t.sum((0, 2), dtype=torch.float64).to(acc)
    return total(dz), total(dz * x_hat)


def channel_grad(dy, x, mean, rstd, weight, c1, c2):
    """dx; c1 and c2 (C,) are means of g * x_hat and g, or None in evaluation, where mean and rstd are constants"""
    c, acc = Channels.of(x.shape), rstd.dtype
    column = lambda p: p.to(acc).view(c.C, 1)
    g = c.view(dy).to(acc)
    if weight is not None:
        g = g * column(weight)
    if c1 is None:
        return _like(g * column(rstd), x, suggest_memory_format(x))
    x_hat = normalize(c.view(x).to(acc), mean.view(2, c.C, 1), column(rstd))
    return _like(grad_input(g, x_hat, column(rstd), column(c1), column(c2)), x, suggest_memory_format(x))


# ---------------------------------------------------------------- channels: the whole op


def channel_fwd(x, weight, bias, running_mean, running_var, training, momentum, eps, num_batches_tracked=None):
    """y, mean (2, C), rstd (C,); in training, running statistics and the counter that are given are updated in place.

    running_mean = (1 - momentum) * running_mean + momentum * mean, and the same with the unbiased variance. As in torch.nn
    the update does not count as an in-place change for autograd: nothing saved for backward aliases the buffers.
    """
    acc, C = accumulate_dtype(x.dtype), x.shape[1]
    if training:
        n, mean, m2, scale = moments(Channels.of(x.shape).view(x).to(acc), (0, 2))
        mean, rstd = mean.view(2, C), rstd_of(n, m2, scale, eps, acc).view(C)
        if running_mean is not None:
            update_running(running_mean.data, mean.double().sum(0), momentum)
            update_running(running_var.data, (m2 / (n - 1) / scale / scale).view(C), momentum)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    else:
        mean = split(running_mean, acc)
        rstd = torch.rsqrt(running_var.double() + eps).to(acc)
    return channel_apply(x, mean, rstd, weight, bias), mean, rstd


def updated(running, value, momentum):
    """(1 - momentum) * running + momentum * value in the dtype of value; momentum may be a tensor."""
    return running.to(value.dtype) * (1 - momentum) + value * momentum


def update_running(running, value, momentum):
    """`updated` in place, rounded once."""
    running.copy_(updated(running, value, momentum))


def channel_bwd(dy, x, weight, mean, rstd, training, need):
    """dx, dweight (C,), dbias (C,)"""
    sum_dz = sum_dz_x_hat = c1 = c2 = dx = None
    if (training and need[0]) or need[1] is not None or need[2] is not None:
        sum_dz, sum_dz_x_hat = channel_sums(dy, x, mean, rstd)
    if need[0]:
        if training:
            w = 1.0 if weight is None else weight.to(rstd.dtype)
            n = Channels.of(x.shape).count
            c1, c2 = w * sum_dz_x_hat / n, w * sum_dz / n
        dx = channel_grad(dy, x, mean, rstd, weight, c1, c2)
    return dx, needed(sum_dz_x_hat, need[1]), needed(sum_dz, need[2])


# ---------------------------------------------------------------- fused: with what surrounds a norm


def _epilogue(z, residual, activation, alpha):
    return ACTIVATIONS[activation].value(z if residual is None else z + residual.to(z.dtype), alpha)


def _grad_epilogue(dy, z, residual, activation, alpha):
    """dz"""
    return dy * ACTIVATIONS[activation].slope(z if residual is None else z + residual.to(z.dtype), alpha)


def _by_rows(p, rows, dtype):
    """Parameters beside (M, N): each part for its rows."""
    if p is None:
        return None
    parts = p.reshape(-1, 1, rows.N).to(dtype)
    return parts.view(rows.N) if parts.shape[0] == 1 else parts.expand(-1, rows.M // parts.shape[0], -1).reshape(rows.M, rows.N)


def row_fused_fwd(x, addend, weight, bias, residual, activation, alpha, eps, N, centre=True):
    """y, h, mean (2, M), rstd (M,); h is None without an addend. Statistics are those of h as it is stored."""
    acc, rows = accumulate_dtype(x.dtype), Rows.of(x.shape, N)
    h = None if addend is None else _like(x.to(acc) + addend.to(acc), x, torch.contiguous_format)
    xf = rows.view(x if h is None else h).to(acc)
    n, mean, m2, scale = (moments if centre else squares)(xf, (1,))
    rstd = rstd_of(n, m2, scale, eps, acc)
    z = affine(normalize(xf, mean, rstd), _by_rows(weight, rows, acc), _by_rows(bias, rows, acc))
    y = _epilogue(z, None if residual is None else rows.view(residual), activation, alpha)
    return _like(y, x, torch.contiguous_format), h, mean.squeeze(2), rstd.squeeze(1)


def row_fused_bwd(dy, dh, x, residual, weight, bias, activation, alpha, mean, rstd, need, centre=True):
    """dx, dweight and dbias (P * N,), dresidual; x is h where there was an addend, and dx has dh, h's own gradient, in it."""
    rows = Rows(rstd.numel(), x.numel() // rstd.numel())
    acc, w = rstd.dtype, _by_rows(weight, rows, rstd.dtype)
    x_hat = normalize(rows.view(x).to(acc), mean[:, :, None], rstd[:, None])
    z = affine(x_hat, w, _by_rows(bias, rows, acc))
    dz = _grad_epilogue(rows.view(dy).to(acc), z, None if residual is None else rows.view(residual), activation, alpha)
    dx = None
    if need[0]:
        g = dz if w is None else dz * w
        dx = grad_input(g, x_hat, rstd[:, None], _mean(g * x_hat, (1,)), _mean(g, (1,)) if centre else 0.0)
        dx = _like(dx if dh is None else dx + rows.view(dh).to(acc), x, torch.contiguous_format)
    parts = 1 if weight is None else weight.numel() // rows.N
    total = lambda t: t.view(parts, -1, rows.N).sum(1, dtype=torch.float64).view(-1)
    dweight = None if need[1] is None else total(dz * x_hat).to(need[1])
    dbias = None if need[2] is None else total(dz).to(need[2])
    return dx, dweight, dbias, _like(dz, x, torch.contiguous_format) if need[3] else None


def channel_fused_fwd(x, weight, bias, residual, activation, alpha, running_mean, running_var, training, momentum, eps,
                      num_batches_tracked=None, keep=False):  # fmt: skip
    """y, mean (2, C), rstd (C,), as channel_fwd; what backward takes in the place of the residual, where that is asked for"""
    wide, acc = x.to(accumulate_dtype(x.dtype)), accumulate_dtype(x.dtype)
    z, mean, rstd = channel_fwd(wide, weight, bias, running_mean, running_var, training, momentum, eps, num_batches_tracked)
    r = None if residual is None else residual.to(acc)
    y = _epilogue(z, r, activation, alpha)
    return _like(y, x, suggest_memory_format(x)), mean, rstd, residual if keep else None


def channel_fused_bwd(dy, x, kept, weight, bias, activation, alpha, mean, rstd, training, need):
    """dx, dweight (C,), dbias (C,), dresidual"""
    acc, like = rstd.dtype, lambda t: _like(t, x, suggest_memory_format(x))
    if kept is not None and kept.dtype == torch.uint8:
        dz = torch.where(kept_bits(kept, x), dy.to(acc), 0.0)
    else:
        z = channel_apply(x.to(acc), mean, rstd, weight, bias)
        dz = _grad_epilogue(dy.to(acc), z, kept, activation, alpha)
    dx, dweight, dbias = channel_bwd(dz, x.to(acc), weight, mean, rstd, training, need[:3])
    return None if dx is None else like(dx), dweight, dbias, like(dz) if need[3] else None


def kept_bits(kept, x):
    """Where z is not <= 0, bool of x's shape"""
    bits = (kept.view(-1, 1) >> torch.arange(8, device=kept.device, dtype=torch.uint8) & 1).bool().view(-1)[: x.numel()]
    order = torch.empty_like(x, dtype=torch.bool, memory_format=suggest_memory_format(x))
    return bits.as_strided(order.shape, order.stride())


# ---------------------------------------------------------------- groups of channels


def _by_channels(p, shape, dtype):
    return None if p is None else p.to(dtype).view(1, shape[1], 1)


def group_fwd(x, weight, bias, activation, alpha, eps, groups):
    """y, mean (2, B * groups), rstd (B * groups,)"""
    acc, rows, c = accumulate_dtype(x.dtype), Rows.of(x.shape, x[0].numel() // groups), Channels.of(x.shape)
    xf = rows.view(x).to(acc)
    n, mean, m2, scale = moments(xf, (1,))
    rstd = rstd_of(n, m2, scale, eps, acc)
    x_hat = c.view(normalize(xf, mean, rstd))
    y = _epilogue(affine(x_hat, _by_channels(weight, x.shape, acc), _by_channels(bias, x.shape, acc)), None, activation, alpha)
    return _like(y, x, torch.contiguous_format), mean.squeeze(2), rstd.squeeze(1)


def group_bwd(dy, x, weight, bias, activation, alpha, mean, rstd, need):
    """dx, dweight (C,), dbias (C,)"""
    acc, rows, c = rstd.dtype, Rows(rstd.numel(), x.numel() // rstd.numel()), Channels.of(x.shape)
    x_hat = normalize(rows.view(x).to(acc), mean[:, :, None], rstd[:, None])
    w = _by_channels(weight, x.shape, acc)
    z = affine(c.view(x_hat), w, _by_channels(bias, x.shape, acc))
    dz = _grad_epilogue(c.view(dy).to(acc), z, None, activation, alpha)
    dx = None
    if need[0]:
        g = rows.view(dz if w is None else dz * w)
        dx = grad_input(g, x_hat, rstd[:, None], _mean(g * x_hat, (1,)), _mean(g, (1,)))
        dx = _like(dx, x, torch.contiguous_format)
    total = lambda t: t.sum((0, 2), dtype=torch.float64)
    dweight = None if need[1] is None else total(dz * c.view(x_hat)).to(need[1])
    return dx, dweight, None if need[2] is None else total(dz).to(need[2])


# ---------------------------------------------------------------- layer norm over channels


def position_fwd(x, weight, bias, activation, alpha, eps):
    """y, mean (2, B * S), rstd (B * S,)"""
    acc, c = accumulate_dtype(x.dtype), Channels.of(x.shape)
    xf = c.view(x).to(acc)
    n, mean, m2, scale = moments(xf, (1,))
    rstd = rstd_of(n, m2, scale, eps, acc)
    z = affine(normalize(xf, mean, rstd), _by_channels(weight, x.shape, acc), _by_channels(bias, x.shape, acc))
    y = _epilogue(z, None, activation, alpha)
    return _like(y, x, torch.contiguous_format), mean.reshape(2, c.count), rstd.reshape(c.count)


def position_bwd(dy, x, weight, bias, activation, alpha, mean, rstd, need):
    """dx, dweight (C,), dbias (C,)"""
    acc, c = rstd.dtype, Channels.of(x.shape)
    mean, rstd, w = mean.view(2, c.B, 1, c.S), rstd.view(c.B, 1, c.S), _by_channels(weight, x.shape, acc)
    x_hat = normalize(c.view(x).to(acc), mean, rstd)
    z = affine(x_hat, w, _by_channels(bias, x.shape, acc))
    dz = _grad_epilogue(c.view(dy).to(acc), z, None, activation, alpha)
    dx = None
    if need[0]:
        g = dz if w is None else dz * w
        dx = _like(grad_input(g, x_hat, rstd, _mean(g * x_hat, (1,)), _mean(g, (1,))), x, torch.contiguous_format)
    total = lambda t: t.sum((0, 2), dtype=torch.float64)
    dweight = None if need[1] is None else total(dz * x_hat).to(need[1])
    return dx, dweight, None if need[2] is None else total(dz).to(need[2])


# ---------------------------------------------------------------- channels of which some positions do not count


def channel_masked_stats(x, mask):
    """count (1,), mean (2, C), std (C,), as channel_stats; all are 0 where nothing counts"""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    n, mean, m2, scale = moments(c.view(x).to(acc), (0, 2), mask.reshape(c.B, 1, c.S))
    return mask.sum().view(1).to(acc), mean.view(2, c.C), ((m2 / n).sqrt() / scale).view(c.C).to(acc)


def channel_masked_grad(dy, x, mask, mean, rstd, weight, c1, c2):
    """dx; c1 and c2 (C,) are sums of g * x_hat and g over all positions, divided by the count of those that count"""
    c, acc = Channels.of(x.shape), rstd.dtype
    column = lambda p: p.to(acc).view(c.C, 1)
    g = c.view(dy).to(acc)
    if weight is not None:
        g = g * column(weight)
    counts = mask.reshape(c.B, 1, c.S)
    x_hat = normalize(c.view(x).to(acc), mean.view(2, c.C, 1), column(rstd))
    dx = torch.where(counts, grad_input(g, x_hat, column(rstd), column(c1), column(c2)), g * column(rstd))
    return _like(dx, x, suggest_memory_format(x))


def channel_masked_bwd(backend, dy, x, mask, weight, count, mean, rstd, need):
    """dx, dweight (C,), dbias (C,) by the pieces of a backend; count (1,) is of the positions that count"""
    sum_dz, sum_dz_x_hat = backend.channel_sums(dy, x, mean, rstd)
    dx = None
    if need[0]:
        share = (1.0 if weight is None else weight.to(rstd.dtype)) / count.clamp(min=1)
        dx = backend.channel_masked_grad(dy, x, mask, mean, rstd, weight, share * sum_dz_x_hat, share * sum_dz)
    return dx, needed(sum_dz_x_hat, need[1]), needed(sum_dz, need[2])


# ---------------------------------------------------------------- a branch onto a stream


def philox(seed, counters):
    """Four words each, int64 below 2^32, in a last dimension: Philox4x32-10 (Salmon et al., 2011)."""
    LOW = 0xFFFFFFFF
    c0, c1 = counters & LOW, counters >> 32 & LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap around where 64 bits end, which leaves both halves right
        c0, c1, c2, c3 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW, (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return torch.stack((c0, c1, c2, c3), -1)


def kept(n, p, seed):
    """Which of n elements dropout keeps, (n,)"""
    words = philox(seed, torch.arange((n + 3) // 4, device=seed.device))
    return words.view(-1)[:n] >= least_word(p)


def least_word(p):
    """The least word that keeps an element with probability 1 - p, for p < 1."""
    return min(round(p * 2**32), 2**32 - 1)


def _dropped(t, row_scale, p, seed):
    """t * row_scale * kept / (1 - p), flat; nothing is kept where p is 1"""
    t = t.reshape(-1)
    if row_scale is not None:
        t = (t.view(row_scale.numel(), -1) * row_scale.to(t.dtype).reshape(-1, 1)).view(-1)
    if p == 0:
        return t
    return torch.where(kept(t.numel(), p, seed), t * (1 / (1 - p)), 0) if p < 1 else torch.zeros_like(t)


def _by_columns(t, column_scale):
    return t if column_scale is None else (t.view(-1, column_scale.numel()) * column_scale.to(t.dtype).reshape(-1)).view(-1)


def branch_fwd(x, addend, row_scale, column_scale, p, seed, dtype):
    """h, contiguous, in this dtype"""
    acc = accumulate_dtype(x.dtype)
    u = _by_columns(_dropped(x.to(acc), row_scale, p, seed), column_scale)
    return (u.view(x.shape) + addend.to(acc)).to(dtype)


def branch_bwd(dh, x, row_scale, column_scale, p, seed, dx_dtype, dcolumn_dtype):
    """dx in its dtype and dcolumn_scale (N,) in its, each None where it is not wanted; x is None without the latter."""
    acc = accumulate_dtype(dh.dtype)
    dx = dcolumn = None
    dropped = _dropped(dh.to(acc), row_scale, p, seed)
    if dx_dtype is not None:
        dx = _by_columns(dropped, column_scale).view(dh.shape).to(dx_dtype)
    if dcolumn_dtype is not None:
        rows = lambda t: t.reshape(-1, column_scale.numel())
        dcolumn = (rows(dropped) * rows(x.to(acc))).sum(0, dtype=torch.float64).to(dcolumn_dtype)
    return dx, dcolumn
