"""What a norm can end in, on tiles in registers. Same names as fastnorm/activations.py; formulas as in csrc/activations.h.

`alpha` is a pair of kernel arguments, see math.pair_of, or None where the activation has none. Nothing here is of libdevice,
which the interpreter does not have, and nothing divides: a quotient rounded to nearest is many instructions and a branch.
"""

import triton
import triton.language as tl

from ..activations import ACTIVATIONS
from .launch import float_pair
from .math import pair_of


@triton.jit
def _inverse(n):
    """1 / n for n from 1 to 2: the approximate one, and a Newton step."""
    r = tl.rsqrt(n)
    r = r * r
    return tl.fma(r, tl.fma(-r, n, tl.full(n.shape, 1.0, n.dtype)), r)


@triton.jit
def _small_expm1(z):
    """For z from -1 to 0, where exp(z) - 1 cancels: Taylor's series."""
    TERMS: tl.constexpr = 19 if z.dtype == tl.float64 else 11
    one = tl.full(z.shape, 1.0, z.dtype)
    series = one
    for k in tl.static_range(TERMS, 2, -1):
        series = tl.fma(series, z * (1.0 / k), one)
    return tl.fma(series, z * (0.5 * z), z)


@triton.jit
def _sigmoid(z):
    """And its derivative s * (1 - s), in which nothing cancels. The exponential is of no positive number: it is finite."""
    e = tl.exp(-tl.abs(z))
    share = _inverse(1.0 + e)
    return share * tl.where(z < 0, e, 1.0), share * share * e


@triton.jit
def _tanh(z):
    """(1 - e) / (1 + e) with e = exp(-2 |z|)."""
    u = -2.0 * tl.abs(z)
    e = tl.exp(u)
    share = _inverse(1.0 + e)
    t = tl.where(u > -1.0, -_small_expm1(u) * share, 1.0 - 2.0 * e * share)
    return tl.where(z < 0, -t, t)


@triton.jit
def _cdf(z):
    """Of the standard normal distribution."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _gelu_tanh(z):
    """0.5 * (1 + tanh(u / 2)) = sigmoid(u), with u = 2 sqrt(2 / pi) * (z + 0.044715 z^3), and its derivative by u."""
    return _sigmoid(1.5957691216057308 * (z + 0.044715 * (z * z * z)))


@triton.jit
def activate(z, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0, z * pair_of(alpha[0], alpha[1], z.dtype), z)
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)[0]
    elif ACTIVATION == "gelu":
        z = z * _cdf(z)
    elif ACTIVATION == "gelu_tanh":
        z = z * _gelu_tanh(z)[0]
    elif ACTIVATION == "sigmoid":
        z = _sigmoid(z)[0]
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "elu":
        below = tl.where(z > -1.0, _small_expm1(z), tl.exp(z) - 1.0)
        z = tl.where(z <= 0, pair_of(alpha[0], alpha[1], z.dtype) * below, z)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z


@triton.jit
def slope(z, alpha, ACTIVATION: tl.constexpr):
    """The derivative; at a kink it is torch's."""
    one = tl.full(z.shape, 1.0, z.dtype)
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, one)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, pair_of(alpha[0], alpha[1], z.dtype), one)
    elif ACTIVATION == "silu":
        s, ds = _sigmoid(z)
        return s + z * ds
    elif ACTIVATION == "gelu":
        return _cdf(z) + z * (tl.exp(-0.5 * (z * z)) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        s, ds = _gelu_tanh(z)
        # Where the square is larger, ds is 0, which an infinite square would make NaN.
        return s + z * ds * (1.5957691216057308 * (1.0 + 0.134145 * tl.minimum(z * z, 1e4)))
    elif ACTIVATION == "sigmoid":
        return _sigmoid(z)[1]
    elif ACTIVATION == "tanh":
        return 4.0 * _sigmoid(2.0 * z)[1]
    else:
        tl.static_assert(ACTIVATION == "elu")
        return tl.where(z <= 0, pair_of(alpha[0], alpha[1], z.dtype) * tl.exp(z), one)


def number(activation: str, alpha: float):
    """alpha as kernels take it."""
    return float_pair(alpha) if ACTIVATIONS[activation].alpha else None
