"""Norms with what surrounds them: one call of a backend, or torch's sequence of operators.

The sequence is for what the kernels do not cover (and then raises torch's own errors), for functorch, forward-mode AD and
subclasses, and for torch.compile, whose Inductor fuses it by itself.
"""

from __future__ import annotations

import torch
from torch.overrides import has_torch_function_variadic

from . import activations, composite
from .autograd import Rows, fused_batch_norm, fused_rows, traced
from .dispatch import direct, select
from .gate import autocasts, channels_fit, covers, needs_grad, parts_fit, rows_fit
from .reference import accumulate_dtype

_is_compiling = torch.compiler.is_compiling


def serving(x, like_x, others):
    """The backend that serves x with tensors of its shape and dtype, and with others; None where torch has to."""
    if has_torch_function_variadic(x, *like_x, *others) or traced() or not covers(x, *like_x, *others):
        return None
    if any(t is not None and (t.shape != x.shape or t.dtype != x.dtype) for t in like_x):
        return None
    tensors = [t for t in (x, *like_x, *others) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and any(t.is_inference() for t in tensors):
        return None  # cannot be saved for backward, as torch will say
    return select(x.device.type)


def rows(x, addend, normalized_shape, weight, bias, eps, activation, residual, centre=True):
    """y and h = x + addend, which is None without an addend; layer_norm, or rms_norm where not `centre`."""
    activation, alpha = activations.parse(activation)
    backend = None
    if not _is_compiling():
        arguments = (x, addend, normalized_shape, weight, bias, eps, activation, alpha, residual, centre)
        if (results := direct.fused_rows(*arguments)) is not None:
            return results
        backend = serving(x, (addend, residual), (weight, bias))
    if backend is None or autocasts(x) or not rows_fit(x, normalized_shape, weight, bias, eps):
        return composite.rows_in_sequence(x, addend, normalized_shape, weight, bias, eps, activation, alpha, residual, centre)
    options = Rows(torch.Size(normalized_shape).numel(), eps, activation, alpha, centre, backend)
    if needs_grad(x, weight, bias, addend, residual):
        return fused_rows(x, addend, weight, bias, residual, options)
    return backend.row_fused_fwd(x, addend, weight, bias, residual, activation, alpha, eps, options.N, centre)[:2]


def rms_eps(input, eps):
    """torch's for None: that of the dtype which it computes in."""
    return torch.finfo(accumulate_dtype(input.dtype)).eps if eps is None and input.is_floating_point() else eps


def modulated_rows(x, normalized_shape, scale, shift, weight, bias, eps, activation):
    """y = activation(layer_norm(x) * (1 + scale) + shift), where scale and shift are the same for the rows of a sample."""
    activation, alpha = activations.parse(activation)
    backend = None if _is_compiling() else serving(x, (), (scale, shift, weight, bias))
    fits = backend is not None and not autocasts(x) and rows_fit(x, normalized_shape, weight, bias, eps)
    if not (fits and scale.shape == shift.shape and parts_fit(x, normalized_shape, scale)):
        return composite.modulated_in_sequence(x, normalized_shape, scale, shift, weight, bias, eps, activation, alpha)
    acc = accumulate_dtype(x.dtype)  # 1 + scale is not rounded to a narrower one, in which small scales would be lost
    factor, offset = scale.to(acc) + 1, shift
    if bias is not None:
        offset = torch.addcmul(shift.to(acc), bias.to(acc), factor)
    if weight is not None:
        factor = factor * weight.to(acc)
    options = Rows(torch.Size(normalized_shape).numel(), eps, activation, alpha, True, backend)
    if needs_grad(x, factor, offset):
        return fused_rows(x, None, factor, offset, None, options)[0]
    return backend.row_fused_fwd(x, None, factor, offset, None, activation, alpha, eps, options.N)[0]


def batch_norm(
    input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, num_batches_tracked=None
):
    """y; the counter goes up where the running statistics are updated."""
    activation, alpha = activations.parse(activation)
    statistics, options = (running_mean, running_var), (training, momentum, eps)
    backend = None
    if not _is_compiling():
        arguments = (input, *statistics, weight, bias, *options, activation, alpha, residual, num_batches_tracked)
        if (y := direct.fused_batch_norm(*arguments)) is not None:
            return y
        backend = serving(input, (residual,), (*statistics, weight, bias))
    if backend is None or not channels_fit(input, *statistics, weight, bias, *options):
        arguments = (input, *statistics, weight, bias, *options, activation, alpha, residual)
        return composite.counted(num_batches_tracked, composite.channels_in_sequence, *arguments)
    arguments = (residual, activation, alpha, *statistics, *options, num_batches_tracked)
    if needs_grad(input, weight, bias, residual):
        y = fused_batch_norm(input, weight, bias, *arguments, backend)
    else:
        y = backend.channel_fused_fwd(input, weight, bias, *arguments)[0]
    if num_batches_tracked is not None:
        torch.autograd.graph.increment_version(num_batches_tracked)
    return y
