"""The registered operators, torch.ops.fastnorm: what torch.compile, torch.export, dispatch modes and DTensor see of a norm.

Every operator is functional: fresh outputs, nothing written in place; running statistics are updated outside by torch's own
operators, which functionalisation, Inductor and export understand. Their kernel is the backend that serves the device, and
`reference` where none does. Statistics keep the leading dimensions of a layer norm, `mean` as (2, *leading), `rstd` as
(*leading), so that a sharded batch has sharded statistics.

Importing this module registers the operators; an exported program that uses them loads after `import fastnorm`.
"""

from __future__ import annotations

import sys
from functools import cache
from math import prod

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch._library.autograd import Info, make_autograd_impl
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from . import composite, reference
from .dispatch import DTYPES, select
from .reference import accumulate_dtype

_library = torch.library.Library("fastnorm", "DEF")
_functorch_active = torch._C._are_functorch_transforms_active


def _define(schema: str, kernel, fake, setup_context, backward):
    """Register one operator, on every device, and return it."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastnorm, name).default
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnorm::{name}", fake, lib=_library)
    differentiable = make_autograd_impl(op, Info(backward, setup_context))

    def autograd(keys, *args):
        # torch.library.register_autograd alone would lose the tangents of inputs that do not require grad, in silence.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(f"fastnorm::{name} has no forward-mode derivative; fastnorm.functional has")
        return differentiable(keys, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return op


def _has_tangent(t) -> bool:
    return isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None


def _differentiable(dy) -> bool:
    """Whether this backward is itself differentiated or batched, and so has to be made of torch's operators."""
    return torch.is_grad_enabled() or _functorch_active() or is_legacy_batchedtensor(dy)


def _backend(x):
    return (select(x.device.type) if x.dtype in DTYPES else None) or reference


def _dtype(p):
    return None if p is None else p.dtype


def _check_parameters(shape, *parameters):
    for p in parameters:
        torch._check(p is None or p.shape == shape, lambda: f"expected parameters of shape {list(shape)}, got {list(p.shape)}")


def _statistics(x, shape):
    """mean and rstd of a fake or an empty input."""
    acc = accumulate_dtype(x.dtype)
    return x.new_zeros((2, *shape), dtype=acc), x.new_zeros(shape, dtype=acc)


def _zeros(x, need, shape):
    """The gradients of an empty input; what is not needed is an empty tensor, for an operator returns a fixed number."""
    dx, *dtypes = need
    return (
        torch.zeros_like(x) if dx else x.new_empty(0),
        *(x.new_empty(0) if d is None else x.new_zeros(shape, dtype=d) for d in dtypes),
    )


def _full(x, gradients, shape):
    """Three tensors out of a backend's gradients, some of which may be None."""
    dx, *parameters = gradients
    return (
        x.new_empty(0) if dx is None else dx,
        *(x.new_empty(0) if d is None else d.view(shape) for d in parameters),
    )


def _some(gradients, need):
    """The inverse: None for what was not needed."""
    return (d if n is not None and n is not False else None for d, n in zip(gradients, need, strict=True))


def _refuse(ctx, *gradients):
    raise NotImplementedError("fastnorm's backward operators have no derivative: use create_graph=True on the forward operator")


# ---------------------------------------------------------------- rows


def _leading(x, normalized_shape):
    """The shape of the rows; raises where the normalised shape is not the end of x's."""
    k = x.dim() - len(normalized_shape)
    fits = 0 <= k < x.dim() and x.shape[k:] == torch.Size(normalized_shape)
    torch._check(fits, lambda: f"expected input of shape (*, {list(normalized_shape)}), got {list(x.shape)}")
    return x.shape[:k]


def _layer_norm(input, normalized_shape, weight, bias, eps):
    leading = _leading(input, normalized_shape)
    _check_parameters(torch.Size(normalized_shape), weight, bias)
    if input.numel() == 0:
        return torch.zeros_like(input, memory_format=torch.contiguous_format), *_statistics(input, leading)
    y, mean, rstd = _backend(input).row_fwd(input, weight, bias, eps, prod(normalized_shape))
    return y, mean.view(2, *leading), rstd.view(leading)


def _layer_norm_fake(input, normalized_shape, weight, bias, eps):
    leading = _leading(input, normalized_shape)
    _check_parameters(torch.Size(normalized_shape), weight, bias)
    return torch.empty_like(input, memory_format=torch.contiguous_format), *_statistics(input, leading)


