"""Batch norm: every backend against the truth, never worse than torch.nn."""

import emulator
import numpy as np
import pytest
import torch
from cases import BF16, CHANNELS, F16, F32, F64, Case
from compare import Evaluation, Training, assert_no_worse, gradients, laid_out_as, parameter_dtypes, statistics, torch_results
from oracle import batch_norm, error, ulp, wide

import fastnorm

cases = pytest.mark.parametrize("case", CHANNELS, ids=str)


# Evaluation computes no statistics: an input far from the running mean would only test the size of y.
whole = [(Training, case) for case in CHANNELS] + [(Evaluation, case) for case in CHANNELS if not case.offset]


@pytest.mark.parametrize(("kind", "case"), whole, ids=lambda p: p.__name__ if isinstance(p, type) else str(p))
def test_forward_and_gradients(kind, case, backend, device):
    inputs = case.make_channels(device)
    ours, peer = gradients(kind.call(fastnorm.batch_norm, case), *inputs), torch_results(kind, case, *inputs)
    truth = kind.truth(case, *inputs)
    assert ours.keys() == peer.keys()
    for name, t in ours.items():
        assert t.dtype == peer[name].dtype, name
        assert laid_out_as(t, peer[name], inputs[0]), name
        assert_no_worse(kind, case, name, t, truth, backend)


@cases
def test_backward_alone(case, backend, device):
    """With the truth's statistics: a wrong forward cannot hide a wrong backward."""
    x, dy, weight, bias = case.make_channels(device)
    truth = Training.truth(case, x, dy, weight, bias)
    need = (True, *parameter_dtypes(weight, bias))
    ours = backend.channel_bwd(dy, x, weight, *statistics(truth, x), True, need)
    for name, t in zip(("dx", "dweight", "dbias"), ours, strict=True):
        if t is not None:
            assert_no_worse(Training, case, name, t, truth, backend)


@cases
def test_pieces(case, backend, device):
    """The four pieces that a collective can go between: each alone, with the truth's results of the pieces before it."""
    x, dy, weight, bias = case.make_channels(device)
    truth = Training.truth(case, x, dy, weight, bias)
    peer = torch_results(Training, case, x, dy, weight, bias)
    mean, rstd = statistics(truth, x)
    acc, eps = rstd.dtype, torch.finfo(rstd.dtype).eps

    count, ours_mean, std = backend.channel_stats(x)
    assert count == truth.count
    assert ours_mean.shape == mean.shape
    assert std.dtype == acc
    spread = np.sqrt(truth.var) + 1e-30
    assert (abs(wide(ours_mean[0]) + wide(ours_mean[1]) - truth.mean) <= 4 * eps * (spread + 1e-4 * abs(truth.mean))).all()
    assert (abs(wide(std) - np.sqrt(truth.var)) <= 10 * eps * np.sqrt(truth.var) + 1e-30).all()

    y = backend.channel_apply(x, mean, rstd, weight, bias)
    assert laid_out_as(y, peer["y"], x)
    assert_no_worse(Training, case, "y", y, truth, backend)

    sum_dz, sum_dz_x_hat = backend.channel_sums(dy, x, mean, rstd)
    added = lambda terms: abs(terms).sum((0, *range(2, x.dim()))).max()  # the size of what is added up
    assert error(sum_dz, truth.dbias) <= 2 * ulp(acc, added(wide(dy)))
    assert error(sum_dz_x_hat, truth.dweight) <= 2 * ulp(acc, added(truth.dz_x_hat))

    c1, c2 = (torch.from_numpy(c.astype("float64")).to(acc).to(device) for c in (truth.c1, truth.c2))
    dx = backend.channel_grad(dy, x, mean, rstd, weight, c1, c2)
    assert laid_out_as(dx, peer["dx"], x)
    assert_no_worse(Training, case, "dx", dx, truth, backend)
    frozen = batch_norm(x, weight, bias, 0.0, dy, torch.zeros_like(mean[0]), rstd.double().pow(-2))
    dx = backend.channel_grad(dy, x, mean, rstd, weight, None, None)
    assert error(dx, frozen.dx) <= 2 * ulp(dx.dtype, abs(frozen.dx).max())


@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 0.37])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_running_statistics(dtype, momentum, layout, backend, device):
    """In their own dtype, with the unbiased variance, beside an input of another dtype."""
    case = Case((6, 5, 4, 3), layout=layout, offset=2.0)
    x, _, weight, bias = case.make_channels(device)
    mean, var = case.running(device, dtype)
    truth = batch_norm(x)
    expected = {
        "mean": wide(mean) * (1 - momentum) + truth.mean * momentum,
        "var": wide(var) * (1 - momentum) + truth.var * truth.count / (truth.count - 1) * momentum,
    }
    fastnorm.batch_norm(x, mean, var, weight, bias, True, momentum)
    for name, t in (("mean", mean), ("var", var)):
        assert error(t, expected[name]) <= 2 * ulp(dtype if dtype != F64 else F32, abs(expected[name]).max()), name


