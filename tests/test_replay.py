"""Replayed calls of the Triton backend: the bits of the call in Python, and a plan wherever there should be one."""

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from cases import BF16, CHANNELS, F16, F32, F64, ROWS, Case
from compare import gradients

import fastnorm
from fastnorm import autograd, dispatch, extension, heuristics

kernels = pytest.importorskip("fastnorm.kernels", reason="triton is not installed")
plans = kernels.plans
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _replaying():
    if reason := dispatch.BACKENDS[0].why_not(DEVICE) or (isinstance(extension.load(), str) and extension.load()):
        pytest.skip(f"calls are not replayed here: {reason}")
    with fastnorm.use_backend("triton"):
        dispatch.select(DEVICE)
        dispatch.forget()
        yield


def counts():
    """(plans, replayed calls)"""
    return extension.load().count_replays(DEVICE)[1:]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].stride() == b[k].stride() for k in a)


def layer_norm(case, eps=None):
    return lambda x, w, b: fastnorm.layer_norm(x, case.normalized_shape, w, b, case.eps if eps is None else eps)


def layer_norm_in_python(case):
    N = torch.Size(case.normalized_shape).numel()
    return lambda x, w, b: autograd.LayerNormFunction.apply(x, w, b, case.eps, N, kernels, None)


def batch_norm(case, buffers, training):
    return lambda x, w, b: fastnorm.batch_norm(x, *buffers, w, b, training, 0.1, case.eps)


def batch_norm_in_python(case, buffers, training):
    return lambda x, w, b: autograd.BatchNormFunction.apply(x, w, b, *buffers, training, 0.1, case.eps, kernels)


# Rows whose elements do not stand beside each other are copied first, and a copy is no launch.
COPIED = ("column_strided", "mT", "transposed", "channels_last", "expanded")


@pytest.mark.parametrize("case", [c for c in ROWS[::2] if c.normalized_shape[-1] < 5000], ids=str)
def test_rows(case):
    inputs = case.make_rows(DEVICE)
    expected = gradients(layer_norm_in_python(case), *inputs)
    before = counts()[1]
    for _ in range(2):  # seen, planned
        assert same(gradients(layer_norm(case), *inputs), expected)
    assert counts()[1] == before
    elsewhere = case.make_rows(DEVICE)
    assert same(gradients(layer_norm(case), *elsewhere), expected)
    assert counts()[1] == before + 2 or case.layout in COPIED


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CHANNELS[::3], ids=str)
def test_channels(case, training):
    inputs = case.make_channels(DEVICE)
    buffers = case.running(DEVICE)
    expected = gradients(batch_norm_in_python(case, buffers, training), *inputs)
    before = counts()[1]
    for i in range(4):
        ours = case.running(DEVICE)
        assert same(gradients(batch_norm(case, ours, training), *inputs), expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, buffers, strict=True))
        assert counts()[1] == before + 2 * max(0, i - 1) or case.layout in COPIED


@pytest.mark.parametrize(
    ("N", "dtype"), [(10, F32), (40, BF16), (600, F32), (1032, F16), (4099, F32), (512, F32)], ids=str
)  # split; read twice
def test_rows_of_every_number_in_a_power_of_two_share_a_plan(N, dtype, monkeypatch):
    monkeypatch.setitem(heuristics.LONG[4], 512, (256, 2, 2, True))
    make = lambda M: Case((M, N), dtype=dtype, weight=F32, bias=F32).make_rows(DEVICE)
    case = Case((8, N))
    for M in (8, 15):  # seen, planned
        gradients(layer_norm(case), *make(M))
    assert counts() == (2, 0)
    for i, M in enumerate((8, 9, 11, 14, 15)):
        inputs = make(M)
        expected = gradients(layer_norm_in_python(case), *inputs)
        assert same(gradients(layer_norm(case), *inputs), expected)
        assert counts() == (2, 2 * i + 2)
    gradients(layer_norm(case), *make(16))
    assert counts() == (2, 10)


def test_other_values_of_options_have_plans_of_their_own():
    x = torch.randn(6, 40, device=DEVICE)
    for eps in (1e-5, 0.1, 1e-5, 0.1, 1e-5, 0.1):
        assert torch.equal(fastnorm.layer_norm(x, (40,), eps=eps), kernels.row_fwd(x, None, None, eps, 40)[0])
    buffers = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    for momentum in (0.1, 0.5, 0.1, 0.5, 0.1, 0.5):
        ours, theirs = ([b.clone() for b in buffers] for _ in range(2))
        fastnorm.batch_norm(x, *ours, training=True, momentum=momentum)
        kernels.channel_fwd(x, None, None, *theirs, True, momentum, 1e-5)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert counts()[1] >= 4


