"""add_layer_norm and add_rms_norm with dropout, scales and a wide stream, and their modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm import reference

N = 48


def leaves(device, dtype=F32, stream=None, shape=(5, 7, N)):
    """x, residual, weight, bias"""
    x, r = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(stream or dtype)
    w, b = torch.randn(2, N, device=device).to(dtype)
    return [t.requires_grad_() for t in (x, r, w, b)]


def in_float64(x, r, w, b, factor):
    """y and h of what was multiplied with `factor`."""
    h = x * factor + r
    return F.layer_norm(h, (N,), w, b), h


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "stream", "wide"), [(F32, F32, False), (BF16, BF16, False), (BF16, BF16, True), (F16, F32, True)]
)
def test_values_and_gradients(dtype, stream, wide, p, scaled, backend, device):
    """Of the elements that a seed keeps. No farther from float64 than torch's operators are."""
    x, r, w, b = inputs = leaves(device, dtype, stream)
    layer_scale = torch.randn(N, device=device).to(dtype).requires_grad_() if scaled else None
    row_scale = torch.rand(5, device=device) if scaled else None
    inputs += [layer_scale] if scaled else []
    options = {"dropout": p, "row_scale": row_scale, "layer_scale": layer_scale, "residual_in_fp32": wide}
    torch.manual_seed(1)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)
    torch.manual_seed(1)
    y, h = fastnorm.add_layer_norm(x, r, (N,), w, b, **options)
    assert (y.dtype, h.dtype) == (dtype, F32 if wide else dtype)
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    ours = [y, h, *torch.autograd.grad([y, h], inputs, [dy, dh])]
    kept = reference.kept(x.numel(), p, seed).view(x.shape) if p else torch.ones_like(x, dtype=torch.bool)
    assert not p or abs(kept.float().mean().item() - 0.8) < 0.05

    def run(dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in inputs]
        factor = kept.to(dtype) / (1 - p)
        factor = factor * row_scale.to(dtype).view(5, 1, 1) * given[4] if scaled else factor
        outputs = in_float64(*given[:4], factor)
        return [*outputs, *torch.autograd.grad(outputs, given, [dy.to(dtype), dh.to(dtype)])]

    for a, plain, exact in zip(ours, run(dtype), run(F64), strict=True):
        error, allowed = ((t.double() - exact).abs().max().item() for t in (a, plain))
        assert error <= allowed + 2 * torch.finfo(a.dtype).eps * exact.abs().max().item()