def test_running_statistics_in_strided_views(backend, device):
    x = torch.randn(8, 4, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    both = torch.zeros(4, 2, device=device)
    both[:, 1] = 1
    fastnorm.batch_norm(x, mean, var, training=True)
    fastnorm.batch_norm(x, both[:, 0], both[:, 1], training=True)
    assert torch.equal(both[:, 0], mean)
    assert torch.equal(both[:, 1], var)
    y = fastnorm.batch_norm(x, both[:, 0], both[:, 1])
    assert torch.equal(y, fastnorm.batch_norm(x, mean, var))


def test_evaluation_leaves_the_statistics_alone(backend, device):
    x, mean, var = torch.randn(8, 4, device=device), torch.randn(4, device=device), torch.rand(4, device=device)
    before = mean.clone(), var.clone()
    fastnorm.batch_norm(x, mean, var)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("layout", ["dense", "channels_last", "transposed"])
def test_mean_far_from_zero(layout, backend, device):
    """mean / std = 1e4 in float32, where torch's channels_last statistics are wrong."""
    case = Case((16, 8, 16, 16), layout=layout, offset=1e4)
    x, dy, _, _ = case.make_channels(device)
    truth = batch_norm(x, dy=dy)
    ours = gradients(lambda x, w, b: fastnorm.batch_norm(x, None, None, training=True), x, dy, None, None)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5


@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_huge_values_stay_finite_and_right(layout, backend, device):
    case = Case((4, 3, 9, 5), layout=layout, scale=1e30)
    x, dy, _, _ = case.make_channels(device)
    truth = batch_norm(x, dy=dy)
    ours = gradients(lambda x, w, b: fastnorm.batch_norm(x, None, None, training=True), x, dy, None, None)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5 * abs(truth.dx).max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_not_finite_input_spoils_its_channel_alone(bad, layout, backend, device):
    x, _, _, _ = Case((4, 3, 5, 5), layout=layout).make_channels(device)
    x[1, 1, 2, 3] = bad
    y = fastnorm.batch_norm(x, None, None, training=True)
    assert torch.equal(y.isnan().all((0, 2, 3)).cpu(), torch.tensor([False, True, False]))
    assert y.isnan().sum() == 100


INF, NAN = float("inf"), float("nan")
# Of the channel that is spoilt, the first and the last value; None leaves them as they are.
FIRST_AND_LAST = [(INF, None), (None, -INF), (INF, INF), (INF, -INF), (None, NAN), (INF, NAN)]
# One share of the positions, and several, of which the first and the last value are in different ones.
SPOILT = [
    *(((3, 3, 20), "dense"), ((3, 3, 20), "mT"), ((9, 4), "dense"), ((2, 4, 5, 6), "channels_last")),
    *(((2, 3, 6144), "dense"), ((2, 3, 6145), "dense"), ((600, 3), "dense")),
    *(((4, 4, 24, 24), "channels_last"), ((3, 3, 16, 16), "channels_last")),
]
spoilt = pytest.mark.parametrize(("shape", "layout"), SPOILT, ids=str)
first_and_last = pytest.mark.parametrize("ends", FIRST_AND_LAST, ids=str)


def spoil(x, ends):
    """A copy of x with these as first and last value of channel 1."""
    x = x.clone()
    for sample, value in zip((0, -1), ends, strict=True):
        if value is not None:
            x[sample, 1].view(-1)[sample] = value
    return x


def trained(function, x, **options):
    """y, running_mean, running_var"""
    mean, var = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    return function(x, mean, var, training=True, **options), mean, var


def assert_spoilt_as_torchs(ours, clean, peer):
    """Each is (y, running_mean, running_var); the other channels are as without the spoilt values, and finite.

    The peer is torch's on the CPU: what another device makes of inf - inf is up to its order of additions.
    """
    others = torch.arange(clean[0].shape[1], device=clean[0].device) != 1
    assert ours[0][:, others].isfinite().all()
    torch.testing.assert_close(ours[0][:, others], clean[0][:, others])
    for got, expected in zip(ours[1:], peer[1:], strict=True):
        torch.testing.assert_close(got.cpu(), expected, equal_nan=True)


@first_and_last
@spoilt
def test_running_statistics_of_not_finite_input(shape, layout, ends, backend, device):
    x = Case(shape, layout=layout).make_channels(device)[0]
    bad = spoil(x, ends)
    ours, clean = trained(fastnorm.batch_norm, bad), trained(fastnorm.batch_norm, x)
    peer = trained(torch.nn.functional.batch_norm, bad.cpu())
    assert_spoilt_as_torchs(ours, clean, peer)
    assert torch.equal(ours[0].isnan().cpu(), peer[0].isnan())


@first_and_last
@spoilt
def test_statistics_of_not_finite_input(shape, layout, ends, backend, device):
    """Those that a collective merges, and the registered operators: high + low is infinite as well."""
    x = spoil(Case(shape, layout=layout).make_channels(device)[0], ends)
    channels = x.cpu().movedim(1, 0).flatten(1)
    mean, std = channels.mean(1), channels.std(1, correction=0)
    counts = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=device)
    pieces = backend.channel_stats(x), backend.channel_masked_stats(x, counts)
    for pair in (*(piece[1] for piece in pieces), backend.channel_fwd(x, None, None, None, None, True, 0.1, 1e-5)[1]):
        torch.testing.assert_close((pair[0] + pair[1]).cpu(), mean, equal_nan=True)
    for piece in pieces:
        torch.testing.assert_close(piece[2].cpu(), std, equal_nan=True)


