"""Drop-in modules: subclasses of torch.nn's, so constructor, repr, parameters, buffers and state_dict are torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.types import Device

from . import channels_first, functional, ghost, group, instance, masked
from . import recompute as anew
from .activations import Activation
from .geometry import around
from .options import (
    BatchNormMixin,
    InstanceNormMixin,
    Mixin,
    Options,
    TorchGroupNorm,
    TorchLayerNorm,
    TorchRMSNorm,
    affine_of,
    with_options,
)
from .reference import accumulate_dtype
from .tracing import Scriptable, given, leaf


def _statistics(module: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """running_mean, running_var, num_batches_tracked, by the same short way."""
    buffers = module._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        return module.running_mean, module.running_var, module.num_batches_tracked


def _batch_norm(module: Any, input: Tensor, training: bool, mask: Tensor | None = None, **extras: Any) -> Tensor:
    (weight, bias), (mean, var, tracked) = affine_of(module), _statistics(module)
    if not training:
        tracked = None
    elif not module.track_running_stats:
        mean = var = tracked = None
    if mask is not None and (training or mean is None):
        momentum = module.momentum or (None if module.momentum is None and tracked is not None else 0.0)
        extras |= {"num_batches_tracked": tracked}
        return masked.batch_norm(input, mask, mean, var, weight, bias, momentum, module.eps, **extras)
    if tracked is not None and module.momentum is None:
        return functional.cumulative_batch_norm(input, mean, var, weight, bias, tracked, module.eps, **extras)
    momentum = 0.0 if module.momentum is None else module.momentum
    if tracked is not None:
        return functional.counting_batch_norm(input, mean, var, weight, bias, tracked, momentum, module.eps, **extras)
    own_statistics = training or (mean is None and var is None)
    return functional.batch_norm(input, mean, var, weight, bias, own_statistics, momentum, module.eps, **extras)


def _ghost_batch_norm(module: Any, input: Tensor, residual: Tensor | None) -> Tensor:
    """A step of training."""
    statistics = _statistics(module) if module.track_running_stats else (None, None, None)
    momentum, eps, ending = module.momentum, module.eps, (module.activation, residual)
    ghosts = (module.virtual_batch_size, module.channel_axis)
    return ghost.training_batch_norm(input, *statistics, *affine_of(module), momentum, eps, *ghosts, *ending)


def layer_norm_forward(self: torch.nn.LayerNorm, input: Tensor) -> Tensor:
    """torch.nn.LayerNorm's forward, for a module of that very class."""
    weight, bias = affine_of(self)
    return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def batch_norm_forward(self: Any, input: Tensor) -> Tensor:
    """The forward of torch.nn.BatchNorm1d, 2d and 3d, for a module of that very class."""
    self._check_input_dim(input)
    return _batch_norm(self, input, self.training)


@with_options("activation", "recompute")
class LayerNorm(Options, Scriptable, TorchLayerNorm):
    """Layer normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias, device, dtype)``; ``norm(x, residual)``
    with an activation is ``activation(norm(x) + residual)``

    Shape: ``(*, *normalized_shape)`` to the same, in the input's dtype. See `fastnorm.functional.layer_norm` for the formula,
    the activations, the dtypes and the errors, and for ``recompute="output"``: backward keeps the output and not the input.

    >>> norm = LayerNorm(4, activation="relu")
    >>> norm(torch.tensor([[1.0, 2.0, 4.0, 5.0]])).detach()
    tensor([[0.0000, 0.0000, 0.6325, 1.2649]])
    """

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        if isinstance(input, Proxy):
            if (node := leaf(self, input, residual, mask=mask, lengths=lengths)) is not None:
                return node
            residual, mask, lengths = (given(self, t) for t in (residual, mask, lengths))
        weight, bias = affine_of(self)
        if residual is None and self.activation is None and mask is None and lengths is None and self.recompute is None:
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        extras: dict[str, Any] = {"activation": self.activation, "residual": residual, "mask": mask, "lengths": lengths}
        extras["recompute"] = self.recompute
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps, **extras)


