"""`fastnorm.from_keras(layer)`: Keras's normalization layers as torch modules with Keras's rules. Keras itself is not imported.

What Keras does otherwise than torch.nn: the channels of a batch norm are any axis, its moving variance is made of the biased
variances, its momentum is the weight of the old statistics, one value per channel is no error, a mask leaves positions out of
the statistics, and ``trainable=False`` stands for evaluation; a layer norm is over any axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional, masked
from .geometry import around
from .reference import accumulate_dtype, affine, update_running

NOT_COPIED = ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")


class KerasBatchNorm(torch.nn.Module):
    """Batch normalization as ``keras.layers.BatchNormalization``, on fused kernels; what `from_keras` makes of one.

    Equivalent to: ``layer(input, training=norm.training, mask=mask)``, in the input's dtype

    Attributes:
        axis: the channels' dimension.
        momentum: the weight of the old statistics, as in Keras.
        eps: added to the variance.
        frozen: the layer was not trainable: the running statistics normalise, and stay, in training as well.
        weight, bias: ``(C,)`` or None, Keras's gamma and beta.
        running_mean, running_var: ``(C,)``, Keras's moving_mean and moving_variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        axis: int,
        momentum: float,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.axis, self.momentum, self.eps, self.frozen = axis, momentum, eps, frozen
        self.weight, self.bias = (_parameter(t, not frozen) for t in (weight, bias))
        self.register_buffer("running_mean", running_mean)
        self.register_buffer("running_var", running_var)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """The norm of `input`, of any shape with C at `axis`.

        In training, `mask`, of input's shape without the last dimension, is True where values are to count. All are normalised.

        Raises:
            ValueError: `mask` has another number of dimensions.
        """
        if mask is not None and mask.dim() != input.dim() - 1:
            raise ValueError(f"a mask has one dimension less than the input: {input.dim() - 1}, not {mask.dim()}")
        training, C = self.training and not self.frozen, len(self.running_mean)
        count = input.numel() // C
        if training and (mask is not None or count < 2):  # one value per channel is an error in torch
            return self._masked(input, mask)
        x = input.reshape(around(input.shape, self.axis))
        if not training:
            y = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return y.view(input.shape)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = functional.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        self._update(mean, var * ((count - 1) / count))  # torch's is the unbiased one
        return y.view(input.shape)

    def _masked(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Where nothing counts, mean and variance are 0, as in Keras. By torch's operators where a mask knows channels."""
        if mask is not None and range(x.dim())[self.axis] == x.dim() - 1:
            nothing = torch.zeros_like(self.running_mean)
            given = (mask.bool().expand(x.shape[:-1]).reshape(-1), (nothing, nothing), self.weight, self.bias, self.eps)
            y, _, mean, var = masked.normalize(x.reshape(around(x.shape, self.axis)), *given)
            self._update(mean, var)
            return y.view(x.shape)
        dims = [d for d in range(x.dim()) if d != range(x.dim())[self.axis]]
        counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().unsqueeze(-1).expand_as(x)
        xf = x.to(accumulate_dtype(x.dtype))
        n = counts.sum(dims, keepdim=True).clamp(min=1)
        mean = torch.where(counts, xf, 0).sum(dims, keepdim=True) / n
        var = torch.where(counts, xf - mean, 0).square().sum(dims, keepdim=True) / n
        weight, bias = (None if p is None else p.view(mean.shape) for p in (self.weight, self.bias))
        self._update(mean.flatten(), var.flatten())
        return affine((xf - mean) * torch.rsqrt(var + self.eps), weight, bias).to(x.dtype)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        with torch.no_grad():
            update_running(self.running_mean, mean, 1 - self.momentum)
            update_running(self.running_var, var, 1 - self.momentum)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, axis={self.axis}, momentum={self.momentum}, eps={self.eps}, frozen={self.frozen}"


class KerasLayerNorm(torch.nn.Module):
    """Layer normalization as ``keras.layers.LayerNormalization``, on fused kernels; what `from_keras` makes of one.

    Equivalent to: ``layer(input)``, in the input's dtype; over axes where Keras's torch backend fails as well

    Attributes:
        axis: the dimensions that are normalised.
        eps: added to the variance.
        rms_scaling: ``input * rstd * weight`` instead, with the rstd about the mean (deprecated in Keras).
        weight, bias: of the shape of those dimensions, or None: Keras's gamma and beta.
    """

    def __init__(
        self, axis: Sequence[int], eps: float, weight: Tensor | None, bias: Tensor | None, rms_scaling: bool = False
    ) -> None:
        super().__init__()
        self.axis, self.eps, self.rms_scaling = tuple(axis), eps, rms_scaling
        self.weight, self.bias = (_parameter(t, True) for t in (weight, bias))

    def forward(self, input: Tensor) -> Tensor:
        """The norm of `input`, of any number of dimensions that has `axis`."""
        dims = sorted(range(input.dim())[a] for a in self.axis)
        shape = [input.shape[d] for d in dims]
        # Keras lays out what it has for axes (1, -1) as if the dimensions were in ascending order.
        weight, bias = (None if p is None else p.reshape(shape) for p in (self.weight, self.bias))
        last = list(range(input.dim() - len(dims), input.dim()))
        x = input.movedim(dims, last)
        if self.rms_scaling:
            xf = x.to(accumulate_dtype(x.dtype))
            y = affine(xf * torch.rsqrt(xf.var(last, correction=0, keepdim=True) + self.eps), weight, None).to(x.dtype)
        else:
            y = functional.layer_norm(x, shape, weight, bias, self.eps)
        return y.movedim(last, dims)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, eps={self.eps}" + (", rms_scaling=True" if self.rms_scaling else "")


def from_keras(layer: Any) -> KerasBatchNorm | KerasLayerNorm:
    """A Keras normalization layer as a torch module: its configuration, its weights and its rules.

    Equivalent to: the layer itself on Keras's torch backend, in the input's dtype; from any of Keras's backends.

    ==================  ========================================================================================
    BatchNormalization  any ``axis``, ``momentum``, ``epsilon``, ``center``, ``scale``, moving statistics (of the
                        biased variance), ``trainable=False`` (evaluation, and parameters that do not learn);
                        ``norm(x, mask)``
    LayerNormalization  any ``axis`` or axes, ``epsilon``, ``center``, ``scale``, ``rms_scaling``
    ==================  ========================================================================================

    Modes are torch's: the module is in training mode until ``eval()``. Regularizers and constraints are not copied, and a
    warning says so. Keras adds 1e-7 to the number of values of a masked batch; here nothing at all counts as one value.

    Args:
        layer: a built layer of Keras 3, or of a subclass without a ``call`` of its own.

    Returns:
        A `KerasBatchNorm` or a `KerasLayerNorm`, whose tensors are copies, in the layer's variable dtype.

    Raises:
        TypeError: `layer` is neither of the two, or has a ``call`` of its own.
        ValueError: it is not built, or a batch norm with ``renorm=True``.

    >>> import keras
    >>> layer = keras.layers.LayerNormalization()
    >>> layer.build((None, 4))
    >>> from_keras(layer)
    KerasLayerNorm(axis=(-1,), eps=0.001)
    """
    cls: Any = next((c for c in type(layer).__mro__ if c.__module__.startswith("keras.") and c.__name__ in MADE), None)
    if cls is None:
        raise TypeError(f"Keras's BatchNormalization and LayerNormalization are rebuilt, not a {type(layer).__name__}")
    if type(layer).call is not cls.call:
        raise TypeError(f"{type(layer).__name__} has a call of its own, which torch modules know nothing of")
    if not layer.built:
        raise ValueError(f"{layer.name} is not built: call it, or layer.build(input_shape), first")
    if dropped := [name for name in NOT_COPIED if getattr(layer, name) is not None]:
        warnings.warn(f"{layer.name}: {' and '.join(dropped)} not copied", stacklevel=2)
    return MADE[cls.__name__](layer)


def _batch_norm(layer: Any) -> KerasBatchNorm:
    if layer.renorm:
        raise ValueError(f"{layer.name} has renorm=True, which fastnorm has not")
    weight, bias = _tensor(layer.gamma), _tensor(layer.beta)
    statistics = (_tensor(layer.moving_mean), _tensor(layer.moving_variance))
    options = (layer.axis, layer.momentum, layer.epsilon)
    return KerasBatchNorm(*options, weight, bias, *statistics, not layer.trainable)


def _layer_norm(layer: Any) -> KerasLayerNorm:
    norm = KerasLayerNorm(layer.axis, layer.epsilon, _tensor(layer.gamma), _tensor(layer.beta), layer.rms_scaling)
    return norm.requires_grad_(layer.trainable)


MADE: dict[str, Callable] = {"BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm}


def _parameter(tensor: Tensor | None, learns: bool) -> torch.nn.Parameter | None:
    return None if tensor is None else torch.nn.Parameter(tensor, learns)


def _tensor(variable: Any) -> Any:
    """A copy of a Keras variable of any backend; on its device where that is torch's."""
    if variable is None:
        return None
    if isinstance(variable.value, torch.Tensor):
        return variable.value.detach().clone()
    return torch.from_numpy(variable.numpy().astype("float64")).to(getattr(torch, variable.dtype))
