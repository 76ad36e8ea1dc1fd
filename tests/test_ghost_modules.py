"""Modules with ghost batches, as torch.nn's batch norm of each ghost batch, and the calls that are refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from ghosts import assert_same, by_parts, calls_of
from options import check_not_lost
from test_ghost import leaves, pair
from torch import nn

import fastnorm

# ---------------------------------------------------------------- modules


class Parts(nn.Module):
    """torch.nn's batch norm of each ghost batch, with one update of the running statistics."""

    def __init__(self, norm, n, end=lambda z: z):
        super().__init__()
        self.norm, self.n, self.end = norm, n, end

    def forward(self, x, residual=None):
        norm = self.norm
        if not norm.training:
            y = norm(x)
        else:
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum or 1 / norm.num_batches_tracked.item()
            running = norm.running_mean, norm.running_var
            y, *new = by_parts(x, *running, norm.weight, norm.bias, self.n, momentum, norm.eps)
            for t, value in zip(running, new, strict=True):
                t.copy_(value.detach())
        return self.end(y if residual is None else y + residual)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("cls", "shape", "options"),
    [
        ("BatchNorm1d", (9, 4), {}),
        ("BatchNorm1d", (8, 4, 6), {"activation": "relu"}),
        ("BatchNorm2d", (8, 4, 3, 2), {"activation": "silu"}),
        ("BatchNorm3d", (7, 4, 2, 3, 2), {}),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_modules(cls, shape, options, momentum, residual, backend, device):
    """Steps of training with a smaller batch in between, evaluation, a frozen step."""
    ours = getattr(fastnorm, cls)(4, momentum=momentum, virtual_batch_size=3, device=device, **options)
    end = {"relu": F.relu, "silu": F.silu, None: lambda z: z}[options.get("activation")]
    theirs = Parts(getattr(nn, cls)(4, momentum=momentum, device=device), 3, end)
    for step in range(5):
        ours.train(step != 3), theirs.train(step < 3)
        ours.frozen = step == 4
        n = shape[0] if step != 1 else 5
        x, r = torch.randn(2, *shape, device=device)[:, :n]
        results = []
        for module in (ours, theirs):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = module(a, b if residual else None)
            wanted = [a, *([b] if residual else []), *module.parameters()]
            results.append([y, *torch.autograd.grad(y.sin().sum(), wanted)])
        assert_same(*results)
        for (name, t), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(t, other, msg=name)


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("B", [6, 5])
def test_channels_on_any_axis(axis, B, monkeypatch, backend, device):
    """The samples are the first of the other dimensions; a dense input gives a dense output, and is read where it lies."""
    ours = fastnorm.BatchNorm2d(4, channel_axis=axis, activation="silu", virtual_batch_size=2, device=device)
    theirs = Parts(nn.BatchNorm2d(4, device=device), 2, F.silu)
    shape = [4, B, 2, 5] if axis == 0 else [B, 3, 2, 5]
    shape[axis] = 4
    x, r = (torch.randn(shape, device=device).requires_grad_() for _ in range(2))
    y = ours(x, r)
    expected = theirs(x.movedim(axis, 1), r.movedim(axis, 1)).movedim(1, axis)
    assert y.is_contiguous()
    gradients = [torch.autograd.grad(t.sin().sum(), (x, r, *m.parameters())) for t, m in ((y, ours), (expected, theirs))]
    assert gradients[0][0].is_contiguous() or axis in (0, 2)
    assert_same([y, *gradients[0], *ours.buffers()], [expected, *gradients[1], *theirs.buffers()])
    calls = calls_of(monkeypatch, lambda: ours(x, r))
    assert {args[0].untyped_storage().data_ptr() for args in calls} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_channels_last_of_sequences(shape, backend, device):
    ours, theirs = (
        fastnorm.BatchNorm1d(4, channel_axis=-1, virtual_batch_size=2, device=device),
        Parts(nn.BatchNorm1d(4, device=device), 2),
    )
    x = torch.randn(shape, device=device)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x.movedim(-1, 1)).movedim(1, -1))
    assert y.is_contiguous()


