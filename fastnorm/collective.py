"""Batch norm over the batches of all ranks: the backend contract's pieces, with one collective between them in each direction.

Forward gathers every rank's (mean, std, count) and merges them on every rank in the same order, so that all ranks hold the same
bits. Backward adds up the two sums of the input gradient; dweight and dbias stay the sums of this rank, as in torch, because
DistributedDataParallel averages them. Nothing here waits for the device: no count or statistic is read on the host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import composite, reference
from .autograd import PLAIN, _dtype, _need, apply_of, traced
from .reference import accumulate_dtype, needed, split, update_running

_is_compiling = torch.compiler.is_compiling

# A count travels as high * COUNT_UNIT + low: float32 holds integers exactly up to this one only.
COUNT_UNIT = 2**24


def all_gather(packed, group):
    """(ranks, n) from every rank's (n,)"""
    ranks = dist.get_world_size(group)
    out = packed.new_empty(ranks * packed.numel())
    # torch 2.13 has a new name for the same collective and warns about the old one.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out, packed, group=group)
    return out.view(ranks, -1)


def all_reduce(t, group):
    """The sum over all ranks, in place."""
    dist.all_reduce(t, group=group)
    return t


class AllReduceFunction(torch.autograd.Function):
    """The sum over all ranks. Every rank's loss depends on every rank's input, so the gradient is such a sum as well."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return all_reduce(t.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, d):
        return AllReduceFunction.apply(d, ctx.group), None


def pack(count, mean, std):
    """(3C + 2,): mean high, mean low, std, count, in the accumulate dtype."""
    high, low = std.new_full((1,), count // COUNT_UNIT), std.new_full((1,), count % COUNT_UNIT)
    return torch.cat((mean.view(-1), std, high, low))


def merge(parts):
    """total count (1,), mean (C,), m2 (C,) in float64 of parts (ranks, 3C + 2): Chan's formula; an empty part adds nothing."""
    C = parts.shape[1] // 3
    high, low, std, counts = parts.double().split((C, C, C, 2), dim=1)
    mean, count = high + low, counts[:, :1] * COUNT_UNIT + counts[:, 1:]
    total = count.sum(0)
    common = (count * mean).sum(0) / total.clamp(min=1)
    return total, common, (count * (std.square() + (mean - common).square())).sum(0)


def _statistics(x, backend, group):
    """total (1,), mean (C,), m2 (C,) of all ranks; float64."""
    if x.numel() > 0:
        packed = pack(*backend.channel_stats(x))
    else:
        packed = x.new_zeros(3 * x.shape[1] + 2, dtype=accumulate_dtype(x.dtype))
    return merge(all_gather(packed, group))


class SyncBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, group, backend):
        total, mean, m2 = _statistics(x, backend, group)
        acc = accumulate_dtype(x.dtype)
        pair, rstd = split(mean, acc), torch.rsqrt(m2 / total.clamp(min=1) + eps).to(acc)
        y = backend.channel_apply(x, pair, rstd, weight, bias) if x.numel() > 0 else torch.empty_like(x)
        if running_mean is not None:
            momentum = (total > 1).double() * momentum  # fewer values have no variance: such a batch leaves no trace
            update_running(running_mean.data, mean, momentum)
            update_running(running_var.data, m2 / (total - 1).clamp(min=1), momentum)
        ctx.save_for_backward(x, weight, pair, rstd, total)
        ctx.eps, ctx.group, ctx.backend, ctx.bias_dtype = eps, group, backend, _dtype(bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd, total = ctx.saved_tensors
        saved, need = (dy, x, weight, mean, rstd, total), _need(ctx, weight)
        if _is_compiling():  # Dynamo lets no backward ask for strides, which the contract's pieces do
            grads = composite.sync_batch_norm_backward(*saved, ctx.eps, need, lambda t: all_reduce(t, ctx.group), anew=False)
        elif torch.is_grad_enabled():
            differentiable = lambda t: AllReduceFunction.apply(t, ctx.group)
            grads = composite.sync_batch_norm_backward(*saved, ctx.eps, need, differentiable)
        else:
            grads = _backward(*saved, need, ctx.group, ctx.backend if fused(dy) else reference)
        return *grads, None, None, None, None, None, None


def _backward(dy, x, weight, mean, rstd, total, need, group, backend):
    """dx, dweight (C,), dbias (C,)

    The collective takes place whatever gradients are needed here: a rank cannot know what the others need.
    """
    if x.numel() > 0:
        sum_dz, sum_dz_x_hat = backend.channel_sums(dy, x, mean, rstd)
    else:
        sum_dz, sum_dz_x_hat = torch.zeros_like(rstd), torch.zeros_like(rstd)
    common = all_reduce(torch.stack((sum_dz, sum_dz_x_hat)), group)
    dx = None
    if need[0]:
        dx = _input_gradient(dy, x, mean, rstd, weight, common, total, backend) if x.numel() > 0 else torch.empty_like(x)
    return dx, needed(sum_dz_x_hat, need[1]), needed(sum_dz, need[2])


def _input_gradient(dy, x, mean, rstd, weight, sums, total, backend):
    g = sums if weight is None else sums * weight.to(rstd.dtype)
    c2, c1 = (g / total).to(rstd.dtype)
    return backend.channel_grad(dy, x, mean, rstd, weight, c1, c2)


def fused(*tensors) -> bool:
    """Whether a fused kernel may read them: plain tensors, and nobody looks at the operators of this call."""
    return not _is_compiling() and not traced() and all(t is None or type(t) in PLAIN for t in tensors)


_apply = apply_of(SyncBatchNormFunction)


def sync_batch_norm(*args):
    """See SyncBatchNormFunction.forward for the arguments."""
    return (SyncBatchNormFunction.apply if _is_compiling() or traced() else _apply)(*args)
