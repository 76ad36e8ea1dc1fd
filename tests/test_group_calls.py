"""group_norm, modulated_layer_norm and their modules: torch's results and errors, and which calls the kernels get."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from torch import nn

import fastnorm
from fastnorm import group

SHAPES = [((2, 6, 5), 3), ((3, 4), 2), ((2, 6, 40), 2), ((2, 8, 12, 12), 4), ((2, 6, 2, 5, 5), 3), ((40, 16, 8, 8), 4)]


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(group, "LEAST", 1)
    monkeypatch.setattr(group, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(group, "LEAST_PLAIN_POSITIONS", 1)


def trained(module, x, dy, *more):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = module(x, *more)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_group_norm_modules(shape, groups, dtype, backend, device):
    """At most twice as far from float64 as torch.nn's own, and four units in the last place: test_groups.py has the kernels'
    closer bound. Contiguous or channels_last."""
    ours, theirs = (cls(groups, shape[1], device=device, dtype=dtype) for cls in (fastnorm.GroupNorm, nn.GroupNorm))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape))
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x, dy = (torch.randn(shape, dtype=F64, device=device).to(dtype) for _ in range(2))
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for memory_format in formats:
        inputs = [t.contiguous(memory_format=memory_format) for t in (x, dy)]
        results = (trained(m, *inputs) for m in (ours, theirs))
        for a, b, t in zip(*results, trained(truth, *(t.double() for t in inputs)), strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * t.abs().max().item()


@pytest.mark.usefixtures("any_size")
def test_group_norm_options(backend, device):
    x = torch.randn(2, 6, 20, device=device)
    assert torch.equal(fastnorm.GroupNorm(3, 6, affine=False, device=device)(x), fastnorm.group_norm(x, 3))
    norm = fastnorm.GroupNorm(3, 6, eps=0.1, activation="silu", device=device)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 3, eps=0.1)))
    assert "activation='silu'" in repr(norm)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(again(x), norm(x))
    with pytest.raises(RuntimeError, match="has no activation"):
        torch.jit.script(norm)
    assert "option that torch.nn's has not: activation" in str(fastnorm.revert(norm))
    with torch.no_grad():
        assert not norm(x).requires_grad


def outcome(function):
    try:
        return function()
    except Exception as e:
        return type(e), str(e).splitlines()[0]


BAD_GROUPS = [
    lambda f, x: f(x, 4),
    lambda f, x: f(x, 0),
    lambda f, x: f(x, -2),
    lambda f, x: f(x, 2.0),
    lambda f, x: f(x, 2, x.new_ones(3)),
    lambda f, x: f(x, 2, None, x.new_ones(6, 1)),
    lambda f, x: f(x[0, 0], 2),
    lambda f, x: f(x[:1, :2, :1], 2),
    lambda f, x: f(x.long(), 2),
    lambda f, x: f(x.to("meta"), 2, x.new_ones(6)),
    lambda f, x: f(x, 2, eps="small"),
    lambda f, x: f("x", 2),
]
OTHERS = [lambda f, x: f(x[:0], 2), lambda f, x: f(x, 2, eps=-1e-9), lambda f, x: f(x.mT, 4), lambda f, x: f(x.conj(), 2)]


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("call", [*BAD_GROUPS, *OTHERS])
def test_calls_that_torch_answers(call, backend, device):
    """The same exception, or the same result."""
    x = torch.randn(2, 6, 20, device=device)
    ours, theirs = outcome(lambda: call(fastnorm.group_norm, x)), outcome(lambda: call(F.group_norm, x))
    assert type(ours) is type(theirs)
    if torch.is_tensor(theirs):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs
        assert call in BAD_GROUPS


def test_which_calls_the_kernels_get(monkeypatch, backend, device):
    """Large and contiguous ones."""
    calls, real = [], backend.group_fwd
    monkeypatch.setattr(backend, "group_fwd", lambda *args: calls.append(args) or real(*args), raising=False)

    def count(x, *args, activation="silu"):
        fastnorm.group_norm(x, 2, *args, activation=activation)
        n = len(calls)
        calls.clear()
        return n

    x = torch.randn(4, 64, 8, 8, device=device)
    assert count(x) == 1
    assert count(x.contiguous(memory_format=torch.channels_last)) == 0
    assert count(x[:, :, ::2]) == 0
    assert count(x[:1, :4]) == 0
    assert count(x, activation=None) == 0
    assert count(torch.randn(1, 8, 48, 48, device=device), activation=None) == 1
    assert count(torch.randn(64, 64, 4, device=device)) == 0
    assert count(x.bfloat16(), torch.ones(64, device=device), torch.ones(64, device=device, dtype=F64)) == 1


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_a_group_norm_saves_x_alone(activation, backend, device):
    x, w, b = (t.requires_grad_() for t in (torch.randn(4, 64, 16, 16, device=device), *torch.randn(2, 64, device=device)))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t):
        fastnorm.group_norm(x, 8, w, b, activation=activation)
    assert sum(n for p, n in kept.items() if p not in {t.data_ptr() for t in (x, w, b)}) <= 3 * 4 * 4 * 8


def modulated(x, s, t):
    return F.layer_norm(x, x.shape[-1:]) * (1 + s) + t


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((5, 9, 32), (5, 1, 32)), ((5, 9, 32), (1, 1, 32)), ((5, 32), (5, 32)), ((2, 3, 4, 32), (2, 3, 1, 32)),
     ((2, 3, 4, 32), (2, 1, 1, 32)), ((5, 9, 32), (5, 9, 32)), ((5, 9, 32), (1, 9, 32)), ((5, 9, 32), (32,)),
     ((5, 9, 32), (9, 32)), ((5, 9, 32), (5, 1, 1)), ((5, 9, 32), ()), ((2, 3, 4, 32), (2, 1, 4, 32))],
)  # fmt: skip
def test_shapes_of_scale_and_shift(shape, parameters, dtype, backend, device):
    """Whatever torch broadcasts; no farther from float64 than its operators."""
    x, dy, s, t = (torch.randn(n, dtype=F64, device=device).to(dtype) for n in (shape, shape, parameters, parameters))

    def run(function, dtype):
        leaves = [p.to(dtype).requires_grad_() for p in (x, s, t)]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    ours = run(lambda x, s, t: fastnorm.modulated_layer_norm(x, shape[-1:], s, t), dtype)
    for a, b, exact in zip(ours, run(modulated, dtype), run(modulated, F64), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, allowed = ((r.double() - exact).abs().max().item() for r in (a, b))
        assert error <= allowed + 2 * torch.finfo(dtype).eps * exact.abs().max().item()


def test_scales_that_a_half_type_would_lose(backend, device):
    """1 + 2^-10 is 1 in bfloat16."""
    x = torch.randn(2, 3, 64, device=device).bfloat16()
    s, t = torch.full((2, 1, 64), 2.0**-10, device=device), torch.zeros(2, 1, 64, device=device)
    y = fastnorm.modulated_layer_norm(x.float(), (64,), s.bfloat16(), t.bfloat16())
    torch.testing.assert_close(y, F.layer_norm(x.float(), (64,)) * (1 + 2.0**-10), rtol=1e-5, atol=1e-5)


def test_modulated_modules(backend, device):
    for options in ({}, {"elementwise_affine": False}, {"activation": "gelu", "bias": False}):
        norm = fastnorm.ModulatedLayerNorm(32, 1e-6, device=device, **options)
        plain = nn.LayerNorm(32, 1e-6, device=device, **{k: v for k, v in options.items() if k != "activation"})
        with torch.no_grad():
            for p in plain.parameters():
                p.copy_(torch.randn(p.shape))
        norm.load_state_dict(plain.state_dict())
        x, dy = torch.randn(2, 4, 9, 32, device=device)
        s, t = torch.randn(2, 4, 1, 32, device=device)

        class Sequence(nn.Module):
            def __init__(self, plain, end):
                super().__init__()
                self.plain, self.end = plain, end

            def forward(self, x, s, t):
                return self.end(self.plain(x) * (1 + s) + t)

        end = F.gelu if "activation" in options else lambda z: z
        for a, b in zip(trained(norm, x, dy, s, t), trained(Sequence(plain, end), x, dy, s, t), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert "has an option that torch.nn's has not: activation, modulated" in str(fastnorm.revert(norm))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (lambda d: torch.randn(4, 1, 32, device=d), "must match the size|should be broadcastable"),
        (lambda d: torch.randn(5, 1, 31, device=d), "must match the size|should be broadcastable"),
        (lambda d: "scale", "concatenate|unsupported operand"),
    ],
)
def test_scales_that_do_not_fit(scale, words, backend, device):
    x = torch.randn(5, 9, 32, device=device)
    with pytest.raises((RuntimeError, TypeError), match=words):
        fastnorm.modulated_layer_norm(x, (32,), scale(device), torch.zeros(5, 1, 32, device=device))
    with pytest.raises(ValueError, match="no activation"):
        fastnorm.modulated_layer_norm(x, (32,), x, x, activation="swish")


GRADIENTS = {
    "expanded": lambda shape, device: torch.ones((), device=device).expand(shape),
    "turned": lambda shape, device: torch.randn(*shape[:-2], shape[-1], shape[-2], device=device).mT,
    "every second": lambda shape, device: torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2],
    "samples last": lambda shape, device: torch.randn(*shape[1:], shape[0], device=device).movedim(-1, 0),
}


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dy", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_strides(dy, backend, device):
    n, c = (3, 1, 32), (8,)
    norms = [
        (fastnorm.group_norm, F.group_norm, (2, 8, 6, 5), (2,), c),
        (lambda *a: fastnorm.group_norm(*a, activation="silu"), lambda *a: F.silu(F.group_norm(*a)), (2, 8, 6, 5), (2,), c),
        (lambda x, *a: fastnorm.modulated_layer_norm(x, (32,), *a), modulated, (3, 5, 32), (), n),
    ]
    for ours, theirs, shape, options, parameters in norms:
        leaves = [t.requires_grad_() for t in (torch.randn(s, device=device) for s in (shape, parameters, parameters))]
        gradient = dy(shape, device)
        results = (torch.autograd.grad(f(leaves[0], *options, *leaves[1:]), leaves, gradient) for f in (ours, theirs))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
