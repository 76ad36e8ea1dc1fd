"""The networks of `models.py`: a block as models have it, and the least around it that gives a loss.

A network is made of a class of norms, torch.nn's or ours, and of whether its norms are fused with what surrounds them. Both
have the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fastnorm

CLASSES = 10
VOCABULARY = 512


class Bottleneck(nn.Module):
    """ResNet's, (B, C_in, H, W) to (B, 4 C, H, W): norms fused with the activation `end`; the first two can be recomputed."""

    def __init__(self, C_in, C, norm, fused, recompute=None, end="relu"):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(C_in, C, 1, bias=False),
                nn.Conv2d(C, C, 3, padding=1, bias=False),
                nn.Conv2d(C, 4 * C, 1, bias=False),
            ]
        )
        options = {"activation": end} if fused else {}
        more = {"recompute": recompute} if fused else {}
        self.norms = nn.ModuleList([norm(C, **options, **more), norm(C, **options, **more), norm(4 * C, **options)])
        projected = C_in != 4 * C
        self.shortcut = nn.Sequential(nn.Conv2d(C_in, 4 * C, 1, bias=False), norm(4 * C)) if projected else nn.Identity()
        self.fused, self.end = fused, getattr(F, end)

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs[:2], self.norms[:2], strict=True):
            y = norm(conv(y)) if self.fused else self.end(norm(conv(y)), inplace=True)
        y, x = self.convs[2](y), self.shortcut(x)
        return self.norms[2](y, x) if self.fused else self.end(self.norms[2](y) + x, inplace=True)


class Classifier(nn.Module):
    """Blocks, (B, *, H, W) to (B, C, H, W), the mean over positions, and a linear layer."""

    def __init__(self, C, *blocks):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(C, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


class PreNorm(nn.Module):
    """A transformer's block, (B, T, N) to the same: attention and a multilayer perceptron, a norm before each and at the end.

    Each norm is that of a sum: of embeddings and their positions, or of the stream and what the last layer adds to it.
    """

    def __init__(self, T, N, norm, fused, causal):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(T, N))
        self.norms = nn.ModuleList([norm(N) for _ in range(3)])
        self.qkv, self.out, self.up, self.down = nn.Linear(N, 3 * N), nn.Linear(N, N), nn.Linear(N, 4 * N), nn.Linear(4 * N, N)
        self.fused, self.causal = fused, causal

    def _add_norm(self, norm, branch, stream):
        if self.fused:
            return norm(branch, stream)
        stream = branch + stream
        return norm(stream), stream

    def forward(self, x):
        y, stream = self._add_norm(self.norms[0], x, self.positions.expand_as(x))
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y, stream = self._add_norm(self.norms[1], self.out(attention.transpose(1, 2).flatten(2)), stream)
        return self._add_norm(self.norms[2], self.down(F.gelu(self.up(y))), stream)[0]


class Language(nn.Module):
    """Tokens (B, T) to logits (B, T, VOCABULARY) of the next ones, through a causal block."""

    def __init__(self, T, N, norm, fused):
        super().__init__()
        self.embedding, self.block = nn.Embedding(VOCABULARY, N), PreNorm(T, N, norm, fused, causal=True)
        self.head = nn.Linear(N, VOCABULARY, bias=False)

    def forward(self, x):
        return self.head(self.block(self.embedding(x)))


class Vision(nn.Module):
    """Embedded patches (B, T, N), the class token first, to logits (B, CLASSES)."""

    def __init__(self, T, N, norm, fused):
        super().__init__()
        self.block, self.head = PreNorm(T, N, norm, fused, causal=False), nn.Linear(N, CLASSES)

    def forward(self, x):
        return self.head(self.block(x)[:, 0])


class Diffusion(nn.Module):
    """A residual block of a diffusion model's U-Net, (B, C, H, W): group norm and silu before each convolution."""

    def __init__(self, C, norm, fused):
        super().__init__()
        options = {"activation": "silu"} if fused else {}
        self.norms = nn.ModuleList([norm(32, C, **options) for _ in range(2)])
        self.convs = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1) for _ in range(2)])
        self.fused = fused

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(norm(y) if self.fused else F.silu(norm(y)))
        return x + y


