"""Fused norms as functions and modules: torch's sequences of operators, in values, derivatives, errors and surroundings."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32
from compare import effort
from conftest import NOT_EMULATED
from masks import written_out
from torch import fx, nn
from torch.autograd import gradcheck, gradgradcheck

import fastnorm
from fastnorm.activations import ACTIVATIONS

D = torch.float64


PATHS = [[[0.5]], [[0.0]], [[2.0]]]


def _counting(x):
    return torch.arange(6, device=x.device).expand(3, 6) < torch.tensor([[2], [6], [0]], device=x.device)


def _gelu_of(norm, h):
    return F.gelu(norm(h)), h


def _norms():
    """name -> (fused, the same in torch's operators, shapes of their inputs)"""
    ln, rms, bn = (6,), F.rms_norm, F.batch_norm
    x, c, n = (3, 4, 6), (4,), (6,)
    return {
        "layer_norm": (
            lambda x, r, w, b: fastnorm.layer_norm(x, ln, w, b, activation="gelu", residual=r),
            lambda x, r, w, b: F.gelu(F.layer_norm(x, ln, w, b) + r),
            (x, x, n, n),
        ),
        "layer_norm without parameters": (
            lambda x: fastnorm.layer_norm(x, ln, activation=("elu", 0.7)),
            lambda x: F.elu(F.layer_norm(x, ln), 0.7),
            (x,),
        ),
        "residual alone": (
            lambda x, r, b: fastnorm.layer_norm(x, ln, None, b, residual=r),
            lambda x, r, b: F.layer_norm(x, ln, None, b) + r,
            (x, x, n),
        ),
        "rms_norm": (lambda x, w: fastnorm.rms_norm(x, ln, w), lambda x, w: rms(x, ln, w), (x, n)),
        "rms_norm with all": (
            lambda x, r, w: fastnorm.rms_norm(x, ln, w, 1e-3, activation="silu", residual=r),
            lambda x, r, w: F.silu(rms(x, ln, w, 1e-3) + r),
            (x, x, n),
        ),
        "add_layer_norm": (
            lambda x, r, w, b: fastnorm.add_layer_norm(x, r, ln, w, b),
            lambda x, r, w, b: (F.layer_norm(x + r, ln, w, b), x + r),
            (x, x, n, n),
        ),
        "add_rms_norm": (
            lambda x, r, w: fastnorm.add_rms_norm(x, r, ln, w, activation="tanh"),
            lambda x, r, w: (rms(x + r, ln, w).tanh(), x + r),
            (x, x, n),
        ),
        "scaled add_layer_norm": (
            lambda x, r, s, w, b: fastnorm.add_layer_norm(
                x, r, ln, w, b, activation="gelu", row_scale=x.new_tensor(PATHS), layer_scale=s
            ),
            lambda x, r, s, w, b: _gelu_of(lambda h: F.layer_norm(h, ln, w, b), x * x.new_tensor(PATHS) * s + r),
            (x, x, n, n, n),
        ),
        "scaled add_rms_norm": (
            lambda x, r, s: fastnorm.add_rms_norm(x, r, ln, eps=1e-3, row_scale=s),
            lambda x, r, s: (rms(x * s + r, ln, eps=1e-3), x * s + r),
            (x, x, (3, 4, 1)),
        ),
        "channels_first_layer_norm": (
            lambda x, w, b: fastnorm.channels_first_layer_norm(x, w, b, 1e-3, activation="silu"),
            lambda x, w, b: F.silu(F.layer_norm(x.mT, (4,), w, b, 1e-3).mT),
            (x, c, c),
        ),
        "masked batch_norm": (
            lambda x, r, w, b: fastnorm.batch_norm(x, None, None, w, b, True, activation="silu", residual=r, mask=_counting(x)),
            lambda x, r, w, b: F.silu(written_out(x, _counting(x), w, b, 1e-5, x.dtype) + r),
            (x, x, c, c),
        ),
        "batch_norm": (
            lambda x, r, w, b: fastnorm.batch_norm(x, None, None, w, b, True, activation="silu", residual=r),
            lambda x, r, w, b: F.silu(bn(x, None, None, w, b, True) + r),
            (x, x, c, c),
        ),
        "batch_norm in evaluation": (
            lambda x, r, w, b: fastnorm.batch_norm(x, x.new_zeros(4), x.new_ones(4), w, b, activation="tanh", residual=r),
            lambda x, r, w, b: (bn(x, x.new_zeros(4), x.new_ones(4), w, b) + r).tanh(),
            (x, x, c, c),
        ),
        "modulated_layer_norm": (
            lambda x, s, t: fastnorm.modulated_layer_norm(x, ln, s, t),
            lambda x, s, t: F.layer_norm(x, ln) * (1 + s) + t,
            (x, (3, 1, 6), (3, 1, 6)),
        ),
        "modulated_layer_norm with all": (
            lambda x, s, t, w, b: fastnorm.modulated_layer_norm(x, ln, s, t, w, b, 1e-3, activation="gelu"),
            lambda x, s, t, w, b: F.gelu(F.layer_norm(x, ln, w, b, 1e-3) * (1 + s) + t),
            (x, (3, 1, 6), (3, 1, 6), n, n),
        ),
        "modulated_layer_norm of each row": (
            lambda x, s, t, w: fastnorm.modulated_layer_norm(x, ln, s, t, w),
            lambda x, s, t, w: F.layer_norm(x, ln, w) * (1 + s) + t,
            (x, x, x, n),
        ),
        "group_norm": (
            lambda x, w, b: fastnorm.group_norm(x, 2, w, b, 1e-3, activation="silu"),
            lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, 1e-3)),
            (x, c, c),
        ),
        "group_norm without an activation": (
            lambda x, w, b: fastnorm.group_norm(x, 2, w, b),
            lambda x, w, b: F.group_norm(x, 2, w, b),
            (x, c, c),
        ),
        "instance_norm": (
            lambda x, w, b: fastnorm.instance_norm(x, None, None, w, b),
            lambda x, w, b: F.instance_norm(x, None, None, w, b),
            (x, c, c),
        ),
    }


