"""Three gloo processes with batches of 5, 0 and 9 against one process with 14; DDP and FSDP2.

The processes run once for all tests (`ranks.py`, which holds the checks); a test looks at what they brought back.
"""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from compare import Training, assert_no_worse
from filelock import FileLock
from oracle import error, ulp, wide
from ranks import BATCHES, CELLS, DOUBLE, OPTIONS, portion

import fastnorm

TIMEOUT = 180  # seconds for all checks of all ranks, which take about 30 of one core
WORLD = range(len(BATCHES))


def launch(folder):
    """The ranks, until all have ended or time is up. One that fails closes its connections, which ends the others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [open(folder / f"{rank}.log", "w+") for rank in WORLD]  # noqa: SIM115
    processes = [
        subprocess.Popen([sys.executable, ranks.__file__, str(rank), str(folder)], stdout=log, stderr=log, env=environment)
        for rank, log in zip(WORLD, logs, strict=True)
    ]
    end = time.monotonic() + TIMEOUT
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.1)
    for p in processes:
        p.kill()
        p.wait()
    for log in logs:
        log.close()


@pytest.fixture(scope="session")
def brought(tmp_path_factory):
    """What every rank brought back: a list of {(check, backend): result}. One launch for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launch(folder)
    files = [folder / f"{rank}.pt" for rank in WORLD]
    return [_load(rank, file) for rank, file in enumerate(files)]


def _load(rank, file):
    if file.exists():
        return torch.load(file, weights_only=False)
    return {"failed": f"rank {rank} brought nothing back in {TIMEOUT} s:\n" + file.with_suffix(".log").read_text()[-3000:]}


@pytest.fixture(params=ranks.served(), ids=lambda p: p[0])
def name(request):
    """The name of a backend and its device, as the ranks use it."""
    return request.param[0]


@pytest.fixture
def of(brought, name):
    """of(check): the results of the ranks, in a list."""

    def results(check, name=name):
        missing = [r for r in brought if (check, name) not in r]
        assert not missing, "\n".join(str(r.get("failed")) for r in missing)
        return [r[check, name] for r in brought]

    return results


@pytest.fixture
def module_of(name):
    return next(backend.load() for backend, device in ranks.conftest.SERVED if f"{backend.name}-{device}" == name)


def truth_of(case):
    x, dy, weight, bias = case.make_channels()
    return Training.truth(case, x, dy, weight, bias)


def of_rank(truth, case, rank):
    """The truth's dweight and dbias with this rank's part of their sums only."""
    dy = case.make_channels()[1]
    rows = slice(sum(BATCHES[:rank]), sum(BATCHES[: rank + 1]))
    axes = (0, *range(2, dy.dim()))
    part = {"dweight": truth.dz_x_hat[rows].sum(axes), "dbias": wide(dy)[rows].sum(axes)}
    return SimpleNamespace(**{**vars(truth), **part})


cells = pytest.mark.parametrize("case", CELLS, ids=str)


@cells
@pytest.mark.parametrize("what", ["y", "dx"])
def test_batches_of_5_0_and_9_are_one_batch_of_14(of, module_of, case, what):
    """At most torch.nn's own error, on one process, and one ulp."""
    results = [r[str(case)][what] for r in of("cells")]
    assert [len(t) for t in results] == list(BATCHES)
    assert all(t.dtype == case.dtype for t in results)
    assert_no_worse(Training, case, what, torch.cat(results), truth_of(case), module_of)


@cells
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_gradients_of_parameters_are_each_ranks_own(of, module_of, case, what):
    parameter = getattr(case, what)
    results = [r[str(case)] for r in of("cells")]
    assert all((f"d{what}" in r) == (parameter is not None) for r in results)
    if parameter is None:
        return
    truth, gradients = truth_of(case), [r[f"d{what}"] for r in results]
    for rank, gradient in enumerate(gradients):
        assert gradient.dtype == parameter
        assert_no_worse(Training, case, f"d{what}", gradient, of_rank(truth, case, rank), module_of)
    assert not gradients[1].any()
    if parameter != BF16:  # where adding three rounded numbers is no error to speak of
        assert_no_worse(Training, case, f"d{what}", sum(gradients), truth, module_of)