class Perceptron(nn.Module):
    """The tutorial's, features -> 64 -> 32 -> 1: logits (B,), with norm and relu after each of the first two layers.

    A batch norm subtracts the bias of the layer before it again: there is none, as is usual.
    """

    def __init__(self, features, norm, fused):
        super().__init__()
        options, bias = {"activation": "relu"} if fused else {}, not issubclass(norm, nn.BatchNorm1d)
        layer = lambda n, m: [nn.Linear(n, m, bias=bias), norm(m, **options), *([] if fused else [nn.ReLU()])]
        self.first, self.second = nn.Sequential(*layer(features, 64)), nn.Sequential(*layer(64, 32))
        self.last = nn.Linear(32, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x))).squeeze(1)


# ---------------------------------------------------------------- data: (shape) -> x, target. Losses are float32 in any case


def tokens(shape):
    """Each token is the one before it and one, two or three."""
    B, T, _ = shape
    walk = torch.randint(1, 4, (B, T + 1)).cumsum(1) % VOCABULARY
    return walk[:, :-1], walk[:, 1:]


def labelled(shape):
    """There is nothing to see in x: the few batches are learnt by heart."""
    return torch.randn(shape), torch.randint(CLASSES, shape[:1])


def noisy(shape):
    """Noise is to be told from what is the same at all positions."""
    noise = torch.randn(shape)
    return noise + torch.randn(*shape[:2], 1, 1), noise


def halves(shape):
    x = torch.randn(shape)
    return x, (x.sum(1) > 0).float()


def cross_entropy(y, target):
    """With smoothed labels, as is usual: else what is learnt by heart has a loss of 0, of which no difference is a part."""
    return F.cross_entropy(y.float().flatten(0, -2), target.flatten(), label_smoothing=0.1)


def squares(y, target):
    return F.mse_loss(y.float(), target.float())


def binary(y, target):
    return F.binary_cross_entropy_with_logits(y.float(), target.float())


@dataclass(frozen=True)
class Block:
    name: str
    shape: tuple[int, ...]  # of what goes into the block
    make: Callable  # (shape, norm, fused) -> network
    norms: tuple[type, type]  # torch.nn's, and the fused one
    data: Callable
    loss: Callable  # (y, target) -> scalar
    few: int  # samples of a batch of the loss curve
    first: bool = False  # nothing comes before it: its input has no gradient
    invertible: bool = False  # (shape, norm, fused, recompute) -> network, too


def _leaky(shape, *args):
    C = shape[1]
    return Classifier(C, Bottleneck(C, C // 4, *args, end="leaky_relu"))


def _stage(shape, *args):
    """ResNet-50's first: a bottleneck with a projection, and two without."""
    C = shape[1]
    return Classifier(4 * C, *(Bottleneck(C_in, C, *args) for C_in in (C, 4 * C, 4 * C)))


NORMS = {
    "batch": (nn.BatchNorm2d, fastnorm.BatchNorm2d),
    "batch1d": (nn.BatchNorm1d, fastnorm.BatchNorm1d),
    "layer": (nn.LayerNorm, fastnorm.LayerNorm),
    "add layer": (nn.LayerNorm, fastnorm.AddLayerNorm),
    "add rms": (nn.RMSNorm, fastnorm.AddRMSNorm),
    "group": (nn.GroupNorm, fastnorm.GroupNorm),
}
_language = lambda shape, *args: Language(*shape[1:], *args)
_vision = lambda shape, *args: Vision(*shape[1:], *args)
_diffusion = lambda shape, *args: Diffusion(shape[1], *args)
_tutorial = lambda shape, *args: Perceptron(shape[1], *args)
BLOCKS = (
    Block("GPT block", (4, 256, 768), _language, NORMS["add layer"], tokens, cross_entropy, 1),
    Block("RMSNorm block", (4, 256, 768), _language, NORMS["add rms"], tokens, cross_entropy, 1),
    Block("ViT block", (4, 197, 768), _vision, NORMS["add layer"], labelled, cross_entropy, 1),
    Block("ResNet-50 stage", (8, 64, 56, 56), _stage, NORMS["batch"], labelled, cross_entropy, 2),
    Block("leaky bottleneck", (16, 256, 56, 56), _leaky, NORMS["batch"], labelled, cross_entropy, 2, invertible=True),
    Block("diffusion GroupNorm", (2, 320, 32, 32), _diffusion, NORMS["group"], noisy, squares, 1),
    Block("tutorial BatchNorm", (32, 10), _tutorial, NORMS["batch1d"], halves, binary, 32, first=True),
    Block("tutorial LayerNorm", (32, 10), _tutorial, NORMS["layer"], halves, binary, 32, first=True),
)
