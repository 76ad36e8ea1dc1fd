"""The package `kernels`: kernelize() takes our forwards, without the Hub."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import hub
from fastnorm.hub import SERVED

ROOT = Path(__file__).resolve().parents[1]

with pytest.MonkeyPatch.context() as patch:
    # `python -m pytest` looks in the repository first, where our Triton kernels lie in a folder of that name.
    patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
    import kernels
    from kernels import Mode


class Twice(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.fixture
def registered():
    """Registered for this test only."""
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        hub.register()
        yield
    for cls in SERVED:
        del cls.kernel_layer_name, cls.kernel_condition


def net():
    torch.manual_seed(2)
    norms = nn.LayerNorm(6), Twice(6), nn.BatchNorm1d(6), fastnorm.LayerNorm(6), nn.LayerNorm(6, bias=False)
    return nn.Sequential(nn.Linear(6, 6), *norms).double()


def replaced(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE], ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_kernelize(registered, mode, times):
    for _ in range(times - 1):
        hub.register()
    model, expected = net(), net()
    kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE)
    assert replaced(model) == ["1", "3", "5"]
    assert model[1].forward.__func__ is SERVED[nn.LayerNorm]
    assert model[3].forward.__func__ is SERVED[nn.BatchNorm1d]
    assert [type(m) for m in model] == [type(m) for m in expected]
    x = torch.randn(4, 6).double()
    for training in (True, False):
        results = []
        for each in (model.train(training), expected.train(training)):
            each.zero_grad()
            y = each(x)
            y.square().sum().backward()
            results.append({"y": y.detach()} | {n: p.grad for n, p in each.named_parameters()} | dict(each.named_buffers()))
        torch.testing.assert_close(*results)
    reasons = {s.name: s.reason for s in fastnorm.convert(model).skipped}
    assert set(reasons) == {"1", "2", "3", "5"}


@pytest.mark.parametrize("cls", list(SERVED), ids=lambda cls: cls.__name__)
def test_every_class_and_device(registered, cls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    shape = (4, 6) if cls in (nn.LayerNorm, nn.BatchNorm1d) else (2, 6, *[3] * (2 if cls is nn.BatchNorm2d else 3))
    x = torch.randn(shape).double()
    for device in hub.DEVICES:
        norm = cls(shape[-1] if cls is nn.LayerNorm else 6).double()
        expected = copy.deepcopy(norm)(x)
        kernels.kernelize(norm, mode=Mode.TRAINING, device=device, use_fallback=kernels.KernelizeFallback.NONE)
        assert norm.forward.__func__ is SERVED[cls]
        torch.testing.assert_close(norm(x), expected)


def test_nothing_is_registered_before():
    model = net()
    kernels.kernelize(model, mode=Mode.TRAINING, device="cpu")
    assert not replaced(model)
