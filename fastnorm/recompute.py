"""`recompute="output"`: backward keeps y and not x, which it computes from y anew (In-Place ABN; Rota Bulò, Porzi and
Kontschieder, 2018). The layer after a norm keeps y in most models, so that x can be freed once the norm is through.

With z = y, or y / alpha where y <= 0, and x_hat = (z - bias) / weight, x = (x_hat / rstd + mean_low) + mean_high in the
accumulate dtype, rounded once. How exact that is, with u half a unit in the last place of 1 in y's dtype:

* y is off by u * |z|, or by u * tiny where it is denormal, and |z| <= |weight| * |x_hat| + |bias|. So x_hat is off by at most
  u * (|x_hat| + |bias / weight| + 1), and by some roundings of the accumulate dtype of the same sizes: `lost` has the columns
  where that is too much.
* The old x is one of the values that the new one is rounded to, which at most doubles this, however large the mean is. Where x
  has coarser steps than that, it comes back to the bit.
"""

from __future__ import annotations

from math import inf
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from . import activations, reference
from .autograd import Rows, apply_of, is_differentiable
from .fused import serving
from .gate import autocasts, channels_fit, needs_grad, rows_fit
from .reference import accumulate_dtype

_is_compiling = torch.compiler.is_compiling

Recompute = Literal["output"]  # what a user may give

# What |bias / weight| may be, and |weight * alpha|, far from what some processors flush to zero.
MOST_BIAS, LEAST_WEIGHT = 8.0, 1e-20
# So many elements are computed at once: their intermediate results stay in a CPU's cache, and take little of a GPU's memory.
AT_ONCE, AT_ONCE_ON_GPUS = 1 << 17, 1 << 24


def check(recompute, activation, **others):
    """
    Raises:
        ValueError: recompute is not "output"; the activation has no inverse; one of the others, by name, is there.
    """
    if not isinstance(recompute, str) or recompute != "output":
        raise ValueError(f"recompute is None or 'output', not {recompute!r}")
    name, alpha = activations.parse(activation)
    if name != "identity" and not (name == "leaky_relu" and 0 < alpha < inf):
        wanted = "goes without an activation or with ('leaky_relu', alpha), alpha > 0"
        raise ValueError(f"recompute='output' {wanted}, which it inverts; it was given activation={activation!r}")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"recompute='output' inverts a norm and its activation alone, and here is {name} as well")


def rows(input, normalized_shape, weight, bias, eps, activation, centre=True):
    """y of layer_norm, or of rms_norm where not `centre`; None where the call goes the way that it goes without recompute."""
    backend = _backend(input, weight, bias)
    if backend is None or autocasts(input) or not rows_fit(input, normalized_shape, weight, bias, eps):
        return None
    options = Rows(torch.Size(normalized_shape).numel(), eps, *activations.parse(activation), centre, backend)
    return recomputed_rows(input, weight, bias, options)


def batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, num_batches_tracked=None):
    """y, or None as `rows`; the counter goes up where the running statistics are updated."""
    statistics = running_mean, running_var
    backend = _backend(input, weight, bias, *statistics)
    if backend is None or not channels_fit(input, *statistics, weight, bias, training, momentum, eps):
        return None
    options = Channels(*activations.parse(activation), *statistics, training, momentum, eps, num_batches_tracked)
    y = recomputed_batch_norm(input, weight, bias, options, backend)
    if num_batches_tracked is not None:
        torch.autograd.graph.increment_version(num_batches_tracked)
    return y