NORMS = _norms()


@pytest.fixture(autouse=True)
def _groups_of_any_size(monkeypatch):
    for module in (fastnorm.group, fastnorm.channels_first):
        monkeypatch.setattr(module, "LEAST", 1)
        monkeypatch.setattr(module, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(fastnorm.channels_first, "pays", lambda *_: True)
    monkeypatch.setattr(fastnorm.group, "LEAST_PLAIN_POSITIONS", 1)


every_norm = pytest.mark.parametrize("name", list(NORMS))


def make(shapes, device, dtype=F32, wanted=None):
    """Leaves; those whose place is not in `wanted` require no gradient."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=D).to(device, dtype) for s in shapes]
    return [t.requires_grad_(wanted is None or i in wanted) for i, t in enumerate(leaves)]


def outputs_and_gradients(function, inputs, unused=None):
    """Of all outputs but the one called `unused`."""
    y = function(*inputs)
    y = [t for i, t in enumerate(y if isinstance(y, tuple) else (y,)) if i != unused]
    leaves = [t for t in inputs if t.requires_grad]
    return [*y, *torch.autograd.grad([t.sin().sum() for t in y if t.requires_grad], leaves, allow_unused=True)]


def assert_same(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@every_norm
def test_values_and_gradients(name, backend, device):
    fused, torchs, shapes = NORMS[name]
    results = (outputs_and_gradients(f, make(shapes, device)) for f in (fused, torchs))
    assert_same(*results, rtol=2e-5, atol=2e-5)


@every_norm
def test_gradients_of_some(name, backend, device):
    """Each input alone."""
    fused, torchs, shapes = NORMS[name]
    for i in range(len(shapes)):
        results = (outputs_and_gradients(f, make(shapes, device, wanted=(i,))) for f in (fused, torchs))
        assert_same(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_one_of_two_outputs_is_used(name, unused, backend, device):
    fused, torchs, shapes = NORMS[name]
    results = (outputs_and_gradients(f, make(shapes, device), unused) for f in (fused, torchs))
    assert_same(*results, rtol=2e-5, atol=2e-5)


@every_norm
def test_first_and_second_derivatives(name, backend, device):
    fused, _, shapes = NORMS[name]
    inputs = make(shapes, device, D)
    assert gradcheck(fused, inputs, **effort(backend, device))
    assert gradgradcheck(fused, inputs, **effort(backend, device))


@every_norm
def test_transforms(name, backend, device):
    """Forward mode and torch.func: torch's operators take these calls."""
    fused, torchs, shapes = NORMS[name]
    inputs = [t.detach() for t in make(shapes, device)]
    tangents = [torch.randn_like(t) for t in inputs]
    for ours, theirs in zip(*(torch.func.jvp(f, tuple(inputs), tuple(tangents)) for f in (fused, torchs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    batched = [torch.stack((t, t + 1)) for t in inputs]
    assert_same(*([t] if torch.is_tensor(t) else t for t in (torch.func.vmap(f)(*batched) for f in (fused, torchs))))


@every_norm
@pytest.mark.parametrize("served", NOT_EMULATED, indirect=True)
def test_compiled(name, backend, device):
    """One graph, of operators that a compiler fuses."""
    fused, torchs, shapes = NORMS[name]
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(*(outputs_and_gradients(f, make(shapes, device)) for f in (compiled, torchs)), rtol=2e-5, atol=2e-5)
    torch._dynamo.reset()


def test_the_same_tensor_twice(backend, device):
    for dtype in (F32, BF16):
        x = make([(3, 4, 6)], device, dtype)[0]
        for create_graph in (False, True):
            ours, theirs = (
                torch.autograd.grad(f(x).sum(), x, create_graph=create_graph)[0]
                for f in (
                    lambda x: fastnorm.layer_norm(x, (6,), activation="silu", residual=x),
                    lambda x: F.silu(F.layer_norm(x, (6,)) + x),
                )
            )
            torch.testing.assert_close(ours, theirs, **({} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}))


@pytest.mark.parametrize(
    "change",
    [lambda r: r[:1], lambda r: r.double(), lambda r: 0.5, lambda r: r.to("meta"), lambda r: "r", lambda r: r[..., :5]],
)
def test_residuals_that_the_kernels_do_not_take(change, backend, device):
    """Broadcast, promoted or refused as torch does."""
    x, r = make([(3, 4, 6)] * 2, device)
    r = change(r.detach())
    results = []
    for function in (
        lambda: fastnorm.layer_norm(x, (6,), residual=r, activation="relu"),
        lambda: F.relu(F.layer_norm(x, (6,)) + r),
    ):
        try:
            results.append(function())
        except (RuntimeError, TypeError) as e:
            results.append((type(e), str(e).splitlines()[0]))
    ours, theirs = results
    if torch.is_tensor(theirs):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


NO_ACTIVATIONS = ["swish", ("relu", 1.0), ("elu", "a"), ("elu", 1.0, 2.0), 3, "", (), ["relu"], (["relu"],), F.relu, False]


@pytest.mark.parametrize("activation", NO_ACTIVATIONS)
def test_activations_that_are_not_there(activation, backend, device):
    x, running = torch.randn(4, 6, device=device), torch.zeros(6, device=device)
    for call in (
        lambda: fastnorm.layer_norm(x, (6,), activation=activation),
        lambda: fastnorm.batch_norm(x, running, running.clone(), training=True, activation=activation),
        lambda: fastnorm.LayerNorm(6, activation=activation),
        lambda: fastnorm.BatchNorm1d(6, activation=activation),
    ):
        with pytest.raises(ValueError, match="activation"):
            call()
    assert running.eq(0).all()


def test_invalid_calls_leave_running_statistics_alone(backend, device):
    norm = fastnorm.BatchNorm1d(6, activation="relu", device=device)
    before = copy.deepcopy(norm.state_dict())
    for x, residual in ((torch.randn(4, 5), None), (torch.randn(1, 6), None), (torch.randn(4, 6), torch.randn(3, 6))):
        with pytest.raises((RuntimeError, ValueError)):
            norm(x.to(device), None if residual is None else residual.to(device))
    for name, t in norm.state_dict().items():
        if name != "num_batches_tracked":
            assert torch.equal(t, before[name]), name


def _modules():
    kwargs = {"activation": "relu"}
    return {
        "LayerNorm": (lambda: fastnorm.LayerNorm(6, **kwargs), lambda: nn.LayerNorm(6), (5, 4, 6)),
        "RMSNorm": (lambda: fastnorm.RMSNorm(6, **kwargs), lambda: nn.RMSNorm(6), (5, 4, 6)),
        "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(4, **kwargs), lambda: nn.BatchNorm1d(4), (5, 4, 6)),
        "BatchNorm1d momentum=None": (
            lambda: fastnorm.BatchNorm1d(4, momentum=None, **kwargs),
            lambda: nn.BatchNorm1d(4, momentum=None),
            (5, 4, 6),
        ),
        "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(4, **kwargs), lambda: nn.BatchNorm2d(4), (5, 4, 6, 3)),
        "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(4, **kwargs), lambda: nn.BatchNorm3d(4), (5, 4, 2, 3, 2)),
    }


@pytest.mark.parametrize("name", _modules())
@pytest.mark.parametrize("residual", [False, True])
def test_modules(name, residual, backend, device):
    """Training steps and evaluation; parameters, statistics and counters stay with torch.nn's."""
    ours, theirs, shape = _modules()[name]
    ours, theirs = ours().to(device), theirs().to(device)
    for step in range(4):
        ours.train(step < 3), theirs.train(step < 3)
        x, r = torch.randn(shape, device=device), torch.randn(shape, device=device)
        pairs = []
        for call in (
            lambda x, r: ours(x, r if residual else None),
            lambda x, r: F.relu(theirs(x) + r if residual else theirs(x)),
        ):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = call(a, b)
            module = ours if call.__code__.co_freevars[0] == "ours" else theirs
            wanted = [a, *([b] if residual else []), *module.parameters()]
            pairs.append([y, *torch.autograd.grad(y.sin().sum(), wanted)])
        assert_same(*pairs, rtol=2e-5, atol=2e-5)
        for key, t in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], t)


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_channels_on_any_axis(axis, residual, backend, device):
    """As torch.nn's with the axis moved; a dense input gives a dense output."""
    ours = fastnorm.BatchNorm2d(4, channel_axis=axis, activation="silu", device=device)
    theirs = nn.BatchNorm2d(4, device=device)
    shape = [3, 5, 2, 6]
    shape[axis] = 4
    x, r = make([tuple(shape)] * 2, device)
    moved = lambda t: t.movedim(axis, 1) if axis != 0 else t.movedim(0, 1)
    back = lambda t: t.movedim(1, axis)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        y = ours(x, r if residual else None)
        z = back(theirs(moved(x)))
        expected = F.silu(z + r if residual else z)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
        gradients = [torch.autograd.grad(t.sin().sum(), (x, *m.parameters())) for t, m in ((y, ours), (expected, theirs))]
        assert_same(*gradients, rtol=2e-5, atol=2e-5)
        assert_same(list(ours.buffers()), list(theirs.buffers()))
    with pytest.raises(IndexError):
        fastnorm.BatchNorm2d(4, channel_axis=4, device=device)(x)


def test_frozen_statistics(backend, device):
    """Evaluation's output in training, with the gradients of weight and bias."""
    ours, theirs = fastnorm.BatchNorm1d(6, frozen=True, device=device), nn.BatchNorm1d(6, device=device).eval()
    for norm in (ours, theirs):
        norm.running_mean.copy_(torch.arange(6.0))
        norm.running_var.copy_(torch.arange(1.0, 7.0))
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(5, 6, device=device)
    assert ours.training
    pair = []
    for norm in (ours, theirs):
        y = norm(x)
        pair.append([y, *torch.autograd.grad(y.sin().sum(), list(norm.parameters()))])
    assert_same(*pair)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_modules_of_sums(backend, device):
    x, r = make([(3, 4, 6)] * 2, device)
    for norm, torchs in ((fastnorm.AddLayerNorm(6), F.layer_norm), (fastnorm.AddRMSNorm(6, 1e-6), F.rms_norm)):
        y, h = norm.to(device)(x, r)
        torch.testing.assert_close(h, x + r)
        options = {"eps": 1e-6} if torchs is F.rms_norm else {}
        torch.testing.assert_close(y, torchs(x + r, (6,), norm.weight, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, D])
def test_the_eps_of_an_rms_norm_that_has_none(dtype, backend, device):
    """That of the dtype in which torch computes: on small inputs an eps of bfloat16 would be most of what is divided by."""
    x, w, r = (t.detach() / 100 for t in make([(3, 4, 6), (6,), (3, 4, 6)], device, dtype))
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(fastnorm.rms_norm(x, (6,), w), F.rms_norm(x, (6,), w), **tolerance)
    torch.testing.assert_close(fastnorm.RMSNorm(6).to(x)(x), nn.RMSNorm(6).to(x)(x), **tolerance)
    for extras in ({}, {"row_scale": x.new_ones(3)}):
        torch.testing.assert_close(fastnorm.add_rms_norm(x, r, (6,), w, **extras)[0], F.rms_norm(x + r, (6,), w), **tolerance)


def test_a_zero_centred_weight(backend, device):
    x = torch.randn(3, 6, device=device)
    zero, one = fastnorm.RMSNorm(6, zero_centred=True, device=device), nn.RMSNorm(6, device=device)
    assert zero.weight.eq(0).all()
    with torch.no_grad():
        zero.weight.copy_(torch.randn(6))
        one.weight.copy_(zero.weight + 1)
    torch.testing.assert_close(zero(x), one(x))
    for norm in (zero, one):
        norm(x).sin().sum().backward()
    torch.testing.assert_close(zero.weight.grad, one.weight.grad, rtol=2e-5, atol=2e-5)


def test_copies_and_pickles_keep_their_options():
    for norm in (fastnorm.BatchNorm2d(4, activation=("leaky_relu", 0.2)), fastnorm.RMSNorm(4, zero_centred=True)):
        for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert repr(again) == repr(norm)
            x = torch.randn(2, 4, 4, 4)
            assert torch.equal(again(x), norm(x))
    assert "activation=('leaky_relu', 0.2)" in repr(fastnorm.BatchNorm2d(4, activation=("leaky_relu", 0.2)))


def test_what_torch_nn_lacks_is_not_lost():
    """Neither by revert, nor by a scripted model, nor by the conversion to a synchronised batch norm."""
    for norm in (fastnorm.BatchNorm2d(4, activation="relu"), fastnorm.AddLayerNorm(4), fastnorm.RMSNorm(4, zero_centred=True)):
        net = nn.Sequential(norm)
        assert "option that torch.nn's has not" in str(fastnorm.revert(net))
        assert net[0] is norm
        with pytest.raises(RuntimeError, match=r"compiles torch\.nn's forward"):
            torch.jit.script(net)
    norm = fastnorm.BatchNorm2d(4, activation="relu")
    with pytest.warns(UserWarning, match="BatchNorm2d is not synchronised"):
        assert type(fastnorm.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]) is fastnorm.BatchNorm2d


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = fastnorm.BatchNorm1d(6, activation="relu")

    def forward(self, x):
        return self.norm(x, x)


