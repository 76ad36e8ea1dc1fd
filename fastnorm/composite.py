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


def channels_in_sequence(x, running_mean, running_var, weight, bias, training, momentum, eps, activation, alpha, residual):
    """y, by torch's own functions; what the sum refuses it refuses before the running statistics are updated."""
    alike = isinstance(residual, torch.Tensor) and residual.shape == x.shape and residual.device == x.device
    if residual is not None and not alike:
        _ = x + residual
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _ended(z, residual, activation, alpha)


def _derivatives(outputs, gradients, inputs, need):
    """By each input that a derivative is needed by, else None."""
    outputs, gradients = zip(*((y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None), strict=True)
    wanted = [t for t, n in zip(inputs, need, strict=True) if n]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if n else None for n in need)


def fused_rows_backward(dy, dh, x, weight, bias, residual, activation, alpha, eps, N, centre, need):
    """dx, dweight, dbias, dresidual of row_fused_fwd(x, None, ...), dh added to dx; they can be differentiated again."""
    with torch.enable_grad():
        own = _own_graph((x, weight, _or_zeros(bias, x, N, need), residual))
        y = reference.row_fused_fwd(own[0], None, *own[1:], activation, alpha, eps, N, centre)[0]
        dx, *others = _derivatives((y,), (dy,), own, need)
    return (dx if dh is None or dx is None else dx + dh, *others)


def fused_batch_norm_backward(dy, x, weight, bias, residual, activation, alpha, mean, rstd, training, eps, need):
    """dx, dweight, dbias, dresidual of channel_fused_fwd; they can be differentiated again."""
    with torch.enable_grad():
        own = _own_graph((x, weight, _or_zeros(bias, x, x.shape[1], need), residual))
        if training:
            y = reference.channel_fused_fwd(*own, activation, alpha, None, None, True, 0.0, eps)[0]
        else:
            wide = own[0].to(rstd.dtype)
            z = reference.channel_apply(wide, mean, rstd, *own[1:3])
            y = _ended(z, None if residual is None else own[3].to(z.dtype), activation, alpha).to(x.dtype)
        return _derivatives((y,), (dy,), own, need)


def _or_zeros(bias, x, size, need):
    """A bias to differentiate by, where its values were not saved, because without an activation nothing depends on them."""
    return x.new_zeros(size, dtype=need[2]) if bias is None and need[2] is not None else bias


def _own_graph(inputs):
    """Views of the inputs: where one tensor is two of them, each has a derivative of its own."""
    return [t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
