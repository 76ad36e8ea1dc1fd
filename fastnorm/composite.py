"""The backward formulas in differentiable torch operators: what `create_graph=True` differentiates again.

The statistics are computed anew from x, so that the second derivative sees how they depend on it; every higher order follows.
"""

from __future__ import annotations

from .geometry import Channels, Rows
from .reference import accumulate_dtype, grad_input, moments, normalize, rstd_of


def layer_norm_backward(dy, x, weight, N, eps, need):
    """dx, dweight (N,), dbias (N,) as in the backend contract's row_bwd."""
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    dz, xf = rows.view(dy).to(acc), rows.view(x).to(acc)
    n, mean, m2, scale = moments(xf, (1,))
    w = None if weight is None else weight.reshape(N).to(acc)
    return _backward(dz, xf, mean, rstd_of(n, m2, scale, eps, acc), w, (1,), (0,), True, x, need)


def batch_norm_backward(dy, x, weight, mean, rstd, training, eps, need):
    """dx, dweight (C,), dbias (C,) as in the backend contract's channel_bwd."""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    dz, xf = c.view(dy).to(acc), c.view(x).to(acc)
    if training:
        n, mean, m2, scale = moments(xf, (0, 2))
        rstd = rstd_of(n, m2, scale, eps, acc)
    else:
        mean, rstd = mean.view(2, c.C, 1), rstd.view(c.C, 1)
    w = None if weight is None else weight.to(acc).view(c.C, 1)
    return _backward(dz, xf, mean, rstd, w, (0, 2), (0, 2), training, x, need)


def _backward(dz, xf, mean, rstd, w, stat_dims, param_dims, training, x, need):
    x_hat = normalize(xf, mean, rstd)
    g = dz if w is None else dz * w
    c1 = (g * x_hat).mean(stat_dims, keepdim=True) if training else 0.0
    c2 = g.mean(stat_dims, keepdim=True) if training else 0.0
    dx = grad_input(g, x_hat, rstd, c1, c2).view(x.shape).to(x.dtype) if need[0] else None
    dweight = None if need[1] is None else (dz * x_hat).sum(param_dims).to(need[1])
    return dx, dweight, None if need[2] is None else dz.sum(param_dims).to(need[2])
