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
def affine(x_hat, weight, bias):
    """z; weight and bias may be None."""
    z = x_hat
    if weight is not None:
        z = z * weight.to(z.dtype)
    if bias is not None:
        z = z + bias.to(z.dtype)
    return z


@triton.jit
def grad_input(g, x_hat, rstd, c1, c2):
    """The derivative of a norm by its input; c1 = mean(g * x_hat), c2 = mean(g). Derived in reference.py."""
    return (g - (c2 + x_hat * c1)) * rstd


@triton.jit
def inverse(n):
    """1 / n rounded to nearest; `/` of float32 may be off by two units of the last place."""
    one = tl.cast(1.0, n.dtype)
    if n.dtype == tl.float32:
        return tl.div_rn(one, n)
    return one / n


@triton.jit
def quotient(a, n):
    """a / n rounded to nearest for many a and one n: by its reciprocal, and a correction (Markstein 1990)."""
    share = inverse(n)
    q = a * share
    return tl.fma(if_finite(tl.fma(-q, n, a), q), share, q)


@triton.jit
def unscaled(v, scale):
    """v / scale, where scale is 1 or BIG_SCALE."""
    return v * tl.where(scale == 1.0, 1.0, 1 / BIG_SCALE)


@triton.jit
def root(v):
    """The square root rounded to nearest; `tl.sqrt` of float32 is an approximation."""
    if v.dtype == tl.float32:
        return tl.sqrt_rn(v)
    return tl.sqrt(v)


@triton.jit
def rstd_of(m2, n, scale, eps):
    """`m2` is in units of scale^-2. A Newton step takes the approximate root to one unit of the last place."""
    var = quotient(m2, n) + eps * scale * scale
    r = tl.rsqrt(var)
    step = (0.5 * r) * (1.0 - (var * r) * r)
    return scale * tl.where(step == step, r + step, r)


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum2(a, b, axis: tl.constexpr):
    """Two sums with one exchange between the warps."""
    return tl.reduce((a, b), axis, _add2)


@triton.jit
def two_sum(a, b):
    """a + b, and what its rounding took away, exactly. No product is in it that a fused operation could change."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def folded(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Plain sums of HIGH places equally far apart along axis 0 of [N, C], then of LOW neighbours.

    They cost no exchange where a thread holds all of them: LOW is its vector, HIGH how often its warps pass over the tile.
    """
    if HIGH > 1:
        v = tl.sum(tl.reshape(v, (HIGH, v.shape[0] // HIGH, v.shape[1])), axis=0)
    NEAR: tl.constexpr = min(LOW, v.shape[0])
    if NEAR > 1:
        v = tl.sum(tl.reshape(v, (v.shape[0] // NEAR, NEAR, v.shape[1])), axis=1)
    return v


@triton.jit
def exact_sum2(a, a_low, b, b_low):
    """The sums over axis 0 of two tiles [N, C] of pairs, rounded once.

    Rump, Ogita and Oishi: adding `grid` and taking it away rounds every value to a multiple of the last place of grid / 2.
    N values of at most grid / 2N sum to less than 2^24 such units, so that their sum is exact in any order; what was rounded
    away is 2^24 / 2N times smaller, and so are the errors of its sum. Where the grid is not finite the sum is a plain one.
    """
    N: tl.constexpr = a.shape[0]
    v = tl.join(a, b)
    BITS: tl.constexpr = tl.int64 if v.dtype == tl.float64 else tl.int32
    # As integers, which order as the floats do: a warp finds the largest integer in one instruction.
    most = tl.max(tl.abs(v).to(BITS, bitcast=True), axis=0).to(v.dtype, bitcast=True)
    grid = most * (2 * N)
    grid = tl.where(grid < float("inf"), grid, 0.0)[None, :, :]
    rounded = (v + grid) - grid
    total, rest = sum2(rounded, (v - rounded) + tl.join(a_low, b_low), 0)
    return tl.split(total + if_finite(rest, total))


@triton.jit
def tile_sum2(a, b, FASTEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The sums over axis 0 of two tiles [N, C]: plain within a thread, see `folded`, and exact across threads.

    They are plain sums where channels lie together: the exact sums of many channels take as long as a small tensor does.
    """
    if FASTEST == 1:
        return sum2(a, b, 0)
    a = folded(a, LOW, HIGH)
    b = folded(b, LOW, HIGH)
    return exact_sum2(a, tl.zeros_like(a), b, tl.zeros_like(b))


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
def centred_moments(x, mask, n, axis: tl.constexpr = 1):
    """d, high, low, m2 and scale over an axis; two passes over the registers. d = x - high, and 0 where `mask` is not set.

    A constant tile comes out as exactly 0: `high` is then off by few units of the last place, d is that many of them
    everywhere, and so is `low`. That `high` is off by so little also keeps s2 - s1 * low from cancelling more than a digit.
    """
    high = quotient(tl.sum(x, axis=axis), n)
    d = tl.where(mask, x - tl.expand_dims(high, axis), 0.0)
    s1, s2 = sum2(d, d * d, axis)
    low = quotient(s1, n)
    m2 = s2 - s1 * low
    scale = tl.full(m2.shape, 1.0, m2.dtype)
    if any_inf(s2):
        overflow = s2 == float("inf")
        scaled = d * BIG_SCALE
        m2 = tl.where(overflow, tl.sum(scaled * scaled, axis=axis) - (s1 * BIG_SCALE) * (low * BIG_SCALE), m2)
        scale = tl.where(overflow, BIG_SCALE, 1.0).to(m2.dtype)
    return d, high, low, tl.where(m2 < 0, 0.0, m2), scale


@triton.jit
def squares(x):
    """m2 and scale about zero, of rows whose places outside are 0."""
    m2 = tl.sum(x * x, axis=1)
    scale = tl.full(m2.shape, 1.0, m2.dtype)
    if any_inf(m2):
        overflow = m2 == float("inf")
        scaled = x * BIG_SCALE
        m2 = tl.where(overflow, tl.sum(scaled * scaled, axis=1), m2)
        scale = tl.where(overflow, BIG_SCALE, 1.0).to(m2.dtype)
    return m2, scale


@triton.jit
def add_shifted(s1, s2, x, shift, scale, mask):
    """s1 + d and s2 + d * d, where d is (x - shift) * scale, and 0 where `mask` is not set; `scale` is None where it is 1."""
    d = x - shift
    if scale is not None:
        d = d * scale
    d = tl.where(mask, d, 0.0)
    return s1 + d, s2 + d * d


@triton.jit
def shifted_moments(shift, s1, s2, n, scale):
    """high, low and m2 (in units of scale^-2) from s1 = sum((x - shift) * scale) and s2, the sum of its squares.

    Cancellation in s2 - s1^2 / n costs (shift - mean)^2 / var units of the last place: `shift` has to be a mean of many.
    """
    delta = quotient(s1, n)
    m2 = s2 - s1 * delta
    delta = unscaled(delta, scale)
    high = shift + delta
    low = if_finite((shift - high) + delta, high)
    return high, low, tl.where(m2 < 0, 0.0, m2)
