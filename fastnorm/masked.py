"""Norms of which some of the input does not count, such as padding: statistics and their gradients leave it out."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_variadic

from . import activations, composite
from .autograd import masked_batch_norm, masked_rows, traced
from .dispatch import DTYPES, select
from .gate import channels_fit, covers, needs_grad, rows_fit
from .geometry import around
from .reference import accumulate_dtype, updated


def mask_of(mask, lengths, shape, device):
    """The bool mask of a (B, *) shape from either of the two; `lengths` (B,) are along the first dimension after B.

    Raises:
        ValueError: both are given, or the one that is does not fit.
    """
    if mask is not None and lengths is not None:
        raise ValueError("a mask and lengths are two ways to say the same: give one of them")
    if mask is not None:
        # not `m in (1, n)`, which torch.compile takes to be false of a symbolic n
        fits = mask.dim() == len(shape) and all(m == 1 or m == n for m, n in zip(mask.shape, shape, strict=True))
        if mask.dtype != torch.bool or not fits:
            wanted = f"expected a bool mask of shape {tuple(shape)}"
            raise ValueError(f"{wanted}, got {mask.dtype} of shape {tuple(mask.shape)}")
        return mask.expand(shape)
    if lengths.shape != shape[:1] or len(shape) < 2 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        wanted = f"expected integer lengths of shape {tuple(shape[:1])}, one a sample"
        raise ValueError(f"{wanted}, got {lengths.dtype} of shape {tuple(lengths.shape)}")
    counts = torch.arange(shape[1], device=device) < lengths.to(device).unsqueeze(1)
    return counts.view(*counts.shape, *[1] * (len(shape) - 2)).expand(shape)


def rows(input, mask, lengths, normalized_shape, weight, bias, eps, activation, residual):
    """layer_norm of what counts; see `functional.layer_norm`."""
    activation, alpha = activations.parse(activation)
    if not rows_fit(input, normalized_shape, weight, bias, eps) or not input.is_floating_point():
        F.layer_norm(input, normalized_shape, weight, bias, eps)  # raises what torch raises
    mask = mask_of(mask, lengths, input.shape[: 2 if mask is None else mask.dim()], input.device)
    backend = _backend(input, mask, weight, bias)
    if backend is None:
        mask = mask.view(*mask.shape, *[1] * (input.dim() - mask.dim()))
        y = composite.masked_rows_in_sequence(input, mask, normalized_shape, weight, bias, eps)
    else:
        mask = _of_rows(mask, input.shape, input.dim() - len(normalized_shape))
        y = masked_rows(input, weight, bias, mask, eps, prod(normalized_shape), backend)
    return activations.ACTIVATIONS[activation].value(y if residual is None else y + residual, alpha)


def _of_rows(mask, shape, lead):
    """The mask (R, P) of the backend contract, from one of the first dimensions of `shape`, of which `lead` are rows'.

    Where it is the same along the last of either, it is not written out for them.
    """
    parts = (0, min(lead, mask.dim())), (lead, mask.dim())
    outer, inner = (next((d for d in range(end, begin, -1) if mask.stride(d - 1) != 0), begin) for begin, end in parts)
    at = tuple(slice(None) if d < outer or lead <= d < inner else 0 for d in range(mask.dim()))
    return mask[at].reshape(prod(shape[:outer]), prod(shape[lead:inner])).contiguous()


def mask_beside(input, mask, lengths, channel_axis):
    """`mask_of` for an input whose channels are any dimension, in the shape that the input has when they are dim 1."""
    shape = list(input.shape)
    del shape[channel_axis]
    mask = mask_of(mask, lengths, torch.Size(shape), input.device)
    moved = around(input.shape, channel_axis)
    return mask if channel_axis == 1 else mask.reshape(moved[:1] + moved[2:])


def _backend(x, mask, weight, bias):
    """The backend that serves a call that fits; None where torch's operators have to."""
    tensors = (mask, weight, bias)
    if torch.compiler.is_compiling() or has_torch_function_variadic(x, *tensors) or traced():
        return None
    if not covers(x, weight, bias) or mask.device != x.device:
        return None
    if needs_grad(x, weight, bias) and any(t is not None and t.is_inference() for t in (x, *tensors)):
        return None  # cannot be saved for backward, as torch will say
    return select(x.device.type)


def normalize(x, mask, otherwise, weight, bias, eps):
    """y, and count (1,), mean and biased variance (C,) of what counts; the last two are `otherwise` where nothing does."""
    backend = _backend(x, mask, weight, bias)
    if backend is None or not channels_fit(x, None, None, weight, bias, True, 0.0, eps):
        return composite.masked_in_sequence(x, mask, weight, bias, otherwise, eps)
    return masked_batch_norm(x, weight, bias, mask, otherwise, eps, backend)


def _otherwise(input, running):
    """As in evaluation; without running statistics mean 0 and variance 1."""
    if running[0] is not None:
        return tuple(t.detach() for t in running)
    zeros = input.new_zeros(input.shape[1], dtype=accumulate_dtype(input.dtype))
    return zeros, zeros + 1


def batch_norm(
    input,
    mask,
    running_mean,
    running_var,
    weight,
    bias,
    momentum,
    eps,
    activation=None,
    residual=None,
    num_batches_tracked=None,
):
    """Training on what counts; `mask` is bool, (B, *) beside input's (B, C, *). See `functional.batch_norm`.

    A batch of which nothing counts leaves the running statistics and the counter alone. ``momentum=None``: they become the
    averages over the batches that are counted.
    """
    activation, alpha = activations.parse(activation)
    running = running_mean, running_var
    if input.dtype not in DTYPES or not channels_fit(input, *running, weight, bias, True, 0.0, eps):
        statistics = (None if t is None else t.detach().clone() for t in running)
        y = F.batch_norm(input, *statistics, weight, bias, True, 0.0, eps)  # raises what torch raises
        if input.numel() == 0:
            return activations.ACTIVATIONS[activation].value(y if residual is None else y + residual, alpha)
    y, count, *statistics = normalize(input, mask, _otherwise(input, running), weight, bias, eps)
    if residual is not None:
        y = y + residual
    y = activations.ACTIVATIONS[activation].value(y, alpha)
    with torch.no_grad():
        _update(running, statistics, count, momentum, num_batches_tracked)
    return y


def _update(running, statistics, count, momentum, num_batches_tracked):
    """In place, without waiting for the device to know the count."""
    some = count > 0
    if num_batches_tracked is not None:
        num_batches_tracked.add_(some.view(()).to(num_batches_tracked.dtype))
    if running[0] is None:
        return
    n = count.double()
    mean, var = statistics[0], statistics[1] * (n / (n - 1).clamp(min=1))
    if momentum is None:
        momentum = 1 / num_batches_tracked.double().clamp(min=1)
    for of, new in zip(running, (mean, var), strict=True):
        of.detach().copy_(torch.where(some, updated(of, new, momentum), of))
