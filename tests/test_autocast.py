"""Autocast: layer_norm is on CUDA's float32 list and batch_norm on none; `fastnorm.config.autocast_keeps_dtype`."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from test_fused_calls import NORMS, make

import fastnorm
from fastnorm import functional, gate


@contextlib.contextmanager
def autocast(device, dtype=BF16):
    """As torch.autocast, which does nothing for "cuda" where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_when_the_output_is_widened(dtype, keeps):
    """On fake tensors of a GPU; the answer for plain ones hangs on nothing else."""
    with torch._subclasses.FakeTensorMode(), fastnorm.config.patch(autocast_keeps_dtype=keeps):
        x = torch.empty(4, 6, dtype=dtype, device="cuda")
        assert not gate.autocasts(x)
        with autocast("cuda"):
            assert gate.autocasts(x) == (dtype in (BF16, F16) and not keeps)
            assert not gate.autocasts(torch.empty(4, 6, dtype=dtype))
        with autocast("cpu"):
            assert not gate.autocasts(x)


@pytest.mark.parametrize("choice", ["torch", "fastnorm"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_dtypes_as_torch_on_fake_tensors_of_a_gpu(dtype, choice):
    with torch._subclasses.FakeTensorMode(), fastnorm.config.patch(compile=choice), autocast("cuda"):
        x = torch.empty(4, 6, dtype=dtype, device="cuda")
        p = torch.empty(6, dtype=F64 if dtype == F64 else F32, device="cuda")
        expected = F.layer_norm(x, (6,), p, p).dtype
        assert fastnorm.layer_norm(x, (6,), p, p).dtype == expected == (F64 if dtype == F64 else F32)
        assert fastnorm.batch_norm(x, None, None, p, p, True).dtype == F.batch_norm(x, None, None, p, p, True).dtype == dtype
        assert torch.ops.fastnorm.layer_norm(x, [6], p, None, 1e-5)[0].dtype == expected
        assert torch.ops.fastnorm.batch_norm_train(x, p, None, 1e-5)[0].dtype == dtype
        with fastnorm.config.patch(autocast_keeps_dtype=True):
            assert fastnorm.layer_norm(x, (6,), p, p).dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_results_and_gradients_of_a_widened_output(dtype, backend, device, monkeypatch):
    """As torch's: layer_norm of x.float(), whose gradient is rounded to x's dtype; also when differentiated again."""
    if device == "cpu":  # no CPU autocast does this: only the question is answered differently here
        monkeypatch.setattr(functional, "autocasts", lambda x: x.dtype in (BF16, F16))
        monkeypatch.setattr(functional.direct, "layer_norm", lambda *args: None)
    x, dy = torch.randn(5, 12, device=device).to(dtype), torch.randn(5, 12, device=device)
    weight, bias = (torch.randn(12, device=device, dtype=p) for p in (F32, dtype))
    results = []
    for function, wide in ((fastnorm.layer_norm, F32), (lambda x, *args: F.layer_norm(x.to(F64), *args), F64)):
        inputs = [t.detach().to(t.dtype if wide is F32 else F64).requires_grad_() for t in (x, weight, bias)]
        with autocast(device) if device == "cuda" and wide is F32 else contextlib.nullcontext():
            y = function(inputs[0], (12,), *inputs[1:])
        first = torch.autograd.grad(y, inputs, dy.to(wide), create_graph=True)
        second = torch.autograd.grad(first[0].to(wide).square().sum(), inputs[0])
        assert wide is F64 or [t.dtype for t in (y, *first, *second)] == [F32, dtype, F32, dtype, dtype]
        results.append([y, *first, *second])
    for a, b, precision in zip(*results, (F32, dtype, F32, dtype, dtype), strict=True):
        scale = 8 * torch.finfo(precision).eps * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=scale)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_cpu_autocast_changes_nothing(dtype, backend, device):
    """As in torch: no norm is on the CPU's lists, which other devices do not read. Parameters may all be float32."""
    x = torch.randn(5, 12, device=device).to(dtype)
    norms = [fastnorm.LayerNorm(12, dtype=parameters, device=device) for parameters in (dtype, F32)]
    norms.append(fastnorm.BatchNorm1d(12, track_running_stats=False, device=device))
    plain = [norm(x) for norm in norms]
    with autocast("cpu"):
        for norm, expected in zip(norms, plain, strict=True):
            y = norm(x)
            assert torch.equal(y, expected)
            assert y.dtype == dtype


def _differentiated(function, inputs):
    """Outputs, and their gradients from the same cotangents whatever is rounded."""
    y = function(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    generator = torch.Generator().manual_seed(1)
    dy = [torch.randn(t.shape, generator=generator, dtype=F64).bfloat16().to(t) for t in y]
    return [*y, *torch.autograd.grad(y, inputs, dy)]


@pytest.fixture
def any_size(monkeypatch):
    """Small inputs are left to torch."""
    for module in (fastnorm.group, fastnorm.channels_first):
        for name in ("LEAST", "LEAST_POSITIONS", "LEAST_PLAIN_POSITIONS"):
            monkeypatch.setattr(module, name, 1, raising=False)
    monkeypatch.setattr(fastnorm.channels_first, "pays", lambda *_: True)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", list(NORMS))
def test_cpu_autocast_of_the_others(name, dtype, backend, device):
    """The dtypes of torch's sequence under the same autocast, and no farther from float64 than it and one rounding."""
    fused, torchs, shapes = NORMS[name]
    inputs = make(shapes, device, dtype)
    with torch.autocast("cpu", BF16):
        ours, theirs = (_differentiated(f, inputs) for f in (fused, torchs))
    truth = _differentiated(torchs, [t.detach().double().requires_grad_() for t in inputs])
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    roundings = 1 if dtype == BF16 else 16  # a gradient is a sum in float32
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = ((t.double() - exact).abs().max().item() for t in (a, b))
        assert error <= allowed + roundings * torch.finfo(dtype).eps * max(exact.abs().max().item(), 1)
