"""The data and the networks of `train.py`: four small tasks on data that scikit-learn ships, nothing is downloaded.

A network takes its norms from a provider, any namespace with LayerNorm, BatchNorm1d and BatchNorm2d: `fastnorm` or `torch.nn`.
Built from the same seed, two networks of different providers have the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

NORMS = ("none", "batch", "layer", "both")
PLACEMENTS = ("before", "after")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Split(NamedTuple):
    """Standardised inputs and labels; labels are float32 0 or 1 where there are two classes, else int64."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    val_x: torch.Tensor
    val_y: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """What follows a hidden layer: which norm, and whether it stands before or after the activation.

    `both` is a batch norm directly followed by a layer norm.
    """

    norm: str
    placement: str
    activation: str

    @property
    def batch(self) -> bool:
        return self.norm in ("batch", "both")

    @property
    def layer(self) -> bool:
        return self.norm in ("layer", "both")

    @property
    def hidden_bias(self) -> bool:
        """A batch norm directly after a hidden layer subtracts that layer's bias again: the bias is left out, as is usual."""
        return not (self.batch and self.placement == "before")

    def block(self, batch_norm: Callable, layer_norm: Callable) -> nn.Sequential:
        norms = [batch_norm()] if self.batch else []
        norms += [layer_norm()] if self.layer else []
        activation = ACTIVATIONS[self.activation]()
        return nn.Sequential(*norms, activation) if self.placement == "before" else nn.Sequential(activation, *norms)


# ---------------------------------------------------------------- networks: all return logits, the loss applies the sigmoid


class Perceptron(nn.Module):
    """features -> 64 -> 32 -> 1, with a norm at each of the two hidden layers."""

    def __init__(self, norms, choice: Choice, features: int):
        super().__init__()
        block = lambda n: choice.block(lambda: norms.BatchNorm1d(n), lambda: norms.LayerNorm(n))
        self.layers = nn.Sequential(
            nn.Linear(features, 64, bias=choice.hidden_bias),
            block(64),
            nn.Linear(64, 32, bias=choice.hidden_bias),
            block(32),
            nn.Linear(32, 1),
        )

    def forward(self, x):
        return self.layers(x).squeeze(1)


class ConvNet(nn.Module):
    """Two 3 x 3 convolutions over (B, 1, 8, 8); batch norm is per channel, layer norm is over a sample's whole (C, H, W).

    It pools by the mean: the blank margin of a digit makes exact ties, and the pixel that a max pooling takes of them is
    decided by the last bit.
    """

    def __init__(self, norms, choice: Choice):
        super().__init__()
        block = lambda c, s: choice.block(lambda: norms.BatchNorm2d(c), lambda: norms.LayerNorm((c, s, s)))
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=choice.hidden_bias),
            block(16, 8),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=choice.hidden_bias),
            block(32, 4),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 10),
        )

    def forward(self, x):
        return self.layers(x)


class OverFeatures(nn.Module):
    """Applies a norm of (B, C, L) to a sequence (B, L, C), so that the statistics are per feature."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """Two GRUs over an image's 8 rows; the hidden sequence of each goes through the norm, and the last step is classified."""

    def __init__(self, norms, choice: Choice):
        super().__init__()
        block = lambda n: choice.block(lambda: OverFeatures(norms.BatchNorm1d(n)), lambda: norms.LayerNorm(n))
        self.first, self.first_block = nn.GRU(8, 32, batch_first=True), block(32)
        self.second, self.second_block = nn.GRU(32, 32, batch_first=True), block(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.first_block(self.first(x)[0])
        x = self.second_block(self.second(x)[0])
        return self.head(x[:, -1])


# ---------------------------------------------------------------- data, as float64 inputs and int64 labels


def _diabetes():
    from sklearn.datasets import load_diabetes

    x, progression = map(torch.from_numpy, load_diabetes(return_X_y=True))
    return x, (progression > progression.quantile(0.5)).long()


def _cancer():
    from sklearn.datasets import load_breast_cancer

    return map(torch.from_numpy, load_breast_cancer(return_X_y=True))


def _digits():
    from sklearn.datasets import load_digits

    return map(torch.from_numpy, load_digits(return_X_y=True))


@dataclass(frozen=True)
class Task:
    name: str
    what: str
    data: Callable
    network: Callable  # (norms, choice) -> nn.Module
    sample_shape: tuple[int, ...]
    classes: int
    epochs: int

    @property
    def one_value_per_sample(self) -> bool:
        """A channel has a single value per sample, so that batch norm has nothing to average in a batch of one."""
        return len(self.sample_shape) == 1

    def load(self, seed: int) -> Split:
        """A stratified split, 3 : 1, that depends on the seed; standardised with the statistics of the training part alone."""
        from sklearn.model_selection import train_test_split

        x, y = self.data()
        train, val = train_test_split(range(len(x)), test_size=0.25, stratify=y.numpy(), random_state=seed)
        per_column = self.one_value_per_sample  # the pixels of an image share one scale
        std, mean = torch.std_mean(x[train], 0 if per_column else None)
        x = ((x - mean) / std).float().reshape(-1, *self.sample_shape)
        y = y.float() if self.classes == 2 else y
        return Split(x[train], y[train], x[val], y[val])

    def loss(self, logits, y):
        if self.classes == 2:
            return nn.functional.binary_cross_entropy_with_logits(logits, y)
        return nn.functional.cross_entropy(logits, y)

    def accuracy(self, logits, y) -> float:
        predicted = (logits > 0).to(y.dtype) if self.classes == 2 else logits.argmax(1)
        return (predicted == y).double().mean().item()


TASKS = {
    t.name: t
    for t in (
        Task("diabetes", "10 inputs, perceptron", _diabetes, lambda n, c: Perceptron(n, c, 10), (10,), 2, 20),
        Task("cancer", "30 inputs, perceptron", _cancer, lambda n, c: Perceptron(n, c, 30), (30,), 2, 10),
        Task("images", "digits of 8 x 8 pixels, convolutions", _digits, ConvNet, (1, 8, 8), 10, 6),
        Task("sequences", "digits as 8 rows, GRUs", _digits, Recurrent, (8, 8), 10, 8),
    )
}