def captured(x) -> bool:
    """Whether a CUDA graph is made of the call: `lost` waits for the device, and what it finds holds for this call alone."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _backend(x, weight, bias, *statistics):
    """The backend that serves a call whose gradient is asked for; None where it goes its usual way."""
    backend = None if _is_compiling() else serving(x, (), (weight, bias, *statistics))
    return None if backend is None or captured(x) or not needs_grad(x, weight, bias) else backend


def lost(x, columns, weight, bias, rstd, slope):
    """Which of so many columns of x y does not give back, (K,); None where it gives back all.

    Their weight is small beside the bias or by itself, or something is infinite or NaN: `rstd`, too, where it is one for each
    column and not made of x. The host waits for the device.
    """
    acc, least = accumulate_dtype(x.dtype), max(torch.finfo(x.dtype).tiny, LEAST_WEIGHT)
    flat = lambda p: p.reshape(-1).to(acc).abs()
    w = x.new_ones(columns, dtype=acc) if weight is None else flat(weight)
    safe = (w * min(1.0, slope) >= least) & w.isfinite()
    if bias is not None:
        safe &= flat(bias) / MOST_BIAS <= w
    if rstd is not None:
        safe &= (1 / rstd).isfinite()
    index = (~safe).nonzero().view(-1)
    return None if index.numel() == 0 else index


def _parts(y):
    n = max(1, (AT_ONCE_ON_GPUS if y.is_cuda else AT_ONCE) // y[0].numel())
    return (slice(start, start + n) for start in range(0, len(y), n))


def _before_end(y, slope, dtype):
    """z, in this dtype; a slope that is below LEAST_WEIGHT is followed by columns that are kept."""
    return y.to(dtype) if slope == 1.0 else F.leaky_relu(y.to(dtype), 1 / max(slope, LEAST_WEIGHT))


def inverted_rows(y, weight, bias, mean, rstd, slope):
    """x of y (M, N)"""
    flat = lambda p: None if p is None else p.reshape(-1).to(rstd.dtype)
    weight, bias, mean, std = flat(weight), flat(bias), mean.unsqueeze(2), 1 / rstd.unsqueeze(1)
    x = torch.empty_like(y)
    for part in _parts(y):
        z = _before_end(y[part], slope, rstd.dtype)
        z = z if bias is None else z - bias
        x_hat = z if weight is None else z / weight
        x[part] = (x_hat * std[part]).add_(mean[1, part]).add_(mean[0, part])
    return x


def inverted_channels(y, weight, bias, mean, rstd, slope, backend):
    """x of y (B, C, *), by a channel_apply: its bias is mean_high, its weight the deviation, and mean_low is in its mean."""
    w = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
    b = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    shift = b - mean[1] * rstd * w
    statistics = torch.stack((shift, torch.zeros_like(shift))), 1 / w, 1 / rstd, mean[0]
    if slope == 1.0:
        return backend.channel_apply(y, *statistics)
    x = torch.empty_like(y)
    for part in _parts(y):
        x[part] = backend.channel_apply(_before_end(y[part], slope, rstd.dtype), *statistics)
    return x


def _put_back(x, index, kept):
    return x if index is None else x.index_copy_(1, index, kept)


def _slope(activation, alpha) -> float:
    """y = slope * z where z <= 0"""
    return 1.0 if activation == "identity" else alpha


def _grad_ended(dy, y, slope):
    """dz, by the sign of y, which is z's: that of a z made anew could be the other one."""
    return dy if slope == 1.0 else torch.ops.aten.leaky_relu_backward(dy, y, slope, True)


def _kernels(backend, dy):
    """What backward runs on; the reference where that has to be made of torch's operators.

    Raises:
        RuntimeError: backward is itself being differentiated. Through x, which is made of y, it would be wrongly.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a norm with recompute='output' is differentiable once: leave it away for create_graph=True")
    return reference if is_differentiable(dy) else backend


def _need(ctx, weight, bias):
    dx, dweight, dbias = ctx.needs_input_grad[:3]
    return dx, weight.dtype if dweight else None, bias.dtype if dbias else None


class RecomputedRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, o):
        if o.centre and o.activation == "identity":
            y, mean, rstd = o.backend.row_fwd(x, weight, bias, o.eps, o.N)
        else:
            options = (o.activation, o.alpha, o.eps, o.N, o.centre)
            y, _, mean, rstd = o.backend.row_fused_fwd(x, None, weight, bias, None, *options)
        ctx.options, ctx.slope = o, _slope(o.activation, o.alpha)
        index = lost(x, o.N, weight, bias, None, ctx.slope)
        kept = None if index is None else x.reshape(-1, o.N).index_select(1, index)
        ctx.save_for_backward(y, weight, bias, mean, rstd, index, kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, weight, bias, mean, rstd, *kept = ctx.saved_tensors
        o, need = ctx.options, _need(ctx, weight, bias)
        backend, dz = _kernels(o.backend, dy), _grad_ended(dy, y, ctx.slope)
        x = _put_back(inverted_rows(y.view(-1, o.N), weight, bias, mean, rstd, ctx.slope), *kept).view(y.shape)
        if o.centre:
            dx, dweight, dbias = backend.row_bwd(dz, x, weight, mean, rstd, need)
        else:
            options = ("identity", 0.0, mean, rstd, (*need, False), False)
            dx, dweight, dbias, _ = backend.row_fused_bwd(dz, None, x, None, weight, None, *options)
        shaped = lambda d, p: None if d is None else d.view(p.shape)
        return dx, shaped(dweight, weight), shaped(dbias, bias), None


class Channels(NamedTuple):
    """The options of a batch norm, in the contract's order."""

    activation: str
    alpha: float
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    training: bool
    momentum: float
    eps: float
    num_batches_tracked: torch.Tensor | None


class RecomputedBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, o, backend):
        y, mean, rstd, _ = backend.channel_fused_fwd(x, weight, bias, None, *o)
        ctx.slope, ctx.training, ctx.backend = _slope(o.activation, o.alpha), o.training, backend
        index = lost(x, x.shape[1], weight, bias, None if o.training else rstd, ctx.slope)
        kept = None if index is None else x.index_select(1, index)
        ctx.save_for_backward(y, weight, bias, mean, rstd, index, kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, weight, bias, mean, rstd, *kept = ctx.saved_tensors
        backend, dz = _kernels(ctx.backend, dy), _grad_ended(dy, y, ctx.slope)
        x = _put_back(inverted_channels(y, weight, bias, mean, rstd, ctx.slope, backend), *kept)
        return *backend.channel_bwd(dz, x, weight, mean, rstd, ctx.training, _need(ctx, weight, bias)), None, None


recomputed_rows, recomputed_batch_norm = apply_of(RecomputedRowsFunction), apply_of(RecomputedBatchNormFunction)
