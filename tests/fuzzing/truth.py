"""The truth of a call and the bound of each result: norms and their gradients in numpy's float64, of float64 in its longdouble.

In plain formulas, and only of what tensors hold: where they lie has no part in it, so that a strided call is held to what its
dense copy is held to.
"""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import numpy as np
import torch
from compare import accumulate
from ghosts import dealt

from .near import OF_RESULT, Near, activated, sloped

# recompute="output": by how much x_hat is off, in its own terms, beside the output's rounding: see fastnorm/recompute.py.
ROUNDINGS = 7


class Groups:
    """Which elements share their statistics: those along `axes`, of the same part of the samples; some may not count."""

    def __init__(self, shape, axes, counts=None, parts=None):
        self.axes, self.parts = axes, parts or [slice(None)]
        self.counts = np.ones((1,) * len(shape), bool) if counts is None else counts
        self.most = prod(shape[a] for a in axes)

    def _each(self, function, a):
        out = np.empty_like(a)
        for part in self.parts:
            out[part] = function(a[part], np.broadcast_to(self.counts, a.shape)[part])
        return out

    def n(self, a):
        """For each element, how many count in its group, at least 1."""
        return self._each(lambda _, counts: np.maximum(counts.sum(self.axes, keepdims=True), 1), a)

    def some(self, a):
        return self._each(lambda _, counts: counts.any(self.axes, keepdims=True), a) > 0

    def mean(self, a):
        """Of what counts."""
        return self._each(lambda a, counts: (a * counts).sum(self.axes, keepdims=True), a) / self.n(a)

    def total(self, a):
        """Of everything."""
        return self._each(lambda a, _: a.sum(self.axes, keepdims=True), a)


def truth(call, t, h=None):
    """Results by name, before they are rounded. `h` is the stream as it was stored, which is what is normalised."""
    u = torch.finfo(accumulate(call.x.dtype)).eps
    float_ = np.longdouble if call.x.dtype == torch.float64 else np.float64
    number = lambda p: p.detach().double().numpy().astype(float_)

    def near(p, shape=None):
        """A parameter, rounded to the accumulate dtype where it is wider."""
        v = number(p) if shape is None else number(p).reshape(shape)
        wider = torch.finfo(p.dtype).eps < u
        return Near(v, u * np.abs(v) * wider, u)

    there, back, groups, parameters = geometry(call, t)
    x = there(number(t.x if h is None else h))
    given = SimpleNamespace(near=near, x=x, groups=groups, parameters=parameters, there=there, number=number, u=u)
    out = {}
    if h is not None:
        out["h"] = onto_the_stream(call, t, given)
    evaluated = not call.training and call.kind == "channels" and call.running is not None
    if call.kind == "channels" and call.running is not None and not groups.counts.any():
        evaluated = True  # of nothing there are no statistics
    dev, rstd, statistics = evaluation(given, t, call) if evaluated else own_statistics(given, call)
    out |= {} if evaluated or statistics is None else running(call, t, statistics, given)
    x_hat = dev * rstd
    affine = _affine(call, t, given)
    z = x_hat
    z = z if affine.factor is None else z * affine.factor
    z = z if affine.offset is None else z + affine.offset
    info = torch.finfo(call.x.dtype)
    stored = (lambda z: z.rounded(info)) if call.mask is not None or call.lengths is not None else (lambda z: z)
    z = stored(z)  # after a norm with a mask come torch's own operators
    if t.residual is not None and h is None:
        z = stored(z + near(t.residual).map(there))
    out["y"] = activated(z, *call.alpha).map(back)
    out |= gradients(call, t, given, x_hat, rstd, z, affine, evaluated)
    return out


def geometry(call, t):
    """There and back between x and the shape in which parameters broadcast, the groups, and the shape of parameters there."""
    shape, same = call.x.shape, lambda a: a
    if call.kind == "rows":
        axes = tuple(range(len(shape) - call.dims, len(shape)))
        return same, same, Groups(shape, axes, counts(call, t, shape, None)), call.normalized_shape
    if call.kind == "groups":
        split = (shape[0], call.groups, shape[1] // call.groups, *shape[2:])
        there, back = (lambda a, s=s: a.reshape(s) for s in (split, shape))
        return there, back, Groups(split, tuple(range(2, len(split)))), (1, *split[1:3], *[1] * len(shape[2:]))
    c = call.channels
    there, back = (lambda a: np.moveaxis(a, c, 1)), (lambda a: np.moveaxis(a, 1, c))
    moved = (*(s := [n for i, n in enumerate(shape) if i != c])[:1], shape[c], *s[1:])
    parameters = (1, shape[c], *[1] * len(moved[2:]))
    if call.kind == "positions":
        return there, back, Groups(moved, (1,)), parameters
    axes = tuple(range(2, len(moved))) if call.function == "instance_norm" else (0, *range(2, len(moved)))
    parts = dealt(moved[0], call.ghosts) if call.ghosts and call.training else None
    counted = counts(call, t, s, 1) if call.training or call.running is None else None
    return there, back, Groups(moved, axes, counted, parts), parameters


def counts(call, t, shape, axis):
    """Where an element counts, to broadcast against x there; None where all do."""
    if t.mask is None and t.lengths is None:
        return None
    if t.lengths is not None:
        mask = (torch.arange(shape[1]) < t.lengths[:, None]).numpy()
    else:
        mask = t.mask.numpy()
    mask = mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim))
    return mask if axis is None else np.expand_dims(mask, axis)


