"""The backward formulas in differentiable torch operators: what `create_graph=True` differentiates again.

The statistics are computed anew from x, so that the second derivative sees how they depend on it; every higher order follows.
Fused norms are here as torch's sequences of operators, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import reference
from .activations import ACTIVATIONS
from .geometry import Channels, Rows
from .reference import accumulate_dtype, grad_input, moments, normalize, rstd_of, squares


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


# ---------------------------------------------------------------- fused: with what surrounds a norm


def counted(num_batches_tracked, function, *args):
    """function(*args), after this batch is counted, as torch.nn does: functorch and checkpoints that stop early see the order.

    Where it raises, the count is taken back.
    """
    if num_batches_tracked is None:
        return function(*args)
    num_batches_tracked.add_(1)
    try:
        return function(*args)
    except (RuntimeError, TypeError, ValueError):
        num_batches_tracked.sub_(1)
        raise


def _ended(z, residual, activation, alpha):
    return ACTIVATIONS[activation].value(z if residual is None else z + residual, alpha)


def rows_in_sequence(x, addend, normalized_shape, weight, bias, eps, activation, alpha, residual, centre):
    """y and h, by torch's own functions."""
    h = x if addend is None else x + addend
    if centre:
        z = F.layer_norm(h, normalized_shape, weight, bias, eps)
    else:
        z = F.rms_norm(h, normalized_shape, weight, eps)
    return _ended(z, residual, activation, alpha), None if addend is None else h


def branch_in_sequence(
    x, stream, normalized_shape, weight, bias, eps, activation, alpha, centre, dropout, row_scale, layer_scale, dtype
):
    """y and h, by torch's own functions; h in `dtype` where that is given, and y in x's."""
    u = F.dropout(x, dropout) if dropout > 0 else x
    for scale in (row_scale, layer_scale):
        u = u if scale is None else u * scale
    if dtype is None:
        u = u.to(x.dtype)  # scales may be wider
        return rows_in_sequence(u, stream, normalized_shape, weight, bias, eps, activation, alpha, None, centre)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    options = (normalized_shape, weight, bias, eps, activation, alpha, None, centre)
    y, h = rows_in_sequence(u.to(dtype), stream.to(dtype), *options)
    return y.to(x.dtype), h


def masked_rows_in_sequence(x, mask, normalized_shape, weight, bias, eps):
    """y; statistics of each row over what counts, mean 0 and variance 1 where nothing does. `mask` has x's dimensions."""
    acc, dims = accumulate_dtype(x.dtype), tuple(range(x.dim() - len(normalized_shape), x.dim()))
    n, mean, m2, scale = moments(x.to(acc), dims, mask)
    some = mask.expand(x.shape).sum(dims, keepdim=True) > 0
    mean, rstd = torch.where(some, mean, 0), torch.where(some, rstd_of(n, m2, scale, eps, acc), (1 + eps) ** -0.5)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    return reference.affine(normalize(x.to(acc), mean, rstd), weight, bias).to(x.dtype)


def modulated_in_sequence(x, normalized_shape, scale, shift, weight, bias, eps, activation, alpha):
    """y, by torch's own functions."""
    return _ended(F.layer_norm(x, normalized_shape, weight, bias, eps) * (1 + scale) + shift, None, activation, alpha)


def channels_in_sequence(x, running_mean, running_var, weight, bias, training, momentum, eps, activation, alpha, residual):
    """y, by torch's own functions; what the sum refuses it refuses before the running statistics are updated."""
    alike = isinstance(residual, torch.Tensor) and residual.shape == x.shape and residual.device == x.device
    if residual is not None and not alike:
        _ = x + residual
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _ended(z, residual, activation, alpha)


def fused_rows_backward(dy, dh, x, weight, bias, residual, activation, alpha, eps, N, centre, need):
    """dx, dweight, dbias, dresidual as in row_fused_bwd; they can be differentiated again, through the statistics as well."""
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    n, mean, m2, scale = (moments if centre else squares)(rows.view(x).to(acc), (1,))
    saved = mean.squeeze(2), rstd_of(n, m2, scale, eps, acc).squeeze(1)
    return reference.row_fused_bwd(dy, dh, x, residual, weight, bias, activation, alpha, *saved, need, centre)


