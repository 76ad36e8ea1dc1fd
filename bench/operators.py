"""torch's operators one after the other, as functions of fastnorm's names and signatures: what a model does without fastnorm.

In float64 they are the oracle of the benchmarks. In training batch norms are given no running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastnorm import reference

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
IN_PLACE = ("relu", "silu")  # gelu has no such form


@dataclass(frozen=True)
class Sequences:
    """`in_place`: sums and activations as models write them, over what nobody needs any more."""

    in_place: bool = False

    def _end(self, y, activation, residual=None):
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        if activation is None:
            return y
        return ACTIVATIONS[activation](y, **({"inplace": True} if self.in_place and activation in IN_PLACE else {}))

    def layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5, *, activation=None, residual=None, mask=None):
        if mask is not None:
            return masked(x, mask, (-1,), weight, bias, eps)
        return self._end(F.layer_norm(x, normalized_shape, weight, bias, eps), activation, residual)

    def rms_norm(self, x, normalized_shape, weight=None, eps=None):
        return F.rms_norm(x, normalized_shape, weight, eps)

    def batch_norm(self, x, mean, var, weight, bias, training, momentum, eps, *, activation=None, residual=None, mask=None):
        if mask is not None and training:
            column = (-1, *[1] * (x.dim() - 2))
            return masked(x, mask.unsqueeze(1), (0, *range(2, x.dim())), weight.view(column), bias.view(column), eps)
        return self._end(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), activation, residual)

    def ghost_batch_norm(self, x, mean, var, weight, bias, training, momentum, eps, *, virtual_batch_size):
        if not training:
            return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
        ghosts = [x[i :: len(x) // virtual_batch_size] for i in range(len(x) // virtual_batch_size)]
        normed = [F.batch_norm(ghost, mean, var, weight, bias, True, momentum, eps) for ghost in ghosts]
        return torch.stack(normed, 1).flatten(0, 1)  # interleaved: sample i is of ghost batch i modulo their number

    def group_norm(self, x, groups, weight, bias, eps, *, activation=None):
        return self._end(F.group_norm(x, groups, weight, bias, eps), activation)

    def instance_norm(self, x, mean, var, weight, bias, use_input_stats, momentum, eps):
        return F.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)

    def add_layer_norm(self, x, residual, normalized_shape, weight, bias, eps, *, dropout=0.0, layer_scale=None):
        x = x if layer_scale is None else x * layer_scale
        h = (F.dropout(x, dropout) if dropout else x) + residual
        return F.layer_norm(h, normalized_shape, weight, bias, eps), h

    def add_rms_norm(self, x, residual, normalized_shape, weight, eps):
        h = x + residual
        return F.rms_norm(h, normalized_shape, weight, eps), h

    def modulated_layer_norm(self, x, normalized_shape, scale, shift, *, eps):
        return F.layer_norm(x, normalized_shape, None, None, eps) * (1 + scale) + shift

    def channels_first_layer_norm(self, x, weight, bias, eps):
        """Dense, or, in place, the view that the permutes leave."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
        return y if self.in_place else y.contiguous()


class Oracle(Sequences):
    """The same, with what fastnorm's dropout keeps: torch's draws others."""

    def add_layer_norm(self, x, residual, normalized_shape, weight, bias, eps, *, dropout=0.0, layer_scale=None):
        if dropout:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=x.device)
            x = x * reference.kept(x.numel(), dropout, seed).view(x.shape) / (1 - dropout)
        return super().add_layer_norm(x, residual, normalized_shape, weight, bias, eps, layer_scale=layer_scale)


def masked(x, counts, axes, weight, bias, eps):
    """Statistics over `axes` of what counts, in float32 at least."""
    wide = x.float() if x.element_size() == 2 else x
    n = counts.sum(axes, keepdim=True)
    mean = (wide * counts).sum(axes, keepdim=True) / n
    var = ((wide - mean) * counts).square().sum(axes, keepdim=True) / n
    return ((wide - mean) * torch.rsqrt(var + eps) * weight + bias).to(x.dtype)
