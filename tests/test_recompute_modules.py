"""recompute="output" of the modules: as torch.nn's with the activation after them, and nothing else about them is different."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from options import check_not_lost
from recomputed import LEAKY, is_recomputed, saved
from torch import nn

import fastnorm

D = {"dtype": F64}
MODULES = {
    "LayerNorm": (fastnorm.LayerNorm, nn.LayerNorm, (6,), (5, 4, 6)),
    "LayerNorm of two dimensions": (fastnorm.LayerNorm, nn.LayerNorm, ((4, 6),), (5, 4, 6)),
    "RMSNorm": (fastnorm.RMSNorm, nn.RMSNorm, (6,), (5, 4, 6)),
    "BatchNorm1d": (fastnorm.BatchNorm1d, nn.BatchNorm1d, (4,), (5, 4)),
    "BatchNorm1d momentum=None": (fastnorm.BatchNorm1d, nn.BatchNorm1d, (4, 1e-3, None), (5, 4, 6)),
    "BatchNorm2d": (fastnorm.BatchNorm2d, nn.BatchNorm2d, (4,), (5, 4, 6, 3)),
    "BatchNorm2d without statistics": (fastnorm.BatchNorm2d, nn.BatchNorm2d, (4, 1e-5, 0.1, True, False), (5, 4, 6, 3)),
    "BatchNorm3d": (fastnorm.BatchNorm3d, nn.BatchNorm3d, (4,), (5, 4, 2, 3, 2)),
}
OPTIONS = {"recompute": "output", "activation": LEAKY}
NORMS = {
    "LayerNorm": lambda **o: fastnorm.LayerNorm(4, **o),
    "RMSNorm": lambda **o: fastnorm.RMSNorm(4, **o),
    "BatchNorm1d": lambda **o: fastnorm.BatchNorm1d(4, **o),
    "BatchNorm2d": lambda **o: fastnorm.BatchNorm2d(4, **o),
    "BatchNorm3d": lambda **o: fastnorm.BatchNorm3d(4, **o),
}


def gradients(module, x, end=lambda y: y):
    a = x.clone().requires_grad_()
    y = end(module(a))
    return [y, *torch.autograd.grad(y.sin().sum(), (a, *module.parameters()))]


def assert_close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, backend, device):
    """Steps of training, then evaluation; parameters, statistics and counters stay with torch.nn's."""
    cls, torchs, args, shape = MODULES[name]
    ours, theirs = cls(*args, **OPTIONS, **D).to(device), torchs(*args, **D).to(device)
    with torch.no_grad():
        ours.weight.uniform_(-2, 2), theirs.weight.copy_(ours.weight)
    for step in range(4):
        ours.train(step < 3), theirs.train(step < 3)
        x = torch.randn(shape, device=device, **D)
        results = gradients(ours, x)
        assert is_recomputed(results[0])
        assert_close(results, gradients(theirs, x, lambda y: F.leaky_relu(y, 0.01)))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert_close(ours.buffers(), theirs.buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", [None, LEAKY])
def test_running_statistics(activation, momentum, backend, device):
    """To the bit those of the norm without the option, and so is y."""
    usual = fastnorm.BatchNorm2d(4, momentum=momentum, activation=activation, device=device)
    ours = fastnorm.BatchNorm2d(4, momentum=momentum, activation=activation, recompute="output", device=device)
    for _ in range(3):
        x = torch.randn(5, 4, 6, 3, device=device) + 2
        version = ours.num_batches_tracked._version
        y = ours(x)
        assert is_recomputed(y)
        assert torch.equal(y, usual(x))
        assert ours.num_batches_tracked._version > version
        assert all(map(torch.equal, ours.buffers(), usual.buffers()))
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_channels_on_any_axis(axis, backend, device):
    ours = fastnorm.BatchNorm2d(4, channel_axis=axis, **OPTIONS, device=device, **D)
    theirs = nn.BatchNorm2d(4, device=device, **D)
    shape = [3, 5, 2, 6]
    shape[axis] = 4
    x = torch.randn(shape, device=device, **D)
    moved = x.movedim(axis, 1)
    back = lambda y: F.leaky_relu(y, 0.01).movedim(1, axis)
    y, dx, *rest = gradients(ours, x)
    z, dz, *others = gradients(theirs, moved, back)
    assert y.is_contiguous()
    assert_close([y, dx, *rest, *ours.buffers()], [z, dz.movedim(1, axis), *others, *theirs.buffers()])


def test_frozen(backend, device):
    ours, theirs = fastnorm.BatchNorm1d(4, frozen=True, **OPTIONS, device=device, **D), nn.BatchNorm1d(4, device=device, **D)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(5, 4, device=device, **D)
    assert is_recomputed(ours(x))
    assert_close(gradients(ours, x), gradients(theirs.eval(), x, lambda y: F.leaky_relu(y, 0.01)))
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_a_zero_centred_weight(backend, device):
    """The factor is what is inverted: a weight of -1 is none."""
    ours, theirs = (fastnorm.RMSNorm(6, zero_centred=True, recompute=how, device=device, **D) for how in ("output", None))
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.0, -1.0, 0.5, -1.0, 0.0, 2.0]))
    x = torch.randn(5, 6, device=device, **D, requires_grad=True)
    y, kept = saved(lambda: ours(x))
    assert is_recomputed(y)
    assert kept[-2].tolist() == [1, 3]
    assert_close(gradients(ours, x.detach()), gradients(theirs, x.detach()))


