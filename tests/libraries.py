"""Copies of timm's and torchvision's norms, under their names: PyPI's torchvision does not load beside a CPU build of torch."""

import torch
import torch.nn.functional as F
from torch import nn


class TimmLayerNorm(nn.LayerNorm):
    def __init__(self, num_channels, eps=1e-6, affine=True, **kwargs):
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **kwargs)
        self._fast_norm = False

    def forward(self, x):
        if self._fast_norm:
            raise NotImplementedError("apex")
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class TimmLayerNorm2d(TimmLayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        if self._fast_norm:
            raise NotImplementedError("apex")
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class TorchvisionLayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerNormAct(nn.LayerNorm):
    """timm's: a norm and its activation."""

    def forward(self, x):
        return F.gelu(F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps))


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a norm and its activation."""

    def forward(self, x):
        return F.relu(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: buffers only, and no torch.nn norm at all."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), fill))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def _called(cls, module, name):
    for thing in (cls, cls.forward):
        thing.__module__ = module
    cls.__name__, cls.__qualname__ = name, name
    cls.forward.__qualname__ = f"{name}.forward"


_called(TimmLayerNorm, "timm.layers.norm", "LayerNorm")
_called(TimmLayerNorm2d, "timm.layers.norm", "LayerNorm2d")
_called(TorchvisionLayerNorm2d, "torchvision.models.convnext", "LayerNorm2d")


class ConvNextBlock(nn.Module):
    """torchvision's CNBlock, with a stem and a head around it."""

    def __init__(self, width, norm2d, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, stride=2), norm2d(width))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Sequential(norm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(x)


class ResNetBlock(nn.Module):
    """torchvision's BasicBlock, with a stem and a head around it."""

    def __init__(self, width, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), norm(width), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm(width),
        )
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.block(x) + x)