def onto_the_stream(call, t, given):
    """h"""
    branch = Near(given.there(given.number(t.x)), 0.0, given.u)
    if call.branched:
        branch = branch * _factor(call, t, given)
    return branch + given.there(given.number(t.residual))


def _factor(call, t, given, without=None):
    """What the branch is multiplied with."""
    factor = Near(np.ones(call.x.shape, given.x.dtype), 0.0, given.u)
    if call.dropout:
        factor = Near(given.number(t.kept) / (1 - call.dropout) if call.dropout < 1 else factor.v * 0, 0.0, given.u)
    if t.row_scale is not None:
        factor = factor * given.near(t.row_scale, _along(t.row_scale, call.x.shape))
    return factor if t.layer_scale is None or without == "layer_scale" else factor * given.near(t.layer_scale)


def _along(row_scale, shape):
    return (*row_scale.shape, *[1] * (len(shape) - row_scale.dim()))


def own_statistics(given, call):
    """x - mean, rstd, and (mean, var) for the running statistics.

    What the mean is off by is of the size of the deviations, because the second number of its pair is the mean of what the
    first one leaves.
    """
    g, x, u = given.groups, given.x, given.u
    more = u * (1 + np.log2(max(g.most, 1)) / 2)
    mean = g.mean(x) if call.function not in ("rms_norm", "add_rms_norm") else np.zeros_like(x)
    d = np.where(g.some(x), x - mean, x)
    off = more * g.mean(np.abs(d)) + _of_a_mean(call, u) * np.abs(mean) if mean.any() else np.zeros_like(x)
    var = g.mean(d * d)
    squared = (2 * more + 4 * u) * var + off * off
    if call.mask is not None or call.lengths is not None:
        var = np.where(g.some(x), var, 1)
    eps = torch.finfo(accumulate(call.x.dtype)).eps if call.eps is None else call.eps
    v = 1 / np.sqrt(var + x.dtype.type(eps))
    rstd = Near(v, v * (squared / (2 * (var + eps)) + 3 * u), u)
    return Near(d, u * np.abs(d) + off, u), rstd, (Near(mean, off + u * np.abs(d), u), Near(var, squared, u))


def evaluation(given, t, call):
    mean, var = (given.number(s).reshape(given.parameters) for s in (t.mean, t.var))
    d, u = given.x - mean, given.u
    v = 1 / np.sqrt(var + d.dtype.type(call.eps))
    return Near(d, u * np.abs(d) + _of_a_mean(call, u) * np.abs(mean), u), Near(v, 3 * u * v, u), None


def _of_a_mean(call, u):
    """What a mean is off by in its own terms. Of float32 it is a pair of numbers. Of float64 one of them is enough; of 16 bits,
    where mean / std is at most 2**11, it costs at most 2**-12, half a unit in the last place of 1."""
    return 4 * u * u if call.x.dtype == torch.float32 else u


def running(call, t, statistics, given):
    """The running statistics after the call."""
    if call.running is None:
        return {}
    g, (mean, var), x = given.groups, statistics, given.x
    n = g.n(x)
    var = var * (n / np.maximum(n - 1, 1))
    over = tuple(i for i in range(x.ndim) if i != 1)
    new = [s.map(lambda a: np.broadcast_to(a, x.shape).mean(over)) for s in (mean, var)]  # over ghost batches and instances too
    momentum = call.momentum
    if not g.some(x).any():
        momentum = 0.0
    u = max(given.u, torch.finfo(accumulate(call.running)).eps)  # in what they are updated
    out = {}
    for name, old, s in zip(("running_mean", "running_var"), (t.mean, t.var), new, strict=True):
        m = x.dtype.type(1 / 4 if momentum is None else momentum)
        if momentum is None:  # the average over all batches is made of the statistics of this one, rounded
            s = s.rounded(torch.finfo(call.running))
        out[name] = Near(given.number(old), 0.0, u) * (1 - m) + Near(s.v, s.t + u * np.abs(s.v), u) * m
    return out