def test_modules_without_running_statistics(backend, device):
    """Ghost batches in training; in evaluation the statistics of the batch, as torch.nn's."""
    norm = fastnorm.BatchNorm1d(3, track_running_stats=False, affine=False, virtual_batch_size=2, device=device)
    x = torch.randn(6, 3, 5, device=device)
    assert torch.equal(norm(x), fastnorm.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2))
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, None, None, training=True))


def test_copies_states_and_words():
    norm, x = fastnorm.BatchNorm2d(4, virtual_batch_size=2), torch.randn(6, 4, 3, 3)
    assert "virtual_batch_size=2" in repr(norm)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert (repr(again), again.virtual_batch_size) == (repr(norm), 2)
        assert torch.equal(again(x), copy.deepcopy(norm)(x))
    assert list(norm.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    nn.BatchNorm2d(4).load_state_dict(norm.state_dict(), strict=True)
    assert fastnorm.BatchNorm2d(4).virtual_batch_size is None
    assert "virtual" not in repr(fastnorm.BatchNorm2d(4, virtual_batch_size=None))


def test_what_torch_nn_lacks_is_not_lost():
    check_not_lost(fastnorm.BatchNorm2d(4, virtual_batch_size=2), "virtual_batch_size", 2)
    sync, x = fastnorm.SyncBatchNorm(4), torch.randn(6, 4, 3)
    sync.virtual_batch_size = 2
    assert torch.equal(sync(x), fastnorm.BatchNorm1d(4)(x))


def test_folded():
    """In evaluation it is a batch norm as any other."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2), fastnorm.BatchNorm2d(4, virtual_batch_size=2)).double()
    net(torch.randn(6, 3, 5, 5, dtype=F64))
    folded, x = fastnorm.fold(net.eval()), torch.randn(6, 3, 5, 5, dtype=F64)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), net(x))


def found(norm, batch_size, layer=None):
    net = nn.Sequential(layer or nn.Linear(3, 4), norm)
    return [(f.rule, f.wrong) for f in fastnorm.lint(net, batch_size=batch_size) if f.severity == "warning"]


def test_linted_by_ghost_batches():
    """As small as they are; a batch that is one ghost batch is a batch."""
    norm = lambda n: fastnorm.BatchNorm1d(4, virtual_batch_size=n)
    assert found(norm(16), 64) == found(norm(16), 16) == found(norm(64), 16) == []
    ((rule, wrong),) = found(norm(4), 64)
    assert rule == "small-batch"
    assert "ghost batches of 4, fewer than 16 rows" in wrong
    assert "ghost batches of 5" in found(norm(4), 10)[0][1]
    assert "a batch of 6," in found(norm(4), 6)[0][1]
    assert [rule for rule, _ in found(norm(1), 64)] == ["one-value"]
    images = fastnorm.BatchNorm2d(4, virtual_batch_size=4)
    assert "ghost batches of 4, fewer than 8 samples" in found(images, 64, nn.Conv2d(3, 4, 1))[0][1]
    images.virtual_batch_size = 8
    assert found(images, 64, nn.Conv2d(3, 4, 1)) == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("n", [0, -2, True, 2.0, "2", (2,), torch.tensor(2)])
def test_virtual_batch_sizes_that_are_none(n, backend, device):
    x, running = torch.randn(4, 3, device=device), torch.zeros(2, 3, device=device)
    late = fastnorm.BatchNorm1d(3, device=device)
    late.virtual_batch_size = n
    for training in (True, False):
        with pytest.raises(ValueError, match="virtual_batch_size is a positive int, not"):
            fastnorm.ghost_batch_norm(x, *running, training=training, virtual_batch_size=n)
    for call in (lambda: fastnorm.BatchNorm1d(3, virtual_batch_size=n), lambda: late(x)):
        with pytest.raises(ValueError, match="virtual_batch_size is a positive int, not"):
            call()
    assert running.eq(0).all()
    assert late.num_batches_tracked == 0
    with pytest.raises(ValueError, match="not None"):
        fastnorm.ghost_batch_norm(x, *running, virtual_batch_size=None)


BAD = {
    "one value": lambda x, o: o.update(virtual_batch_size=1),
    "one dimension": lambda x, o: x[0],
    "other channels": lambda x, o: x[:, :2],
    "long": lambda x, o: x.long(),
    "no tensor": lambda x, o: "x",
    "elsewhere": lambda x, o: x.to("meta"),
    "weight": lambda x, o: o.update(weight=torch.ones(4)),
    "bias": lambda x, o: o.update(bias="b"),
    "one statistic": lambda x, o: o.update(running_var=None),
    "statistics with gradients": lambda x, o: o.update(running_var=torch.ones(3, requires_grad=True)),
    "momentum": lambda x, o: o.update(momentum="m"),
    "eps": lambda x, o: o.update(eps="e"),
    "training": lambda x, o: o.update(training="yes"),
    "residual": lambda x, o: o.update(residual=torch.ones(5, 3)),
    "residual of another device": lambda x, o: o.update(residual=torch.ones(6, 3, device="meta")),
    "activation": lambda x, o: o.update(activation="swish"),
}


def outcome(function):
    try:
        return function()
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as e:
        return type(e), str(e).splitlines()[0].replace("[6,", "[1,")


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
@pytest.mark.parametrize("n", [2, 4])
def test_invalid_calls(change, n, backend, device):
    """The exception of batch norm, and nothing is updated; the module's counter neither."""
    with torch.device(device):
        x, options = torch.randn(6, 3), {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "virtual_batch_size": n}
        options |= {"training": True, "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5, "residual": None}
        changed = change(x, options)
    x = x if changed is None else changed
    statistics = [t for t in (options["running_mean"], options["running_var"]) if t is not None]
    before = [t.clone() for t in statistics]
    ours = outcome(lambda: fastnorm.ghost_batch_norm(x, **options))
    n = options.pop("virtual_batch_size")
    theirs = outcome(lambda: fastnorm.batch_norm(x if n > 1 else x[:1], **options))
    if change is not BAD["momentum"]:
        assert ours == theirs
    assert not isinstance(ours, torch.Tensor)
    assert all(map(torch.equal, statistics, before))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("residual", [None, torch.ones(5, 3)])
def test_a_module_that_raises_has_not_counted(momentum, residual, backend, device):
    norm = fastnorm.BatchNorm1d(3, momentum=momentum, virtual_batch_size=2 if residual is not None else 1, device=device)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        norm(torch.randn(6, 3, device=device), residual)
    with pytest.raises(IndexError):
        fastnorm.BatchNorm1d(3, channel_axis=2, virtual_batch_size=2)(torch.randn(6, 3))
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())


@pytest.mark.parametrize("change", [lambda r: r[:1], lambda r: r.double(), lambda r: 0.5, lambda r: torch.stack((r, r))])
def test_residuals_of_other_shapes(change, backend, device):
    """Broadcast and promoted as torch does."""
    x, r, w, b = (t.detach() for t in leaves((6, 2, 4), device))
    ours, theirs = pair()
    torch.testing.assert_close(ours(x, change(r), w, b), theirs(x, change(r), w, b), rtol=2e-5, atol=2e-5)


def test_a_weight_of_any_shape(backend, device):
    """torch takes one of (C, 1)."""
    x, w = torch.randn(6, 3, 4, device=device), torch.randn(3, 1, device=device, requires_grad=True)
    results = []
    for weight in (w, w[:, 0]):
        y = fastnorm.ghost_batch_norm(x, None, None, weight, training=True, virtual_batch_size=2)
        results.append([y, *torch.autograd.grad(y.sin().sum(), w)])
    assert all(map(torch.equal, *results))


def test_empty_inputs(backend, device):
    for shape in ((0, 3), (4, 3, 0)):
        x, running = torch.empty(shape, device=device), torch.ones(2, 3, device=device)
        expected = outcome(lambda: F.batch_norm(x, *running.clone(), training=True))
        got = outcome(lambda: fastnorm.ghost_batch_norm(x, *running, training=True, virtual_batch_size=2))
        assert type(got) is type(expected)
        assert got.shape == shape if isinstance(got, torch.Tensor) else got == expected
