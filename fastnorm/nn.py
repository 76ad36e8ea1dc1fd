"""Drop-in modules: subclasses of torch.nn's, so constructor, repr, parameters, buffers and state_dict are torch's own."""

from __future__ import annotations

import torch
from torch.fx import Proxy

from . import functional
from .tracing import Scriptable, leaf


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


class LayerNorm(Scriptable, torch.nn.LayerNorm):
    """Layer normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias, device, dtype)``

    Shape: ``(*, *normalized_shape)`` to the same, in the input's dtype. See `fastnorm.functional.layer_norm` for the formula,
    the dtypes and the errors.
    """

    def forward(self, input):
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        weight, bias = _affine(self)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class _BatchNorm(Scriptable):
    """torch.nn._BatchNorm.forward on fused kernels; a call that raises leaves num_batches_tracked as it was, too."""

    def forward(self, input):
        if isinstance(input, Proxy) and (node := leaf(self, input)) is not None:
            return node
        self._check_input_dim(input)
        training, (weight, bias), (mean, var, tracked) = self.training, _affine(self), _statistics(self)
        if not training:
            tracked = None
        elif not self.track_running_stats:
            mean = var = tracked = None
        if tracked is not None and self.momentum is None:
            return functional.cumulative_batch_norm(input, mean, var, weight, bias, tracked, self.eps)
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked is not None:
            return functional.counting_batch_norm(input, mean, var, weight, bias, tracked, momentum, self.eps)
        own_statistics = training or (mean is None and var is None)
        return functional.batch_norm(input, mean, var, weight, bias, own_statistics, momentum, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``(B, C)`` or ``(B, C, L)`` inputs, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the dtypes and the errors;
    ``momentum=None`` averages over all batches.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``(B, C, H, W)`` inputs, contiguous or channels_last, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the dtypes and the errors;
    ``momentum=None`` averages over all batches.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``(B, C, D, H, W)`` inputs, contiguous or channels_last_3d, on fused kernels.

    Equivalent to: ``torch.nn.BatchNorm3d(num_features, eps, momentum, affine, track_running_stats, device, dtype)``

    See `fastnorm.functional.batch_norm` for the formula, the dtypes and the errors;
    ``momentum=None`` averages over all batches.
    """