def test_a_module_counts_its_batches_without_a_launch_for_it():
    ours, batch = fastnorm.BatchNorm1d(40).to(DEVICE), torch.randn(6, 40, device=DEVICE)
    for i in range(5):
        assert ours.num_batches_tracked == i
        with mock.patch.object(torch.Tensor, "add_", None):
            ours(batch)
    assert ours.num_batches_tracked == 5
    assert counts() == (1, 3)
    ours.eval()(batch)
    assert ours.num_batches_tracked == 5


# A module of two channels, and the plans of its forward and backward: the gradient of a permuted result is copied first.
RESHAPED = {
    "instances": (lambda: fastnorm.InstanceNorm1d(2, affine=True, track_running_stats=True), 2),
    "ghosts": (lambda: fastnorm.BatchNorm1d(2, virtual_batch_size=2), 2),
    "layer norm over channels": (lambda: fastnorm.LayerNorm2d(2), 1),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_norms_that_are_reshapes_are_replayed(name):
    """Steps of training: the bits and the running statistics of the calls in Python."""
    make, planned = RESHAPED[name]
    inputs, dy = torch.randn(4, 4, 2, 8, device=DEVICE), torch.randn(4, 2, 8, device=DEVICE)

    def steps():
        norm, results = make().to(DEVICE), []
        for x in inputs.clone().requires_grad_():
            y = norm(x)
            results += [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], dy)]
        return results + list(norm.buffers())

    nothing = lambda *args: None
    with mock.patch.multiple(dispatch.direct, layer_norm=nothing, batch_norm=nothing):
        expected = steps()
    assert counts() == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(steps(), expected, strict=True))
    assert counts() == (planned, 2 * planned)  # seen, planned, and two that are replayed


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_only_what_is_needed(norm, needs):
    shape = (6, 40)
    results = []
    for _ in range(4):
        torch.manual_seed(1)
        x, w, b = (torch.randn(s, device=DEVICE).requires_grad_(n) for s, n in zip((shape, 40, 40), needs, strict=True))
        arguments = ((40,), w, b) if norm == "layer_norm" else (None, None, w, b, True)
        y = getattr(fastnorm, norm)(x, *arguments)
        results.append(torch.autograd.grad(y, [t for t in (x, w, b) if t.requires_grad], torch.ones_like(y) + x.detach()))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    assert counts()[1] == 4


def test_an_odd_address_has_a_plan_of_its_own():
    """16-byte accesses are compiled for addresses that allow them."""
    memory = torch.randn(6 * 64 + 1, device=DEVICE)
    for _ in range(3):
        for start in (0, 1):
            x = memory[start : start + 6 * 64].view(6, 64)
            assert torch.equal(fastnorm.layer_norm(x, (64,)), kernels.row_fwd(x, None, None, 1e-5, 64)[0])
    assert counts() == (2, 2)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_no_grad_and_inference_mode(dtype):
    x = torch.randn(6, 40, device=DEVICE).to(dtype)
    expected = kernels.row_fwd(x, None, None, 1e-5, 40)[0]
    for context in (torch.no_grad, torch.inference_mode):
        for _ in range(3):
            with context():
                y = fastnorm.layer_norm(x, (40,))
            assert torch.equal(y, expected)
            assert y.is_inference() == (context is torch.inference_mode)
    assert counts()[1] == 4


def test_parameters_that_share_one_storage_have_a_plan():
    """As FSDP's flat parameters do."""
    flat = torch.randn(80, device=DEVICE)
    w, b = flat[:40], flat[40:]
    x = torch.randn(6, 40, device=DEVICE)
    for _ in range(3):
        assert torch.equal(fastnorm.layer_norm(x, (40,), w, b), kernels.row_fwd(x, w, b, 1e-5, 40)[0])
    assert counts() == (1, 1)


def test_tensors_that_cannot_be_told_apart_have_no_plan():
    """A plan from a call with weight = bias would be wrong for the next one."""
    x, w, b = torch.randn(6, 40, device=DEVICE), torch.randn(40, device=DEVICE), torch.randn(40, device=DEVICE)
    for bias in (w, w, w, b, b, b):
        assert torch.equal(fastnorm.layer_norm(x, (40,), w, bias), kernels.row_fwd(x, w, bias, 1e-5, 40)[0])
    assert counts() == (0, 0)


def test_parameters_that_have_to_be_copied_have_no_plan():
    x, w = torch.randn(6, 40, device=DEVICE), torch.randn(80, device=DEVICE)
    for _ in range(3):
        assert torch.equal(fastnorm.layer_norm(x, (40,), w[::2]), kernels.row_fwd(x, w[::2].clone(), None, 1e-5, 40)[0])
    assert counts() == (0, 0)


def test_shapes_that_never_come_again_do_not_fill_the_memory():
    clone = lambda x, *args: (x.clone(), None, None)
    extension.load().serve_replays(DEVICE, dict.fromkeys(kernels.CONTRACT, clone), plans.record, *plans.driver())
    for n in range(1, 5000):
        fastnorm.layer_norm(torch.ones(1, n, device=DEVICE), (n,))
    kinds, planned, _ = extension.load().count_replays(DEVICE)
    assert planned == 0
    assert 0 < kinds <= 4096


