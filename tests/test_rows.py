"""Layer norm: every backend against the truth, never worse than torch.nn."""

import itertools
import mmap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, ROWS, Case
from compare import Rows, assert_no_worse, gradients, parameter_dtypes, statistics, torch_results
from oracle import error, layer_norm, wide

import fastnorm
from fastnorm import heuristics

cases = pytest.mark.parametrize("case", ROWS, ids=str)


@cases
def test_forward_and_gradients(case, device, backend):
    inputs = case.make_rows(device)
    ours, peer = gradients(Rows.call(fastnorm.layer_norm, case), *inputs), torch_results(Rows, case, *inputs)
    truth = Rows.truth(case, *inputs)
    assert ours.keys() == peer.keys()
    for name, t in ours.items():
        assert t.dtype == peer[name].dtype, name
        assert t.stride() == peer[name].stride(), name
        assert_no_worse(Rows, case, name, t, truth, backend)


@cases
def test_backward_alone(case, device, backend):
    """With the truth's statistics: a wrong forward cannot hide a wrong backward."""
    x, dy, weight, bias = case.make_rows(device)
    truth = Rows.truth(case, x, dy, weight, bias)
    ours = backend.row_bwd(dy, x, weight, *statistics(truth, x), (True, *parameter_dtypes(weight, bias)))
    for name, t in zip(("dx", "dweight", "dbias"), ours, strict=True):
        if t is not None:
            assert_no_worse(Rows, case, name, t, truth, backend)


@pytest.fixture
def shared_rows(monkeypatch):
    """Rows of 512 are read twice, by two programs each, as long ones are."""
    for itemsize in (2, 4):
        monkeypatch.setitem(heuristics.LONG[itemsize], 512, (256, 2, 2, True))


@pytest.mark.usefixtures("shared_rows")
@pytest.mark.parametrize("shape", [(5, 40), (37, 300), (3, 4099), (9, 512)], ids=str)  # the third is split by columns
def test_only_what_is_needed(shape, backend, device):
    x, dy, weight, _ = Case(shape).make_rows(device)
    _, mean, rstd = backend.row_fwd(x, weight, None, 1e-5, shape[1])
    full = backend.row_bwd(dy, x, weight, mean, rstd, (True, F32, F32))
    for need in itertools.product((True, False), (F32, None), (F32, None)):
        for got, expected, wanted in zip(backend.row_bwd(dy, x, weight, mean, rstd, need), full, need, strict=True):
            assert (got is not None) == bool(wanted), need
            assert got is None or torch.equal(got, expected), need


@pytest.mark.parametrize("M", [1, 3, 21])
def test_a_backward_of_split_rows(M, backend, device, monkeypatch):
    """Several programs to a column, rows that fill no tile, and a program without rows: none is lost or counted twice."""
    monkeypatch.setattr(heuristics, "COLUMN_PROGRAMS_PER_SM", 17)
    case = Case((M, 4099))
    inputs = case.make_rows(device)
    truth = Rows.truth(case, *inputs)
    for name, t in gradients(Rows.call(fastnorm.layer_norm, case), *inputs).items():
        assert_no_worse(Rows, case, name, t, truth, backend)


@pytest.mark.parametrize("M", [33, 130])
@pytest.mark.parametrize("N", [200, 1000, 2050])
def test_a_backward_of_many_tiles_of_rows(M, N, backend, device):
    """More rows than the programs take at once, and a last tile that is not full."""
    case = Case((M, N), dtype=BF16)
    inputs = case.make_rows(device)
    truth = Rows.truth(case, *inputs)
    for name, t in gradients(Rows.call(fastnorm.layer_norm, case), *inputs).items():
        assert_no_worse(Rows, case, name, t, truth, backend)


@pytest.mark.parametrize("shape", [(3, 40), (2, 3000)], ids=str)
def test_mean_far_from_zero(shape, backend, device):
    """mean / std = 1e4 in float32: one float32 cannot hold the mean."""
    x, dy, _weight, _bias = Case(shape, offset=1e4).make_rows(device)
    truth = layer_norm(x, shape[1:], dy=dy)
    ours = gradients(lambda x, w, b: fastnorm.layer_norm(x, shape[1:]), x, dy, None, None)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5


@pytest.mark.parametrize("N", [6, 100, 5000, 40000])
def test_huge_values_stay_finite_and_right(N, backend, device):
    """Squares of 1e30 overflow float32."""
    x, dy, _, _ = Case((2, N), scale=1e30).make_rows(device)
    truth = layer_norm(x, (N,), dy=dy)
    ours = gradients(lambda x, w, b: fastnorm.layer_norm(x, (N,)), x, dy, None, None)
    assert error(ours["y"], truth.y) <= 1e-5
    assert error(ours["dx"], truth.dx) <= 1e-5 * abs(truth.dx).max()


