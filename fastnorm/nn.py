"""Drop-in modules: subclasses of torch.nn's, so constructor, repr, parameters, buffers and state_dict are torch's own."""

from __future__ import annotations

import functools
import inspect

import torch
from torch.fx import Proxy

from . import activations, channels_first, functional, ghost, group, instance, masked
from . import recompute as anew
from .geometry import around
from .reference import accumulate_dtype
from .tracing import OPTIONS, Scriptable, extras, given, leaf

KINDS = ("addend", "modulated", "channels_first")  # what a forward of its own makes of a LayerNorm or RMSNorm


def _with_options(*names):
    """A class decorator: torch.nn's constructor with keyword-only options, which become attributes; the class has defaults."""

    def decorate(cls):
        theirs = cls.__init__
        signature = inspect.signature(theirs)
        keyword = lambda name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(cls, name))

        @functools.wraps(theirs)
        def __init__(self, *args, **kwargs):
            given = {name: kwargs.pop(name) for name in names if name in kwargs}
            activations.parse(given.get("activation"))
            if given.get("virtual_batch_size") is not None:
                ghost.check(given["virtual_batch_size"])
            if given.get("recompute") is not None:
                if any(getattr(self, kind, False) for kind in KINDS):
                    raise ValueError(f"{type(self).__name__} keeps its input: it has no recompute={given['recompute']!r}")
                anew.check(given["recompute"], given.get("activation"), virtual_batch_size=given.get("virtual_batch_size"))
            for name, value in given.items():  # before torch's constructor resets the parameters, which may depend on them
                object.__setattr__(self, name, value)
            theirs(self, *args, **kwargs)

        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *map(keyword, names)])
        cls.__init__ = __init__
        return cls

    return decorate


class _Options:
    """Options that torch.nn's classes do not have, and how they are shown."""

    activation = OPTIONS["activation"]
    zero_centred = OPTIONS["zero_centred"]
    channel_axis = OPTIONS["channel_axis"]
    frozen = OPTIONS["frozen"]
    virtual_batch_size = OPTIONS["virtual_batch_size"]
    recompute = OPTIONS["recompute"]

    def extra_repr(self):
        given = [f"{name}={getattr(self, name)!r}" for name in extras(self) if name in vars(self)]
        return ", ".join([super().extra_repr(), *given])


def _affine(module):
    """weight, bias. `Module.__getattr__` costs 0.8 us for each; it is for what is no plain parameter (parametrized, pruned)."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return module.weight, module.bias


def _statistics(module):
    """running_mean, running_var, num_batches_tracked, by the same short way."""
    buffers = module._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        return module.running_mean, module.running_var, module.num_batches_tracked


def _batch_norm(module, input, training, mask=None, **extras):
    (weight, bias), (mean, var, tracked) = _affine(module), _statistics(module)
    if not training:
        tracked = None
    elif not module.track_running_stats:
        mean = var = tracked = None
    if mask is not None and (training or mean is None):
        momentum = module.momentum or (None if module.momentum is None and tracked is not None else 0.0)
        options = (momentum, module.eps, *extras.values())
        return masked.batch_norm(input, mask, mean, var, weight, bias, *options, num_batches_tracked=tracked)
    if tracked is not None and module.momentum is None:
        return functional.cumulative_batch_norm(input, mean, var, weight, bias, tracked, module.eps, **extras)
    momentum = 0.0 if module.momentum is None else module.momentum
    if tracked is not None:
        return functional.counting_batch_norm(input, mean, var, weight, bias, tracked, momentum, module.eps, **extras)
    own_statistics = training or (mean is None and var is None)
    return functional.batch_norm(input, mean, var, weight, bias, own_statistics, momentum, module.eps, **extras)


def _ghost_batch_norm(module, input, residual):
    """A step of training."""
    statistics = _statistics(module) if module.track_running_stats else (None, None, None)
    options = (module.momentum, module.eps, module.virtual_batch_size, module.channel_axis, module.activation, residual)
    return ghost.training_batch_norm(input, *statistics, *_affine(module), *options)


def layer_norm_forward(self, input):
    """torch.nn.LayerNorm's forward, for a module of that very class."""
    weight, bias = _affine(self)
    return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def batch_norm_forward(self, input):
    """The forward of torch.nn.BatchNorm1d, 2d and 3d, for a module of that very class."""
    self._check_input_dim(input)
    return _batch_norm(self, input, self.training)