class _Branch(Mixin):
    """What happens to the branch of a pre-norm on its way onto the stream."""

    addend = True
    normalized_shape: tuple[int, ...]
    activation: Activation | None
    layer_scale: torch.nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        residual_in_fp32: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, p in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= p <= 1:
                raise ValueError(f"{name} probability has to be between 0 and 1, but got {p}")
        super().__init__(*args, **kwargs)
        self.dropout, self.drop_path, self.residual_in_fp32 = dropout, drop_path, residual_in_fp32
        factory: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        scale = None if layer_scale is None else torch.full(self.normalized_shape, float(layer_scale), **factory)
        self.register_parameter("layer_scale", None if scale is None else torch.nn.Parameter(scale))

    def extra_repr(self) -> str:
        given = {"dropout": self.dropout, "drop_path": self.drop_path, "residual_in_fp32": self.residual_in_fp32}
        given["layer_scale"] = self.layer_scale is not None
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in given.items() if value)])

    def _extras(self, input: Tensor) -> dict[str, Any]:
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

    >>> norm = AddLayerNorm(2, layer_scale=0.5)
    >>> y, h = norm(torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 5.0]]))
    >>> y.detach(), h.detach()
    (tensor([[-1.0000,  1.0000]]), tensor([[3., 7.]]))
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            normalized_shape: int | Sequence[int],
            eps: float = 1e-5,
            elementwise_affine: bool = True,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dropout: float = 0.0,
            drop_path: float = 0.0,
            layer_scale: float | None = None,
            residual_in_fp32: bool = False,
            activation: Activation | None = None,
        ) -> None: ...

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight, bias = affine_of(self)
        extras = self._extras(input)
        return functional.add_layer_norm(input, residual, self.normalized_shape, weight, bias, self.eps, **extras)


@with_options("zero_centred", "activation", "recompute")
class RMSNorm(Options, Scriptable, TorchRMSNorm):
    """Root mean square normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.RMSNorm(normalized_shape, eps, elementwise_affine, device, dtype)``

    Args:
        zero_centred: the factor is ``1 + weight``, and weight starts at 0 (Gemma): weight decay pulls the factor to 1.

    Shape: ``(*, *normalized_shape)`` to the same. See `fastnorm.functional.rms_norm` for the formula, the dtypes and the
    errors, and `LayerNorm` for activation, residual and recompute.

    >>> norm = RMSNorm(4, zero_centred=True)
    >>> norm.weight.detach(), norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]])).detach()
    (tensor([0., 0., 0., 0.]), tensor([[1.2000, 1.6000, 0.0000, 0.0000]]))
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.elementwise_affine and self.zero_centred:
            torch.nn.init.zeros_(self.weight)

    def _factor(self) -> Tensor | None:
        return self.weight + 1 if self.zero_centred and self.weight is not None else self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # torch.nn's name for it
        if isinstance(x, Proxy):
            if (node := leaf(self, x, residual)) is not None:
                return node
            residual = given(self, residual)
        extras: dict[str, Any] = {"activation": self.activation, "residual": residual, "recompute": self.recompute}
        return functional.rms_norm(x, self.normalized_shape, self._factor(), self.eps, **extras)


class AddRMSNorm(_Branch, RMSNorm):
    """`RMSNorm` of a sum, which it returns as well: ``y, h = norm(branch, stream)``.

    Equivalent to: ``h = dropout(branch) * path * layer_scale + stream; y = activation(torch.nn.RMSNorm(...)(h))``; see
    `fastnorm.functional.add_rms_norm`, and `AddLayerNorm` for the options of the branch.

    >>> y, h = AddRMSNorm(2)(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    >>> y.detach(), h
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            normalized_shape: int | Sequence[int],
            eps: float | None = None,
            elementwise_affine: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dropout: float = 0.0,
            drop_path: float = 0.0,
            layer_scale: float | None = None,
            residual_in_fp32: bool = False,
            zero_centred: bool = False,
            activation: Activation | None = None,
        ) -> None: ...

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        extras = self._extras(input)
        return functional.add_rms_norm(input, residual, self.normalized_shape, self._factor(), self.eps, **extras)


class ModulatedLayerNorm(LayerNorm):
    """`LayerNorm` with a scale and a shift for each sample, ``norm(x, scale, shift)``: adaLN of diffusion transformers.

    Equivalent to: ``activation(torch.nn.LayerNorm(...)(x) * (1 + scale) + shift)``; see
    `fastnorm.functional.modulated_layer_norm`.

    >>> scale, shift = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 10.0]])
    >>> ModulatedLayerNorm(2, elementwise_affine=False)(torch.tensor([[3.0, 7.0]]), scale, shift)
    tensor([[-2.0000, 12.0000]])
    """

    modulated = True

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        weight, bias = affine_of(self)
        arguments = (input, self.normalized_shape, scale, shift, weight, bias, self.eps)
        return functional.modulated_layer_norm(*arguments, activation=self.activation)


class LayerNorm2d(LayerNorm):
    """`LayerNorm` over the channels of ``(B, C, *)`` inputs, ConvNeXt's; on a CPU nothing is permuted for it.

    Equivalent to: ``torch.nn.LayerNorm(C)(x.movedim(1, -1)).movedim(-1, 1)``, and the activation after it; see
    `fastnorm.channels_first_layer_norm`. The constructor is torch.nn.LayerNorm's.

    Raises:
        ValueError: normalized_shape has more than one dimension.

    >>> x = torch.randn(2, 3, 4, 4)
    >>> torch.allclose(LayerNorm2d(3)(x), torch.nn.LayerNorm(3)(x.movedim(1, -1)).movedim(-1, 1), atol=1e-6)
    True
    """

    channels_first = True

    def __init__(self, normalized_shape: int | Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"expected normalized_shape to be the number of channels, got {self.normalized_shape}")

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        if input.dim() > 1 and input.shape[1] != self.normalized_shape[0]:
            raise ValueError(f"expected {self.normalized_shape[0]} channels in dim 1, got an input of {tuple(input.shape)}")
        weight, bias = affine_of(self)
        return channels_first.channels_first_layer_norm(input, weight, bias, self.eps, activation=self.activation)


