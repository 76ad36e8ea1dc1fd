"""fastnorm.convert and modules that are special: replaced forwards, parametrizations, lazy, compiled, sharded."""

import copy
import gc
import types

import libraries
import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from test_convert import assert_same_results, model, step
from torch import nn

import fastnorm
from fastnorm.convert import CLASSES, NORMS, OURS


class Registered(nn.LayerNorm):
    known = []  # noqa: RUF012 (a registry, as in the libraries that have one)

    def __init_subclass__(cls):
        Registered.known.append(cls)


class OtherBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        pass


def on_the_instance():
    norm = nn.LayerNorm(6)
    norm.forward = types.MethodType(nn.LayerNorm.forward, norm)
    return norm


LEFT = {
    "its own forward": (lambda: libraries.LayerNormAct(6), "has a forward of its own"),
    "a forward on the instance": (on_the_instance, "its forward was replaced on the instance"),
    "lazy": (lambda: nn.LazyBatchNorm1d(), "is lazy: convert after the first call"),
    "scripted": (lambda: torch.jit.script(nn.LayerNorm(6)), "is compiled by torch.jit"),
    "quantised": (
        lambda: torch.ao.nn.quantized.LayerNorm(6, *map(nn.Parameter, torch.randn(2, 6)), 1.0, 0),
        "has a forward of its own",
    ),
    "another batch norm": (lambda: OtherBatchNorm(6), "fastnorm has no such norm"),
    "a registry": (lambda: Registered(6), "its class takes notice of subclasses, and converting makes one"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("what", LEFT)
def test_left_alone(what):
    make, reason = LEFT[what]
    norm = make()
    cls = type(norm)
    report = fastnorm.convert(nn.Sequential(norm))
    assert type(norm) is cls
    assert [(s.name, s.cls, s.reason) for s in report.skipped] == [("0", cls, reason)]
    assert not report.changed
    assert not Registered.known


def test_a_lazy_norm_can_be_converted_after_its_first_call():
    net = nn.Sequential(nn.LazyBatchNorm1d())
    net(torch.randn(4, 6))
    fastnorm.convert(net)
    assert type(net[0]) is fastnorm.BatchNorm1d


def test_revert_leaves_what_it_cannot_know():
    class Own(fastnorm.LayerNorm):
        pass

    hooked = fastnorm.LayerNorm(6)
    hooked.forward = types.MethodType(fastnorm.LayerNorm.forward, hooked)
    report = fastnorm.revert(nn.Sequential(Own(6), hooked, fastnorm.BatchNorm1d(6)))
    assert report.changed == {"2": nn.BatchNorm1d}
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("0", "is a subclass of fastnorm's class"),
        ("1", "its forward was replaced on the instance"),
    ]


# What torch does to modules.


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.BatchNorm1d, libraries.TimmLayerNorm], ids=["layer", "batch", "subclass"])
def test_parametrized(cls):
    """The class that torch made for the module is replaced, so deep copies, which share it, keep theirs."""
    x = torch.randn(4, 6).double()
    net = nn.Sequential(cls(6)).double()
    parametrize.register_parametrization(net[0], "weight", Double())
    copied = copy.deepcopy(net)
    want = net(x)
    fastnorm.convert(net)
    assert isinstance(net[0], CLASSES)
    assert not isinstance(copied[0], CLASSES)
    torch.testing.assert_close(net(x), want)
    torch.testing.assert_close(copied(x), want)
    assert fastnorm.convert(net).unchanged == 1
    clone = copy.deepcopy(net)
    assert type(clone[0]) is type(net[0])
    fastnorm.revert(clone)
    parametrize.remove_parametrizations(clone[0], "weight")
    assert type(clone[0]) is cls
    parametrize.remove_parametrizations(net[0], "weight")
    assert isinstance(net[0], CLASSES)
    torch.testing.assert_close(net(x), want)
    fastnorm.revert(net)
    assert type(net[0]) is cls
    torch.testing.assert_close(net(x), want)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "apply",
    [lambda m: nn.utils.weight_norm(m, dim=None), lambda m: prune.l1_unstructured(m, "weight", 0.5), nn.utils.spectral_norm],
    ids=["weight_norm", "prune", "spectral_norm"],
)
def test_weights_that_hooks_recompute(apply):
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    net = nn.Sequential(apply(norm)).eval()
    mine = copy.deepcopy(net) if apply is nn.utils.spectral_norm else net
    x = torch.randn(4, 6).double()
    want = step(net, x)
    fastnorm.convert(mine)
    assert type(mine[0]) is fastnorm.LayerNorm
    torch.testing.assert_close(step(mine, x), want)


def test_a_model_that_is_compiled_already():
    net = model().eval()
    x = torch.randn(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    want = compiled(x)
    assert len(fastnorm.convert(compiled).changed) == 4
    assert type(net[1]) is fastnorm.LayerNorm
    torch.testing.assert_close(compiled(x), want)
    torch._dynamo.reset()


def test_the_fast_path_of_an_encoder_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert_same_results(layer.double(), torch.randn(2, 3, 8).double(), changed=2)
    layer.eval()
    x = torch.randn(2, 3, 8).double()
    with torch.no_grad():
        want = layer(x)
        fastnorm.convert(layer)
        torch.testing.assert_close(layer(x), want)


@pytest.fixture
def one_process():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    gc.collect()


def test_fully_shard(one_process):
    """Convert before; after it the class is FSDP's, and stays."""
    from torch.distributed.fsdp import fully_shard

    late, early = nn.Sequential(nn.LayerNorm(6)), nn.Sequential(nn.LayerNorm(6))
    fully_shard(late[0], mesh=one_process)
    assert [s.reason for s in fastnorm.convert(late).skipped] == ["is wrapped by fully_shard, which comes after the conversion"]
    assert type(late[0]).__bases__[1] is nn.LayerNorm
    fastnorm.convert(early)
    fully_shard(early[0], mesh=one_process)
    assert fastnorm.convert(early).unchanged == 1
    assert len(fastnorm.revert(early).skipped) == 1
    assert isinstance(early[0], fastnorm.LayerNorm)


def test_every_class_has_its_counterpart():
    assert all(issubclass(ours, theirs) and issubclass(theirs, NORMS) for theirs, ours in OURS.items())
    assert {ours.__name__ for ours in CLASSES} <= set(fastnorm.__all__)
