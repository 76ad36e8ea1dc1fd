"""SyncBatchNorm in one process: torch's module, the merging of statistics, and the conversion of models."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from cases import F32, F64
from oracle import error, wide

import fastnorm
from fastnorm import collective


def test_merge_of_counts_no_float32_holds():
    """Counts beyond 2^24 are exact, and so is a mean that is large beside the deviations."""
    counts = [2**24 + 1, 0, 2**40 + 3, 5]
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 6, generator=generator, dtype=F64) + 1e4
    std = torch.rand(4, 6, generator=generator, dtype=F64).float()
    mean[1], std[1] = 0, 0
    pair = lambda t: torch.stack((t.float(), (t - t.float()).float()))
    parts = torch.stack([collective.pack(n, pair(a), b) for n, a, b in zip(counts, mean, std, strict=True)])
    assert parts.dtype == F32
    total, common, merged = collective.merge(parts)
    assert total.item() == sum(counts)
    n = wide(torch.tensor(counts))[:, None]
    expected = (n * wide(mean)).sum(0) / n.sum()
    assert error(common, expected) < 1e-9
    expected_var = (n * (wide(std) ** 2 + (wide(mean) - expected) ** 2)).sum(0) / n.sum()
    assert error(merged / total, expected_var) < 1e-6


def test_is_torchs_sync_batch_norm():
    ours, theirs = fastnorm.SyncBatchNorm, torch.nn.SyncBatchNorm
    assert issubclass(ours, theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    assert repr(ours(6, eps=0.1)) == repr(theirs(6, eps=0.1))
    theirs(6).load_state_dict(ours(6).state_dict(), strict=True)
    ours(6).load_state_dict(theirs(6).state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 5), (4, 6, 3, 2)])
def test_without_process_group_it_is_batch_norm(backend, device, shape, training):
    kinds = {2: fastnorm.BatchNorm1d, 3: fastnorm.BatchNorm1d, 4: fastnorm.BatchNorm2d}
    x = torch.randn(shape, device=device)
    plain = kinds[len(shape)](6, device=device).train(training)
    norm = fastnorm.SyncBatchNorm(6, device=device).train(training)
    assert torch.equal(norm(x), plain(x))
    for name, t in norm.state_dict().items():
        assert torch.equal(t, plain.state_dict()[name])


def test_an_attribute_is_no_option():
    """One that a model's author has set for himself means nothing to this norm, in training and in evaluation alike."""
    norm, x = fastnorm.SyncBatchNorm(6), torch.randn(8, 6)
    norm.activation, norm.frozen, norm.channel_axis = "relu", True, 0
    for training in (True, False):
        plain = fastnorm.BatchNorm1d(6).train(training)
        plain.load_state_dict(norm.state_dict())
        assert torch.equal(norm.train(training)(x), plain(x))


def net():
    """Every kind of batch norm; one module in two places, and one with children of its own."""
    shared = fastnorm.BatchNorm1d(6, momentum=None)
    without_bias = {"bias": False} if "bias" in inspect.signature(torch.nn.SyncBatchNorm).parameters else {}
    inner = torch.nn.ModuleDict({"two": torch.nn.BatchNorm2d(6, affine=False), "again": shared, "same": shared})
    return torch.nn.Sequential(
        torch.nn.Linear(6, 6),
        shared,
        inner,
        torch.nn.BatchNorm3d(6, track_running_stats=False),
        torch.nn.SyncBatchNorm(6, **without_bias),
        torch.nn.LayerNorm(6),
        torch.nn.InstanceNorm1d(6),
    )


