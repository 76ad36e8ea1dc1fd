"""The truth: norms and their gradients in numpy's widest float (80 bits or more), from the same rounded inputs.

Independent of the package, so that `fastnorm.reference` is tested by it like every other backend.
"""

from types import SimpleNamespace

import numpy as np
import torch

WIDE = np.longdouble


def wide(t):
    return None if t is None else t.detach().cpu().double().numpy().astype(WIDE)


def _norm(x, weight, bias, dy, eps, axes, running=None):
    """x, dy broadcast against weight and bias; statistics over `axes`, or the `running` (mean, var) given."""
    mean, var = (x.mean(axes, keepdims=True), x.var(axes, keepdims=True)) if running is None else running
    rstd = 1 / np.sqrt(var + WIDE(eps))
    x_hat = (x - mean) * rstd
    y = x_hat * (1 if weight is None else weight) + (0 if bias is None else bias)
    out = SimpleNamespace(y=y, mean=mean, var=var, rstd=rstd, x_hat=x_hat)
    if dy is not None:
        g = dy * (1 if weight is None else weight)
        out.c1 = (g * x_hat).mean(axes, keepdims=True) if running is None else 0
        out.c2 = g.mean(axes, keepdims=True) if running is None else 0
        out.dx = (g - out.c2 - x_hat * out.c1) * rstd
        out.dx_terms = np.abs(g * rstd).max(initial=0)  # what cancels in dx, and is rounded before it does
        out.dz_x_hat = dy * x_hat
    return out


def _terms(t, dz, axes):
    """What a sum of random terms comes to, whatever this one happened to come to."""
    t.dweight_terms = np.sqrt((t.dz_x_hat**2).sum(axes).max(initial=0))
    t.dbias_terms = np.sqrt((dz**2).sum(axes).max(initial=0))


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, dy=None):
    """y, dx, dweight, dbias in the shapes of torch's; mean, var, rstd as (M,)."""
    shape, N = tuple(x.shape), int(np.prod(normalized_shape))
    rows = lambda t: None if t is None else wide(t).reshape(-1, N)
    t = _norm(rows(x), rows(weight), rows(bias), rows(dy), eps, (1,))
    t.y, t.mean, t.var, t.rstd = t.y.reshape(shape), t.mean[:, 0], t.var[:, 0], t.rstd[:, 0]
    if dy is not None:
        t.dx = t.dx.reshape(shape)
        _terms(t, rows(dy), (0,))
        t.dweight = t.dz_x_hat.sum(0).reshape(normalized_shape)
        t.dbias = rows(dy).sum(0).reshape(normalized_shape)
    return t


def batch_norm(x, weight=None, bias=None, eps=1e-5, dy=None, running_mean=None, running_var=None):
    """y, dx, dweight, dbias in the shapes of torch's; mean, var, rstd, c1, c2 as (C,). Evaluation where given statistics."""
    axes = (0, *range(2, x.dim()))
    column = lambda t: None if t is None else wide(t).reshape(1, -1, *[1] * (x.dim() - 2))
    running = None if running_mean is None else (column(running_mean), column(running_var))
    t = _norm(wide(x), column(weight), column(bias), wide(dy), eps, axes, running)
    for name in ("mean", "var", "rstd", "c1", "c2"):
        if np.ndim(getattr(t, name, 0)):
            setattr(t, name, getattr(t, name).reshape(-1))
    t.count = x.numel() // x.shape[1]
    if dy is not None:
        _terms(t, wide(dy), axes)
        t.dweight, t.dbias = t.dz_x_hat.sum(axes), wide(dy).sum(axes)
    return t


def error(actual, truth):
    """The largest absolute difference; infinite where one is NaN and the other is not."""
    actual = wide(actual)
    assert actual.shape == truth.shape, f"shape {actual.shape} instead of {truth.shape}"
    difference = np.abs(actual - truth)
    assert not np.isnan(difference).any(), "not a number where the truth is one"
    return difference.max(initial=0)


def ulp(dtype, size):
    """One unit in the last place of `dtype` at a value of this size."""
    info = torch.finfo(dtype)
    return 2.0 ** np.floor(np.log2(max(float(size), info.tiny))) * info.eps
