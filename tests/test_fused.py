"""Fused norms, kernel by kernel: what surrounds a norm is at most as far from float64 as torch.nn's sequence of operators."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, Case
from compare import accumulate
from sequences import Fused, cancelling, check, differentiated
from torch._prims_common import suggest_memory_format

from fastnorm import reference
from fastnorm.activations import ACTIVATIONS


def dtypes(weight, bias):
    return (None if p is None else p.dtype for p in (weight, bias))


SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
SMALL, HALF = Case((6, 33)), Case((5, 40), **SAME(BF16))
ROW_SHAPES = [(3, 1), (5, 7), (9, 15), (33, 64), (2, 3, 100), (3, 768), (3, 4097), (2, 6000), (2, 9001), (2, 10000),
              (2, 33000)]  # fmt: skip
# Shapes and parts: of one row, of a few, of more rows than a program has, and of rows that are split.
PARTED = [((3, 7), 3), ((6, 16), 2), ((4, 9, 33), 4), ((2, 70, 768), 2), ((4, 2, 4100), 4), ((2, 3, 10000), 2), ((4, 33000), 2)]
ROWS = [
    *(Fused(SMALL, a) for a in ACTIVATIONS),
    *(Fused(HALF, a, residual="dense") for a in ACTIVATIONS),
    *(Fused(Case(s, **SAME(d)), "gelu", residual="dense", addend=True) for s in ROW_SHAPES for d in (F32, BF16)),
    *(Fused(Case(s, **SAME(d)), "silu", centre=False, addend=True) for s in ROW_SHAPES for d in (F32, BF16)),
    *(Fused(Case(s, bias=None), centre=False) for s in ROW_SHAPES),
    *(Fused(replace(SMALL, **missing), "relu", addend=True) for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *(Fused(Case((6, 33), dtype=x, weight=w, bias=b), "tanh", residual="dense") for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32)]),
    *(Fused(Case((4, 6, 24), layout=layout), "elu", residual=layout, addend=True)
      for layout in ("row_strided", "transposed", "mT", "every_second", "expanded")),
    *(Fused(Case((7, 100), **SAME(d)), "gelu_tanh", residual="dense", addend=True) for d in (F64, F16)),
    Fused(Case((2, 5, 6, 4), dims=2), "sigmoid", residual="transposed"),
    Fused(Case((4, 512), offset=1e4), "silu", residual="dense"),
    *(Fused(Case((4, 48), scale=scale), "leaky_relu", centre=centre) for scale in (1e-4, 1e4) for centre in (True, False)),
    *(Fused(Case(s, **SAME(d)), parts=p) for d in (F32, BF16) for s, p in PARTED),
    *(Fused(Case((4, 6, 24), layout=layout), "silu", residual=layout, addend=True, centre=c, parts=4)
      for layout, c in (("dense", True), ("dense", False), ("transposed", True), ("mT", True), ("expanded", True))),
    Fused(Case((4, 6, 24), bias=None), parts=4),
    *(Fused(Case((6, 5, 32), dtype=x, weight=p, bias=p), parts=3) for x, p in ((BF16, F32), (F16, F16), (F64, F64))),
]  # fmt: skip

PIXELS, FEW_CHANNELS = Case((4, 6, 5, 7)), Case((16, 3, 40, 40))
CHANNEL_SHAPES = [(8, 5), (64, 64), (4, 6, 10), (2, 3, 300), (2, 3, 7, 7), (3, 65, 5, 5), (2, 16, 14, 14), (24, 40, 6, 6)]
CHANNELS = [
    *(Fused(PIXELS, a) for a in ACTIVATIONS),
    *(Fused(replace(PIXELS, **SAME(BF16)), a, residual="dense") for a in ACTIVATIONS),
    *(Fused(Case(s, **SAME(d)), "relu", residual=r) for s in CHANNEL_SHAPES for d in (F32, BF16) for r in (None, "dense")),
    *(Fused(Case(s), "silu", residual="dense", training=False) for s in CHANNEL_SHAPES),
    *(Fused(replace(PIXELS, **missing), "gelu", residual="dense") for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *(Fused(replace(PIXELS, layout=layout), "relu", residual=other)
      for layout in ("channels_last", "row_strided", "column_strided", "transposed", "expanded")
      for other in ("dense", layout)),
    *(Fused(replace(PIXELS, layout="channels_last", **SAME(BF16)), "relu", residual="channels_last", training=t)
      for t in (True, False)),
    *(Fused(replace(FEW_CHANNELS, **SAME(d), layout=layout), "silu", residual=r, training=t)
      for d, layout, t in ((F32, "dense", True), (BF16, "dense", True), (F32, "dense", False), (F32, "channels_last", True))
      for r in (None, layout)),
    Fused(Case((16, 8, 20, 21), layout="channels_last", **SAME(BF16)), "gelu", residual="channels_last"),
    Fused(Case((16, 3, 21, 21)), "tanh", residual="channels_last"),
    Fused(Case((3, 20, 9), layout="mT"), "elu", residual="mT"),
    *(Fused(Case((3, 4, 5, 5), dtype=x, weight=w, bias=b), "leaky_relu", residual="dense")
      for x, w, b in [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F64, F32, F32)]),
    Fused(Case((64, 4, 8, 8), offset=1e4), "relu", residual="dense"),
    Fused(Case((64, 4, 8, 8), layout="channels_last", offset=1e4), "silu"),
]  # fmt: skip


def row_statistics(fused, h):
    """What the contract's mean and rstd are, computed in float64."""
    N = torch.Size(fused.case.normalized_shape).numel()
    wide = h.double().reshape(-1, N)
    mean = wide.mean(1) if fused.centre else torch.zeros_like(wide[:, 0])
    rstd = torch.rsqrt((wide - mean[:, None]).square().mean(1) + fused.case.eps)
    acc = accumulate(h.dtype)
    return reference.split(mean, acc), rstd.to(acc)


