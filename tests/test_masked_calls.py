"""Norms with mask=... or lengths=... and their modules: statistics of what counts, gradients, running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32, F64
from masks import differentiated, mask_for
from test_group_calls import outcome
from torch import nn

import fastnorm
from fastnorm.activations import ACTIVATIONS

SHAPES = [(12, 5), (4, 6, 10), (3, 4, 5, 7), (2, 3, 2, 4, 5)]


def counting(x, mask):
    """What counts, (n, C), in float64."""
    return x.detach().double().movedim(1, -1)[mask]


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2)])
@pytest.mark.parametrize("kind", ["padding", "random", "all"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_calls(shape, dtype, kind, activation, backend, device):
    """Outputs and gradients are the plain ones, of which test_masked.py knows the bound; residuals are added before the end."""
    x, dy, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    w, b = torch.randn(2, shape[1], device=device, dtype=F64 if dtype == F64 else F32)
    mask = mask_for(x, kind)
    name, alpha = (activation, 0.0) if isinstance(activation, str) else activation or ("identity", 0.0)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = fastnorm.batch_norm(leaves[0], None, None, *leaves[1:], True, residual=residual, activation=activation, mask=mask)
    grads = torch.autograd.grad(y, leaves, dy)
    z = differentiated(x, dy, mask, w, b, 1e-5, F64)["y"] + residual.double()
    slope = torch.autograd.functional.vjp(lambda z: ACTIVATIONS[name].value(z, alpha), z, dy.double())[1]
    truth = differentiated(x, slope, mask, w, b, 1e-5, F64)
    tight = {F64: 1e-12, F32: 2e-5, BF16: 4e-2}[dtype]
    torch.testing.assert_close(y.double(), ACTIVATIONS[name].value(z, alpha), rtol=tight, atol=tight)
    if name == "identity" or dtype != BF16:  # where z is rounded, a relu may have the other slope
        for g, k in zip(grads, ("dx", "dweight", "dbias"), strict=True):
            torch.testing.assert_close(g.double(), truth[k], rtol=tight, atol=tight * truth[k].abs().max().item())


def test_what_does_not_count_may_be_anything(backend, device):
    x, mask = torch.randn(3, 4, 5, device=device), torch.zeros(3, 5, dtype=torch.bool, device=device)
    x[0, 1, 2], x[1, 2, 3], x[2, 3, :2] = torch.inf, torch.nan, torch.tensor([torch.inf, -torch.inf])
    mask[1, :3] = True
    results = []
    for values in (x, x.nan_to_num(0.0, 0.0, 0.0)):
        norm = fastnorm.BatchNorm1d(4, device=device)
        results.append([norm(values, mask=mask)[1, :, :3], *norm.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", ["1d", "2d", "last"])
def test_running_statistics_of_modules(layer, momentum, backend, device):
    """Those of what counts, the variance unbiased; a batch of which nothing counts changes nothing."""
    shape = (3, 4, 5, 7) if layer == "2d" else (4, 6, 10)
    cls = fastnorm.BatchNorm2d if layer == "2d" else fastnorm.BatchNorm1d
    norm = cls(shape[1], momentum=momentum, device=device, **({"channel_axis": -1} if layer == "last" else {}))
    mean, var, seen = torch.zeros(shape[1], dtype=F64), torch.ones(shape[1], dtype=F64), 0
    for kind in ("padding", "random", "none", "all", "none"):
        x = torch.randn(shape, device=device)
        mask = mask_for(x, kind)
        before = {k: v.clone() for k, v in norm.state_dict().items()}
        norm(x.movedim(1, -1) if layer == "last" else x, mask=mask)
        if kind == "none":
            assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
            continue
        seen += 1
        share, values = momentum or 1 / seen, counting(x, mask).cpu()
        mean, var = mean + share * (values.mean(0) - mean), var + share * (values.var(0) - var)
        assert norm.num_batches_tracked.item() == seen
        torch.testing.assert_close(norm.running_mean.cpu().double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var.cpu().double(), var, rtol=1e-5, atol=1e-6)


def test_where_nothing_counts_the_running_statistics_normalise(backend, device):
    norm = fastnorm.BatchNorm1d(6, device=device)
    norm(torch.randn(9, 6, 4, device=device))
    x = torch.randn(4, 6, 10, device=device, requires_grad=True)
    mask = torch.zeros(4, 10, dtype=torch.bool, device=device)
    y = norm(x, mask=mask)
    expected = copy.deepcopy(norm).eval()(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), x) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    plain = fastnorm.batch_norm(x, None, None, training=True, mask=mask)
    torch.testing.assert_close(plain, x / (1 + 1e-5) ** 0.5)


def test_evaluation_has_no_use_for_a_mask(backend, device):
    norm = fastnorm.BatchNorm1d(6, device=device)
    x = torch.randn(4, 6, 10, device=device)
    mask = mask_for(x, "random")
    norm(x)
    for evaluating in (copy.deepcopy(norm).eval(), fastnorm.BatchNorm1d(6, frozen=True, device=device)):
        before = copy.deepcopy(evaluating.state_dict())
        assert torch.equal(evaluating(x, mask=mask), evaluating(x))
        assert all(torch.equal(v, before[k]) for k, v in evaluating.state_dict().items())
    without = fastnorm.BatchNorm1d(6, track_running_stats=False, device=device).eval()
    own = F.batch_norm(x, None, None, training=True)
    assert not torch.allclose(without(x, mask=mask), own, atol=1e-3)  # its statistics are the batch's in evaluation, too


def test_lengths(backend, device):
    """Are masks; beside channels last, too."""
    x = torch.randn(4, 6, 10, 3, device=device)
    lengths = torch.tensor([0, 3, 10, 7])
    mask = (torch.arange(10) < lengths[:, None])[..., None].expand(4, 10, 3).to(device)
    norm = fastnorm.BatchNorm2d(6, device=device)
    assert torch.equal(norm(x, lengths=lengths.to(device)), norm(x, mask=mask))
    assert torch.equal(norm(x, lengths=lengths.to(device)), norm(x, mask=mask[..., :1]))
    last = fastnorm.BatchNorm2d(6, channel_axis=-1, device=device)
    y = last(x.movedim(1, -1).contiguous(), lengths=lengths.to(device))
    torch.testing.assert_close(y.movedim(-1, 1), norm(x, mask=mask), rtol=1e-5, atol=1e-5)


def test_padding_does_not_matter(backend, device):
    """The purpose: a sequence has the same outputs and gradients however far it is padded."""
    sequences = [torch.randn(6, n, device=device) for n in (3, 9, 5)]
    results = []
    for longest, filling in ((9, 0.0), (17, 1e3)):
        x = torch.full((3, 6, longest), filling, device=device)
        for i, s in enumerate(sequences):
            x[i, :, : s.shape[1]] = s
        x.requires_grad_()
        norm = fastnorm.BatchNorm1d(6, device=device)
        lengths = torch.tensor([3, 9, 5], device=device)
        y = norm(x, lengths=lengths)
        valid = torch.cat([y[i, :, :n] for i, n in enumerate((3, 9, 5))], 1)
        valid.square().mul(torch.arange(17, device=device)).sum().backward()
        results.append([valid, torch.cat([x.grad[i, :, :n] for i, n in enumerate((3, 9, 5))], 1), norm.weight.grad])
        results[-1] += [norm.running_mean, norm.running_var]
        assert not x.grad[0, :, 3:].any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["random", "none"])
def test_derivatives(kind, backend, device):
    x, w, b = (torch.randn(s, dtype=F64, device=device, requires_grad=True) for s in ((3, 4, 5), (4,), (4,)))
    mask = mask_for(x, kind)
    call = lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True, 0.1, 1e-2, mask=mask)
    assert torch.autograd.gradcheck(call, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, w, b), fast_mode=True)
    expected = torch.autograd.grad(call(x, w, b).square().sum(), (x, w, b))
    for a, b_ in zip(torch.func.grad(lambda *t: call(*t).square().sum(), (0, 1, 2))(x, w, b), expected, strict=True):
        torch.testing.assert_close(a, b_)
    tangent = torch.func.jvp(lambda x: call(x, w, b), (x,), (torch.ones_like(x),))[1]
    assert tangent.isfinite().all()


def test_compiled(device):
    norm, twin = (fastnorm.BatchNorm1d(6, device=device) for _ in range(2))
    x = torch.randn(4, 6, 10, device=device)
    mask = mask_for(x, "random")
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, mask=mask)
    torch.testing.assert_close(y, twin(x, mask=mask))
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked.item() == 1


WRONG = [
    (lambda x: {"mask": torch.ones(4, 10)}, r"expected a bool mask of shape \(4, 10\).*got torch.float32 of shape \(4, 10\)"),
    (lambda x: {"mask": torch.ones(4, 9, dtype=torch.bool)}, r"got torch.bool of shape \(4, 9\)"),
    (lambda x: {"mask": torch.ones(4, dtype=torch.bool)}, r"got torch.bool of shape \(4,\)"),
    (lambda x: {"lengths": torch.ones(4)}, r"expected integer lengths of shape \(4,\).*got torch.float32"),
    (lambda x: {"lengths": torch.ones(3, dtype=torch.long)}, r"got torch.int64 of shape \(3,\)"),
    (lambda x: {"lengths": torch.ones(4, dtype=torch.long), "mask": torch.ones(4, 10, dtype=torch.bool)}, "give one of them"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_masks_that_do_not_fit(options, words, backend, device):
    x = torch.randn(4, 6, 10, device=device)
    norm = fastnorm.BatchNorm1d(6, device=device)
    before = copy.deepcopy(norm.state_dict())
    options = {k: t.to(device) for k, t in options(x).items()}
    for call in (lambda: norm(x, **options), lambda: fastnorm.batch_norm(x, None, None, training=True, **options)):
        with pytest.raises(ValueError, match=words):
            call()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    with pytest.raises(ValueError, match="virtual_batch_size knows no masks"):
        fastnorm.BatchNorm1d(6, virtual_batch_size=2, device=device)(x, mask=torch.ones(4, 10, dtype=torch.bool, device=device))


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x, m: f(x, None, None, torch.ones(3), None, True, mask=m),
        lambda f, x, m: f(x[:1, :, :1], None, None, training=True, mask=m[:1, :1]),
        lambda f, x, m: f(x.long(), None, None, training=True, mask=m),
        lambda f, x, m: f(x, torch.zeros(5), torch.ones(5), training=True, mask=m),
        lambda f, x, m: f(x, None, None, training=True, eps=0.0, mask=m),
        lambda f, x, m: f(x[0, 0], None, None, training=True, mask=m[0]),
    ],
)
def test_calls_that_torch_refuses(call, backend, device):
    """With its own exception, the mask away."""
    x = torch.randn(4, 6, 10)
    mask = torch.ones(4, 10, dtype=torch.bool)
    without = lambda *args, mask, **options: F.batch_norm(*args, **options)
    ours, theirs = (outcome(lambda f=f: call(f, x, mask)) for f in (fastnorm.batch_norm, without))
    assert isinstance(theirs, tuple)
    assert ours == theirs


def test_traced_modules(device):
    model = nn.Sequential(fastnorm.BatchNorm1d(6, device=device))

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = model[0]

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    graph = torch.fx.symbolic_trace(Padded().eval())
    x = torch.randn(4, 6, 10, device=device)
    mask = mask_for(x, "random")
    assert torch.equal(graph(x, mask), model.eval()(x))
    graph.train()
    assert not torch.allclose(graph(x, mask), model(x))


@pytest.mark.parametrize("kind", ["padding", "random", "none"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("shape", "dims"), [((4, 6, 5), 2), ((4, 6), 1), ((3, 4, 5, 2), 3), ((3, 4, 5, 2), 2)])
def test_rows(shape, dims, dtype, kind, backend, device):
    """layer_norm row by row, of what counts in it; a row of which nothing counts has mean 0 and variance 1."""
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    n = shape[len(shape) - dims :]
    w, b = torch.randn(2, *n, device=device, dtype=dtype)
    mask = mask_for(x.movedim(-1, 1) if len(shape) > 2 else x[:, None], kind)

    def written(x, w, b):
        counts = mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())).expand(x.shape)
        rows = [
            (row - row[m].mean()) * torch.rsqrt(row[m].var(correction=0) + 1e-5) if m.any() else row * (1 + 1e-5) ** -0.5
            for row, m in zip(x.reshape(-1, *n), counts.reshape(-1, *n), strict=True)
        ]
        return torch.stack(rows).view(x.shape) * w + b

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    tight = {F64: 1e-12, F32: 2e-5, BF16: 2e-2}[dtype]
    for ours, truth in zip(
        run(lambda x, w, b: fastnorm.layer_norm(x, n, w, b, mask=mask), dtype), run(written, F64), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), truth, rtol=tight, atol=tight * truth.abs().max().item())


def test_lengths_of_rows(backend, device):
    x, r = torch.randn(2, 4, 6, 5, device=device)
    lengths = torch.tensor([1, 6, 3, 0], device=device)
    norm = lambda **options: fastnorm.layer_norm(x, (6, 5), activation="relu", residual=r, **options)
    assert torch.equal(norm(lengths=lengths), norm(mask=torch.arange(6, device=device) < lengths[:, None]))
    assert not torch.equal(norm(lengths=lengths), norm())
    module = fastnorm.LayerNorm((6, 5), activation="relu", device=device)
    assert torch.equal(module(x, r, lengths=lengths), norm(lengths=lengths))
    for wrong in ({"mask": x > 0, "lengths": lengths}, {"mask": x}, {"mask": x[:, :3] > 0}, {"lengths": lengths[:3]}):
        with pytest.raises(ValueError, match=r"expected|give one"):
            norm(**wrong)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fastnorm.layer_norm(x, (5, 5), lengths=lengths)


@pytest.mark.parametrize(
    ("shape", "dims", "mask", "R", "P"),
    [
        ((4, 6, 5), 1, (4, 6), 24, 1),
        ((4, 6, 5), 1, (4, 1), 4, 1),
        ((4, 6, 5), 2, (4, 6), 4, 6),
        ((4, 6, 5), 1, (4, 1, 5), 4, 5),
        ((4, 6, 5), 1, (1, 1, 5), 1, 5),
        ((4, 6, 5), 1, (1, 6), 24, 1),
        ((4, 6, 5, 3), 2, (4, 6, 5, 1), 24, 5),
        ((4, 6, 5, 3), 2, (4, 1, 1, 3), 4, 15),
        ((4, 6, 5, 3), 3, (4,), 4, 1),
    ],
)
def test_masks_of_rows_are_not_written_out(shape, dims, mask, R, P, backend, device, monkeypatch):
    """The kernels get a byte for as many rows and columns as have the same one."""
    given, run = [], backend.row_masked_fwd
    monkeypatch.setattr(
        backend, "row_masked_fwd", lambda x, mask, *rest: given.append(mask) or run(x, mask, *rest), raising=False
    )
    x, m = torch.randn(shape, device=device), torch.rand(mask, device=device) < 0.6
    n = shape[len(shape) - dims :]
    y = fastnorm.layer_norm(x, n, mask=m)
    assert [tuple(t.shape) for t in given] == [(R, P)]
    whole = m.view(*mask, *[1] * (x.dim() - m.dim())).expand(shape)
    torch.testing.assert_close(y, fastnorm.layer_norm(x, n, mask=whole), rtol=1e-5, atol=1e-6)


def test_derivatives_of_rows(backend, device):
    """Of every order, through the statistics; those of forward mode and of functorch by torch's operators."""
    x, w, b = torch.randn(3, 4, 5, device=device, dtype=F64), *torch.randn(2, 4, 5, device=device, dtype=F64)
    lengths = torch.tensor([2, 0, 4], device=device)
    call = lambda x, w, b: fastnorm.layer_norm(x, (4, 5), w, b, lengths=lengths)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for one, other in zip(first, torch.func.grad(lambda *a: call(*a).square().sum(), (0, 1, 2))(x, w, b), strict=True):
        torch.testing.assert_close(one, other)
    _, tangent = torch.func.jvp(lambda x: call(x, w, b), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent[1], w * (1 + 1e-5) ** -0.5)  # nothing counts: the statistics stay
