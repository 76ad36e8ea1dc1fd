"""Layer norm of rows of which some columns do not count, kernel by kernel."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import BF16, F16, F32, F64, Case
from compare import assert_same_sums
from masks import check, differentiated, rows_for, rows_written_out

from fastnorm import reference
from fastnorm.reference import accumulate_dtype

SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
# The shape of x, and R and P of its mask: a byte for each row, for neighbouring rows, for several columns, for one.
SHAPES = [
    ((6, 10), 6, 1),
    ((12, 64), 4, 1),
    ((5, 7), 5, 7),
    ((33, 24), 33, 3),
    ((70, 96), 10, 24),
    ((8, 1), 8, 1),
    ((9, 300), 1, 300),
    ((3, 768), 3, 768),
    ((4, 1021), 4, 1),
    ((3, 4097), 3, 17),
    ((6, 5120), 2, 40),
    ((2, 10241), 2, 10241),
    ((2, 33000), 2, 33),
    ((3, 9000), 3, 1),
]
MASKED = [
    *((Case(shape, **SAME(d)), kind, R, P) for shape, R, P in SHAPES for d, kind in ((F32, "padding"), (BF16, "random"))),
    *((Case((7, 40)), kind, 7, 8) for kind in ("all", "none")),
    *((Case((6, 12), layout=layout), "random", 6, 12)
      for layout in ("row_strided", "column_strided", "transposed", "every_second", "expanded")),
    *((replace(Case((7, 40)), **missing), "random", 7, 8)
      for missing in ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *((Case((6, 33), dtype=x, weight=w, bias=b), "random", 6, 11) for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F64, F64, F64)]),
    *((Case((4, 512), offset=offset), "padding", 4, 512) for offset in (1e2, 1e4)),
    *((Case((3, 9000), offset=1e4), kind, 3, 9000) for kind in ("padding", "random")),
    *((Case((4, 64), scale=scale), "padding", 4, 16) for scale in (1e-4, 1e4)),
]  # fmt: skip
each = pytest.mark.parametrize(("case", "kind", "R", "P"), MASKED, ids=str)


def drawn(R, P, case, kind, device, draw):
    return *case.make_rows(device, draw), rows_for(case, kind, R, P, draw).to(device)


def statistics(x, mask, eps):
    """mean (2, M) and rstd (M,), rounded once from those of float64."""
    counts, acc = reference.counting(mask, reference.Rows(*x.shape)), accumulate_dtype(x.dtype)
    mean, rstd = reference.masked_statistics(x.double(), counts, eps)
    return reference.split(mean.sum(0).squeeze(1), acc), rstd.squeeze(1).to(acc)


@each
def test_forward(case, kind, R, P, backend, device):
    draw = partial(drawn, R, P)
    x, dy, weight, bias, mask = draw(case, kind, device, 0)
    truth = differentiated(x, dy, mask, weight, bias, case.eps, F64, rows_written_out)
    y, mean, rstd = backend.row_masked_fwd(x, mask, weight, bias, case.eps, x.shape[-1])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    check(case, kind, {"y": y}, {"y": truth["y"]}, device, 0, draw, rows_written_out)
    expected, expected_rstd = statistics(x, mask, case.eps)
    assert (mean.shape, rstd.shape) == (expected.shape, expected_rstd.shape)
    assert mean.dtype == rstd.dtype == accumulate_dtype(x.dtype)
    eps = torch.finfo(rstd.dtype).eps
    assert ((rstd.double() / expected_rstd.double() - 1).abs() <= 10 * eps).all()
    off = (mean.double().sum(0) - expected.double().sum(0)).abs() * expected_rstd.double()
    assert (off <= 10 * eps * (1 + 1e-4 * case.offset)).all()


@each
def test_backward(case, kind, R, P, backend, device):
    """With the truth's statistics."""
    draw = partial(drawn, R, P)
    x, dy, weight, bias, mask = draw(case, kind, device, 0)
    truth = differentiated(x, dy, mask, weight, bias, case.eps, F64, rows_written_out)
    mean, rstd = statistics(x, mask, case.eps)
    need = (True, None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    grads = dict(zip(("dx", "dweight", "dbias"), backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, need), strict=True))
    assert grads["dx"].dtype == x.dtype
    assert grads["dx"].is_contiguous()
    g = dy.double() if weight is None else dy.double() * weight.double()
    terms = (g.abs().amax(1) * rstd.double()).max().item()
    results = {name: t for name, t in grads.items() if t is not None}
    assert results.keys() == truth.keys() - {"y"}
    check(case, kind, results, truth, device, terms, draw, rows_written_out)