@cells
def test_running_statistics_are_those_of_one_batch_on_every_rank(of, case):
    truth, results = truth_of(case), [r[str(case)] for r in of("cells")]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.equal(r[name], results[0][name]) for r in results)
    unbiased = truth.var * truth.count / (truth.count - 1)
    x = abs(wide(case.make_channels()[0])).max()
    # Two roundings at the size of what is rounded: the mean's sum of x, the variance before it travels and at the store.
    for name, value, size in (("running_mean", truth.mean / 10, x / 10), ("running_var", 0.9 + unbiased / 10, 0)):
        got = results[0][name]
        assert error(got, value) <= 2 * ulp(got.dtype, max(abs(value).max(), size)), name
    assert results[0]["num_batches_tracked"] == 1


@cells
def test_memory_format_is_batch_norms(of, case):
    x = case.make_channels()[0]
    for rank, r in zip(WORLD, of("cells"), strict=True):
        one = portion(x, rank)
        if len(one):
            y = F.batch_norm(one.float(), None, None, training=True)
            assert r[str(case)]["y"].stride() == r[str(case)]["dx"].stride() == y.stride()


def test_two_runs_give_the_same_bits(of):
    for first, second in of("twice"):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_collective_in_each_direction(of):
    """Forward, backward; then forward, a backward that can be differentiated, its backward; none in evaluation."""
    for counts in of("collectives"):
        assert counts[:3] == [1, 1, 1]
        assert counts[3] == 2
        assert counts[5] == 0


def test_ranks_may_want_different_gradients(of):
    case, results = CELLS[0], of("needs")
    expected = of("cells")
    assert torch.equal(results[0][0], expected[0][str(case)]["dx"])
    assert torch.equal(results[0][1], expected[0][str(case)]["dweight"])
    assert results[1][0] is None
    assert not results[1][1].any()
    assert torch.equal(results[2][0], expected[2][str(case)]["dx"])
    assert results[2][1] is None


def test_buffers_may_change_between_forward_and_backward(of):
    for dx, expected in zip(of("buffers"), of("cells"), strict=True):
        assert torch.equal(dx, expected[str(CELLS[0])]["dx"])


@pytest.mark.parametrize("option", OPTIONS)
def test_options_over_several_steps(of, option):
    results, kwargs = [r[option] for r in of("options")], OPTIONS[option]
    single = torch.nn.BatchNorm1d(6, **{**kwargs, "dtype": F64})
    expected = [single(x.double()) for x in ranks.steps("cpu")]
    half = kwargs.get("dtype") == F16
    for step, y in enumerate(expected):
        torch.testing.assert_close(torch.cat([outputs[step] for outputs, _ in results]).double(), y, rtol=0, atol=2e-6)
    for _, state in results:
        for key, value in single.state_dict().items():
            torch.testing.assert_close(
                state[key].double(), value.double(), rtol=2e-3 if half else 1e-6, atol=0 if half else 1e-6
            )
        assert all(torch.equal(state[key], results[0][1][key]) for key in state)
    evaluated = torch.cat([outputs[3] for outputs, _ in results])
    if option == "no statistics":
        assert len(evaluated) == 14 * len(BATCHES)  # every rank evaluates by itself, on its batch's statistics
    single.eval()
    y = single(ranks.steps("cpu")[0].double())
    torch.testing.assert_close(evaluated[:14].double(), y, rtol=0, atol=5e-3 if half else 5e-6)


def test_batches_without_a_variance_leave_no_trace(of):
    for rank, results in zip(WORLD, of("few"), strict=True):
        for B, (y, dx, dweight, state) in enumerate(results):
            assert y.shape == dx.shape == (B if rank == 2 else 0, 6)
            assert not y.any()
            assert not dx.any()
            assert not dweight.any()
            fresh = fastnorm.SyncBatchNorm(6).state_dict()
            fresh["num_batches_tracked"] += 1
            assert all(torch.equal(state[key], fresh[key]) for key in fresh)


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_double_backward(of, case):
    """torch.nn.SyncBatchNorm has none (pytorch#61222)."""
    x, coefficients, weight, bias = case.make_channels()
    x, coefficients = x.requires_grad_(), coefficients.requires_grad_()
    weight = None if weight is None else weight.requires_grad_()
    norm = lambda x: F.batch_norm(x, None, None, weight, bias, True, 0.1, case.eps)
    inputs = [t for t in (x, coefficients, weight) if t is not None]
    expected = torch.autograd.grad(ranks.penalty(norm, x, coefficients), inputs)
    results = [r[str(case)] for r in of("double_backward")]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), expected[i], rtol=1e-9, atol=1e-11)
    if weight is not None:
        torch.testing.assert_close(sum(r[2] for r in results), expected[2], rtol=1e-9, atol=1e-11)


