"""A call as fastnorm takes it, and as torch's own operators have it, one after the other."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from compare import accumulate
from ghosts import by_parts
from masks import written_out

import fastnorm
from fastnorm.activations import ACTIVATIONS

from .calls import Call

MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
PLAIN = ("layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm")
TRACKED = 3  # batches that a module has counted before the call


def is_plain(call: Call) -> bool:
    """Whether torch.nn.functional has this very call."""
    extras = (call.activation, call.residual, call.mask, call.lengths)
    return call.function in PLAIN and all(e is None for e in extras) and not call.recompute


def plain_arguments(call, t):
    """Of torch.nn.functional's function, and of ours."""
    if call.function == "layer_norm":
        return t.x, call.normalized_shape, t.weight, t.bias, call.eps
    if call.function == "rms_norm":
        return t.x, call.normalized_shape, t.weight, call.eps
    if call.function == "group_norm":
        return t.x, call.groups, t.weight, t.bias, call.eps
    return t.x, t.mean, t.var, t.weight, t.bias, call.training, call.momentum, call.eps


def ours(call, t):
    """(y, h or None)"""
    extras = {"activation": call.activation, "residual": t.residual, "mask": t.mask, "lengths": t.lengths}
    extras = {name: e for name, e in extras.items() if e is not None}
    if call.recompute:
        extras["recompute"] = "output"
    if call.function in PLAIN:
        return getattr(fastnorm, call.function)(*plain_arguments(call, t), **extras), None
    if call.function == "BatchNorm":
        return _module(call, t)(t.x, **{name: e for name, e in extras.items() if name in ("residual", "mask", "lengths")}), None
    if call.function == "ghost_batch_norm":
        options = (call.training, call.momentum, call.eps)
        tensors = (t.x, t.mean, t.var, t.weight, t.bias)
        return fastnorm.ghost_batch_norm(*tensors, *options, virtual_batch_size=call.ghosts, **extras), None
    if call.function == "modulated_layer_norm":
        options = (call.normalized_shape, t.scale, t.shift, t.weight, t.bias, call.eps)
        return fastnorm.modulated_layer_norm(t.x, *options, **extras), None
    if call.function == "channels_first_layer_norm":
        return fastnorm.channels_first_layer_norm(t.x, t.weight, t.bias, call.eps, **extras), None
    extras |= {"dropout": call.dropout, "row_scale": t.row_scale, "layer_scale": t.layer_scale, "residual_in_fp32": call.wide}
    extras.pop("residual")
    parameters = (t.weight,) if call.function == "add_rms_norm" else (t.weight, t.bias)
    if call.dropout:
        torch.manual_seed(call.seed)
    return getattr(fastnorm, call.function)(t.x, t.residual, call.normalized_shape, *parameters, call.eps, **extras)


def _module(call, t):
    options = {"activation": call.activation, "channel_axis": 1 if call.axis is None else call.axis}
    options |= {"virtual_batch_size": call.ghosts or None, "recompute": "output" if call.recompute else None}
    options |= {"track_running_stats": t.mean is not None, "momentum": call.momentum, "eps": call.eps, "affine": False}
    norm = getattr(fastnorm, MODULES[t.x.dim()])(t.x.shape[call.channels], **options).train(call.training)
    for name, p in (("weight", t.weight), ("bias", t.bias)):
        delattr(norm, name)
        setattr(norm, name, p)  # no Parameter, which would be another leaf
    if t.mean is not None:
        norm.running_mean, norm.running_var = t.mean, t.var
        norm.num_batches_tracked.fill_(TRACKED)
    return norm


def dropped(call, t):
    """Which elements dropout keeps in a call that has been seeded as `ours` seeds it."""
    torch.manual_seed(call.seed)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,))
    return fastnorm.reference.kept(t.x.numel(), call.dropout, seed).view(t.x.shape)


def torchs(call, t, taken=None):
    """(y, h or None), each step rounded to x's dtype."""
    if call.branched:
        u = t.x if not call.dropout else torch.where(t.kept, t.x / (1 - call.dropout), 0)
        if t.row_scale is not None:
            u = u * t.row_scale.reshape(*t.row_scale.shape, *[1] * (t.x.dim() - t.row_scale.dim()))
        u = u if t.layer_scale is None else u * t.layer_scale
        h = u.to(call.stream) + t.residual.to(call.stream)  # scales may be wider
    else:
        h = t.x + t.residual if call.function.startswith("add_") else None
    z = (taken or _taken)(call, t, t.x if h is None else h)
    z = z if t.residual is None or h is not None else z + t.residual
    name, alpha = call.alpha
    return ACTIVATIONS[name].value(z, alpha).to(t.x.dtype), h


def _taken(call, t, x):
    """The norm in the given dtypes where torch takes them, else of wider ones, rounded once."""
    try:
        return _norm(call, t, x)
    except RuntimeError:
        wide = SimpleNamespace(**vars(t))
        for name in ("weight", "bias", "mean", "var", "scale", "shift"):
            p = getattr(t, name)
            setattr(wide, name, None if p is None else p.to(accumulate(x.dtype)))
        return _norm(call, wide, x.to(accumulate(x.dtype))).to(x.dtype)