@pytest.mark.parametrize(("shape", "P"), [((5, 40), 40), ((37, 300), 1), ((3, 4099), 1), ((4, 8192), 64)])
def test_only_what_is_needed(shape, P, backend, device):
    x, dy, weight, _, mask = drawn(shape[0], P, Case(shape), "random", device, 0)
    _, mean, rstd = backend.row_masked_fwd(x, mask, weight, None, 1e-5, shape[1])
    full = backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, (True, F32, F32))
    for need in itertools.product((True, False), (F32, None), (F32, None)):
        for got, expected, wanted in zip(
            backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, need), full, need, strict=True
        ):
            assert (got is not None) == bool(wanted), need
            if got is not None and device == "cpu":
                assert torch.equal(got, expected), need
            elif got is not None:  # another kernel of Triton's, which may add in another order
                assert_same_sums(got, expected, x, need)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("P", [1, 50, 300])
def test_what_does_not_count_may_be_anything(value, P, backend, device):
    """What counts does not see it where no gradient comes back from it."""
    x, dy, weight, bias, mask = drawn(8, P, Case((8, 300)), "random", device, 0)
    counts = mask.repeat_interleave(300 // P, 1)
    filled, dy = torch.where(counts, x, value), torch.where(counts, dy, 0)
    runs = [backend.row_masked_fwd(t, mask, weight, bias, 1e-5, 300) for t in (x, filled)]
    (y, *saved), (other, *others) = runs
    assert all(torch.equal(a, b) for a, b in zip(saved, others, strict=True))
    assert torch.equal(y[counts], other[counts])


def test_rows_that_count_are_the_usual_ones(backend, device):
    """A mask that is True in all of a row changes nothing in it, but for the order of its sums."""
    x, dy, weight, bias, mask = drawn(33, 1, Case((33, 200)), "random", device, 0)
    y, mean, rstd = backend.row_masked_fwd(x, mask, weight, bias, 1e-5, 200)
    dx, *_ = backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, (True, None, None))
    usual_y, usual_mean, usual_rstd = backend.row_fwd(x, weight, bias, 1e-5, 200)
    usual_dx, *_ = backend.row_bwd(dy, x, weight, usual_mean, usual_rstd, (True, None, None))
    whole = mask[:, 0]
    assert whole.any()
    assert not whole.all()
    tight = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(y[whole], usual_y[whole], **tight)
    torch.testing.assert_close(dx[whole], usual_dx[whole], **tight)


def test_squares_that_overflow(backend, device):
    """Up to 1e30 what is finite stays finite."""
    x = torch.randn(4, 50, device=device) * torch.tensor([1.0, 1e30, 1e18, 1e-3], device=device).view(4, 1)
    mask = rows_for(None, "random", 4, 50).to(device)
    mask[0, :3] = True
    y, mean, rstd = backend.row_masked_fwd(x, mask, None, None, 0.0, 50)
    _, expected_rstd = statistics(x, mask, 0.0)
    torch.testing.assert_close(rstd, expected_rstd, rtol=1e-5, atol=0)
    assert y.isfinite().all()
    dx, *_ = backend.row_masked_bwd(torch.ones_like(x), x, mask, None, mean, rstd, (True, None, None))
    assert dx.isfinite().all()


@pytest.mark.parametrize("begin", [4090, 8000, 8999])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e4), (1e30, 0.0), (1e18, 0.0)])
def test_what_counts_of_a_long_row_may_begin_late(scale, offset, begin, backend, device):
    """Statistics are about the mean of what counts, of which what a sweep reads first says little, or nothing."""
    x = torch.randn(3, 9000, device=device) * scale + offset
    mask = torch.zeros(3, 9000, dtype=torch.bool, device=device)
    mask[:2, begin:] = True
    _, mean, rstd = backend.row_masked_fwd(x, mask, None, None, 1e-5, 9000)
    expected, expected_rstd = statistics(x, mask, 1e-5)
    torch.testing.assert_close(rstd, expected_rstd, rtol=2e-6, atol=0)
    off = (mean.double().sum(0) - expected.double().sum(0)).abs() * expected_rstd.double().clamp(max=1)
    assert off.max() <= 2e-6


@pytest.mark.parametrize(("shape", "P"), [((70, 96), 24), ((5, 9000), 9000), ((40, 768), 1)])
def test_two_runs_give_the_same_bits(shape, P, backend, device):
    x, dy, weight, bias, mask = drawn(shape[0], P, Case(shape), "padding", device, 0)

    def run():
        y, mean, rstd = backend.row_masked_fwd(x, mask, weight, bias, 1e-5, shape[1])
        return y, *backend.row_masked_bwd(dy, x, mask, weight, mean, rstd, (True, F32, F32))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_mask_that_does_not_fit_is_refused(device):
    from fastnorm import native

    if reason := native.unavailable(device):
        pytest.skip(reason)
    x = torch.randn(6, 10, device=device)
    for mask in (torch.ones(4, 1), torch.ones(6, 3), torch.ones(6), torch.ones(6, 1, dtype=torch.uint8)):
        mask = mask.to(device) if mask.dtype == torch.uint8 else mask.bool().to(device)
        with pytest.raises(RuntimeError, match="is none for 6 rows of 10"):
            native.row_masked_fwd(x, mask, None, None, 1e-5, 10)
