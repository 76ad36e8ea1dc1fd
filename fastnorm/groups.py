"""group_norm and instance_norm as reshapes onto channels: a group of a sample, or a channel of a sample, is a channel.

What a reshape cannot describe without a copy (channels_last), and what the kernels do not cover, goes to torch itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_variadic

from . import functional
from .autograd import apply_of, is_differentiable, traced
from .dispatch import select
from .gate import autocasts, covers, needs_grad, savable
from .reference import accumulate_dtype, needed


def _serves(input, *parameters):
    if torch.compiler.is_compiling() or has_torch_function_variadic(input, *parameters) or traced():
        return False
    fits = covers(input, *parameters) and input.dim() >= 2 and input.is_contiguous() and not autocasts(input)
    return fits and all(p is None or p.shape == input.shape[1:2] for p in parameters)


# ---------------------------------------------------------------- groups


class _GroupNormFunction(torch.autograd.Function):
    """Statistics over (1, B * groups, K), and everything else over (1, B * C, S): a channel has its group's statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, backend):
        y, mean, rstd = _forward(x, weight, bias, groups, eps, backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.options, ctx.bias_dtype = (groups, eps, backend), None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        groups, eps, backend = ctx.options
        dx, *wanted = ctx.needs_input_grad[:3]
        need = dx, weight.dtype if wanted[0] else None, ctx.bias_dtype if wanted[1] else None
        if is_differentiable(dy):
            grads = _backward_in_operators(dy, x, weight, groups, eps, need)
        else:
            grads = _backward(dy, x, weight, mean, rstd, groups, backend, need)
        return *grads, None, None, None


_group_norm = apply_of(_GroupNormFunction)


def _channels(t, B, C):
    return t.reshape(1, B * C, -1)


def _forward(x, weight, bias, groups, eps, backend):
    """y, and of each group its mean pair (2, B * groups) and rstd"""
    B, C = x.shape[:2]
    _, mean, deviation = backend.channel_stats(_channels(x, B, groups))
    rstd = torch.rsqrt(deviation.double().square_().add_(eps)).to(deviation.dtype)
    each = lambda t: None if t is None else t.repeat(B)
    y = backend.channel_apply(_channels(x, B, C), *_of_channels(mean, rstd, C // groups), each(weight), each(bias))
    return y.view(x.shape), mean, rstd


def _of_channels(mean, rstd, n):
    return mean.repeat_interleave(n, 1), rstd.repeat_interleave(n)


def _backward(dy, x, weight, mean, rstd, groups, backend, need):
    (B, C), acc = x.shape[:2], rstd.dtype
    statistics = _of_channels(mean, rstd, C // groups)
    dy, xc = _channels(dy, B, C), _channels(x, B, C)
    sum_dz, sum_dz_x_hat = backend.channel_sums(dy, xc, *statistics)
    dx = None
    if need[0]:
        w = None if weight is None else weight.repeat(B)
        mean_of = lambda t: t if w is None else t * w.to(acc)
        count = x.numel() // (B * groups)
        c1, c2 = (
            mean_of(t).view(B * groups, -1).sum(1).div_(count).repeat_interleave(C // groups) for t in (sum_dz_x_hat, sum_dz)
        )
        dx = backend.channel_grad(dy, xc, *statistics, w, c1, c2).view(x.shape)
    over_samples = lambda t, dtype: None if dtype is None else needed(t.view(B, C).sum(0), dtype)
    return dx, over_samples(sum_dz_x_hat, need[1]), over_samples(sum_dz, need[2])


def _backward_in_operators(dy, x, weight, groups, eps, need):
    """By torch's group_norm, which is differentiated as often as it takes."""
    with torch.enable_grad():
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        w = (
            torch.ones(x.shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)
            if weight is None
            else weight.view_as(weight)
        )
        w = w if w.requires_grad else w.requires_grad_()
        b = torch.zeros_like(w).detach().requires_grad_()
        acc = accumulate_dtype(x.dtype)
        y = F.group_norm(x.to(acc), groups, w.to(acc), b.to(acc), eps).to(x.dtype)
        found = torch.autograd.grad(y, (x, w, b), dy, create_graph=torch.is_grad_enabled())
    dx, dweight, dbias = found
    return dx if need[0] else None, needed(dweight, need[1]), needed(dbias, need[2])


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    r"""Group normalization (Wu and He, 2018): statistics over the channels of a group and all positions of a sample.

    Equivalent to: ``torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    Args:
        input: ``(B, C)`` or ``(B, C, *)``, float64, float32, bfloat16 or float16; one that is not contiguous goes to torch.
        num_groups: divides C.
        weight, bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        RuntimeError, TypeError: torch's own, with torch's message.
    """
    fits = _serves(input, weight, bias) and type(eps) in (int, float) and eps > 0 and savable(input, weight, bias)
    fits = fits and type(num_groups) is int and num_groups > 0 and input.shape[1] % num_groups == 0
    backend = select(input.device.type) if fits else None
    if backend is None:
        if weight is None and bias is not None:  # torch does not differentiate a bias alone
            weight = torch.ones_like(bias)
        return F.group_norm(input, num_groups, weight, bias, eps)
    if needs_grad(input, weight, bias):
        return _group_norm(input, weight, bias, num_groups, eps, backend)
    return _forward(input, weight, bias, num_groups, eps, backend)[0]


# ---------------------------------------------------------------- instances


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    r"""Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016): statistics over the positions of a sample's channel.

    Equivalent to: ``torch.nn.functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats,
    momentum, eps)``

    Args:
        input: ``(B, C, *)``, float64, float32, bfloat16 or float16; one that is not contiguous goes to torch.
        running_mean, running_var: ``(C,)`` or None; updated in place with the means over the samples.
        weight, bias: ``(C,)`` or None.
        use_input_stats: False for the running statistics.
        momentum, eps: as `functional.batch_norm`'s.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError, RuntimeError, TypeError: torch's own, with torch's message; running statistics are then unchanged.
    """
    running = (running_mean, running_var)
    fits = _serves(input, *running, weight, bias) and input.dim() > 2 and (running_mean is None) == (running_var is None)
    fits = (
        fits
        and input[0, 0].numel() > 1
        and use_input_stats is True
        and not any(t is not None and t.requires_grad for t in running)
    )
    if not fits:
        return F.instance_norm(input, *running, weight, bias, use_input_stats, momentum, eps)
    B, C = input.shape[:2]
    each = lambda t: None if t is None else t.repeat(B)
    batch = list(map(each, running))
    x = input.reshape(1, B * C, *input.shape[2:])
    y = functional.batch_norm(x, *batch, each(weight), each(bias), True, momentum, eps)
    for t, new in zip(running, batch, strict=True):
        if t is not None:
            t.data.copy_(new.view(B, C).mean(0))
    return y.view(input.shape)
