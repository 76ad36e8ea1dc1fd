"""What every norm of (B, C, *) with parameters of channels that ends in an activation is held to, kernel by kernel: group norm
and layer norm over channels, which the contract calls `group` and `position`."""

import itertools

import torch
from cases import F32, F64
from compare import accumulate, assert_same_sums
from sequences import cancelling, check, differentiated

from fastnorm import reference


def forward(backend, kind):
    return getattr(backend, f"{kind}_fwd")


def backward(backend, kind):
    return getattr(backend, f"{kind}_bwd")


def statistics(fused, x, rows, axis):
    """What the contract's mean and rstd are, in float64, of x in the shape `rows` over this axis."""
    wide, acc = x.double().reshape(rows), accumulate(x.dtype)
    mean, var = wide.mean(axis).reshape(-1), wide.var(axis, correction=0).reshape(-1)
    return reference.split(mean, acc), torch.rsqrt(var + fused.case.eps).to(acc)


def check_kernels(kind, fused, backend, device, rows, axis, *more):
    """Both directions, the backward from the truth's statistics; `rows` is x's shape for these, as a function of it."""
    x, dy, weight, bias, *_ = inputs = fused.inputs(device, 0, False)
    truth = differentiated(f"{kind}s", fused, F64, *inputs)
    options = fused.activation, fused.alpha
    y, mean, rstd = forward(backend, kind)(x, weight, bias, *options, fused.case.eps, *more)
    exact_mean, exact_rstd = statistics(fused, x, rows(x.shape), axis)
    assert mean.shape == (2, rstd.numel())
    torch.testing.assert_close(mean.double().sum(0), exact_mean.double().sum(0), rtol=1e-6, atol=1e-6 * fused.case.scale)
    torch.testing.assert_close(rstd, exact_rstd, rtol=2e-6, atol=0)
    need = (True, *(None if p is None else p.dtype for p in (weight, bias)))
    gradients = backward(backend, kind)(dy, x, weight, bias, *options, exact_mean, exact_rstd, need)
    names = ("dx", "dweight", "dbias")
    results = {"y": y} | {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    assert [name for name in names if name in results] == [n for n, w in zip(names, need, strict=True) if w]
    assert all(results[name].is_contiguous() and results[name].dtype == x.dtype for name in ("y", "dx"))
    check(f"{kind}s", fused, results, truth, device, cancelling(f"{kind}s", fused, x, weight, truth["dz"]))


def check_wanted(kind, fused, backend, device, *more):
    """Each alone and all combinations: what is not wanted is None, what is wanted is as it is among all."""
    x, dy, weight, bias, *_ = fused.inputs(device, 0, False)
    _, *s = forward(reference, kind)(x, weight, bias, "gelu", 0.0, 1e-5, *more)
    run = lambda need: backward(backend, kind)(dy, x, weight, bias, "gelu", 0.0, *s, need)
    every = run((True, F32, F32))
    for need in itertools.product((True, False), (F32, None), (F32, None)):
        for wanted, one, full in zip(need, run(need), every, strict=True):
            assert (one is not None) == bool(wanted), need
            if wanted:
                assert_same_sums(one, full, x, need)


def check_batches(kind, fused, backend, device, *more):
    """y and dx of a sample do not depend on its batch, to the bit, and two runs give the same bits of everything.

    torch's silu differs at an array's end.
    """
    x, dy, weight, bias, *_ = fused.inputs(device, 0, False)
    activation = "identity" if backend is reference else "silu"

    def run(x, dy):
        y, mean, rstd = forward(backend, kind)(x, weight, bias, activation, 0.0, 1e-5, *more)
        return y, *backward(backend, kind)(dy, x, weight, bias, activation, 0.0, mean, rstd, (True, F32, F32))

    y, dx, *sums = run(x, dy)
    for i in (0, len(x) // 2, len(x) - 1):
        alone_y, alone_dx, *_ = run(x[i : i + 1], dy[i : i + 1])
        assert torch.equal(alone_y[0], y[i])
        assert torch.equal(alone_dx[0], dx[i])
    assert all(torch.equal(a, b) for a, b in zip((y, dx, *sums), run(x, dy), strict=True))
