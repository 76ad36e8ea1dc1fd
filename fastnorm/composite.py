"""The backward formulas in differentiable torch operators: what `create_graph=True` differentiates again.

The statistics are computed anew from x, so that the second derivative sees how they depend on it; every higher order follows.
"""

from __future__ import annotations

import torch

from .geometry import Channels, Rows
from .reference import accumulate_dtype, grad_input, moments, normalize, rstd_of


def layer_norm_backward(dy, x, weight, N, eps, need):
    """dx, dweight (N,), dbias (N,) as in the backend contract's row_bwd."""
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    dz, xf = rows.view(dy).to(acc), rows.view(x).to(acc)
    n, mean, m2, scale = moments(xf, (1,))
    w = None if weight is None else weight.reshape(N).to(acc)
    return _backward(dz, xf, mean, rstd_of(n, m2, scale, eps, acc), w, _means((1,)), (0,), x, need)


def batch_norm_backward(dy, x, weight, mean, rstd, training, eps, need):
    """dx, dweight (C,), dbias (C,) as in the backend contract's channel_bwd."""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    dz, xf = c.view(dy).to(acc), c.view(x).to(acc)
    if training:
        n, mean, m2, scale = moments(xf, (0, 2))
        rstd, means = rstd_of(n, m2, scale, eps, acc), _means((0, 2))
    else:
        mean, rstd, means = mean.view(2, c.C, 1), rstd.view(c.C, 1), lambda g, x_hat: (0.0, 0.0)
    w = None if weight is None else weight.to(acc).view(c.C, 1)
    return _backward(dz, xf, mean, rstd, w, means, (0, 2), x, need)


def sync_batch_norm_backward(dy, x, weight, mean, rstd, total, eps, need, all_reduce, anew=True):
    """dx, dweight (C,), dbias (C,): batch_norm_backward in training, over all ranks; the last two are this rank's sums.

    `all_reduce` is the sum over the ranks, and total (1,) the count of all. With `anew` the result can be differentiated again,
    if all_reduce can; this costs a second collective. The statistics are then computed about the saved mean in units of the
    saved rstd, so that sums of one pass lose nothing.
    """
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    dz, xf = c.view(dy).to(acc), c.view(x).to(acc)
    mean, rstd = mean.view(2, c.C, 1), rstd.view(c.C, 1)

    def average(*terms):
        sums = torch.stack([t.sum((0, 2), dtype=torch.float64) for t in terms])
        return (all_reduce(sums) / total.clamp(min=1)).to(acc).unsqueeze(2)

    if anew:
        about = normalize(xf, mean, rstd)
        m1, m2 = average(about, about.square())
        mean = torch.stack((mean[0], mean[1] + m1 / rstd))
        rstd = rstd * torch.rsqrt(m2 - m1 * m1 + eps * rstd * rstd)
    w = None if weight is None else weight.to(acc).view(c.C, 1)
    return _backward(dz, xf, mean, rstd, w, lambda g, x_hat: average(g * x_hat, g), (0, 2), x, need)


def _means(dims):
    """c1 and c2 over these dimensions"""
    return lambda g, x_hat: ((g * x_hat).mean(dims, keepdim=True), g.mean(dims, keepdim=True))


def _backward(dz, xf, mean, rstd, w, means, param_dims, x, need):
    x_hat = normalize(xf, mean, rstd)
    g = dz if w is None else dz * w
    c1, c2 = means(g, x_hat)
    dx = grad_input(g, x_hat, rstd, c1, c2).view(x.shape).to(x.dtype) if need[0] else None
    dweight = None if need[1] is None else (dz * x_hat).sum(param_dims).to(need[1])
    return dx, dweight, None if need[2] is None else dz.sum(param_dims).to(need[2])