def test_process_group_is_respected(of):
    x = torch.randn(14, 6, generator=torch.Generator().manual_seed(5), dtype=F32).double()
    parts = [portion(x, rank, (4, 2, 8)) for rank in WORLD]
    pair = F.batch_norm(torch.cat((parts[0], parts[2])), None, None, training=True)
    pair = [pair[:4], F.batch_norm(parts[1], None, None, training=True), pair[4:]]
    for (together, alone, message), part, expected in zip(of("groups"), parts, pair, strict=True):
        torch.testing.assert_close(together.double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(alone.double(), F.batch_norm(part, None, None, training=True), rtol=0, atol=2e-6)
        assert message == "Expected more than 1 value per channel when training, got input size torch.Size([1, 6])"


def test_calls_that_raise_change_nothing(of):
    for raised, state, running_mean in of("errors"):
        assert [kind for kind, _ in raised] == [
            "ValueError",
            "ValueError",
            "RuntimeError",
            "NotImplementedError",
            "RuntimeError",
        ]
        assert raised[0][1] == "expected at least 2D input (got 1D input)"
        assert raised[1][1] == "SyncBatchNorm number of input channels should be non-zero"
        assert raised[2][1] == "running_mean should contain 5 elements not 6"
        assert "weight is on meta" in raised[4][1]
        fresh = fastnorm.SyncBatchNorm(6).state_dict()
        assert all(torch.equal(state[key], fresh[key]) for key in fresh)
        assert torch.equal(running_mean, fresh["running_mean"])


@pytest.mark.parametrize("check", ["host", "compiled", "checkpointed"])
def test_same_step_in_other_surroundings(of, name, check):
    """host: no operator waits for the device, with momentum=None too. compiled: torch.compile(fullgraph=True)."""
    name = name if check == "host" else ranks.served()[0][0]
    for plain, other in zip(of("cells", name), of(check, name), strict=True):
        for key, expected in plain[str(CELLS[0])].items():
            if key in other and not (check == "host" and key.startswith("running")):  # another momentum
                torch.testing.assert_close(other[key], expected, rtol=1e-5, atol=1e-5)
        assert {"y", "dx", "dweight", "dbias"} <= other.keys()


def test_transforms_raise_and_fakes_pass(of):
    """As with torch.nn.SyncBatchNorm: no collective works under functorch or forward AD, and no tangent is lost in silence."""
    for raised, kind, shape in of("transforms"):
        assert len(raised) == 5
        assert all(raised.values()), raised
        assert (kind, shape) == ("FakeTensor", (5, 6))


def spread(net, x):
    """ranks.model of torch.nn on all ranks' batches at once: only the plain BatchNorm1d sees one rank at a time."""
    for layer in net:
        x = torch.cat([layer(part) for part in x.split(4)]) if layer is net[3] else layer(x)
    return x


@pytest.mark.parametrize(("check", "draws"), [("ddp", (0, 1)), ("fsdp", (0,))])
def test_model_in_parallel(of, check, draws):
    """Gradients are the ranks' mean, as DDP and FSDP promise; DDP broadcast the buffers between two forwards."""
    stand_ins = SimpleNamespace(
        LayerNorm=torch.nn.LayerNorm, BatchNorm1d=torch.nn.BatchNorm1d, SyncBatchNorm=torch.nn.BatchNorm1d
    )
    net = ranks.model(stand_ins)
    for draw in draws:
        (spread(net, torch.cat([ranks.batch(rank, draw) for rank in WORLD])).square().sum() / len(BATCHES)).backward()
    for gradients in of(check):
        for name, p in net.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-11)


def test_ddp_with_an_empty_rank(of):
    case = CELLS[0]
    x, dy, weight, bias = case.make_channels()
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    F.batch_norm(x.double(), None, None, weight, bias, True).backward(dy.double())
    for gradients in of("ddp_empty"):
        for name, p in (("weight", weight), ("bias", bias)):
            torch.testing.assert_close(gradients[name].double(), p.grad / len(BATCHES), rtol=1e-6, atol=1e-6)
