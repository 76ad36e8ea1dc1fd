"""channels_first_layer_norm and LayerNorm2d: torch's results of the permuted input, its errors, which calls the kernels get."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from test_group_calls import GRADIENTS, outcome, trained
from torch import nn

import fastnorm
from fastnorm import channels_first

SHAPES = [(2, 6, 5), (3, 4), (2, 6, 40), (2, 8, 12, 12), (2, 6, 2, 5, 5), (40, 16, 8, 8), (4, 6, 1, 1), (1, 3, 9, 1)]


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(channels_first, "LEAST", 1)
    monkeypatch.setattr(channels_first, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(channels_first, "pays", lambda *_: True)


class Permuted(nn.LayerNorm):
    """As it is written elsewhere."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def reference(x, weight=None, bias=None, eps=1e-5):
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_modules(shape, dtype, backend, device):
    """At most twice as far from float64 as the permuted torch.nn.LayerNorm, and four units in the last place: test_positions.py
    has the kernels' closer bound. Contiguous inputs give contiguous outputs, channels_last ones channels_last."""
    ours, theirs = (cls(shape[1], device=device, dtype=dtype) for cls in (fastnorm.LayerNorm2d, Permuted))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape))
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x, dy = (torch.randn(shape, dtype=F64, device=device).to(dtype) for _ in range(2))
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for memory_format in formats:
        inputs = [t.contiguous(memory_format=memory_format) for t in (x, dy)]
        mine, results = trained(ours, *inputs), trained(theirs, *inputs)
        assert mine[0].is_contiguous(memory_format=memory_format)
        for a, b, t in zip(mine, results, trained(truth, *(t.double() for t in inputs)), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
            units = 16 if dtype == F64 else 4  # the truth in float64 is as rough as what it is to judge
            assert error <= 2 * allowed + units * torch.finfo(dtype).eps * t.abs().max().item()


@pytest.mark.usefixtures("any_size")
def test_options(backend, device):
    x = torch.randn(2, 6, 20, device=device)
    plain = fastnorm.LayerNorm2d(6, elementwise_affine=False, device=device)
    assert torch.equal(plain(x), fastnorm.channels_first_layer_norm(x))
    norm = fastnorm.LayerNorm2d(6, eps=0.1, bias=False, activation="silu", device=device)
    torch.testing.assert_close(norm(x), F.silu(reference(x, eps=0.1)))
    assert "activation='silu'" in repr(norm)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(again(x), norm(x))
    for module in (norm, plain):
        with pytest.raises(RuntimeError, match=r"has no .*channels_first"):
            torch.jit.script(module)
        assert "channels_first" in str(fastnorm.revert(module))
    with pytest.raises(ValueError, match=r"the number of channels, got \(3, 4\)"):
        fastnorm.LayerNorm2d((3, 4))
    with pytest.raises(ValueError, match=r"expected 6 channels in dim 1, got an input of \(2, 20, 6\)"):
        norm(x.mT)
    with torch.no_grad():
        assert not norm(x).requires_grad


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_derivatives(activation, backend, device):
    x, w, b = (torch.randn(s, dtype=F64, device=device, requires_grad=True) for s in ((2, 4, 5), (4,), (4,)))
    call = lambda x, w, b: fastnorm.channels_first_layer_norm(x, w, b, 1e-2, activation=activation)
    assert torch.autograd.gradcheck(call, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)
    torch.testing.assert_close(torch.func.vmap(call, (0, None, None))(x[:, None], w, b)[:, 0], call(x, w, b))


@pytest.mark.usefixtures("any_size")
def test_compiled(device):
    norm = fastnorm.LayerNorm2d(6, activation="relu", device=device)
    x = torch.randn(2, 6, 20, device=device)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


BAD = [
    lambda f, x: f(x, x.new_ones(3)),
    lambda f, x: f(x, None, x.new_ones(6, 1)),
    lambda f, x: f(x.long()),
    lambda f, x: f(x, eps="small"),
    lambda f, x: f(x.to("meta"), x.new_ones(6)),
]
OTHERS = [lambda f, x: f(x[:0]), lambda f, x: f(x.mT), lambda f, x: f(x[:, :, ::2]), lambda f, x: f(x.to("meta"))]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("call", [*BAD, *OTHERS])
def test_calls_that_torch_answers(call, backend, device):
    """The same exception, or the same result."""
    x = torch.randn(2, 6, 20, device=device)
    ours, theirs = outcome(lambda: call(fastnorm.channels_first_layer_norm, x)), outcome(lambda: call(reference, x))
    assert type(ours) is type(theirs)
    if torch.is_tensor(theirs):
        assert (ours.shape, ours.device) == (theirs.shape, theirs.device)
        assert ours.is_meta or torch.allclose(ours, theirs, atol=1e-5)
    else:
        assert ours == theirs
        assert call in BAD


def test_what_has_no_channels(device):
    with pytest.raises(ValueError, match=r"two or more dimensions, \(B, C, \*\), got \(5,\)"):
        fastnorm.channels_first_layer_norm(torch.randn(5, device=device))


def test_which_calls_the_kernels_get(monkeypatch, backend, device):
    """Contiguous ones that are not small, on a GPU Triton's; channels_last are rows as they lie."""
    calls = []
    position = "position_fwd" if device == "cpu" or backend.__name__ == "fastnorm.kernels" else "layer_norm"
    for name, module in (("position_fwd", backend), ("layer_norm", fastnorm.functional)):
        real = getattr(module, name)
        wrapped = lambda *args, name=name, real=real, **options: calls.append((name, args[0])) or real(*args, **options)
        monkeypatch.setattr(module, name, wrapped, raising=False)

    def served(x):
        fastnorm.channels_first_layer_norm(x)
        (name, got), *more = calls
        calls.clear()
        assert not more
        assert got.is_contiguous()
        assert (got.data_ptr() == x.data_ptr()) == (name == "position_fwd" or x.movedim(1, -1).is_contiguous())
        return name

    x = torch.randn(8, 64, 8, 8, device=device)
    assert served(x) == position
    assert served(x.contiguous(memory_format=torch.channels_last)) == "layer_norm"
    assert served(x[:1, :4]) == "layer_norm"
    assert served(torch.randn(256, 64, 4, device=device)) == "layer_norm"
    assert served(torch.randn(640, 64, device=device)) == "layer_norm"
    assert served(x.bfloat16()) == position


def test_where_kernels_of_a_gpu_are_used():
    """Where they have been faster; a backend that does not say so was not timed."""
    x = torch.empty(2, 8, 4, device="meta")
    timed = lambda answer: SimpleNamespace(position_pays=lambda x, differentiable: answer and not differentiable)
    assert channels_first.pays(x, timed(True), False)
    assert not channels_first.pays(x, timed(True), True)
    assert not channels_first.pays(x, timed(False), False)
    assert not channels_first.pays(x, SimpleNamespace(), False)
    assert channels_first.pays(torch.empty(2, 8, 4), SimpleNamespace(), True)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_what_is_saved(activation, backend, device):
    x, w, b = (t.requires_grad_() for t in (torch.randn(4, 64, 16, 16, device=device), *torch.randn(2, 64, device=device)))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t):
        fastnorm.channels_first_layer_norm(x, w, b, activation=activation)
    assert sum(n for p, n in kept.items() if p not in {t.data_ptr() for t in (x, w, b)}) <= 3 * 4 * 4 * 256


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dy", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_strides(dy, backend, device):
    for end, activation in ((lambda z: z, None), (F.silu, "silu")):
        leaves = [t.requires_grad_() for t in (torch.randn(s, device=device) for s in ((2, 8, 6, 5), (8,), (8,)))]
        gradient = dy((2, 8, 6, 5), device)
        ours = torch.autograd.grad(fastnorm.channels_first_layer_norm(*leaves, activation=activation), leaves, gradient)
        theirs = torch.autograd.grad(end(reference(*leaves)), leaves, gradient)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
