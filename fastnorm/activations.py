"""THE table of activations that a norm can end in; csrc/activations.h and kernels/activations.py have the same names.

`alpha` is the one number that some of them have: leaky_relu's negative_slope and elu's alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a user may give, for those who check types: the keys of ACTIVATIONS, and those that have a number with it.
Name = Literal["identity", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "elu"]
Activation = Name | tuple[Literal["leaky_relu", "elu"], float]


@dataclass(frozen=True)
class Function:
    """value(z, alpha) is torch's own function, slope(z, alpha) its derivative, which is torch's at a kink as well, and
    module(alpha) torch's module."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    module: Callable[[float], nn.Module]
    alpha: float = 0.0  # the default


def _gelu_slope(z: Tensor, _: float) -> Tensor:
    return 0.5 * (1 + torch.erf(z / sqrt(2))) + z * torch.exp(-0.5 * z * z) / sqrt(2 * pi)


def _gelu_tanh_slope(z: Tensor, _: float) -> Tensor:
    inner = sqrt(2 / pi) * (z + 0.044715 * z * z * z)
    t = torch.tanh(inner)
    square = z.square().clamp(max=1e4)  # beyond it 1 - t * t is 0, which an infinite square would make NaN
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * sqrt(2 / pi) * (1 + 3 * 0.044715 * square)


def _silu_slope(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


ACTIVATIONS: dict[str, Function] = {
    "identity": Function(lambda z, _: z, lambda z, _: torch.ones_like(z), lambda _: nn.Identity()),
    "relu": Function(lambda z, _: F.relu(z), lambda z, _: torch.ones_like(z).masked_fill(z <= 0, 0.0), lambda _: nn.ReLU()),
    "leaky_relu": Function(
        F.leaky_relu, lambda z, alpha: torch.full_like(z, alpha).masked_fill(z > 0, 1.0), nn.LeakyReLU, alpha=0.01
    ),
    "silu": Function(lambda z, _: F.silu(z), _silu_slope, lambda _: nn.SiLU()),
    "gelu": Function(lambda z, _: F.gelu(z), _gelu_slope, lambda _: nn.GELU()),
    "gelu_tanh": Function(lambda z, _: F.gelu(z, approximate="tanh"), _gelu_tanh_slope, lambda _: nn.GELU("tanh")),
    "sigmoid": Function(
        lambda z, _: torch.sigmoid(z), lambda z, _: torch.sigmoid(z) * (1 - torch.sigmoid(z)), lambda _: nn.Sigmoid()
    ),
    "tanh": Function(lambda z, _: torch.tanh(z), lambda z, _: 1 - torch.tanh(z).square(), lambda _: nn.Tanh()),
    "elu": Function(F.elu, lambda z, alpha: torch.where(z > 0, 1.0, alpha * torch.exp(z.clamp(max=0))), nn.ELU, alpha=1.0),
}


def parse(activation: Activation | None) -> tuple[str, float]:
    """(name, alpha) of what a user gives: None, a name, or a pair ("leaky_relu", 0.2) or ("elu", 0.5).

    Raises:
        ValueError: it is none of these.
    """
    if activation is None:
        return "identity", 0.0
    name, *rest = activation if isinstance(activation, tuple) and activation else (activation,)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"fastnorm has no activation {activation!r}; choose None or one of {', '.join(ACTIVATIONS)}")
    if rest and (not ACTIVATIONS[name].alpha or len(rest) != 1 or type(rest[0]) not in (int, float)):
        raise ValueError(f"activation={activation!r}: only leaky_relu and elu take one number, as in ('leaky_relu', 0.2)")
    return name, float(rest[0] if rest else ACTIVATIONS[name].alpha)
