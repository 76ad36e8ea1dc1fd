"""`fastnorm.fold(model)`: batch norms of a trained model become part of the layers before them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, parse
from .order import HOOKS, held, option, order
from .sync import FORWARDS

M = TypeVar("M", bound=nn.Module)

NORM_AFTER: dict[type, Any] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


def fold(model: M) -> M:
    r"""A copy of a model for inference, whose batch norms are folded into the layers before them.

    Equivalent to: ``torch.nn.utils.fuse_conv_bn_eval`` and ``fuse_linear_bn_eval`` wherever they apply, with less rounding.

    .. math:: \mathrm{scale} = \mathrm{weight}_{bn} / \sqrt{\mathrm{running\_var} + \mathrm{eps}}, \quad
              \mathrm{weight} \leftarrow \mathrm{weight} \cdot \mathrm{scale}, \quad
              \mathrm{bias} \leftarrow (\mathrm{bias} - \mathrm{running\_mean}) \cdot \mathrm{scale} + \mathrm{bias}_{bn}

    in float64, rounded once to the layer's dtype. Folded is each BatchNorm1d/2d/3d or SyncBatchNorm of torch.nn or fastnorm
    that reads the output of a Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d which nothing else reads. An nn.Identity, or the
    norm's ``activation``, then stands in its place: the names of all other modules, and the keys of the state_dict but for the
    norm's own and a bias that the layer did not have, stay.

    Left alone is a norm in training mode or without running statistics, a layer or norm that is called twice, has hooks, a
    parametrization, a forward of its own or a weight that is no parameter (weight_norm, pruning), and a pair whose folded
    weights would overflow their dtype.

    What is called after what is found by `torch.fx`, for ``model(x)`` with every optional argument at its default. Of a model
    that cannot be traced as a whole, the parts that can are folded; they are taken to be called as wholes.

    Args:
        model: any torch.nn.Module in evaluation mode. A Linear before a BatchNorm1d is taken to read (B, in_features), unless
            ``channel_axis=-1``.

    Returns:
        A deep copy of the model.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `model` is in training mode.

    >>> fold(nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()).eval())
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): Identity()
      (2): ReLU()
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is folded, not an object of type {type(model).__name__}")
    if model.training:
        raise ValueError("batch norms are folded for inference: call model.eval() first")
    folded = copy.deepcopy(model, {id(t): t.detach().clone() for m in model.modules() for t in held(m) if not t.is_leaf})
    with torch.no_grad():
        for layer, norm in _pairs(folded):
            weight, bias = _folded(layer, norm)
            if weight.isfinite().all() and bias.isfinite().all():
                layer.weight, layer.bias = weight, bias
                name, alpha = parse(option(norm, "activation"))
                _become(norm, ACTIVATIONS[name].module(alpha))
    return folded


def _pairs(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(layer, norm) for all that can be folded."""
    found = order(model).calls
    times = Counter(call.module for call in found)
    read = {call.name.rpartition(".")[0] for call in found if call.kind == "parameter"}
    for call in found:
        if not (call.kind == "module" and call.plain and _is_norm(call.module)):
            continue
        (before,) = call.reads
        if len(before.readers) > 1 or not _fits(before.module, call.module):
            continue
        if times[before.module] == times[call.module] == 1 and not {before.name, call.name} & read:
            yield before.module, call.module


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of it is its class's forward, and nobody watches."""
    watched = any(getattr(module, hooks) for hooks in HOOKS)
    return not (watched or "forward" in vars(module) or module._modules)


def _is_norm(module: nn.Module | None) -> bool:
    if not (isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).forward in FORWARDS):
        return False
    own = (module.training and not option(module, "frozen")) or module.running_mean is None or module.running_var is None
    return _is_plain(module) and not own


def _kind(module: Any) -> type | None:
    """Which of the layers it is, or None."""
    cls = next((c for c in type(module).__mro__ if c in NORM_AFTER), None)
    if cls is None or any(getattr(type(module), f, None) is not getattr(cls, f, None) for f in ("forward", "_conv_forward")):
        return None
    plain = type(module.weight) is nn.Parameter and type(module.bias) in (nn.Parameter, type(None)) and _is_plain(module)
    return cls if plain else None


def _fits(layer: Any, norm: Any) -> bool:
    kind = _kind(layer)
    if kind is None or not isinstance(norm, (NORM_AFTER[kind], nn.SyncBatchNorm)):
        return False
    axis = option(norm, "channel_axis")
    if kind is nn.Linear:
        return axis in (1, -1) and norm.num_features == layer.out_features
    return axis == 1 and norm.num_features == layer.out_channels


def _folded(layer: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The layer's new weight and bias."""
    wide = lambda t: t.detach().to("cpu", torch.float64)  # not every device has float64
    scale = 1 / (wide(norm.running_var) + norm.eps).sqrt()
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    bias = -wide(norm.running_mean) if layer.bias is None else wide(layer.bias) - wide(norm.running_mean)
    bias = bias * scale if norm.bias is None else bias * scale + wide(norm.bias)
    weight = wide(layer.weight)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out / groups, *), and the groups share dim 0
        weight = weight.unflatten(0, (layer.groups, -1)) * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = weight.flatten(0, 1)
    else:  # (out, in / groups, *)
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return _parameter(weight, layer.weight), _parameter(bias, layer.weight if layer.bias is None else layer.bias)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """`value` with the device, dtype and, where the shape is the same, strides of `like`."""
    new = torch.empty_like(like) if like.shape == value.shape else like.new_empty(value.shape)
    return nn.Parameter(new.copy_(_rounded(value, like.dtype)), like.requires_grad)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded once. torch rounds to 16 bits by way of float32, where a value just off a tie can become the tie.

    So float32 is rounded to odd first: towards zero, and the last bit of what is inexact is 1. It has more than twice the
    bits of a 16-bit type, and the rest is then rounded as the value itself would be.
    """
    if dtype.itemsize > 2:
        return value.to(dtype)
    near = value.float()
    bits = near.view(torch.int32)
    bits = torch.where(near.double().abs() > value.abs(), bits - 1, bits)
    bits = torch.where(near.double() == value, bits, bits | 1)
    return bits.view(torch.float32).to(dtype)


def _become(norm: nn.Module, module: nn.Module) -> None:
    """The object stays, because lists and attributes may hold it beside the module tree."""
    norm.__class__ = type(module)
    vars(norm).clear()
    vars(norm).update(vars(module.eval()))