def test_seeds(backend, device):
    """torch's generator decides, and a generator's state gives the same call again."""
    x, r, w, b = leaves(device)
    call = lambda: fastnorm.add_layer_norm(x, r, (N,), w, b, dropout=0.5)[1]
    torch.manual_seed(7)
    first, second = call(), call()
    torch.manual_seed(7)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    gradients = []
    for again in (False, True):
        torch.manual_seed(7)
        run = lambda x: fastnorm.add_layer_norm(x, r, (N,), w, b, dropout=0.5)[0]
        y = checkpoint(run, x, use_reentrant=False) if again else run(x)
        gradients.append(torch.autograd.grad(y.sin().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_derivatives_through_dropout(norm, backend, device):
    x, r, w, s = (torch.randn(t, device=device, dtype=F64, requires_grad=True) for t in ((3, 2, 6), (3, 2, 6), (6,), (6,)))

    def call(x, r, w, s):
        torch.manual_seed(3)
        options = {"dropout": 0.4, "layer_scale": s, "row_scale": torch.tensor([1.0, 0.0, 2.0], device=device, dtype=F64)}
        if norm == "layer":
            return fastnorm.add_layer_norm(x, r, (6,), w, eps=1e-2, activation="silu", **options)
        return fastnorm.add_rms_norm(x, r, (6,), w, eps=1e-2, **options)

    assert torch.autograd.gradcheck(call, (x, r, w, s), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, r, w, s), fast_mode=True)


def test_what_is_saved(backend, device):
    """h and the statistics; no mask."""
    x, r, w, b = leaves(device)
    for extras, copies in (({"dropout": 0.3}, 1), ({"layer_scale": torch.ones(N, device=device, requires_grad=True)}, 2)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t
        ):
            fastnorm.add_layer_norm(x, r, (N,), w, b, **extras)
        assert sum(n for n in kept.values() if n > 4 * 2 * x.numel() // N) == copies * x.nbytes


@pytest.mark.parametrize("unused", [0, 1])
def test_one_of_two_outputs_is_used(unused, backend, device):
    results = []
    for function in (
        lambda x, r, w, b: fastnorm.add_layer_norm(x, r, (N,), w, b, row_scale=torch.full((5,), 2.0, device=device)),
        lambda x, r, w, b: in_float64(x, r, w, b, 2.0),
    ):
        torch.manual_seed(0)
        inputs = leaves(device)
        y = function(*inputs)[1 - unused]
        results.append(torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


class Plain(nn.Module):
    """As it is written elsewhere."""

    def __init__(self, norm, p, scale):
        super().__init__()
        self.norm, self.p = norm, p
        self.layer_scale = nn.Parameter(torch.full((N,), scale))

    def forward(self, x, r):
        h = F.dropout(x, self.p, self.training) * self.layer_scale + r
        return self.norm(h), h


@pytest.mark.parametrize("cls", ["AddLayerNorm", "AddRMSNorm"])
def test_modules(cls, backend, device):
    """Evaluation drops nothing, training as much as asked; deepcopy, state_dict, repr."""
    plain = {"AddLayerNorm": nn.LayerNorm, "AddRMSNorm": nn.RMSNorm}[cls](N, device=device)
    norm = getattr(fastnorm, cls)(N, dropout=0.25, drop_path=0.5, layer_scale=0.1, device=device)
    assert "dropout=0.25, drop_path=0.5, layer_scale=True" in repr(norm)
    assert set(norm.state_dict()) == {*plain.state_dict(), "layer_scale"}
    torch.testing.assert_close(norm.layer_scale, torch.full((N,), 0.1, device=device))
    x, r, *_ = (t.detach() for t in leaves(device, shape=(400, 3, N)))
    expected = Plain(plain, 0.0, 0.1).to(device).eval()
    for module in (norm, copy.deepcopy(norm)):
        for ours, theirs in zip(module.eval()(x, r), expected(x, r), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    _, h = norm.train()(x, r)
    branch = (h - r).abs() > 1e-5 * x.abs()
    present = branch.flatten(1).any(1)
    assert 0.35 < present.float().mean().item() < 0.65
    assert 0.7 < branch[present].float().mean().item() < 0.8
    ratio = ((h - r) / x)[branch & (x.abs() > 0.1)]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1 / 0.75 / 0.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("shape", "n", "scaled"), [((6,), (6,), (6,)), ((2, 6), (6,), (2, 6)), ((2, 6), (2, 6), (2,))])
def test_a_row_scale_for_less_than_a_row(shape, n, scaled, backend, device):
    """Was the kernels' own error, of numbers that nobody had given."""
    x = torch.randn(shape, device=device)
    for function in (fastnorm.add_layer_norm, fastnorm.add_rms_norm):
        with pytest.raises(ValueError, match="expected a row_scale for the first dimensions"):
            function(x, x, n, row_scale=torch.ones(scaled, device=device))


@pytest.mark.parametrize("wide", [False, True])
def test_wide_scales_of_a_compiled_half(wide, device):
    """drop_path's factors are float32; results have the branch's dtype all the same."""
    norm = fastnorm.AddLayerNorm(N, drop_path=0.5, residual_in_fp32=wide, device=device, dtype=BF16)
    x, r, *_ = (t.detach() for t in leaves(device, BF16))
    for module in (norm, torch.compile(norm, backend="eager")):
        y, h = module(x, r)
        assert (y.dtype, h.dtype) == (BF16, F32 if wide else BF16)


def test_a_wide_stream(backend, device):
    """Small branches are not lost in a stream that a half type would round."""
    norm = fastnorm.AddLayerNorm(N, residual_in_fp32=True, device=device, dtype=BF16)
    stream = torch.full((4, N), 256.0, device=device)
    branch = torch.full((4, N), 2.0**-4, device=device, dtype=BF16)
    for _ in range(8):
        y, stream = norm(branch, stream)
    assert y.dtype == BF16
    assert torch.equal(stream, torch.full_like(stream, 256.5))


def test_without_options_nothing_changes(backend, device):
    x, r, w, b = leaves(device)
    for plain, with_them in (
        (
            fastnorm.add_layer_norm(x, r, (N,), w, b),
            fastnorm.add_layer_norm(x, r, (N,), w, b, dropout=0.0, residual_in_fp32=False),
        ),
        (fastnorm.add_layer_norm(x, r, (N,), w, b), fastnorm.add_layer_norm(x, r, (N,), w, b, residual_in_fp32=True)),
    ):
        assert all(torch.equal(a, c) for a, c in zip(plain, with_them, strict=True))


def test_compiled(device):
    norm = fastnorm.AddLayerNorm(N, dropout=0.5, layer_scale=1.0, device=device)
    x, r, *_ = (t.detach() for t in leaves(device))
    y, h = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, r)
    torch.testing.assert_close(y, F.layer_norm(h, (N,)), rtol=1e-5, atol=1e-5)
    assert 0.3 < (h == r).float().mean().item() < 0.7


WRONG = [
    ({"dropout": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
    ({"dropout": -0.1}, ValueError, "dropout probability has to be between 0 and 1, but got -0.1"),
    ({"row_scale": torch.ones(4)}, ValueError, r"row_scale for the first dimensions of \(5, 7, 48\), got \(4,\)"),
    ({"row_scale": torch.ones(7, 1)}, ValueError, r"got \(7, 1\)"),
    ({"layer_scale": torch.ones(47)}, RuntimeError, "must match the size"),
    ({"dropout": 0.1, "activation": "swish"}, ValueError, "no activation"),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG)
def test_options_that_do_not_fit(options, error, words, backend, device):
    x, r, w, b = leaves(device)
    options = {k: t.to(device) if torch.is_tensor(t) else t for k, t in options.items()}
    with pytest.raises(error, match=words):
        fastnorm.add_layer_norm(x, r, (N,), w, b, **options)


def test_modules_check_their_probabilities():
    for name in ("dropout", "drop_path"):
        with pytest.raises(ValueError, match=f"{name} probability has to be between 0 and 1, but got 2"):
            fastnorm.AddRMSNorm(N, **{name: 2})


@pytest.mark.parametrize("change", [lambda r: r[:1], lambda r: r.double(), lambda r: r.mT.contiguous().mT])
def test_streams_that_the_kernels_do_not_take(change, backend, device):
    """Broadcast or promoted as torch does."""
    x, r, *_ = leaves(device)
    r = change(r.detach())
    ours = fastnorm.add_layer_norm(x, r, (N,), row_scale=torch.full((5,), 2.0, device=device))
    h = x * 2 + r
    for a, c in zip(ours, (F.layer_norm(h, (N,)), h), strict=True):
        assert a.dtype == c.dtype
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