def _layer_norm_backward(dy, input, normalized_shape, mean, rstd, weight, *need):
    if input.numel() == 0:
        return _zeros(input, need, normalized_shape)
    gradients = _backend(input).row_bwd(dy, input, weight, mean.reshape(2, -1), rstd.reshape(-1), need)
    return _full(input, gradients, normalized_shape)


def _layer_norm_backward_fake(dy, input, normalized_shape, mean, rstd, weight, dx, *dtypes):
    dx = torch.empty_like(input, memory_format=torch.contiguous_format) if dx else None
    parameters = (None if d is None else input.new_empty(normalized_shape, dtype=d) for d in dtypes)
    return _full(input, (dx, *parameters), normalized_shape)


def _layer_norm_context(ctx, inputs, output):
    input, ctx.normalized_shape, weight, bias, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, mean, rstd)
    ctx.bias_dtype = _dtype(bias)


def _layer_norm_derivative(ctx, dy, *_):
    x, weight, mean, rstd = ctx.saved_tensors
    shape, needs = ctx.normalized_shape, ctx.needs_input_grad
    need = needs[0], _dtype(weight) if needs[2] else None, ctx.bias_dtype if needs[3] else None
    if _differentiable(dy):
        gradients = composite.layer_norm_backward(dy, x, weight, prod(shape), ctx.eps, need)
        dx, dweight, dbias = (d if i == 0 or d is None else d.view(shape) for i, d in enumerate(gradients))
    else:
        dx, dweight, dbias = _some(_layer_norm_backward_op(dy, x, shape, mean, rstd, weight, *need), need)
    return dx, None, dweight, dbias, None


_layer_norm_op = _define(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _layer_norm,
    _layer_norm_fake,
    _layer_norm_context,
    _layer_norm_derivative,
)
_layer_norm_backward_op = _define(
    "layer_norm_backward(Tensor dy, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool dx, ScalarType? dweight, ScalarType? dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
    None,
    _refuse,
)
# As in torch: layer_norm is on the list of what CUDA's autocast computes in float32; batch_norm is on none.
torch.library.register_autocast("fastnorm::layer_norm", "cuda", torch.float32, lib=_library)


@torch.library.register_vmap("fastnorm::layer_norm", lib=_library)
def _layer_norm_vmap(info, dims, input, normalized_shape, weight, bias, eps):
    """A batch of inputs is more rows; batched parameters are applied afterwards."""
    x = input.unsqueeze(0) if dims[0] is None else input.movedim(dims[0], 0)
    inside = dims[2] is None and dims[3] is None
    x = x if inside else x.to(accumulate_dtype(x.dtype))
    y, mean, rstd = _layer_norm_op(x, normalized_shape, weight if inside else None, bias if inside else None, eps)
    if not inside:
        rows = (1,) * (x.dim() - 1 - len(normalized_shape))
        parameter = lambda p, d: p if d is None else p.movedim(d, 0).reshape(-1, *rows, *normalized_shape)
        y = y if weight is None else y * parameter(weight, dims[2])
        y = y if bias is None else y + parameter(bias, dims[3])
    batched = None if dims[0] is None else 1
    return (y.to(input.dtype), mean if batched else mean[:, 0], rstd if batched else rstd[0]), (0, batched, batched and 0)


def layer_norm(input, normalized_shape, weight, bias, eps):
    """torch.nn.functional.layer_norm's arguments, valid ones, as one operator."""
    if not torch.compiler.is_compiling() and is_dtensor(input):
        register_sharding()
    return _layer_norm_op(input, normalized_shape, weight, bias, eps)[0]


# ---------------------------------------------------------------- channels


def _like(x):
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _batch_norm_train(input, weight, bias, eps):
    _check_parameters(input.shape[1:2], weight, bias)
    if input.numel() == 0:
        return _batch_norm_train_fake(input, weight, bias, eps)
    running_mean, var = (input.new_zeros(input.shape[1], dtype=accumulate_dtype(input.dtype)) for _ in range(2))
    y, mean, rstd = _backend(input).channel_fwd(input, weight, bias, running_mean, var, True, 1.0, eps)
    return y, mean, rstd, var


def _batch_norm_train_fake(input, weight, bias, eps):
    _check_parameters(input.shape[1:2], weight, bias)
    mean, rstd = _statistics(input, input.shape[1:2])
    return _like(input), mean, rstd, torch.zeros_like(rstd)


