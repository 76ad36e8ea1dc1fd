"""The torch.autograd.Functions: what is saved, and which gradients are needed. No shapes, no devices.

Backward runs the fused kernel, or, when it is itself being differentiated (create_graph=True) or its gradient is no plain
tensor (batched gradients, subclasses), the formula of `composite`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from . import composite, extension, reference

PLAIN = (torch.Tensor, Parameter)
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def traced() -> bool:
    """Somebody looks at the operators of this call, so it must be made of torch's own."""
    return _functorch_active() or _dispatch_modes() > 0 or forward_ad._current_level >= 0 or torch._C._is_tracing()


def elsewhere(t) -> bool:
    """Its memory does not hold its values: a negative view (`x.conj().imag`), zeros without any memory, a nested tensor."""
    return t.is_neg() or t._is_zerotensor() or t.is_nested


def is_differentiable(dy) -> bool:
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
        if is_differentiable(dy):
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
        if is_differentiable(dy):
            grads = composite.batch_norm_backward(dy, x, weight, mean, rstd, ctx.training, ctx.eps, need)
        else:
            grads = ctx.backend.channel_bwd(dy, x, weight, mean, rstd, ctx.training, need)
        return *grads, None, None, None, None, None, None


def _need(ctx, weight):
    dx, dweight, dbias = ctx.needs_input_grad[:3]
    return dx, weight.dtype if dweight else None, ctx.bias_dtype if dbias else None


class Rows(NamedTuple):
    """The options of a fused norm of rows."""

    N: int
    eps: float
    activation: str
    alpha: float
    centre: bool
    backend: object


class FusedRowsFunction(torch.autograd.Function):
    """y and h = x + addend; without an addend y and None. With the identity, residual and bias do not come back in backward."""

    @staticmethod
    def forward(ctx, x, addend, weight, bias, residual, o):
        y, h, mean, rstd = o.backend.row_fused_fwd(
            x, addend, weight, bias, residual, o.activation, o.alpha, o.eps, o.N, o.centre
        )
        plain = o.activation == "identity"
        ctx.save_for_backward(x if h is None else h, weight, None if plain else bias, None if plain else residual, mean, rstd)
        ctx.options, ctx.plain, ctx.bias_dtype = o, plain, _dtype(bias)
        ctx.parameter_shape = None if weight is None and bias is None else (bias if weight is None else weight).shape
        ctx.set_materialize_grads(False)
        if h is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        if dy is None:  # only h is used
            return dh, dh, None, None, None, None
        x, weight, bias, residual, mean, rstd = ctx.saved_tensors
        o, (dx, daddend, _, _, dresidual, _) = ctx.options, ctx.needs_input_grad
        activated = dresidual and not ctx.plain
        need = (dx or daddend, *_parameter_dtypes(ctx, weight, ctx.needs_input_grad[2:4]), activated)
        if is_differentiable(dy) or (dh is not None and is_differentiable(dh)):
            formula = composite.fused_rows_backward
            grads = formula(dy, dh, x, weight, bias, residual, o.activation, o.alpha, o.eps, o.N, o.centre, need)
        else:
            run = o.backend.row_fused_bwd
            grads = run(dy, dh, x, residual, weight, bias, o.activation, o.alpha, mean, rstd, need, o.centre)
        shaped = lambda d: d if d is None else d.view(ctx.parameter_shape)
        dx, dweight, dbias, dz = grads
        return dx, dx if daddend else None, shaped(dweight), shaped(dbias), dy if dresidual and ctx.plain else dz, None


class Branch(NamedTuple):
    """What happens to a branch on its way onto the stream, beside a scale of its columns."""

    dropout: float
    seed: torch.Tensor | None
    row_scale: torch.Tensor | None
    dtype: torch.dtype  # the stream's