def test_a_compiled_module(backend, device):
    ours, theirs = fastnorm.BatchNorm2d(4, **OPTIONS, device=device), nn.BatchNorm2d(4, device=device)
    x = torch.randn(5, 4, 6, 3, device=device)
    got = gradients(torch.compile(ours, backend="aot_eager", fullgraph=True), x)
    assert_close(got, gradients(theirs, x, lambda y: F.leaky_relu(y, 0.01)), 1e-5)
    assert_close(ours.buffers(), theirs.buffers(), 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NORMS)
def test_copies_states_and_words(name):
    norm, x = NORMS[name](**OPTIONS), torch.randn(3, 4, *[4] * {"2": 2, "3": 3}.get(name[-2], 0))
    assert "activation=('leaky_relu', 0.01), recompute='output'" in repr(norm)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert (repr(again), again.recompute) == (repr(norm), "output")
        assert torch.equal(again(x), copy.deepcopy(norm)(x))
    plain = NORMS[name]()
    assert plain.recompute is None
    assert "recompute" not in repr(NORMS[name](recompute=None))
    assert list(norm.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(norm.state_dict(), strict=True)


def test_what_torch_nn_lacks_is_not_lost():
    for make in NORMS.values():
        check_not_lost(make(recompute="output"), "recompute", "output")
    sync, x = fastnorm.SyncBatchNorm(4), torch.randn(6, 4, 3, requires_grad=True)
    sync.recompute = "output"
    assert not is_recomputed(sync(x))


def test_folded_and_traced():
    """In inference it is a norm as any other."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2), fastnorm.BatchNorm2d(4, **OPTIONS)).double()
    x = torch.randn(6, 3, 5, 5, **D)
    net(x)
    folded = fastnorm.fold(net.eval())
    assert type(folded[1]) is nn.LeakyReLU
    torch.testing.assert_close(folded(x), net(x))
    graph = torch.fx.symbolic_trace(net)
    assert torch.equal(graph(x), net(x))


@pytest.mark.parametrize("name", NORMS)
def test_what_is_refused_at_construction(name):
    make = NORMS[name]
    for wrong in ("input", True, ("output",)):
        with pytest.raises(ValueError, match="recompute is None or 'output', not"):
            make(recompute=wrong)
    for activation in ("relu", "elu", ("leaky_relu", 0.0)):
        with pytest.raises(ValueError, match="goes without an activation or with"):
            make(recompute="output", activation=activation)
    if name.startswith("Batch"):
        with pytest.raises(ValueError, match="here is virtual_batch_size as well"):
            make(recompute="output", virtual_batch_size=2)


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm", "ModulatedLayerNorm", "LayerNorm2d"])
def test_norms_that_keep_their_input(name):
    with pytest.raises(ValueError, match=f"{name} keeps its input"):
        getattr(fastnorm, name)(4, recompute="output")
    getattr(fastnorm, name)(4, recompute=None)
    with pytest.raises(TypeError, match="recompute"):
        fastnorm.GroupNorm(2, 4, recompute="output")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_refused_at_the_call(training, momentum, backend, device):
    """And nothing is counted."""
    x = torch.randn(6, 4, 5, device=device)
    mask, lengths = torch.ones(6, 5, dtype=torch.bool, device=device), torch.ones(6, dtype=torch.long, device=device)
    for change, extras, words in (
        ({}, {"residual": x}, "here is residual as well"),
        ({}, {"mask": mask}, "here is mask as well"),
        ({}, {"lengths": lengths}, "here is lengths as well"),
        ({"virtual_batch_size": 2}, {}, "here is virtual_batch_size as well"),
        ({"activation": "relu"}, {}, "given activation='relu'"),
        ({"recompute": "input"}, {}, "recompute is None or 'output', not 'input'"),
    ):
        norm = fastnorm.BatchNorm1d(4, momentum=momentum, recompute="output", device=device).train(training)
        vars(norm).update(change)
        before = copy.deepcopy(norm.state_dict())
        with pytest.raises(ValueError, match=words):
            norm(x, **extras)
        assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    rows = fastnorm.LayerNorm(5, recompute="output", device=device), fastnorm.RMSNorm(5, recompute="output", device=device)
    for norm in rows:
        with pytest.raises(ValueError, match="here is residual as well"):
            norm(x, x)
        norm.recompute = "input"
        with pytest.raises(ValueError, match="not 'input'"):
            norm(x)
    with pytest.raises(ValueError, match="here is mask as well"):
        fastnorm.LayerNorm(5, recompute="output", device=device)(x, mask=mask[:, :4])