def test_traced_by_fx():
    """One node, with the residual."""
    block, x = Block().eval(), torch.randn(4, 6)
    graph = fx.symbolic_trace(block)
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(graph(x), block(x))


def saved_bytes(function, inputs):
    """What a call keeps for backward beside the inputs themselves and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs)
    outputs = {t.untyped_storage().data_ptr() for t in (y if isinstance(y, tuple) else (y,))}
    return sum(kept.values()), sum(n for p, n in kept.items() if p not in outputs)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
def test_an_activation_saves_nothing(activation, backend, device):
    x, r, w, b = make([(64, 32, 8, 8), (64, 32, 8, 8), (32,), (32,)], device)
    options = {"training": True, "activation": activation, "residual": r}
    _, ours = saved_bytes(lambda x, r, w, b: fastnorm.batch_norm(x, None, None, w, b, **options), (x, r, w, b))
    bits = x.numel() // 8 + 8 if activation == "relu" and backend.__name__ == "fastnorm.native" else 0
    assert ours <= 32 * 4 * 3 + bits  # mean pair and rstd, and what is kept in the place of the residual


@pytest.mark.parametrize(
    ("call", "torchs"),
    [
        (lambda x: fastnorm.instance_norm(x[..., :1]), lambda x: F.instance_norm(x[..., :1])),
        (lambda x: fastnorm.rms_norm(x, (5,)), lambda x: F.rms_norm(x, (5,))),
        (lambda x: fastnorm.add_layer_norm(x, x, (5,)), lambda x: F.layer_norm(x, (5,))),
    ],
)
def test_invalid_calls(call, torchs, backend, device):
    """torch's own exceptions, in its words."""
    x = torch.randn(2, 6, 4, device=device)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        torchs(x)
    with pytest.raises(type(expected.value)) as got:
        call(x)
    assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]