def _norm(call, t, x):
    moved = lambda v: v if call.axis is None else v.movedim(call.channels, 1)
    unmoved = lambda v: v if call.axis is None else v.movedim(1, call.channels)
    as_x = lambda p: None if p is None else p.to(x.dtype)
    statistics = [None if s is None else s.clone() for s in (t.mean, t.var)]
    momentum = 1 / (TRACKED + 1) if call.momentum is None else call.momentum
    options = (*statistics, t.weight, t.bias, call.training or t.mean is None, momentum, call.eps)
    if call.kind == "rows" and (t.mask is not None or t.lengths is not None):
        return _masked_rows(call, t, x)
    if call.function in ("layer_norm", "add_layer_norm"):
        return F.layer_norm(x, call.normalized_shape, as_x(t.weight), as_x(t.bias), call.eps)
    if call.function in ("rms_norm", "add_rms_norm"):
        return F.rms_norm(x, call.normalized_shape, as_x(t.weight), call.eps)
    if call.function == "modulated_layer_norm":
        return F.layer_norm(x, call.normalized_shape, t.weight, t.bias, call.eps) * (1 + t.scale) + t.shift
    if call.function == "group_norm":
        return F.group_norm(x, call.groups, t.weight, t.bias, call.eps)
    if call.function == "instance_norm":
        y = F.instance_norm(x, *options)
        if call.running is not None and hasattr(t, "updated"):
            t.updated |= {"running_mean": statistics[0], "running_var": statistics[1]}
        return y
    if call.function == "channels_first_layer_norm":
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], t.weight, t.bias, call.eps).movedim(-1, 1)
    own = call.training or t.mean is None
    if own and (t.mask is not None or t.lengths is not None):
        mask = _positions(call, t, moved(x))
        if not mask.any():
            zeros = x.new_zeros(x.shape[call.channels])
            mean, var = statistics if t.mean is not None else (zeros, zeros + 1)
            return unmoved(F.batch_norm(moved(x), mean, var, t.weight, t.bias, False, 0.0, call.eps))
        return unmoved(written_out(moved(x), mask, t.weight, t.bias, call.eps, x.dtype))
    if call.ghosts and call.training and len(moved(x)) >= 2 * call.ghosts:
        zeros = x.new_zeros(x.shape[call.channels], dtype=accumulate(x.dtype))
        return unmoved(by_parts(moved(x), zeros, zeros, t.weight, t.bias, call.ghosts, 0.0, call.eps)[0])
    return unmoved(F.batch_norm(moved(x), *options))


def _positions(call, t, x):
    """bool, (B, *): where a position counts."""
    mask = t.mask if t.mask is not None else torch.arange(x.shape[2]) < t.lengths[:, None]
    mask = mask if t.mask is not None else mask.view(*mask.shape, *[1] * (x.dim() - 3))
    return mask.expand(x.shape[:1] + x.shape[2:])


def _masked_rows(call, t, x):
    acc, dims = accumulate(x.dtype), tuple(range(x.dim() - call.dims, x.dim()))
    mask = t.mask if t.mask is not None else torch.arange(x.shape[1]) < t.lengths[:, None]
    mask = mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())).expand(x.shape)
    n, wide = mask.sum(dims, keepdim=True), x.to(acc)
    mean = (wide * mask).sum(dims, keepdim=True) / n.clamp(min=1)
    var = torch.where(n > 0, ((wide - mean) * mask).square().sum(dims, keepdim=True) / n.clamp(min=1), 1)
    z = (wide - mean) * torch.rsqrt(var + call.eps)
    z = z if t.weight is None else z * t.weight.to(acc)
    return (z if t.bias is None else z + t.bias.to(acc)).to(x.dtype)


def differentiated(call, t, function):
    """Results by name, and the gradients that the call asks for."""
    y, h = function(call, t)
    results = {"y": y} if h is None else {"y": y, "h": h}
    if leaves := call.leaves(t):
        outputs = [(results[name], g) for name, g in (("y", t.dy), ("h", t.dh)) if name in call.used]
        outputs = [(r, g.to(r.dtype)) for r, g in outputs if r.requires_grad]
        if outputs:
            r, g = zip(*outputs, strict=True)
            found = torch.autograd.grad(r, list(leaves.values()), g, allow_unused=True)
            results |= {f"d{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return results


def in_torch(call, t):
    """Results of torch's operators, as far as it has any."""
    t.updated = {}
    found = outcome(call, t, torchs)
    return t.updated if isinstance(found, tuple) else found | t.updated


def outcome(call, t, function):
    """Results, or what it raises and the first line of what it says."""
    try:
        return differentiated(call, t, function)
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        return type(e), str(e).splitlines()[0]


def of_torch(call, t):
    """The outcome of torch's operators in the given dtypes."""
    return outcome(call, t, lambda call, t: torchs(call, t, _norm))
