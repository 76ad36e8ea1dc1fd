"""torch.nn.functional's norms, with torch's signatures, results, exceptions and messages.

A call has two exits. Plain eager calls that the fused kernels cover go to the backend that serves the device. Everything else
goes to torch itself: calls that are invalid (torch then raises its own exception), empty inputs, functorch transforms,
forward-mode AD, torch.compile (Inductor fuses a plain norm with its neighbours), torch.jit.trace, dispatch modes and tensor
subclasses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd
from .autograd import PLAIN, elsewhere, traced
from .dispatch import DTYPES, direct, select

_is_compiling = torch.compiler.is_compiling


def _covers(x, *parameters) -> bool:
    """Plain strided tensors of one device, in dtypes that the kernels read."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.dtype not in DTYPES or elsewhere(x):
        return False
    for p in parameters:
        if p is None:
            continue
        if type(p) not in PLAIN or p.dtype not in DTYPES or p.device != x.device or p.layout is not x.layout:
            return False
        if elsewhere(p):
            return False
    return x.device.type != "meta" and x.numel() > 0


def _needs_grad(x, weight, bias) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    r"""Layer normalization (Ba, Kiros and Hinton, 2016) over the last dimensions.

    Equivalent to: ``torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    with the mean and the biased variance of each row of ``prod(normalized_shape)`` elements.

    Args:
        input: ``(*, *normalized_shape)``, float64, float32, bfloat16 or float16, any strides.
        normalized_shape: list, tuple or torch.Size, the trailing shape that is normalised.
        weight, bias: ``normalized_shape`` or None; their dtypes may differ from input's, which torch.nn's may not always.
        eps: added to the variance.

    Returns:
        A contiguous tensor of input's shape and dtype; float32 under CUDA autocast, as in torch.

    Raises:
        RuntimeError, TypeError: torch's own, with torch's message, for shapes, devices and types that do not fit.
    """
    if _is_compiling():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    y = direct.layer_norm(input, normalized_shape, weight, bias, eps)
    if y is not None:
        return y
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
    fits = not traced() and _covers(input, weight, bias) and _rows_fit(input, normalized_shape, weight, bias, eps)
    backend = select(input.device.type) if fits else None
    if backend is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if input.is_cuda and input.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        input = input.float()
    N = 1
    for size in normalized_shape:
        N *= size
    if _needs_grad(input, weight, bias):
        return autograd.layer_norm(input, weight, bias, eps, N, backend)
    return backend.row_fwd(input, weight, bias, eps, N)[0]


def _rows_fit(x, normalized_shape, weight, bias, eps) -> bool:
    if not isinstance(normalized_shape, (tuple, list)) or type(eps) not in (float, int):
        return False
    shape = torch.Size(normalized_shape) if all(type(n) is int for n in normalized_shape) else None
    if not shape or x.shape[-len(shape) :] != shape:
        return False
    return (weight is None or weight.shape == shape) and (bias is None or bias.shape == shape)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    r"""Batch normalization (Ioffe and Szegedy, 2015) over every dimension but dim 1.

    Equivalent to: ``torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    In training, mean and biased variance are the channel's own, and ``running = (1 - momentum) * running + momentum * new``
    in place, with the unbiased variance. In evaluation they are ``running_mean`` and ``running_var``.

    Args:
        input: ``(B, C)`` or ``(B, C, *)``, float64, float32, bfloat16 or float16, any strides.
        running_mean, running_var: ``(C,)``; both None only in training.
        weight, bias: ``(C,)`` or None; their dtypes may differ from input's.
        training: use the statistics of this batch.
        momentum: weight of the new statistics.
        eps: added to the variance.

    Returns:
        A tensor of input's shape, dtype and memory format (contiguous, channels_last or channels_last_3d).

    Raises:
        ValueError, RuntimeError, TypeError: torch's own, with torch's message; running statistics are then unchanged.
    """
    if _is_compiling():
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = direct.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if y is not None:
        return y
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    fits = (
        not traced()
        and _covers(input, running_mean, running_var, weight, bias)
        and _channels_fit(input, running_mean, running_var, weight, bias, training, momentum, eps)
    )
    backend = select(input.device.type) if fits else None
    if backend is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if _needs_grad(input, weight, bias):
        return autograd.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, backend)
    return backend.channel_fwd(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def _channels_fit(x, running_mean, running_var, weight, bias, training, momentum, eps) -> bool:
    if type(eps) not in (float, int) or type(momentum) not in (float, int) or type(training) is not bool or x.dim() < 2:
        return False
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    shape = x.shape[1:2]
    for p in (running_mean, running_var, weight, bias):
        if p is not None and p.shape != shape:
            return False
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        return False
    return eps >= 0 and (not training or (eps > 0 and x.numel() > shape[0]))