def fused_batch_norm_backward(dy, x, weight, bias, kept, activation, alpha, mean, rstd, training, eps, need):
    """dx, dweight, dbias, dresidual as in channel_fused_bwd; they can be differentiated again."""
    if training:
        c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
        n, mean, m2, scale = moments(c.view(x).to(acc), (0, 2))
        mean, rstd = mean.view(2, c.C), rstd_of(n, m2, scale, eps, acc).view(c.C)
    return reference.channel_fused_bwd(dy, x, kept, weight, bias, activation, alpha, mean, rstd, training, need)


def group_norm_backward(dy, x, weight, bias, activation, alpha, eps, groups, need):
    """dx, dweight, dbias as in group_bwd; they can be differentiated again."""
    rows, acc = Rows.of(x.shape, x[0].numel() // groups), accumulate_dtype(x.dtype)
    n, mean, m2, scale = moments(rows.view(x).to(acc), (1,))
    saved = mean.squeeze(2), rstd_of(n, m2, scale, eps, acc).squeeze(1)
    return reference.group_bwd(dy, x, weight, bias, activation, alpha, *saved, need)


def position_norm_backward(dy, x, weight, bias, activation, alpha, eps, need):
    """dx, dweight, dbias as in position_bwd; they can be differentiated again."""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    n, mean, m2, scale = moments(c.view(x).to(acc), (1,))
    saved = mean.reshape(2, c.count), rstd_of(n, m2, scale, eps, acc).reshape(c.count)
    return reference.position_bwd(dy, x, weight, bias, activation, alpha, *saved, need)


def masked_rows_backward(dy, x, mask, weight, N, eps, need):
    """dx, dweight, dbias as in row_masked_bwd; they can be differentiated again, through the statistics as well."""
    rows, acc = Rows.of(x.shape, N), accumulate_dtype(x.dtype)
    mean, rstd = reference.masked_statistics(rows.view(x).to(acc), reference.counting(mask, rows), eps)
    return reference.row_masked_bwd(dy, x, mask, weight, mean.squeeze(2), rstd.squeeze(1), need)


def masked_batch_norm_backward(dy, x, mask, weight, count, mean, rstd, eps, need):
    """dx, dweight, dbias as in channel_masked_bwd; they can be differentiated again. mean and rstd stay if nothing counts."""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    n, own_mean, m2, scale = moments(c.view(x).to(acc), (0, 2), mask.reshape(c.B, 1, c.S))
    mean = torch.where(count > 0, own_mean.view(2, c.C), mean)
    rstd = torch.where(count > 0, rstd_of(n, m2, scale, eps, acc).view(c.C), rstd)
    return reference.channel_masked_bwd(reference, dy, x, mask, weight, count, mean, rstd, need)


def masked_in_sequence(x, mask, weight, bias, otherwise, eps):
    """y, count, mean, var of `autograd.MaskedBatchNormFunction`, by torch's own operators."""
    c, acc = Channels.of(x.shape), accumulate_dtype(x.dtype)
    counts, flat = mask.reshape(c.B, 1, c.S), c.view(x).to(acc)
    n, mean, m2, scale = moments(flat, (0, 2), counts)
    count, mean, var = mask.sum().view(1).to(acc), mean.double().sum(0).view(c.C), (m2 / n / scale / scale).view(c.C)
    mean, var = (torch.where(count > 0, of, other.double()) for of, other in zip((mean, var), otherwise, strict=True))
    column = lambda p: None if p is None else p.to(acc).view(c.C, 1)
    x_hat = reference.normalize(flat, reference.split(mean, acc).unsqueeze(2), column(torch.rsqrt(var + eps)))
    return reference.affine(x_hat, column(weight), column(bias)).to(x.dtype).view(x.shape), count, mean.detach(), var.detach()