class BranchRowsFunction(torch.autograd.Function):
    """y, in x's dtype, and h = stream + dropout(x) * row_scale * column_scale."""

    @staticmethod
    def forward(ctx, x, stream, weight, bias, column_scale, b, o):
        h = o.backend.branch_fwd(x, stream, b.row_scale, column_scale, b.dropout, b.seed, b.dtype)
        y, _, mean, rstd = o.backend.row_fused_fwd(h, None, weight, bias, None, o.activation, o.alpha, o.eps, o.N, o.centre)
        plain = o.activation == "identity"
        saved = (None if column_scale is None or not ctx.needs_input_grad[4] else x, column_scale, b.row_scale, b.seed)
        ctx.save_for_backward(h, weight, None if plain else bias, mean, rstd, *saved)
        ctx.options, ctx.dropout, ctx.dtypes, ctx.bias_dtype = o, b.dropout, (x.dtype, stream.dtype), _dtype(bias)
        ctx.parameter_shape = None if weight is None and bias is None else (bias if weight is None else weight).shape
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[i] for i in (0, 1, 4)):
            ctx.mark_non_differentiable(h)
        return y.to(x.dtype), h

    @staticmethod
    def backward(ctx, dy, dh):
        h, weight, bias, mean, rstd, x, column_scale, row_scale, seed = ctx.saved_tensors
        o, (x_dtype, stream_dtype), needed = ctx.options, ctx.dtypes, ctx.needs_input_grad
        if dy is None and dh is None:
            return (None,) * 7
        branch, again = (needed[0], needed[4]), any(g is not None and is_differentiable(g) for g in (dy, dh))
        total, dweight, dbias = dh, None, None
        if dy is not None:
            need = (any(branch) or needed[1], *_parameter_dtypes(ctx, weight, needed[2:4]), False)
            if again:
                formula, options = composite.fused_rows_backward, (o.activation, o.alpha, o.eps, o.N, o.centre)
                total, dweight, dbias, _ = formula(dy.to(h.dtype), dh, h, weight, bias, None, *options, need)
            else:
                run, options = o.backend.row_fused_bwd, (o.activation, o.alpha, mean, rstd, need, o.centre)
                total, dweight, dbias, _ = run(dy.to(h.dtype), dh, h, None, weight, bias, *options)
        dx = dcolumn = None
        if any(branch):
            run = (reference if again else o.backend).branch_bwd
            dtypes = (x_dtype if branch[0] else None, column_scale.dtype if branch[1] else None)
            dx, dcolumn = run(total, x, row_scale, column_scale, ctx.dropout, seed, *dtypes)
        shaped = lambda d: d if d is None else d.view(ctx.parameter_shape)
        dcolumn = None if dcolumn is None else dcolumn.view(column_scale.shape)
        return dx, total.to(stream_dtype) if needed[1] else None, shaped(dweight), shaped(dbias), dcolumn, None, None


class FusedBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, activation, alpha, mean, var, training, momentum, eps, tracked, backend):
        options = (residual, activation, alpha, mean, var, training, momentum, eps, tracked)
        y, mean, rstd, kept = backend.channel_fused_fwd(x, weight, bias, *options, keep=True)
        plain = activation == "identity"
        ctx.save_for_backward(x, weight, None if plain else bias, None if plain else kept, mean, rstd)
        ctx.options, ctx.plain, ctx.bias_dtype = (activation, alpha, training, eps, backend), plain, _dtype(bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, kept, mean, rstd = ctx.saved_tensors
        activation, alpha, training, eps, backend = ctx.options
        dx, *parameters, dresidual = ctx.needs_input_grad[:4]
        need = (dx, *_parameter_dtypes(ctx, weight, parameters), dresidual and not ctx.plain)
        if is_differentiable(dy):
            formula = composite.fused_batch_norm_backward
            grads = formula(dy, x, weight, bias, kept, activation, alpha, mean, rstd, training, eps, need)
        else:
            run = backend.channel_fused_bwd
            grads = run(dy, x, kept, weight, bias, activation, alpha, mean, rstd, training, need)
        dx, dweight, dbias, dz = grads
        return dx, dweight, dbias, dy if dresidual and ctx.plain else dz, *[None] * 9


class Ended(NamedTuple):
    """The options of a norm of (B, C, *) that has parameters of channels and ends in an activation."""

    kind: str  # as in the names of the contract: "group" or "position"
    activation: str
    alpha: float
    eps: float
    backend: object
    more: tuple = ()  # arguments of the kind's own

    @property
    def arguments(self):
        return self.activation, self.alpha


class EndedNormFunction(torch.autograd.Function):
    """Group norm, and layer norm over channels."""

    @staticmethod
    def forward(ctx, x, weight, bias, o):
        run = getattr(o.backend, f"{o.kind}_fwd")
        y, mean, rstd = run(x, weight, bias, *o.arguments, o.eps, *o.more)
        ctx.save_for_backward(x, weight, None if o.activation == "identity" else bias, mean, rstd)
        ctx.options, ctx.bias_dtype = o, _dtype(bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        o, need = ctx.options, _need(ctx, weight)
        if is_differentiable(dy):
            formula = getattr(composite, f"{o.kind}_norm_backward")
            grads = formula(dy, x, weight, bias, *o.arguments, o.eps, *o.more, need)
        else:
            grads = getattr(o.backend, f"{o.kind}_bwd")(dy, x, weight, bias, *o.arguments, mean, rstd, need)
        return *grads, None


class MaskedBatchNormFunction(torch.autograd.Function):
    """y, and count (1,), mean and biased variance (C,) in float64 of what counts: `otherwise` where nothing does."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, otherwise, eps, backend):
        count, mean, deviation = backend.channel_masked_stats(x, mask)
        some, moments = count > 0, (mean.sum(0, dtype=torch.float64), deviation.double().square())
        mean, var = (torch.where(some, of, other) for of, other in zip(moments, otherwise, strict=True))
        saved = reference.split(mean, count.dtype), torch.rsqrt(var + eps).to(count.dtype)
        y = backend.channel_apply(x, *saved, weight, bias)
        ctx.save_for_backward(x, weight, mask, count, *saved)
        ctx.eps, ctx.backend, ctx.bias_dtype = eps, backend, _dtype(bias)
        ctx.mark_non_differentiable(count, mean, var)
        return y, count, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mask, count, mean, rstd = ctx.saved_tensors
        need = _need(ctx, weight)
        if is_differentiable(dy):
            grads = composite.masked_batch_norm_backward(dy, x, mask, weight, count, mean, rstd, ctx.eps, need)
        else:
            grads = reference.channel_masked_bwd(ctx.backend, dy, x, mask, weight, count, mean, rstd, need)
        return *grads, None, None, None, None


class MaskedRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mask, eps, N, backend):
        y, mean, rstd = backend.row_masked_fwd(x, mask, weight, bias, eps, N)
        ctx.save_for_backward(x, weight, mask, mean, rstd)
        ctx.eps, ctx.N, ctx.backend, ctx.bias_dtype = eps, N, backend, _dtype(bias)
        ctx.parameter_shape = None if weight is None and bias is None else (bias if weight is None else weight).shape
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mask, mean, rstd = ctx.saved_tensors
        need = _need(ctx, weight)
        if is_differentiable(dy):
            dx, *grads = composite.masked_rows_backward(dy, x, mask, weight, ctx.N, ctx.eps, need)
        else:
            dx, *grads = ctx.backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, need)
        return dx, *(None if d is None else d.view(ctx.parameter_shape) for d in grads), None, None, None, None


def _parameter_dtypes(ctx, weight, needed):
    return weight.dtype if needed[0] else None, ctx.bias_dtype if needed[1] else None


def apply_of(function):
    """Function.apply as C has it: without the wrapper that looks after functorch transforms, which never come here."""
    return super(torch.autograd.Function, function).apply


layer_norm, batch_norm = apply_of(LayerNormFunction), apply_of(BatchNormFunction)
fused_rows, fused_batch_norm = apply_of(FusedRowsFunction), apply_of(FusedBatchNormFunction)
branch_rows = apply_of(BranchRowsFunction)
ended_norm, masked_batch_norm = apply_of(EndedNormFunction), apply_of(MaskedBatchNormFunction)
masked_rows = apply_of(MaskedRowsFunction)
extension.differentiate_with(
    composite.layer_norm_backward,
    composite.batch_norm_backward,
    composite.fused_rows_backward,
    composite.fused_batch_norm_backward,
)
