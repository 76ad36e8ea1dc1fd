"""Pieces of a batch norm of which some positions do not count, kernel by kernel."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, F16, F32, F64, Case
from masks import check, differentiated, mask_for

from fastnorm import reference
from fastnorm.reference import accumulate_dtype

SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
SMALL = Case((4, 6, 10))
SHAPES = [
    (8, 5),
    (33, 17),
    (300, 64),
    (2, 1),
    (4, 6, 10),
    (2, 3, 700),
    (5, 1, 9),
    (3, 65, 5, 5),
    (2, 16, 14, 14),
    (2, 3, 2, 3, 4),
]
SHAPES += [(2, 40, 33), (3, 8, 16, 16), (64, 2, 3)]
MASKED = [
    *((Case(s, **SAME(d)), kind) for s in SHAPES for d, kind in ((F32, "padding"), (BF16, "random"))),
    *((Case(s, layout="channels_last", **SAME(d)), kind)
      for s in ((3, 65, 5, 5), (2, 16, 14, 14), (2, 8, 2, 3, 4)) for d, kind in ((F32, "random"), (BF16, "padding"))),
    *((replace(SMALL, layout=layout), "padding")
      for layout in ("mT", "transposed", "row_strided", "column_strided", "expanded")),
    *((Case((12, 10), layout=layout), "random") for layout in ("mT", "row_strided", "every_second")),
    *((SMALL, kind) for kind in ("all", "one")),
    *((replace(SMALL, **missing), "random") for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *((Case((3, 4, 6), dtype=x, weight=w, bias=b), "random") for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F64, F64, F64)]),
    *((Case((16, 4, 64), offset=offset), "padding") for offset in (1e2, 1e4)),
    *((Case((500, 4), offset=1e4), kind) for kind in ("random",)),
    *((replace(SMALL, scale=scale), "padding") for scale in (1e-4, 1e4)),
]  # fmt: skip
each = pytest.mark.parametrize(("case", "kind"), MASKED, ids=str)


def statistics(x, mask, eps):
    """count, mean (2, C), rstd (C,) and the deviation in float64, of what counts."""
    counting = x.double().movedim(1, -1)[mask]
    var, mean = torch.var_mean(counting, 0, correction=0)
    acc = accumulate_dtype(x.dtype)
    return len(counting), reference.split(mean, acc), torch.rsqrt(var + eps).to(acc), var.sqrt()


@each
def test_statistics(case, kind, backend, device):
    x, *_ = case.make_channels(device)
    mask = mask_for(x, kind)
    n, mean, _, deviation = statistics(x, mask, case.eps)
    count, ours, std = backend.channel_masked_stats(x, mask)
    acc = accumulate_dtype(x.dtype)
    assert (count.shape, ours.shape, std.shape) == ((1,), mean.shape, deviation.shape)
    assert count.dtype == ours.dtype == std.dtype == acc
    assert count.item() == n
    eps, truth = torch.finfo(acc).eps, mean.double().sum(0)
    assert ((ours.double().sum(0) - truth).abs() <= 4 * eps * (deviation + 1e-4 * truth.abs() + 1e-30)).all()
    assert ((std.double() - deviation).abs() <= 10 * eps * deviation + 1e-30 * case.scale).all()


@each
def test_gradient(case, kind, backend, device):
    """With the truth's statistics and sums: the whole of it is the norm's derivative."""
    x, dy, weight, bias = case.make_channels(device)
    mask = mask_for(x, kind)
    truth = differentiated(x, dy, mask, weight, bias, case.eps, F64)
    n, mean, rstd, _ = statistics(x, mask, case.eps)
    acc, shape, dims = rstd.dtype, (1, -1, *[1] * (x.dim() - 2)), (0, *range(2, x.dim()))
    x_hat = (x.double() - mean.double().sum(0).view(shape)) * rstd.double().view(shape)
    g = dy.double() if weight is None else dy.double() * weight.double().view(shape)
    c1, c2 = ((t.sum(dims) / n).to(acc) for t in (g * x_hat, g))
    dx = backend.channel_masked_grad(dy, x, mask, mean, rstd, weight, c1, c2)
    assert dx.dtype == x.dtype
    assert dx.stride() == torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x)).stride()
    parts = (g.abs().amax(dims), c2.abs(), torch.where(mask.unsqueeze(1), x_hat, 0).abs().amax(dims) * c1.abs())
    terms = max((part * rstd).max().item() for part in parts)
    check(case, kind, {"dx": dx}, truth, device, terms)


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_nothing_counts(layout, backend, device):
    """Zeros, and a gradient as in evaluation; whatever x holds."""
    x, dy, weight, _ = Case((4, 6, 5, 7), layout=layout).make_channels(device)
    mask = mask_for(x, "none")
    count, mean, std = backend.channel_masked_stats(x, mask)
    assert not count.any()
    assert not mean.any()
    assert not std.any()
    rstd = torch.rand(6, device=device) + 0.5
    dx = backend.channel_masked_grad(dy, x, mask, mean, rstd, weight, rstd, rstd)
    torch.testing.assert_close(dx, dy * (weight * rstd).view(-1, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_what_does_not_count_may_be_anything(value, layout, backend, device):
    """Neither statistics nor the gradients of what counts see it, nor its own gradient."""
    x, dy, weight, _ = Case((4, 6, 5, 7), layout=layout).make_channels(device)
    mask = mask_for(x, "padding")
    filled = torch.where(mask.unsqueeze(1), x, torch.full_like(x, value))
    results = [backend.channel_masked_stats(t, mask) for t in (x, filled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    _, mean, std = results[0]
    c1 = torch.rand(6, device=device)
    a, b = (backend.channel_masked_grad(dy, t, mask, mean, 1 / std, weight, c1, c1) for t in (x, filled))
    assert torch.equal(a, b)


def test_squares_that_overflow(backend, device):
    """Up to 1e30 what is finite stays finite."""
    sizes = torch.tensor([1.0, 1e30, 1e18, 1e-3], device=device).view(4, 1)
    x = torch.randn(8, 4, 50, device=device) * sizes
    mask = mask_for(x, "random")
    _, mean, _, deviation = statistics(x, mask, 0.0)
    _, ours, std = backend.channel_masked_stats(x, mask)
    torch.testing.assert_close(std.double(), deviation, rtol=1e-5, atol=0)
    assert ((ours.double().sum(0) - mean.double().sum(0)).abs() <= 1e-6 * deviation).all()


def test_two_runs_give_the_same_bits(backend, device):
    x, *_ = Case((9, 6, 300)).make_channels(device)
    mask = mask_for(x, "random")
    first, second = (backend.channel_masked_stats(x, mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
