"""Group norm, kernel by kernel: at most as far from float64 as torch's own group norm and activation, one after the other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, Case
from compare import accumulate
from sequences import Fused, cancelling, check, differentiated, size

from fastnorm import reference
from fastnorm.activations import ACTIVATIONS

SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
SMALL = Case((3, 6, 5, 7))
# (shape, groups): one channel a group and one group, single elements, runs of every length, groups of any size.
SHAPES = [
    *(((2, 6, 1), 3), ((3, 4), 2), ((1, 4, 16), 1), ((3, 12, 5), 12), ((2, 6, 3, 3), 2), ((5, 32, 8, 8), 8)),
    *(
        ((2, 64, 14, 14), 32),
        ((2, 10, 33), 5),
        ((2, 8, 40, 40), 2),
        ((1, 8, 50, 50), 1),
        ((9, 30, 17), 3),
        ((2, 320, 4, 4), 32),
    ),
]
GROUPS = [
    *(Fused(SMALL, a, groups=3) for a in ACTIVATIONS),
    *(Fused(replace(SMALL, **SAME(BF16)), a, groups=2) for a in ACTIVATIONS),
    *(Fused(Case(s, **SAME(d)), a, groups=g) for s, g in SHAPES for d, a in ((F32, "silu"), (BF16, "identity"))),
    *(Fused(replace(SMALL, **missing), "gelu", groups=3) for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *(Fused(Case((3, 6, 4, 6), dtype=x, weight=w, bias=b), "relu", groups=3) for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F64, F64, F64)]),
    *(Fused(replace(SMALL, layout=layout), "silu", groups=2)
      for layout in ("channels_last", "row_strided", "column_strided", "transposed", "expanded")),
    Fused(Case((4, 8, 12, 12), offset=1e4), "silu", groups=4),
    Fused(Case((4, 8, 40, 40), offset=1e4), groups=2),
    *(Fused(Case((4, 8, 5, 5), scale=scale), "leaky_relu", groups=4) for scale in (1e-4, 1e4)),
]  # fmt: skip


def statistics(fused, x):
    """What the contract's mean and rstd are, computed in float64."""
    wide = x.double().reshape(len(x) * fused.groups, -1)
    acc = accumulate(x.dtype)
    return reference.split(wide.mean(1), acc), torch.rsqrt(wide.var(1, correction=0) + fused.case.eps).to(acc)


@pytest.mark.parametrize("fused", GROUPS, ids=str)
def test_groups(fused, backend, device):
    x, dy, weight, bias, *_ = inputs = fused.inputs(device, 0, False)
    truth = differentiated("groups", fused, F64, *inputs)
    options = fused.activation, fused.alpha
    y, mean, rstd = backend.group_fwd(x, weight, bias, *options, fused.case.eps, fused.groups)
    exact_mean, exact_rstd = statistics(fused, x)
    assert mean.shape == (2, rstd.numel())
    torch.testing.assert_close(mean.double().sum(0), exact_mean.double().sum(0), rtol=1e-6, atol=1e-6 * fused.case.scale)
    torch.testing.assert_close(rstd, exact_rstd, rtol=2e-6, atol=0)
    need = (True, *(None if p is None else p.dtype for p in (weight, bias)))
    gradients = backend.group_bwd(dy, x, weight, bias, *options, exact_mean, exact_rstd, need)
    names = ("dx", "dweight", "dbias")
    results = {"y": y} | {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    assert [name for name in names if name in results] == [n for n, w in zip(names, need, strict=True) if w]
    assert all(results[name].is_contiguous() and results[name].dtype == x.dtype for name in ("y", "dx"))
    check("groups", fused, results, truth, device, cancelling("groups", fused, x, weight, truth["dz"]))


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize(("shape", "groups"), [((3, 6, 20), 3), ((2, 4, 60, 60), 2)])
def test_gradients_that_are_not_wanted(shape, groups, wanted, backend, device):
    """Each alone and all combinations: what is not wanted is None, what is wanted is as it is among all."""
    x, dy, weight, bias, *_ = Fused(Case(shape), groups=groups).inputs(device, 0, False)
    _, *s = reference.group_fwd(x, weight, bias, "gelu", 0.0, 1e-5, groups)
    run = lambda need: backend.group_bwd(dy, x, weight, bias, "gelu", 0.0, *s, need)
    bits = [bool(wanted >> i & 1) for i in range(3)]
    some = run((bits[0], *(F32 if bit else None for bit in bits[1:])))
    for bit, one, full in zip(bits, some, run((True, F32, F32)), strict=True):
        assert (one is not None) == bit
        if bit:
            torch.testing.assert_close(one, full, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("S", [1, 5, 40, 2500])
def test_groups_whose_squares_overflow(S, backend, device):
    """Up to 1e30 what is finite stays finite, beside groups of the usual size, and as exact as these."""
    sizes = torch.tensor([1.0, 1e30, 1e18, 1e-3], device=device).repeat_interleave(2)[None, :, None]
    x = torch.randn(2, 8, S, device=device) * sizes
    y, mean, rstd = backend.group_fwd(x, None, None, "identity", 0.0, 1e-5, 4)
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 4), rtol=2e-6, atol=2e-6)
    dx = backend.group_bwd(x / sizes, x, None, None, "identity", 0.0, mean, rstd, (True, None, None))[0]
    assert dx.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(value, backend, device):
    x = torch.randn(2, 6, 20, device=device)
    x[1, 3, 7] = value
    y = backend.group_fwd(x, None, None, "identity", 0.0, 1e-5, 3)[0]
    torch.testing.assert_close(y, F.group_norm(x, 3), equal_nan=True, rtol=2e-6, atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch(backend, device):
    """To the bit: y and dx; and two runs give the same bits of everything. torch's silu differs at an array's end."""
    x, dy, weight, bias, *_ = Fused(Case((7, 6, 33)), groups=3).inputs(device, 0, False)
    activation = "identity" if backend is reference else "silu"
    run = lambda x, dy: _both(backend, x, dy, weight, bias, activation)
    y, dx, *sums = run(x, dy)
    for i in (0, 3, 6):
        alone_y, alone_dx, *_ = run(x[i : i + 1], dy[i : i + 1])
        assert torch.equal(alone_y[0], y[i])
        assert torch.equal(alone_dx[0], dx[i])
    assert all(torch.equal(a, b) for a, b in zip((y, dx, *sums), run(x, dy), strict=True))


def _both(backend, x, dy, weight, bias, activation):
    y, mean, rstd = backend.group_fwd(x, weight, bias, activation, 0.0, 1e-5, 3)
    return y, *backend.group_bwd(dy, x, weight, bias, activation, 0.0, mean, rstd, (True, F32, F32))


def test_sizes_mean_what_they_say():
    """The bound of these tests grows with a result, and is not nothing where there is none."""
    assert size(torch.zeros(3)) > 0
    assert size(torch.tensor([-3.0, 1.0])) == 3