@pytest.mark.parametrize("N", [6, 100, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_input_spoils_its_row_alone(N, bad, backend, device):
    x = torch.randn(3, N, device=device)
    x[1, N // 2] = bad
    y = fastnorm.layer_norm(x, (N,))
    assert torch.equal(y.isnan(), F.layer_norm(x, (N,)).isnan())
    assert torch.equal(y.isnan().all(1).cpu(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("N", [16, 33, 700])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_constant_rows_are_zero(dtype, N, backend, device):
    """Whatever their value, and beside rows that are not constant."""
    x = torch.randn(16, N)
    x[::2] = torch.tensor([0.0, 3.0, 1e4, -1 / 3, 0.1, 777.7, 1e-3, -6.1e4])[:, None]
    y = fastnorm.layer_norm(x.to(dtype).to(device), (N,))
    assert torch.equal(y[::2], torch.zeros_like(y[::2]))
    assert (y[1::2].float().std(1) > 0.9).all()


@pytest.mark.usefixtures("shared_rows")
@pytest.mark.parametrize("N", [10, 300, 512, 1024, 4099])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_row_does_not_depend_on_its_batch(N, dtype, backend, device):
    """A row's y and dx: the same bits for every M and every place."""
    case = Case((70, N), dtype=dtype)
    x, dy, weight, bias = case.make_rows(device)
    whole = gradients(lambda x, w, b: fastnorm.layer_norm(x, (N,), w, b), x, dy, weight, bias)
    for start, end in ((0, 1), (69, 70), (13, 30)):
        part = gradients(lambda x, w, b: fastnorm.layer_norm(x, (N,), w, b), x[start:end], dy[start:end], weight, bias)
        assert torch.equal(part["y"], whole["y"][start:end])
        assert torch.equal(part["dx"], whole["dx"][start:end])


@pytest.mark.usefixtures("shared_rows")
@pytest.mark.parametrize("N", [40, 512, 768])
def test_rows_that_are_far_apart(N, backend, device):
    """2^31 elements and more: such a stride, times a row's number, is no int32. No memory is behind what lies between."""
    stride, dtype = 2**31 + 8, F16
    if device == "cpu":
        memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2 * (stride + N)), dtype=np.float16))
    else:
        memory = torch.empty(stride + N, dtype=dtype, device=device)
    inputs = [t.to(device) for t in Case((2, N), dtype=dtype, weight=dtype).make_rows("cpu")[:3]]
    x = memory.as_strided((2, N), (stride, 1)).copy_(inputs[0])
    y, mean, rstd = backend.row_fwd(x, inputs[2], None, 1e-5, N)
    assert torch.equal(y, backend.row_fwd(inputs[0], inputs[2], None, 1e-5, N)[0])
    near, far = (backend.row_bwd(inputs[1], t, inputs[2], mean, rstd, (True, dtype, dtype)) for t in (inputs[0], x))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_two_runs_give_the_same_bits(backend, device):
    x, dy, weight, bias = Case((100, 72), dtype=BF16).make_rows(device)
    run = lambda: gradients(lambda x, w, b: fastnorm.layer_norm(x, (72,), w, b), x, dy, weight, bias)
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cotangent", ["expanded", "sum", "transposed", "row_strided"])
def test_any_strides_of_the_output_gradient(cotangent, backend, device):
    x, dy, weight, bias = Case((9, 20)).make_rows(device)
    dy = {
        "expanded": dy[:1].expand(9, 20),
        "sum": torch.ones((), device=device).expand(9, 20),
        "transposed": dy.t().contiguous().t(),
        "row_strided": dy.repeat(1, 2)[:, :20],
    }[cotangent]
    run = lambda dy: gradients(lambda x, w, b: fastnorm.layer_norm(x, (20,), w, b), x, dy, weight, bias)
    ours, dense = run(dy), run(dy.contiguous())
    assert all(torch.equal(t, dense[name]) for name, t in ours.items())


def test_inputs_are_left_alone(backend, device):
    tensors = Case((9, 20)).make_rows(device)
    before = [t.clone() for t in tensors]
    gradients(lambda x, w, b: fastnorm.layer_norm(x, (20,), w, b), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_saved_statistics(backend, device):
    x, _, weight, bias = Case((6, 50), offset=1e3).make_rows(device)
    _, mean, rstd = backend.row_fwd(x, weight, bias, 1e-5, 50)
    truth = layer_norm(x, (50,))
    assert mean.shape == (2, 6)
    assert rstd.shape == (6,)
    assert abs(wide(mean[0]) + wide(mean[1]) - truth.mean).max() <= 1e-7
    assert abs(wide(rstd) / truth.rstd - 1).max() <= 1e-6