@first_and_last
@spoilt
def test_masked_running_statistics_of_not_finite_input(shape, layout, ends, backend, device):
    x = Case(shape, layout=layout).make_channels(device)[0]
    bad = spoil(x, ends)
    counts = torch.rand(x.shape[0], *x.shape[2:], device=device) < 0.6
    counts[0].view(-1)[0] = counts[-1].view(-1)[-1] = True
    ours, clean = (trained(fastnorm.batch_norm, t, mask=counts) for t in (bad, x))
    peer = trained(torch.nn.functional.batch_norm, bad.movedim(1, -1)[counts].cpu())
    assert_spoilt_as_torchs(ours, clean, peer)
    assert ours[0][:, 1].isnan().all()


def test_constant_channels_are_zero(backend, device):
    for value in (0.0, 3.0, 1e4):
        y = fastnorm.batch_norm(torch.full((4, 3, 7), value, device=device), None, None, training=True)
        assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", [(a, b, c) for a in (True, False) for b in (F32, None) for c in (F32, None)], ids=str)
def test_only_what_is_needed(training, need, backend, device):
    x, dy, weight, _ = Case((5, 6, 7)).make_channels(device)
    mean, var = Case((5, 6, 7)).running(device)
    _, mean, rstd = backend.channel_fwd(x, weight, None, mean, var, training, 0.1, 1e-5)
    full = backend.channel_bwd(dy, x, weight, mean, rstd, training, (True, F32, F32))
    for got, expected, wanted in zip(backend.channel_bwd(dy, x, weight, mean, rstd, training, need), full, need, strict=True):
        assert (got is not None) == bool(wanted)
        assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("cotangent", ["expanded", "sum", "channels_last", "transposed"])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
def test_any_strides_of_the_output_gradient(cotangent, layout, backend, device):
    x, dy, weight, bias = Case((4, 6, 5, 7), layout=layout).make_channels(device)
    dy = {
        "expanded": dy[:1].expand(dy.shape),
        "sum": torch.ones((), device=device).expand(dy.shape),
        "channels_last": dy.contiguous(memory_format=torch.channels_last),
        "transposed": dy.transpose(0, 1).contiguous().transpose(0, 1),
    }[cotangent]
    run = lambda dy: gradients(lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True), x, dy, weight, bias)
    ours, dense, truth = run(dy), run(dy.contiguous()), batch_norm(x, weight, bias, dy=dy)
    assert torch.equal(ours["y"], dense["y"])
    torch.testing.assert_close(ours["dx"], dense["dx"], rtol=1e-6, atol=1e-6)
    # A sum may come to nothing where its terms do not: it is held to the size of what is added up.
    for name, terms in (("dweight", truth.dz_x_hat), ("dbias", wide(dy))):
        added = abs(terms).sum((0, 2, 3)).max()
        assert error(ours[name], getattr(truth, name)) <= ulp(F32, added), name


def test_two_runs_give_the_same_bits(backend, device):
    x, dy, weight, bias = Case((40, 6, 9, 9), dtype=BF16).make_channels(device)
    run = lambda: gradients(lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True), x, dy, weight, bias)
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def floats_of_every_kind(n):
    """Random bits, and what rounding to 16 bits can go wrong at: ties, the ends of the range, what is not a number."""
    bits = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    special = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F801000, 0x3F803000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    special += [0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x00000001, 0x007FFFFF, 0]
    special = np.array([*special, *(s | 0x80000000 for s in special)], dtype=np.uint32)
    bits[: len(special)] = special[:n]
    return torch.from_numpy(np.random.default_rng(1).permutation(bits).view(np.float32))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("shape", [*((3, C) for C in (*range(24, 42), 1000)), *((3, 40, S) for S in range(16, 42))], ids=str)
def test_results_are_rounded_to_nearest(shape, dtype, backend, device):
    """y = bias, in vectors and in the parts of one that are left over at an end."""
    C = shape[1]
    bias = floats_of_every_kind(C).to(device)
    mean, rstd = torch.zeros(2, C, device=device), torch.ones(C, device=device)
    y = backend.channel_apply(torch.zeros(shape, dtype=dtype, device=device), mean, rstd, None, bias)
    on_cpu = backend.__name__ == "fastnorm.native" and device == "cpu" and not emulator.in_force
    if dtype == BF16 and on_cpu and "bf16" in backend.load().build_key:
        bias = bias * (bias.abs() >= torch.finfo(torch.float32).tiny)  # the processor's own rounding takes those as zero
    rounded = bias.to(dtype).reshape(1, C, *[1] * (len(shape) - 2)).expand(shape)
    assert torch.equal(y.isnan(), rounded.isnan())
    assert torch.equal(y.nan_to_num(1.0), rounded.nan_to_num(1.0))