def _affine(call, t, given):
    """z = x_hat * factor + offset; 1 + scale on its own, and weight and bias without it."""
    shape = given.parameters
    w, b = (None if p is None else given.near(p, shape) for p in (t.weight, t.bias))
    if t.scale is None:
        return SimpleNamespace(factor=w, offset=b, w=w, b=b, one=None)
    one = given.near(t.scale) + 1.0
    factor = one if w is None else one * w
    offset = given.near(t.shift) if b is None else given.near(t.shift) + one * b
    return SimpleNamespace(factor=factor, offset=offset, w=w, b=b, one=one)


def gradients(call, t, given, x_hat, rstd, z, affine, evaluated):
    there, back, groups, u = given.there, geometry(call, t)[1], given.groups, given.u
    wanted, out = call.leaves(t), {}
    if not wanted:
        return out
    dy = Near(there(given.number(t.dy)) if "y" in call.used else np.zeros_like(given.x), 0.0, u)
    dz = dy
    if call.activation is not None:  # handed on in x's dtype, as by torch's operators
        dz = (dy * _slope(call, z)).rounded(torch.finfo(call.x.dtype))
    if call.recompute:
        x_hat = _recomputed(call, given, x_hat, affine)
    plain = dz if affine.one is None else dz * affine.one
    shape = given.parameters
    for name, terms in (("weight", lambda: plain * x_hat), ("bias", lambda: plain), ("shift", lambda: dz)):
        if name in wanted:
            of = wanted[name].shape if name == "shift" else shape
            out[f"d{name}"] = terms().sum_to(of).map(lambda a, s=wanted[name].shape: a.reshape(s))
    if "scale" in wanted:
        unscaled = x_hat if affine.w is None else x_hat * affine.w
        out["dscale"] = (dz * (unscaled if affine.b is None else unscaled + affine.b)).sum_to(t.scale.shape)
    dx = _dx(call, groups, dz if affine.factor is None else dz * affine.factor, x_hat, rstd, evaluated)
    if not call.function.startswith("add_"):
        found = {"x": dx, "residual": dz}
    else:
        found = _through_the_stream(call, t, given, dx, out, wanted)
    return out | {f"d{name}": found[name].map(back) for name in found if name in wanted}


def _slope(call, z):
    """After a norm with a mask torch's operators make it of their results, which are rounded to x's dtype."""
    slope = sloped(z, *call.alpha)
    if (call.mask is None and call.lengths is None) or call.alpha[0] not in OF_RESULT:
        return slope
    y = activated(z, *call.alpha).rounded(torch.finfo(call.x.dtype))
    return Near(slope.v, slope.t + OF_RESULT[call.alpha[0]](y.v) * y.t, slope.u)


def _dx(call, groups, g, x_hat, rstd, evaluated):
    plain = g * rstd
    if evaluated:
        return plain
    mean = lambda a: a.total(lambda v: groups.total(v) / groups.n(v), groups.most)
    c = x_hat * mean(g * x_hat)
    dx = (g - (c if call.function in ("rms_norm", "add_rms_norm") else mean(g) + c)) * rstd
    counts = np.broadcast_to(groups.counts, g.v.shape)
    return Near(np.where(counts, dx.v, plain.v), np.where(counts, dx.t, plain.t), g.u)


def _through_the_stream(call, t, given, dx, out, wanted):
    """dx and dresidual; the stream's gradient is rounded to its dtype before it goes through a branch."""
    dh = dx + (given.number(t.dh) if "h" in call.used else np.zeros_like(given.x))
    if "y" not in call.used:
        dh = Near(given.number(t.dh), 0.0, given.u)
    if not call.branched:
        return {"x": dh, "residual": dh}
    dh = dh.rounded(torch.finfo(call.stream))
    if "layer_scale" in wanted:
        terms = dh * given.number(t.x) * _factor(call, t, given, "layer_scale")
        out["dlayer_scale"] = terms.sum_to(t.layer_scale.shape)
    return {"x": dh * _factor(call, t, given), "residual": dh}


def _recomputed(call, given, x_hat, affine):
    """x_hat of backward: it comes from the rounded output, but for columns with a small weight."""
    half = torch.finfo(call.x.dtype).eps / 2 + ROUNDINGS * given.u
    w = np.ones_like(x_hat.v[:1]) if affine.w is None else np.abs(affine.w.v)
    b = np.zeros_like(w) if affine.b is None else np.abs(affine.b.v)
    kept = w < b / 8
    off = np.where(kept, 0, 2 * half * (np.abs(x_hat.v) + np.where(kept, 0, b / np.where(w == 0, 1, w)) + 1))
    return Near(x_hat.v, x_hat.t + off, x_hat.u)