def test_a_launch_that_fails_is_done_in_python(monkeypatch):
    """As in a thread that has no CUDA context yet: the driver declines, nothing has happened, and Triton launches."""
    if DEVICE == "cuda":
        pytest.skip("a GPU's driver cannot be replaced")
    x = torch.randn(6, 40, device=DEVICE)
    expected = kernels.row_fwd(x, None, None, 1e-5, 40)[0]
    for _ in range(3):
        fastnorm.layer_norm(x, (40,))
    replayed = counts()[1]
    monkeypatch.setattr(plans, "_interpreted", [])  # the stand-in driver knows no kernel any more, and answers with an error
    assert torch.equal(fastnorm.layer_norm(x, (40,)), expected)
    assert counts()[1] == replayed == 1


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("number", ctypes.c_uint)]  # fmt: skip


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's driver cannot be replaced")
def test_the_driver_is_told_of_launches_that_may_start_early(monkeypatch):
    step, told = plans._step, []

    def watched(config, *rest):
        c = ctypes.cast(config, ctypes.POINTER(Config)).contents
        attributes = (Attribute * c.number).from_address(c.attributes) if c.number else ()
        told.append(([*c.grid], [*c.block], [(a.id, a.value[0]) for a in attributes]))
        return plans._interpret(config, *rest)

    def second_follows(launch, memory):
        function, programs, threads, shared, _, parameters = step(launch, memory)
        return function, programs, threads, shared, launch.kernel.fn.__name__ == "_finalise_kernel", parameters

    signature = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
    driver = ctypes.CFUNCTYPE(ctypes.c_int, *signature)(watched)
    extension.load().serve_replays(DEVICE, kernels.CONTRACT, plans.record, ctypes.cast(driver, ctypes.c_void_p).value, 0)
    monkeypatch.setattr(plans, "_step", second_follows)
    x, w = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((2000, 40), (40,)))
    results = []
    for _ in range(3):
        y = fastnorm.layer_norm(x, (40,), w)
        results.append((y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert [attributes for *_, attributes in told] == [[], [], [(6, 1)]]  # forward; backward, and what finishes it
    assert all(grid[0] > 0 and grid[1:] == block[1:] == [1, 1] and block[0] > 0 for grid, block, _ in told)


def test_backward_runs_where_its_forward_ran():
    x = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    for _ in range(3):
        dispatch.select(DEVICE)
        y = fastnorm.layer_norm(x, (40,))
        before = counts()[1]
        with fastnorm.use_backend("reference"):
            dx = torch.autograd.grad(y.square().sum(), x)[0]
    assert counts()[1] == before + 1
    assert torch.allclose(dx, torch.autograd.grad(torch.nn.functional.layer_norm(x, (40,)).square().sum(), x)[0], atol=1e-5)


def test_closed_devices_are_not_served():
    x = torch.randn(6, 40, device=DEVICE)
    for _ in range(3):
        fastnorm.layer_norm(x, (40,))
    assert counts()[1] == 1
    with fastnorm.use_backend("reference"):
        assert dispatch.direct.layer_norm(x, (40,), None, None, 1e-5) is None
        fastnorm.layer_norm(x, (40,))
    assert counts()[1] == 1


def test_many_threads(monkeypatch):
    """Replays at once, from user threads and from the engine's. Triton's interpreter is for one thread, so nothing computes."""
    launched = itertools.count()
    counting = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(lambda *args: 0 * next(launched))
    inputs = [torch.randn(6, n, device=DEVICE, requires_grad=True) for n in (8, 16, 24)]

    def work(i):
        y = fastnorm.layer_norm(inputs[i % 3], inputs[i % 3].shape[1:])
        return torch.autograd.grad(y, inputs[i % 3], torch.ones_like(y))[0].shape

    for i in range(6):
        work(i)
    if DEVICE == "cpu":
        launch, stream = ctypes.cast(counting, ctypes.c_void_p).value, 0
        extension.load().serve_replays(DEVICE, kernels.CONTRACT, plans.record, launch, stream)
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(work, range(200)))
    assert shapes == [inputs[i % 3].shape for i in range(200)]
    assert counts() == (6, 400)
    assert DEVICE == "cuda" or next(launched) == 400


def test_an_exception_of_the_planner_is_passed_on(monkeypatch):
    class Odd(Exception):
        pass

    def broken(*args):
        raise Odd("this")

    functions = dict.fromkeys(kernels.CONTRACT, broken)
    extension.load().serve_replays(DEVICE, functions, plans.record, *plans.driver())
    with pytest.raises(Odd, match="this"):
        fastnorm.layer_norm(torch.randn(2, 3, device=DEVICE, requires_grad=True), (3,))