@pytest.mark.parametrize("fused", ROWS, ids=str)
def test_rows(fused, backend, device):
    x, dy, weight, bias, addend, residual, dh = inputs = fused.inputs(device, 0, True)
    truth = differentiated("rows", fused, F64, *inputs)
    if addend is not None:  # what follows is of h as it is stored
        stored = (x.to(accumulate(x.dtype)) + addend.to(accumulate(x.dtype))).to(x.dtype)
        exact = differentiated("rows", replace(fused, addend=False), F64, stored, dy, weight, bias, None, residual, None)
        truth = {**exact, "h": truth["h"], "dx": exact["dx"] + dh.double()}
    case, N = fused.case, torch.Size(fused.case.normalized_shape).numel()
    y, h, mean, rstd = backend.row_fused_fwd(
        x, addend, weight, bias, residual, fused.activation, fused.alpha, case.eps, N, fused.centre
    )
    assert (h is None) == (addend is None)
    expected_mean, expected_rstd = row_statistics(fused, x if h is None else h)
    assert mean.shape == (2, rstd.numel())
    torch.testing.assert_close(mean.double().sum(0), expected_mean.double().sum(0), rtol=1e-6, atol=1e-6 * case.scale)
    torch.testing.assert_close(rstd, expected_rstd, rtol=2e-6, atol=0)
    results = {"y": y} if h is None else {"y": y, "h": h}
    need = (True, *dtypes(weight, bias), residual is not None)
    saved = x if h is None else h
    gradients = backend.row_fused_bwd(
        dy, dh, saved, residual, weight, bias, fused.activation, fused.alpha, expected_mean, expected_rstd, need, fused.centre
    )
    names = ("dx", "dweight", "dbias", "dresidual")
    results |= {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    assert [name for name in names if name in results] == [n for n, w in zip(names, need, strict=True) if w]
    for name in ("dweight", "dbias"):
        if name in results:
            results[name] = results[name].view(truth[name].shape)
    assert all(t.is_contiguous() and t.dtype == x.dtype for name, t in results.items() if name not in ("dweight", "dbias"))
    check("rows", fused, results, truth, device, cancelling("rows", fused, x if h is None else h, weight, truth["dz"]))


@pytest.mark.parametrize("fused", CHANNELS, ids=str)
def test_channels(fused, backend, device):
    x, dy, weight, bias, _, residual, _ = inputs = fused.inputs(device, 0, False)
    truth = differentiated("channels", fused, F64, *inputs)
    running, tracked = fused.case.running(device, F32), torch.zeros((), dtype=torch.int64, device=device)
    expected = [t.clone() for t in running]
    options = (fused.training, 0.1, fused.case.eps)
    y, mean, rstd, kept = backend.channel_fused_fwd(
        x, weight, bias, residual, fused.activation, fused.alpha, *running, *options, tracked, keep=True
    )
    _, exact_mean, exact_rstd = reference.channel_fwd(x.double(), None, None, *expected, *options)
    assert tracked == int(fused.training)
    for ours, theirs in zip(running, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    acc = accumulate(x.dtype)
    exact_mean, exact_rstd = reference.split(exact_mean.sum(0), acc), exact_rstd.to(acc)
    torch.testing.assert_close(mean.double().sum(0), exact_mean.double().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd, exact_rstd, rtol=2e-6, atol=0)
    need = (True, *dtypes(weight, bias), residual is not None)
    gradients = backend.channel_fused_bwd(
        dy, x, kept, weight, bias, fused.activation, fused.alpha, exact_mean, exact_rstd, fused.training, need
    )
    names = ("dx", "dweight", "dbias", "dresidual")
    results = {"y": y} | {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    assert [name for name in names if name in results] == [n for n, w in zip(names, need, strict=True) if w]
    formatted = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()
    for name in ("y", "dx", "dresidual"):
        if name in results:
            assert results[name].stride() == formatted
            assert results[name].dtype == x.dtype
    check("channels", fused, results, truth, device, cancelling("channels", fused, x, weight, truth["dz"]))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("kind", "shape"), [("rows", (6, 20)), ("rows", (2, 17000)), ("training", (6, 20)),
                                             ("evaluation", (6, 20)), ("training", (16, 3, 30, 30))])  # fmt: skip
def test_gradients_that_are_not_wanted(kind, shape, activation, backend, device):
    """Each alone and all combinations: what is not wanted is None, what is wanted is as it is among all."""
    fused = Fused(Case(shape), activation, residual="dense")
    x, dy, weight, bias, _, residual, _ = fused.inputs(device, 0, kind == "rows")
    if kind == "rows":
        _, _, *s = reference.row_fused_fwd(x, None, weight, bias, residual, activation, 0.0, 1e-5, shape[-1])
        run = lambda need: backend.row_fused_bwd(dy, None, x, residual, weight, bias, activation, 0.0, *s, need)
    else:
        around = (weight, bias, residual, activation, 0.0, None, None, True, 0.1, 1e-5)
        _, *s, kept = backend.channel_fused_fwd(x, *around, keep=True)
        trains = kind == "training"
        run = lambda need: backend.channel_fused_bwd(dy, x, kept, weight, bias, activation, 0.0, *s, trains, need)
    every = run((True, F32, F32, True))
    for need in itertools.product((True, False), (F32, None), (F32, None), (True, False)):
        for wanted, one, full in zip(need, run(need), every, strict=True):
            assert (one is not None) == bool(wanted), need
            if wanted:
                torch.testing.assert_close(one, full, rtol=1e-6, atol=1e-6, msg=lambda words: f"{need}: {words}")


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("N", [33, 768, 4097, 33000])
def test_rows_whose_squares_overflow(N, centre, backend, device):
    """Up to 1e30 what is finite stays finite, beside rows of the usual size, and as exact as these."""
    sizes = torch.tensor([[1.0], [1e30], [1e18], [1e-3], [1e30]], device=device)
    x, addend = torch.randn(2, 5, N, device=device) * sizes
    y, h, mean, rstd = backend.row_fused_fwd(x, addend, None, None, None, "identity", 0.0, 1e-5, N, centre)
    torch.testing.assert_close(h, x + addend, rtol=0, atol=0)
    wide = h.double()
    expected = F.layer_norm(wide, (N,)) if centre else F.rms_norm(wide, (N,), eps=1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
    dx = backend.row_fused_bwd(
        x / sizes, None, h, None, None, None, "identity", 0.0, mean, rstd, (True, None, None, False), centre
    )[0]
    assert dx.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [True, False])
def test_gradients_stay_finite(activation, rows, backend, device):
    """Where z is 1e30; slopes there are those of a smaller one."""
    x, dy = torch.randn(4, 16, device=device), torch.randn(4, 16, device=device)
    residual = torch.tensor([1e30, -1e30, 1e20, -1e20, 1e10, -1e10, 40.0, -120.0], device=device).repeat(4, 2)
    alpha, slope = ACTIVATIONS[activation].alpha, ACTIVATIONS[activation].slope
    s = torch.zeros(2, 4 if rows else 16, device=device), torch.ones(4 if rows else 16, device=device)
    need = (True, None, None, True)
    if rows:
        dx, *_, dresidual = backend.row_fused_bwd(dy, None, x, residual, None, None, activation, alpha, *s, need)
    else:
        dx, *_, dresidual = backend.channel_fused_bwd(dy, x, residual, None, None, activation, alpha, *s, True, need)
    assert dx.isfinite().all()
    expected = dy * slope(residual.double().clamp(-1e4, 1e4), alpha)
    torch.testing.assert_close(dresidual, expected.to(dy.dtype), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [True, False])
def test_what_is_not_finite_goes_on_as_in_torch(activation, rows, backend, device):
    """NaN stays NaN, and only where torch has it; residuals of any size."""
    x = torch.randn(4, 16, device=device)
    residual = torch.tensor([0.0, 1e4, -1e4, 90.0, -90.0, 12.0, -12.0, float("nan")], device=device).repeat(4, 2)
    alpha = ACTIVATIONS[activation].alpha
    if rows:
        y = backend.row_fused_fwd(x, None, None, None, residual, activation, alpha, 1e-5, 16)[0]
        z = F.layer_norm(x, (16,)) + residual
    else:
        y = backend.channel_fused_fwd(x, None, None, residual, activation, alpha, None, None, True, 0.1, 1e-5)[0]
        z = F.batch_norm(x, None, None, training=True) + residual
    torch.testing.assert_close(y, ACTIVATIONS[activation].value(z, alpha), equal_nan=True, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", ["rows", "runs"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_nan_of_16_bits_stays_one(activation, layout, backend, device):
    """As x, as residual and as dy, whatever its bits."""
    nan = torch.tensor([*range(0x7F81, 0x8000), *range(0xFF81, 0x10000)], dtype=torch.int32).to(torch.int16).view(BF16)
    nan = nan.to(device).repeat(2, 3)[:, :736].reshape((2, 736) if layout == "rows" else (2, 2, 368))
    assert nan.isnan().all()
    zero, alpha = torch.zeros_like(nan), ACTIVATIONS[activation].alpha
    mean, rstd = torch.zeros(2, nan.shape[1], device=device), torch.ones(nan.shape[1], device=device)
    running = mean[0].clone(), torch.ones_like(mean[0])
    for x, residual in ((nan, None), (nan, zero), (zero, nan)):
        y = backend.channel_fused_fwd(x, None, None, residual, activation, alpha, *running, False, 0.1, 1e-5)[0]
        assert y.isnan().all()
    need = (True, None, None, True)
    dx, *_, dresidual = backend.channel_fused_bwd(nan, zero + 1, zero, None, None, activation, alpha, mean, rstd, False, need)
    assert dx.isnan().all()
    assert dresidual.isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_of_every_size_of_z(activation, backend, device):
    """In evaluation with mean 0 and rstd 1 z is x; beyond 12 nothing changes. As good as torch's backward, or 4 ulps of 1."""
    x = torch.linspace(-12, 12, 3 << 10, device=device).view(-1, 4)
    s = torch.zeros(2, 4, device=device), torch.ones(4, device=device)
    alpha = ACTIVATIONS[activation].alpha
    need = (True, None, None, False)
    dx, *_ = backend.channel_fused_bwd(torch.ones_like(x), x, None, None, None, activation, alpha, *s, False, need)
    truth = ACTIVATIONS[activation].slope(x.double(), alpha)
    leaf = x.clone().requires_grad_()
    (torchs,) = torch.autograd.grad(ACTIVATIONS[activation].value(leaf, alpha).sum(), leaf)
    error, allowed = ((d.double() - truth).abs().max() for d in (dx, torchs))
    assert error <= torch.maximum(allowed, torch.tensor(4 * torch.finfo(x.dtype).eps, dtype=torch.float64, device=device))