@with_options("activation")
class GroupNorm(Options, Scriptable, TorchGroupNorm):
    """Group normalization of ``(B, C, *)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.GroupNorm(num_groups, num_channels, eps, affine, device, dtype)``, and the activation after it;
    see `fastnorm.group_norm`.

    >>> GroupNorm(2, 4, activation="relu")(torch.tensor([[[1.0], [3.0], [4.0], [8.0]]])).detach().flatten()
    tensor([0.0000, 1.0000, 0.0000, 1.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        weight, bias = affine_of(self)
        return group.group_norm(input, self.num_groups, weight, bias, self.eps, activation=self.activation)


class _InstanceNorm(Scriptable, InstanceNormMixin):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        own_statistics = self.training or not self.track_running_stats
        (weight, bias), momentum = affine_of(self), self.momentum if self.momentum is not None else 0.0
        options = (own_statistics, momentum, self.eps)
        return instance.instance_norm(input, self.running_mean, self.running_var, weight, bias, *options)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """Instance normalization of ``(B, C, L)`` or ``(C, L)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.InstanceNorm1d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``; see
    `fastnorm.instance_norm` for the formula, the dtypes and the errors.

    >>> x = torch.arange(6.0).reshape(1, 3, 2)
    >>> InstanceNorm1d(3)(x)[0, 0].flatten()
    tensor([-1.0000,  1.0000])
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Instance normalization of ``(B, C, H, W)`` or ``(C, H, W)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.InstanceNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``; see
    `fastnorm.instance_norm` for the formula, the dtypes and the errors.

    >>> x = torch.arange(12.0).reshape(1, 3, 2, 2)
    >>> InstanceNorm2d(3)(x)[0, 0].flatten()
    tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Instance normalization of ``(B, C, D, H, W)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.InstanceNorm3d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``; see
    `fastnorm.instance_norm` for the formula, the dtypes and the errors.

    >>> x = torch.arange(24.0).reshape(1, 3, 2, 2, 2)
    >>> InstanceNorm3d(3)(x)[0, 0].flatten()
    tensor([-1.5275, -1.0911, -0.6547, -0.2182,  0.2182,  0.6547,  1.0911,  1.5275])
    """


class _BatchNorm(Options, Scriptable, BatchNormMixin):
    """torch.nn._BatchNorm.forward on fused kernels; a call that raises leaves num_batches_tracked as it was, too."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        if isinstance(input, Proxy):
            if (node := leaf(self, input, residual, mask=mask, lengths=lengths)) is not None:
                return node
            residual, mask, lengths = (given(self, t) for t in (residual, mask, lengths))
        self._check_input_dim(input)
        training = self.training and not self.frozen
        extras: dict[str, Any] = {}
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


@with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``(B, C)`` or ``(B, C, L)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.

    >>> norm = BatchNorm1d(2, momentum=1.0, activation="relu")
    >>> norm(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).detach(), norm.running_mean
    (tensor([[0.0000, 0.0000],
            [1.0000, 1.0000]]), tensor([2., 2.]))
    """


@with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``(B, C, H, W)`` inputs, contiguous or channels_last, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.

    >>> norm, x = BatchNorm2d(3, channel_axis=-1), torch.randn(2, 4, 4, 3)
    >>> torch.allclose(norm(x), torch.nn.BatchNorm2d(3)(x.movedim(-1, 1)).movedim(1, -1), atol=1e-6)
    True
    """


@with_options("activation", "channel_axis", "frozen", "virtual_batch_size", "recompute")
class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``(B, C, D, H, W)`` inputs, contiguous or channels_last_3d, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm3d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the activations, the dtypes and the errors, and `LayerNorm` for
    activation and residual; ``norm(x, mask=mask)`` or ``norm(x, lengths=lengths)`` leaves values out of the statistics;
    ``momentum=None`` averages over all batches. ``channel_axis=-1``: the channels are the last
    dimension, and nothing is moved for it. ``frozen=True``: in training, too, the running statistics normalise and stay as
    they are, while weight and bias learn. ``virtual_batch_size=n``: in training, statistics are those of ghost batches of n
    samples, see `fastnorm.ghost_batch_norm`. ``recompute="output"``: backward keeps the output and not the input.

    >>> norm, x = BatchNorm3d(3, frozen=True), torch.randn(2, 3, 4, 4, 4)
    >>> torch.allclose(norm(x), torch.nn.BatchNorm3d(3).eval()(x), atol=1e-6)
    True
    """
