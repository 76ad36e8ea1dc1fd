"""Drop-in modules: subclasses of torch.nn's, so constructor, repr, parameters, buffers and state_dict are torch's own."""

from __future__ import annotations

import torch

from . import functional


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization over the trailing ``normalized_shape`` of the input, on fused kernels.

    Equivalent to: ``torch.nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias, device, dtype)``

    Shape: ``(*, *normalized_shape)`` to the same, in the input's dtype. See `fastnorm.functional.layer_norm` for the formula,
    the dtypes and the errors.
    """

    def forward(self, input):
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _BatchNorm:
    """torch.nn._BatchNorm.forward on fused kernels; a call that raises leaves num_batches_tracked as it was, too."""

    def forward(self, input):
        self._check_input_dim(input)
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        if tracked is not None:
            tracked.add_(1)  # before the norm, as torch.nn: checkpoints and functorch see the order
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked is not None and self.momentum is None:
            momentum = 1.0 / float(tracked)  # cumulative average
        own_statistics = not self.training or self.track_running_stats
        try:
            return functional.batch_norm(
                input,
                self.running_mean if own_statistics else None,
                self.running_var if own_statistics else None,
                self.weight,
                self.bias,
                self.training or (self.running_mean is None and self.running_var is None),
                momentum,
                self.eps,
            )
        except (RuntimeError, TypeError, ValueError):
            if tracked is not None:
                tracked.sub_(1)
            raise


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
