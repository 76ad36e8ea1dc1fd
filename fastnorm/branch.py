"""The pre-norm of a transformer's block whose branch is dropped or scaled on its way onto the stream: two calls of a backend,
or torch's sequence of operators."""

from __future__ import annotations

import torch

from . import activations, composite, fused
from .autograd import Branch, Rows, branch_rows
from .gate import autocasts, rows_fit


def _along(row_scale, x, normalized_shape):
    """row_scale, one for each index of x's first dimensions, with as many dimensions as x.

    Raises:
        ValueError: it is of another shape, or one for less than a row.
    """
    lead = x.dim() - len(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else x.dim()
    shape = row_scale.shape
    while shape and shape[-1] == 1 and len(shape) > 1:
        shape = shape[:-1]
    if row_scale.dim() > x.dim() or shape != x.shape[: len(shape)] or shape[max(lead, 0) :].numel() > 1:
        raise ValueError(f"expected a row_scale for the first dimensions of {tuple(x.shape)}, got {tuple(row_scale.shape)}")
    return row_scale.reshape(*shape, *[1] * (x.dim() - len(shape)))


def rows(x, stream, normalized_shape, weight, bias, eps, activation, centre, dropout, row_scale, layer_scale, in_fp32):
    """y, in x's dtype where `in_fp32`, and h = stream + dropout(x) * row_scale * layer_scale.

    Raises:
        ValueError: `dropout` is no probability, or `row_scale` does not fit.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
    named, alpha = activations.parse(activation)
    if row_scale is not None:
        row_scale = _along(row_scale, x, normalized_shape)
    dtype = torch.promote_types(x.dtype, torch.float32) if in_fp32 else x.dtype
    options = (weight, bias, eps, named, alpha, centre)
    backend = _backend(x, stream, normalized_shape, weight, bias, eps, row_scale, layer_scale, dtype)
    if backend is None:
        scales = (dropout, row_scale, layer_scale, dtype if in_fp32 else None)
        return composite.branch_in_sequence(x, stream, normalized_shape, *options, *scales)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=x.device) if dropout > 0 else None
    norm = Rows(torch.Size(normalized_shape).numel(), eps, named, alpha, centre, backend)
    return branch_rows(x, stream, weight, bias, layer_scale, Branch(float(dropout), seed, row_scale, dtype), norm)


def _backend(x, stream, normalized_shape, weight, bias, eps, row_scale, layer_scale, dtype):
    """The backend that serves the call; None where torch's operators have to."""
    if torch.compiler.is_compiling() or not isinstance(stream, torch.Tensor) or not isinstance(x, torch.Tensor):
        return None
    if autocasts(x) or stream.shape != x.shape or stream.dtype not in (x.dtype, dtype):
        return None
    if row_scale is not None and row_scale.requires_grad:  # the kernels give it no gradient
        return None
    if not rows_fit(x, normalized_shape, weight, bias, eps) or not rows_fit(x, normalized_shape, layer_scale, None, eps):
        return None
    return fused.serving(x, (), (stream, weight, bias, row_scale, layer_scale))