@_with_options("activation", "recompute")
class LayerNorm(_Options, Scriptable, torch.nn.LayerNorm):
    """Layer normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias, device, dtype)``; ``norm(x, residual)``
    with an activation is ``activation(norm(x) + residual)``

    Shape: ``(*, *normalized_shape)`` to the same, in the input's dtype. See `fastnorm.functional.layer_norm` for the formula,
    the activations, the dtypes and the errors, and for ``recompute="output"``: backward keeps the output and not the input.
    """

    def forward(self, input, residual=None, mask=None, lengths=None):
        if isinstance(input, Proxy):
            if (node := leaf(self, input, residual, mask=mask, lengths=lengths)) is not None:
                return node
            residual, mask, lengths = (given(self, t) for t in (residual, mask, lengths))
        weight, bias = _affine(self)
        if residual is None and self.activation is None and mask is None and lengths is None and self.recompute is None:
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        extras = {"activation": self.activation, "residual": residual, "mask": mask, "lengths": lengths}
        extras["recompute"] = self.recompute
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps, **extras)


class _Branch:
    """What happens to the branch of a pre-norm on its way onto the stream."""

    addend = True

    def __init__(self, *args, dropout=0.0, drop_path=0.0, layer_scale=None, residual_in_fp32=False, **kwargs):
        for name, p in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= p <= 1:
                raise ValueError(f"{name} probability has to be between 0 and 1, but got {p}")
        super().__init__(*args, **kwargs)
        self.dropout, self.drop_path, self.residual_in_fp32 = dropout, drop_path, residual_in_fp32
        factory = {name: kwargs.get(name) for name in ("device", "dtype")}
        scale = None if layer_scale is None else torch.full(self.normalized_shape, float(layer_scale), **factory)
        self.register_parameter("layer_scale", None if scale is None else torch.nn.Parameter(scale))

    def extra_repr(self):
        given = {"dropout": self.dropout, "drop_path": self.drop_path, "residual_in_fp32": self.residual_in_fp32}
        given["layer_scale"] = self.layer_scale is not None
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in given.items() if value)])

    def _extras(self, input):
        row_scale = None
        if self.training and self.drop_path > 0:
            row_scale = input.new_empty(input.shape[:1], dtype=accumulate_dtype(input.dtype)).bernoulli_(1 - self.drop_path)
            row_scale = row_scale / max(1 - self.drop_path, torch.finfo(row_scale.dtype).tiny)
        return {
            "activation": self.activation,
            "dropout": self.dropout if self.training else 0.0,
            "row_scale": row_scale,
            "layer_scale": self.layer_scale,
            "residual_in_fp32": self.residual_in_fp32,
        }


class AddLayerNorm(_Branch, LayerNorm):
    """`LayerNorm` of a sum, which it returns as well: ``y, h = norm(branch, stream)``, the pre-norm of a transformer's block.

    Equivalent to: ``h = dropout(branch) * path * layer_scale + stream; y = activation(torch.nn.LayerNorm(...)(h))``; see
    `fastnorm.functional.add_layer_norm`.

    Args:
        dropout: the probability with which an element of the branch is zeroed in training, as torch.nn.Dropout's.
        drop_path: the probability with which a sample's branch is left out in training (stochastic depth; Huang et al., 2016);
            the others are divided by ``1 - drop_path``.
        layer_scale: what the parameter `layer_scale`, of normalized_shape, begins with; None for no such parameter.
        residual_in_fp32: h is float32 where the branch is a half type.

    Raises:
        ValueError: a probability is none.
    """

    def forward(self, input, residual):
        weight, bias = _affine(self)
        extras = self._extras(input)
        return functional.add_layer_norm(input, residual, self.normalized_shape, weight, bias, self.eps, **extras)


@_with_options("zero_centred", "activation", "recompute")
class RMSNorm(_Options, Scriptable, torch.nn.RMSNorm):
    """Root mean square normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.RMSNorm(normalized_shape, eps, elementwise_affine, device, dtype)``

    Args:
        zero_centred: the factor is ``1 + weight``, and weight starts at 0 (Gemma): weight decay pulls the factor to 1.

    See `fastnorm.functional.rms_norm` for the formula, the dtypes and the errors, and `LayerNorm` for activation, residual and
    recompute.
    """

    def reset_parameters(self):
        super().reset_parameters()
        if self.elementwise_affine and self.zero_centred:
            torch.nn.init.zeros_(self.weight)

    def _factor(self):
        return self.weight + 1 if self.zero_centred and self.weight is not None else self.weight

    def forward(self, x, residual=None):  # torch.nn's name for it
        if isinstance(x, Proxy):
            if (node := leaf(self, x, residual)) is not None:
                return node
            residual = given(self, residual)
        extras = {"activation": self.activation, "residual": residual, "recompute": self.recompute}
        return functional.rms_norm(x, self.normalized_shape, self._factor(), self.eps, **extras)


class AddRMSNorm(_Branch, RMSNorm):
    """`RMSNorm` of a sum, which it returns as well: ``y, h = norm(branch, stream)``. See `fastnorm.functional.add_rms_norm`,
    and `AddLayerNorm` for the options of the branch."""

    def forward(self, input, residual):
        extras = self._extras(input)
        return functional.add_rms_norm(input, residual, self.normalized_shape, self._factor(), self.eps, **extras)


