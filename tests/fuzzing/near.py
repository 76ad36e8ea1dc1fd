"""Values in a wide float, each with how far from it one may be that was computed in the accumulate dtype.

This is a running error analysis (Wilkinson's; Higham, "Accuracy and Stability of Numerical Algorithms", 3.3): every operation
hands on the errors of what goes in, to first order, and rounds once more. It is where the bounds of the fuzz tests come from:
no factor is fitted to what the kernels happen to give. `u` is the accumulate dtype's eps, two times what one rounding costs;
the other half is for sums and products in another order, and for functions that are right to a unit in the last place. A sum of
n terms is allowed what a tree of additions costs, log2(n) roundings of the sum of magnitudes.
"""

from __future__ import annotations

import numpy as np


class Near:
    __array_ufunc__ = None  # so that numpy's operators leave theirs to those below

    def __init__(self, v, t, u):
        self.v, self.t, self.u = v, t, u

    def _made(self, v, t):
        return Near(v, t + self.u * np.abs(v), self.u)

    def _other(self, o):
        return o if isinstance(o, Near) else Near(o, 0.0, self.u)

    def __add__(self, o):
        o = self._other(o)
        return self._made(self.v + o.v, self.t + o.t)

    def __sub__(self, o):
        o = self._other(o)
        return self._made(self.v - o.v, self.t + o.t)

    def __mul__(self, o):
        o = self._other(o)
        return self._made(self.v * o.v, np.abs(self.v) * o.t + self.t * (np.abs(o.v) + o.t))

    __radd__, __rmul__ = __add__, __mul__

    def map(self, function):
        """What only moves values."""
        t = np.broadcast_to(self.t, np.shape(self.v))
        return Near(function(self.v), function(t), self.u)

    def total(self, sums, n):
        """Sums of n terms each, by a linear function of arrays."""
        more = self.u * (1 + np.log2(max(n, 1)) / 2)
        return Near(sums(self.v), sums(np.broadcast_to(self.t, self.v.shape)) + more * sums(np.abs(self.v)), self.u)

    def sum_to(self, shape):
        """Over the dimensions along which `shape`, which broadcasts to this one, is 1."""
        full = (1,) * (self.v.ndim - len(shape)) + tuple(shape)
        axes = tuple(i for i, n in enumerate(full) if n == 1)
        n = int(np.prod([self.v.shape[i] for i in axes]))
        return self.total(lambda a: a.sum(axes, keepdims=True).reshape(shape), n)

    def through(self, function, size):
        """function(v), whose own intermediate values are of this size; also where it jumps within reach of v."""
        v = function(self.v)
        moved = np.maximum(np.abs(function(self.v + self.t) - v), np.abs(function(self.v - self.t) - v))
        return Near(v, moved + 2 * self.u * size, self.u)

    def rounded(self, dtype_info):
        """Rounded once more, to a narrower dtype; what is too small for it may be lost."""
        least = dtype_info.smallest_normal * (dtype_info.eps if dtype_info.bits == 16 and dtype_info.eps < 1e-3 else 1)
        return Near(self.v, self.t + dtype_info.eps / 2 * (np.abs(self.v) + self.t) * (1 + 2.0**-10) + least, self.u)


def _erf(x):
    """By the series of exp(x^2) erf(x), whose terms are all of one sign."""
    a = np.minimum(np.abs(x), 7.0)
    term, total = a.copy(), a.copy()
    for n in range(1, 180):
        term = term * (2 * a * a / (2 * n + 1))
        total = total + term
    return np.sign(x) * np.minimum(total * np.exp(-a * a) * 2 / np.sqrt(np.arctan(x.dtype.type(1)) * 4), 1)


def _sigmoid(z):
    return 1 / (1 + np.exp(-np.clip(z, -80, 80)))


def _gelu_slope(z, _):
    pi = np.arctan(z.dtype.type(1)) * 4
    return (1 + _erf(z / np.sqrt(z.dtype.type(2)))) / 2 + z * np.exp(-z * z / 2) / np.sqrt(2 * pi)


def _inner(z):
    return np.sqrt(2 / (np.arctan(z.dtype.type(1)) * 4)) * (z + z.dtype.type("0.044715") * z**3)


def _gelu_tanh_slope(z, _):
    of_inner = np.sqrt(2 / (np.arctan(z.dtype.type(1)) * 4)) * (1 + 3 * z.dtype.type("0.044715") * z * z)
    return (1 + np.tanh(_inner(z))) / 2 + z / 2 * (1 - np.tanh(_inner(z)) ** 2) * of_inner


# Value, slope, and the size of what either is made of beside it: a square is off by twice what its root is.
ACTIVATIONS = {
    "identity": (lambda z, _: z, lambda z, _: np.ones_like(z), lambda z: 0),
    "relu": (lambda z, _: np.maximum(z, 0), lambda z, _: (z > 0).astype(z.dtype), lambda z: 0),
    "leaky_relu": (lambda z, a: np.where(z > 0, z, z * a), lambda z, a: np.where(z > 0, z.dtype.type(1), a), np.abs),
    "silu": (lambda z, _: z * _sigmoid(z), lambda z, _: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))), lambda z: 1 + np.abs(z)),
    "gelu": (lambda z, _: z * (1 + _erf(z / np.sqrt(z.dtype.type(2)))) / 2, _gelu_slope, lambda z: 1 + np.abs(z)),
    "gelu_tanh": (lambda z, _: z * (1 + np.tanh(_inner(z))) / 2, _gelu_tanh_slope, lambda z: 1 + np.abs(z)),
    "sigmoid": (lambda z, _: _sigmoid(z), lambda z, _: _sigmoid(z) * (1 - _sigmoid(z)), lambda z: 1),
    "tanh": (lambda z, _: np.tanh(z), lambda z, _: 1 - np.tanh(z) ** 2, lambda z: 2),
    "elu": (
        lambda z, a: np.where(z > 0, z, a * np.expm1(np.minimum(z, 0))),
        lambda z, a: np.where(z > 0, z.dtype.type(1), a * np.exp(np.minimum(z, 0))),
        lambda z: 1 + np.abs(z),
    ),
}


# Whose slope torch makes of the result y, and how much the slope moves with it: 1 - y * y and y * (1 - y).
OF_RESULT = {"tanh": lambda y: 2 * np.abs(y), "sigmoid": lambda y: np.abs(1 - 2 * y)}


def activated(z, name, alpha):
    value, _, size = ACTIVATIONS[name]
    return z.through(lambda v: value(v, alpha), size(z.v))


def sloped(z, name, alpha):
    _, slope, size = ACTIVATIONS[name]
    return z.through(lambda v: slope(v, alpha), size(z.v))