def _batch_norm_eval(input, weight, bias, running_mean, running_var, eps):
    if input.numel() == 0:
        return _batch_norm_eval_fake(input, weight, bias, running_mean, running_var, eps)
    _check_parameters(input.shape[1:2], weight, bias, running_mean, running_var)
    return _backend(input).channel_fwd(input, weight, bias, running_mean, running_var, False, 0.0, eps)


def _batch_norm_eval_fake(input, weight, bias, running_mean, running_var, eps):
    _check_parameters(input.shape[1:2], weight, bias, running_mean, running_var)
    return _like(input), *_statistics(input, input.shape[1:2])


def _batch_norm_backward(dy, input, mean, rstd, weight, training, *need):
    if input.numel() == 0:
        return _zeros(input, need, input.shape[1:2])
    gradients = _backend(input).channel_bwd(dy, input, weight, mean, rstd, training, need)
    return _full(input, gradients, input.shape[1:2])


def _batch_norm_backward_fake(dy, input, mean, rstd, weight, training, dx, *dtypes):
    C = input.shape[1:2]
    parameters = (None if d is None else input.new_empty(C, dtype=d) for d in dtypes)
    return _full(input, (_like(input) if dx else None, *parameters), C)


def _batch_norm_context(training):
    def setup_context(ctx, inputs, output):
        input, weight, bias, *_, ctx.eps = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(input, weight, *statistics[:2])
        ctx.training, ctx.bias_dtype, ctx.inputs = training, _dtype(bias), len(inputs)

    return setup_context


def _batch_norm_derivative(ctx, dy, *_):
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, *others = ctx.needs_input_grad
    if any(others):
        raise NotImplementedError("fastnorm::batch_norm_eval is not differentiable by the running statistics")
    need = dx, _dtype(weight) if dweight else None, ctx.bias_dtype if dbias else None
    if _differentiable(dy):
        gradients = composite.batch_norm_backward(dy, x, weight, mean, rstd, ctx.training, ctx.eps, need)
    else:
        gradients = _some(_batch_norm_backward_op(dy, x, mean, rstd, weight, ctx.training, *need), need)
    return *gradients, *[None] * (ctx.inputs - 3)


_batch_norm_train_op = _define(
    "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor unbiased_var)",
    _batch_norm_train,
    _batch_norm_train_fake,
    _batch_norm_context(True),
    _batch_norm_derivative,
)
_batch_norm_eval_op = _define(
    "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _batch_norm_eval,
    _batch_norm_eval_fake,
    _batch_norm_context(False),
    _batch_norm_derivative,
)
_batch_norm_backward_op = _define(
    "batch_norm_backward(Tensor dy, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, bool training,"
    " bool dx, ScalarType? dweight, ScalarType? dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _batch_norm_backward,
    _batch_norm_backward_fake,
    None,
    _refuse,
)


def batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps):
    """torch.nn.functional.batch_norm's arguments, valid ones, as one operator and the update of the running statistics."""
    if not training:
        return _batch_norm_eval_op(input, weight, bias, running_mean, running_var, eps)[0]
    y, mean, _, var = _batch_norm_train_op(input, weight, bias, eps)
    if running_mean is not None:
        reference.update_running(running_mean, mean.sum(0), momentum)
        reference.update_running(running_var, var, momentum)
    return y


# ---------------------------------------------------------------- DTensor


def is_dtensor(x) -> bool:
    """Without importing torch.distributed.tensor, which takes half a second: whoever has a DTensor has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@cache
def register_sharding() -> None:
    """Rows may be sharded over any leading dimension; parameters are replicated, and their gradients are partial sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole = Replicate()
    replicated = lambda t: None if t is None else whole

    @register_sharding(_layer_norm_op)
    def forward(input, normalized_shape, weight, bias, eps):
        parameters = [replicated(weight), replicated(bias)]
        rules = [([whole] * 3, [whole, None, *parameters, None])]
        for d in range(input.ndim - len(normalized_shape)):
            rules.append(([Shard(d), Shard(d + 1), Shard(d)], [Shard(d), None, *parameters, None]))
        return rules

    @register_sharding(_layer_norm_backward_op)
    def backward(dy, input, normalized_shape, mean, rstd, weight, dx, *dtypes):
        rules = [([whole] * 3, [whole, whole, None, whole, whole, replicated(weight), None, None, None])]
        for d in range(input.ndim - len(normalized_shape)):
            rows = Shard(d)
            gradients = [rows if dx else whole, *(whole if t is None else Partial() for t in dtypes)]
            rules.append((gradients, [rows, rows, None, Shard(d + 1), rows, replicated(weight), None, None, None]))
        return rules