class ModulatedLayerNorm(LayerNorm):
    """`LayerNorm` with a scale and a shift for each sample, ``norm(x, scale, shift)``: adaLN of diffusion transformers.

    Equivalent to: ``activation(torch.nn.LayerNorm(...)(x) * (1 + scale) + shift)``; see
    `fastnorm.functional.modulated_layer_norm`.
    """

    modulated = True

    def forward(self, input, scale, shift):
        options, extras = (*_affine(self), self.eps), {"activation": self.activation}
        return functional.modulated_layer_norm(input, self.normalized_shape, scale, shift, *options, **extras)


class LayerNorm2d(LayerNorm):
    """`LayerNorm` over the channels of ``(B, C, *)`` inputs, ConvNeXt's; on a CPU nothing is permuted for it.

    Equivalent to: ``torch.nn.LayerNorm(C)(x.movedim(1, -1)).movedim(-1, 1)``, and the activation after it; see
    `fastnorm.channels_first_layer_norm`. The constructor is torch.nn.LayerNorm's.

    Raises:
        ValueError: normalized_shape has more than one dimension.
    """

    channels_first = True

    def __init__(self, normalized_shape, *args, **kwargs):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"expected normalized_shape to be the number of channels, got {self.normalized_shape}")

    def forward(self, input):
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        if input.dim() > 1 and input.shape[1] != self.normalized_shape[0]:
            raise ValueError(f"expected {self.normalized_shape[0]} channels in dim 1, got an input of {tuple(input.shape)}")
        return channels_first.channels_first_layer_norm(input, *_affine(self), self.eps, activation=self.activation)


@_with_options("activation")
class GroupNorm(_Options, Scriptable, torch.nn.GroupNorm):
    """Group normalization of ``(B, C, *)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.GroupNorm(num_groups, num_channels, eps, affine, device, dtype)``, and the activation after it;
    see `fastnorm.group_norm`.
    """

    def forward(self, input):
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        return group.group_norm(input, self.num_groups, *_affine(self), self.eps, activation=self.activation)


class _InstanceNorm(Scriptable):
    def forward(self, input):
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        return super().forward(input)

    def _apply_instance_norm(self, input):
        own_statistics = self.training or not self.track_running_stats
        options = (own_statistics, self.momentum if self.momentum is not None else 0.0, self.eps)
        return instance.instance_norm(input, self.running_mean, self.running_var, *_affine(self), *options)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """Instance normalization of ``(B, C, L)`` or ``(C, L)`` inputs, on fused kernels; as torch.nn.InstanceNorm1d."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Instance normalization of ``(B, C, H, W)`` or ``(C, H, W)`` inputs, on fused kernels; as torch.nn.InstanceNorm2d."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Instance normalization of ``(B, C, D, H, W)`` inputs, on fused kernels; as torch.nn.InstanceNorm3d."""


class _BatchNorm(_Options, Scriptable):
    """torch.nn._BatchNorm.forward on fused kernels; a call that raises leaves num_batches_tracked as it was, too."""

    def forward(self, input, residual=None, mask=None, lengths=None):
        if isinstance(input, Proxy):
            if (node := leaf(self, input, residual, mask=mask, lengths=lengths)) is not None:
                return node
            residual, mask, lengths = (given(self, t) for t in (residual, mask, lengths))
        self._check_input_dim(input)
        training, extras = self.training and not self.frozen, {}
        if residual is not None or self.activation is not None:
            extras = {"activation": self.activation, "residual": residual}
        if self.recompute is not None:
            others = {"mask": mask, "lengths": lengths, "virtual_batch_size": self.virtual_batch_size}
            anew.check(self.recompute, self.activation, **others)
            extras["recompute"] = self.recompute
        if mask is not None or lengths is not None:
            if self.virtual_batch_size is not None:
                raise ValueError("virtual_batch_size knows no masks and no lengths")
            extras["mask"] = masked.mask_beside(input, mask, lengths, self.channel_axis)
        if training and self.virtual_batch_size is not None:
            return _ghost_batch_norm(self, input, residual)
        if self.channel_axis == 1:
            return _batch_norm(self, input, training, **extras)
        shape = around(input.shape, self.channel_axis)
        if residual is not None:
            extras["residual"] = residual.reshape(shape)
        return _batch_norm(self, input.reshape(shape), training, **extras).view(input.shape)


@_with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``(B, C)`` or ``(B, C, L)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.
    """


@_with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``(B, C, H, W)`` inputs, contiguous or channels_last, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.
    """


@_with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``(B, C, D, H, W)`` inputs, contiguous or channels_last_3d, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm3d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.
    """
