"""The torch.autograd.Functions: what is saved, and which gradients are needed. No shapes, no devices.

Backward runs the fused kernel, or, when it is itself being differentiated (create_graph=True) or its gradient is no plain
tensor (batched gradients, subclasses), the formula of `composite`.
"""

from __future__ import annotations

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from . import composite, extension

PLAIN = (torch.Tensor, Parameter)
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def traced() -> bool:
    """Somebody looks at the operators of this call, so it must be made of torch's own."""
    return _functorch_active() or _dispatch_modes() or forward_ad._current_level >= 0 or torch._C._is_tracing()


def elsewhere(t) -> bool:
    """Its memory does not hold its values: a negative view (`x.conj().imag`), zeros without any memory, a nested tensor."""
    return t.is_neg() or t._is_zerotensor() or t.is_nested


def _differentiable(dy) -> bool:
    """Whether backward has to be made of torch's operators; `is_grads_batched` hides what dy is from all but that test."""
    if _is_compiling():  # compiled autograd traces this backward
        return True
    return torch.is_grad_enabled() or traced() or type(dy) not in PLAIN or is_legacy_batchedtensor(dy) or elsewhere(dy)


def _dtype(p):
    return None if p is None else p.dtype


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, N, backend, dtype):
        y, mean, rstd = backend.row_fwd(x, weight, bias, eps, N, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.N, ctx.backend, ctx.bias_dtype = eps, N, backend, _dtype(bias)
        ctx.parameter_shape = None if weight is None and bias is None else (bias if weight is None else weight).shape
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        need = _need(ctx, weight)
        if _differentiable(dy):
            dx, dweight, dbias = composite.layer_norm_backward(dy, x, weight, ctx.N, ctx.eps, need)
        else:
            dx, dweight, dbias = ctx.backend.row_bwd(dy, x, weight, mean, rstd, need)
        shaped = lambda d: d if d is None else d.view(ctx.parameter_shape)
        return dx, shaped(dweight), shaped(dbias), None, None, None, None


class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, backend):
        y, mean, rstd = backend.channel_fwd(x, weight, bias, running_mean, running_var, training, momentum, eps)
        # mean and rstd are copies, in evaluation too: buffers that DDP broadcasts in place are never saved.
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.training, ctx.backend, ctx.bias_dtype = eps, training, backend, _dtype(bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        need = _need(ctx, weight)
        if _differentiable(dy):
            grads = composite.batch_norm_backward(dy, x, weight, mean, rstd, ctx.training, ctx.eps, need)
        else:
            grads = ctx.backend.channel_bwd(dy, x, weight, mean, rstd, ctx.training, need)
        return *grads, None, None, None, None, None, None


def _need(ctx, weight):
    dx, dweight, dbias = ctx.needs_input_grad[:3]
    return dx, weight.dtype if dweight else None, ctx.bias_dtype if dbias else None


def _apply_of(function):
    """Function.apply as C has it: without the wrapper that looks after functorch transforms, which never come here."""
    return super(torch.autograd.Function, function).apply


layer_norm, batch_norm = _apply_of(LayerNormFunction), _apply_of(BatchNormFunction)
extension.differentiate_with(composite.layer_norm_backward, composite.batch_norm_backward)
