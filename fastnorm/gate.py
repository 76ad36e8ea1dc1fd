"""What decides whether the kernels take a call: plain tensors of one device, arguments that fit, gradients to be saved."""

from __future__ import annotations

import torch

from .autograd import PLAIN, elsewhere
from .dispatch import DTYPES
from .settings import config

HALVES = (torch.bfloat16, torch.float16)


def covers(x, *parameters) -> bool:
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


def needs_grad(x, weight, bias, *others) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or any(t is not None and t.requires_grad for t in others)
    )


def savable(x, weight, bias) -> bool:
    """Inference tensors cannot be saved for backward: torch says so before anything has happened."""
    return not needs_grad(x, weight, bias) or not (x.is_inference() or (weight is not None and weight.is_inference()))


def autocasts(x) -> bool:
    """CUDA's autocast computes layer_norm in float32. The kernels do so anyway, so all it changes is the output's dtype."""
    return x.dtype in HALVES and x.is_cuda and torch.is_autocast_enabled("cuda") and not config.autocast_keeps_dtype


def rows_fit(x, normalized_shape, weight, bias, eps) -> bool:
    if not isinstance(normalized_shape, (tuple, list)) or type(eps) not in (float, int):
        return False
    shape = torch.Size(normalized_shape) if all(type(n) is int for n in normalized_shape) else None
    if not shape or x.shape[-len(shape) :] != shape:
        return False
    return (weight is None or weight.shape == shape) and (bias is None or bias.shape == shape)


def parts_fit(x, normalized_shape, parameter) -> bool:
    """Whether this is one for each index of x's first dimensions, and of length 1 along the others before the last ones."""
    d = x.dim() - len(normalized_shape)
    leading = parameter.shape[:d]
    while leading and leading[-1] == 1:
        leading = leading[:-1]
    return parameter.dim() == x.dim() and parameter.shape[d:] == x.shape[d:] and leading == x.shape[: len(leading)]


def channels_fit(x, running_mean, running_var, weight, bias, training, momentum, eps) -> bool:
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
