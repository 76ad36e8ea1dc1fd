"""The math of the project on tiles in registers: no load, no store. The names are those of reference.py.

Rows of a tile [rows, columns] are reduced over axis 1, channels of one [positions, channels] over axis 0. ACC, the accumulate
dtype, is float64 for float64 data, else float32.
"""

import triton
import triton.language as tl

# Squares that overflow are summed again after this exact scaling.
BIG_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def centre(x, high, low):
    """x - mean; the mean is the pair high + low."""
    return (x - high) - low


@triton.jit
def normalize(x, high, low, rstd):
    """x_hat"""
    return centre(x, high, low) * rstd


@triton.jit
def grad_input(g, x_hat, rstd, c1, c2):
    """The derivative of a norm by its input; c1 = mean(g * x_hat), c2 = mean(g). Derived in reference.py."""
    return (g - (c2 + x_hat * c1)) * rstd


@triton.jit
def rstd_of(m2, n, scale, eps):
    """`m2` is in units of scale^-2."""
    return scale * tl.rsqrt(m2 / n + eps * scale * scale)


@triton.jit
def sum2(a, b, axis: tl.constexpr):
    """Two sums with one exchange between the warps."""
    return tl.split(tl.sum(tl.join(a, b), axis=axis))


@triton.jit
def any_inf(v):
    """Whether a vector holds +inf; NaN is not, because scaling does not repair it."""
    return tl.max((v == float("inf")).to(tl.int32), axis=0) > 0


@triton.jit
def pair_of(high, low, ACC: tl.constexpr):
    """A Python float arrives as float32; float64 kernels get the rest of it as a second argument."""
    return tl.cast(high, ACC) + tl.cast(low, ACC)


@triton.jit
def if_finite(v, of):
    """v where `of` is finite, else 0: the mean of an infinite channel is infinite, and inf - inf is not a number."""
    return tl.where(tl.abs(of) < float("inf"), v, 0.0)


@triton.jit
def exact_quotient(a, n):
    """a / n, and exactly that where it is representable: a GPU's own division may be off by 2 units of the last place."""
    q = a / n
    return q + tl.fma(-q, n, a) / n


@triton.jit
def centred_moments(x, mask, n, axis: tl.constexpr = 1):
    """d, high, low, m2 and scale over an axis; two passes over the registers. d = x - high, and 0 where `mask` is not set.

    A constant tile comes out as exactly 0: `high` is then off by few units of the last place, d is that many of them
    everywhere, and so is `low`. That `high` is off by so little also keeps s2 - s1 * low from cancelling more than a digit.
    """
    high = tl.sum(x, axis=axis) / n
    d = tl.where(mask, x - tl.expand_dims(high, axis), 0.0)
    s1, s2 = sum2(d, d * d, axis)
    low = exact_quotient(s1, n)
    m2 = s2 - s1 * low
    scale = tl.full(m2.shape, 1.0, m2.dtype)
    if any_inf(s2):
        overflow = s2 == float("inf")
        scaled = d * BIG_SCALE
        m2 = tl.where(overflow, tl.sum(scaled * scaled, axis=axis) - (s1 * BIG_SCALE) * (low * BIG_SCALE), m2)
        scale = tl.where(overflow, BIG_SCALE, 1.0).to(m2.dtype)
    return d, high, low, tl.where(m2 < 0, 0.0, m2), scale


@triton.jit
def moments(x, mask, n, axis: tl.constexpr = 1):
    """high, low, m2 and scale over an axis; x is 0 where `mask` is not set."""
    _, high, low, m2, scale = centred_moments(x, mask, n, axis)
    return high, low, m2, scale


@triton.jit
def shifted_moments(shift, s1, s2, n, scale):
    """high, low and m2 (in units of scale^-2) from s1 = sum((x - shift) * scale) and s2, the sum of its squares.

    Cancellation in s2 - s1^2 / n costs (shift - mean)^2 / var units of the last place: `shift` has to be a mean of many.
    """
    delta = s1 / n
    m2 = s2 - s1 * delta
    delta = delta / scale
    high = shift + delta
    low = if_finite((shift - high) + delta, high)
    return high, low, tl.where(m2 < 0, 0.0, m2)