def test_conversion_keeps_everything():
    model = net()
    model.qconfig = model[1].qconfig = "quantised"
    model[2]["two"].eval()
    calls = []
    handle = model[1].register_forward_hook(lambda *args: calls.append(args))
    before, parameters, buffers = repr(model), dict(model.named_parameters()), dict(model.named_buffers())
    converted = fastnorm.SyncBatchNorm.convert_sync_batchnorm(model, "group")
    assert converted is model
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert t is {**parameters, **buffers}[name]
    assert model.state_dict().keys() == net().state_dict().keys()
    new = [model[1], model[2]["two"], model[3], model[4]]
    assert all(type(m) is fastnorm.SyncBatchNorm and m.process_group == "group" for m in new)
    assert model[2]["again"] is model[2]["same"] is model[1]
    assert [m.training for m in new] == [True, False, True, True]
    assert (model[1].qconfig, model[1].momentum, model[3].track_running_stats) == ("quantised", None, False)
    assert type(model[5]) is torch.nn.LayerNorm
    assert type(model[6]) is torch.nn.InstanceNorm1d
    assert before.count("BatchNorm") == repr(model).count("SyncBatchNorm")
    model[1](torch.randn(4, 6))
    assert len(calls) == 1
    handle.remove()
    model[1](torch.randn(4, 6))
    assert len(calls) == 1
    again = fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)
    assert again[4].process_group is None
    assert type(copy.deepcopy(again)[1]) is fastnorm.SyncBatchNorm


def test_conversion_of_one_batch_norm_is_a_new_module():
    old = torch.nn.BatchNorm1d(6)
    new = fastnorm.SyncBatchNorm.convert_sync_batchnorm(old)
    assert type(old) is torch.nn.BatchNorm1d
    assert type(new) is fastnorm.SyncBatchNorm
    assert new.weight is old.weight
    new.weight = torch.nn.Parameter(torch.zeros(6))
    new.register_buffer("running_mean", torch.ones(6))
    assert old.weight.all()
    assert not old.running_mean.any()
    x = torch.randn(4, 6)
    assert torch.equal(fastnorm.SyncBatchNorm.convert_sync_batchnorm(old)(x), fastnorm.BatchNorm1d(6)(x))


class Activated(torch.nn.BatchNorm2d):
    """What torch's conversion loses the activation of (pytorch#187298)."""

    def forward(self, x):
        return super().forward(x).relu()


class ActivatedSync(torch.nn.SyncBatchNorm):
    """Needs no conversion, hence no warning."""

    def forward(self, x):
        return super().forward(x).relu()


class Renamed(torch.nn.BatchNorm2d):
    def __init__(self, C):
        super().__init__(C, eps=0.25)


@pytest.mark.filterwarnings("error:.*is not synchronised")
def test_conversion_drops_nothing():
    parametrized = torch.nn.utils.parametrize.register_parametrization(torch.nn.BatchNorm1d(6), "weight", torch.nn.Tanh())
    instance = torch.nn.BatchNorm1d(6)
    instance.forward = lambda x: x
    for special in (Activated(6), parametrized, instance, torch.nn.LazyBatchNorm1d()):
        with pytest.warns(UserWarning, match="is not synchronised"):
            assert fastnorm.SyncBatchNorm.convert_sync_batchnorm(special) is special
    synchronised = ActivatedSync(6)
    assert fastnorm.SyncBatchNorm.convert_sync_batchnorm(synchronised) is synchronised
    plain = fastnorm.SyncBatchNorm.convert_sync_batchnorm(Renamed(6))
    assert type(plain) is fastnorm.SyncBatchNorm
    assert plain.eps == 0.25


def test_ddp_still_refuses_torchs_own_on_the_cpu():
    """fastnorm lets its own SyncBatchNorm through; that is all it changes."""
    handle = torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle
    logged = lambda kind, text: (_ for _ in ()).throw(kind(text))
    parallel = SimpleNamespace(device_type="cpu", _log_and_throw=logged)
    handle(parallel, torch.nn.Sequential(fastnorm.SyncBatchNorm(6), torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="only work with GPU modules"):
        handle(parallel, torch.nn.Sequential(fastnorm.SyncBatchNorm(6), torch.nn.SyncBatchNorm(6)))
