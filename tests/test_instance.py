"""Instance norm, a reshape onto channels: as exact as torch's, and which calls are left to torch."""

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32
from torch import nn

import fastnorm
from fastnorm import instance

D = torch.float64


@pytest.mark.parametrize("cls", [fastnorm.InstanceNorm1d, fastnorm.InstanceNorm2d, fastnorm.InstanceNorm3d])
@pytest.mark.parametrize("dtype", [F32, BF16, D])
def test_instances_are_at_least_as_exact(cls, dtype, backend, device):
    """Against float64; gradients and running statistics, too."""
    torchs = getattr(nn, cls.__name__)
    extra = {"affine": True, "track_running_stats": True}
    shape = (4, 6, *(5, 7, 3)[: int(cls.__name__[-2])])
    kwargs = {"device": device, "dtype": dtype, **extra}
    ours, theirs, truth = cls(6, **kwargs), torchs(6, **kwargs), torchs(6, **{**kwargs, "dtype": D})
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape))
    for module in (theirs, truth):
        module.load_state_dict(ours.state_dict())
    x = (torch.randn(shape, dtype=D, device=device) + 3).to(dtype)
    dy = torch.randn(shape, dtype=D, device=device).to(dtype)

    def run(module, dtype):
        a = x.to(dtype).requires_grad_()
        y = module(a)
        return [y, *torch.autograd.grad(y, (a, *module.parameters()), dy.to(dtype)), *module.buffers()]

    units = 8 if dtype == D else 1  # the truth is no more exact there
    for a, b, t in zip(run(ours, dtype), run(theirs, dtype), run(truth, D), strict=True):
        error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
        one = torch.finfo(a.dtype if a.is_floating_point() else D).eps * t.abs().max().item()
        assert error <= 2 * allowed + units * one


@pytest.fixture
def of_channels(monkeypatch):
    """The shapes of the calls that go on as channels; fewer than 100 elements are small."""
    real, calls = fastnorm.functional.batch_norm, []
    monkeypatch.setattr(instance, "LEAST", 100)
    monkeypatch.setattr(fastnorm.functional, "batch_norm", lambda *args: calls.append(tuple(args[0].shape)) or real(*args))
    return calls


def test_small_ones_are_torchs(of_channels, backend, device):
    """On a CPU, where their calls have been timed."""
    for x in (torch.randn(2, 3, 16, device=device), torch.randn(2, 3, 17, device=device)):
        torch.testing.assert_close(fastnorm.instance_norm(x), F.instance_norm(x))
    assert of_channels == ([(1, 6, 17)] if device == "cpu" else [(1, 6, 16), (1, 6, 17)])


@pytest.mark.parametrize("which", ["weight", "running_mean"])
def test_small_ones_that_torch_does_not_take(which, of_channels, backend, device):
    """Parameters of any dtype beside any input, whatever its size."""
    x, ones = torch.randn(2, 3, 16, device=device), torch.ones(3, dtype=D, device=device)
    given = {"running_mean": None, "running_var": None, "weight": None, "bias": None, which: ones.clone()}
    if which == "running_mean":
        given["running_var"] = ones
    before = {name: None if t is None else t.clone() for name, t in given.items()}
    y = fastnorm.instance_norm(x, **given)
    wide = F.instance_norm(x.double(), **before)
    torch.testing.assert_close(y.double(), wide, rtol=1e-6, atol=1e-6)
    for name, t in given.items():
        assert t is None or torch.allclose(t, before[name], rtol=1e-6)
    assert of_channels == [(1, 6, 16)]
