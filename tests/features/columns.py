"""Columns of the table beside torch.nn's layer norm and batch norm: its newer norms, and norms with what surrounds them, whose
twin is a sequence of torch's operators. Other inputs are made of x, so that gradients go through them as well."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fastnorm

SAMPLES = 2  # of a ghost batch


def counting(x):
    """The mask of (B, C, L): another length for each sample."""
    return torch.arange(x.shape[2], device=x.device) <= torch.arange(x.shape[0], device=x.device).unsqueeze(1)


class GELULayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.gelu(super().forward(x))


class Residual(fastnorm.BatchNorm2d):
    def forward(self, x):
        return super().forward(x, x.flip(0))


class ResidualTwin(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x) + x.flip(0))


class Added(fastnorm.AddLayerNorm):
    def forward(self, x):
        y, h = super().forward(x, x.flip(0))
        return y * h


class AddedTwin(nn.LayerNorm):
    def forward(self, x):
        h = x + x.flip(0)
        return super().forward(h) * h


class ScaledTwin(nn.LayerNorm):
    def __init__(self, shape, device=None, dtype=None):
        super().__init__(shape, device=device, dtype=dtype)
        self.layer_scale = nn.Parameter(torch.ones_like(self.weight))

    def forward(self, x):
        h = x * self.layer_scale + x.flip(0)
        return super().forward(h) * h


class LayerNorm2dTwin(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class Modulated(fastnorm.ModulatedLayerNorm):
    def forward(self, x):
        return super().forward(x, x[:, :1], x[:, 1:2])


class ModulatedTwin(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * (1 + x[:, :1]) + x[:, 1:2]


class Masked(fastnorm.BatchNorm1d):
    def forward(self, x):
        return super().forward(x, mask=counting(x))


def update(m, mean, var):
    """The running statistics, by those of this batch."""
    if m.running_mean is not None:
        m.num_batches_tracked.add_(1)
        for t, new in ((m.running_mean, mean), (m.running_var, var)):
            t.copy_(t * (1 - m.momentum) + new.detach() * m.momentum)


class MaskedTwin(nn.BatchNorm1d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mask, column = counting(x).unsqueeze(1), lambda t: t.unsqueeze(1)
        n, total = mask.sum(), lambda t: torch.where(mask, t, 0).sum((0, 2))
        mean = total(x) / n
        var = total((x - column(mean)).square()) / n
        y = (x - column(mean)) * torch.rsqrt(column(var) + self.eps) * column(self.weight) + column(self.bias)
        update(self, mean, var * (n / (n - 1)))
        return y


class GhostTwin(nn.BatchNorm1d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        G = len(x) // SAMPLES
        batches = [x[g::G] for g in range(G)]
        y = [F.batch_norm(b, None, None, self.weight, self.bias, True, 0.0, self.eps) for b in batches]
        update(self, *(sum(of(b, (0, 2)) for b in batches) / G for of in (torch.mean, torch.var)))
        return torch.stack(y, 1).flatten(0, 1)


COLUMNS = (
    ("RMSNorm", fastnorm.RMSNorm, nn.RMSNorm, (6,), (4, 6)),
    ("GroupNorm", fastnorm.GroupNorm, nn.GroupNorm, (2, 4), (3, 4, 3)),
    (
        "InstanceNorm2d",
        partial(fastnorm.InstanceNorm2d, affine=True, track_running_stats=True),
        partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
        (3,),
        (3, 3, 2, 3),
    ),
    ("LayerNorm-gelu", partial(fastnorm.LayerNorm, activation="gelu"), GELULayerNorm, (6,), (4, 6)),
    ("BatchNorm2d-residual-relu", partial(Residual, activation="relu"), ResidualTwin, (3,), (3, 3, 2, 3)),
    ("AddLayerNorm", Added, AddedTwin, (6,), (4, 6)),
    ("AddLayerNorm-layer-scale", partial(Added, layer_scale=1.0), ScaledTwin, (6,), (4, 6)),
    ("LayerNorm2d", fastnorm.LayerNorm2d, LayerNorm2dTwin, (3,), (3, 3, 2, 3)),
    ("ModulatedLayerNorm", Modulated, ModulatedTwin, (4,), (3, 3, 4)),
    ("BatchNorm1d-masked", Masked, MaskedTwin, (3,), (4, 3, 3)),
    ("BatchNorm1d-ghosts", partial(fastnorm.BatchNorm1d, virtual_batch_size=SAMPLES), GhostTwin, (3,), (4, 3, 2)),
)
