"""recompute="output": gradients within the bound that fastnorm/recompute.py states, and the columns that are kept."""

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, Case
from compare import accumulate
from recomputed import LAYERS, LEAKY, is_recomputed, leaves, saved
from sequences import Fused, cancelling, differentiated, size, torch_errors

import fastnorm

# In the accumulate dtype: those of x_hat, z and y in forward, and of what takes them back.
ROUNDINGS = 14


def same(dtype):
    return {"dtype": dtype, "weight": dtype, "bias": dtype}


def ended(case, alpha, **options):
    return Fused(case, **({} if alpha is None else {"activation": "leaky_relu", "alpha": alpha}), **options)


MISSING = [{"weight": None}, {"bias": None}]
CHANNELS = [
    *(ended(Case((12, 5), **same(dtype)), alpha) for dtype in (F64, F32, BF16, F16) for alpha in (None, 0.2)),
    *(ended(Case((3, 4, 5, 7), **same(dtype)), 0.01) for dtype in (F64, F32, BF16, F16)),
    *(ended(Case((3, 4, 5, 7), layout="channels_last", **same(dtype)), 0.01) for dtype in (F32, BF16)),
    *(ended(Case((4, 6, 9), layout=layout, dtype=F16), 0.2) for layout in ("row_strided", "mT", "every_second")),
    *(ended(Case((4, 6, 9), dtype=dtype), alpha) for dtype in (F32, BF16) for alpha in (1.0, 2.0)),
    *(ended(Case((64, 4, 6), offset=1e3, **same(dtype)), alpha) for dtype in (F32, BF16, F16) for alpha in (None, 0.2)),
    *(ended(Case((4, 6, 9), **{**same(BF16), **missing}), 0.2) for missing in MISSING),
    ended(Case((4, 6, 9), weight=None, bias=None), None),
    *(ended(Case((3, 4, 5, 7), **same(dtype)), alpha, training=False) for dtype in (F32, BF16) for alpha in (None, 0.2)),
]
ROWS = [
    *(ended(Case((9, 20), **same(dtype)), alpha) for dtype in (F64, F32, BF16, F16) for alpha in (None, 0.2)),
    *(ended(Case((6, 12), layout=layout), 0.01) for layout in ("row_strided", "transposed")),
    *(ended(Case((4, 6, 24), dtype=dtype), alpha) for dtype in (F32, BF16) for alpha in (1.0, 2.0)),
    ended(Case((5, 4, 8), dims=2, **same(BF16)), 0.2),
    *(ended(Case((4, 200), offset=1e3, **same(dtype)), alpha) for dtype in (F32, BF16, F16) for alpha in (None, 0.2)),
    *(ended(Case((9, 20), **{**same(BF16), **missing}), 0.2) for missing in MISSING),
    ended(Case((9, 20), weight=None, bias=None), None),
    *(
        ended(Case((5, 4, 8), dims=2, **{**same(dtype), "bias": None}), alpha, centre=False)
        for dtype in (F64, F32, BF16, F16)
        for alpha in (None, 0.01)
    ),
]
KINDS = [*(("channels", fused) for fused in CHANNELS), *(("rows", fused) for fused in ROWS)]


def run(kind, fused, inputs, recompute):
    """y, and gradients by name."""
    x, dy, weight, bias, *_ = inputs
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    x, weight, bias = (leaves.get(name) for name in ("dx", "dweight", "dbias"))
    end = {"activation": None if fused.activation == "identity" else (fused.activation, fused.alpha), "recompute": recompute}
    if kind == "channels":
        running = (None, None) if fused.training else fused.case.running(x.device)
        y = fastnorm.batch_norm(x, *running, weight, bias, fused.training, 0.1, fused.case.eps, **end)
    elif fused.centre:
        y = fastnorm.layer_norm(x, fused.case.normalized_shape, weight, bias, fused.case.eps, **end)
    else:
        y = fastnorm.rms_norm(x, fused.case.normalized_shape, weight, fused.case.eps, **end)
    assert is_recomputed(y) == (recompute is not None)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def moved(kind, fused, x, weight, bias, dz):
    """By how much what x_hat is off by moves dx and dweight, element by element."""
    x, d = x.double(), x.dim()
    rows, leading = kind == "rows", tuple(range(d - fused.case.dims))
    axes, over = (tuple(range(len(leading), d)), leading) if rows else ((0, *range(2, d)),) * 2
    shape = fused.case.normalized_shape if rows else (-1, *[1] * (d - 2))
    weight, bias = (None if p is None else p.double().view(shape) for p in (weight, bias))
    w, b = x.new_ones(()) if weight is None else weight, x.new_zeros(()) if bias is None else bias
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    if not fused.centre:
        mean, var = torch.zeros_like(mean), x.square().mean(axes, keepdim=True)
    if not fused.training:
        mean, var = (t.double().view(shape) for t in fused.case.running(x.device))
    rstd = torch.rsqrt(var + fused.case.eps)
    x_hat, g = (x - mean) * rstd, dz * w
    u = torch.finfo(fused.case.dtype).eps / 2 + ROUNDINGS * torch.finfo(accumulate(fused.case.dtype)).eps / 2
    off = torch.where(w.abs() < b.abs() / 8, 0, 2 * u * (x_hat.abs() + (b / w).abs() + 1))
    c1, off_c1 = (g * x_hat).mean(axes, keepdim=True), (g.abs() * off).mean(axes, keepdim=True)
    dx = rstd * (off * (c1.abs() + off_c1) + x_hat.abs() * off_c1) if fused.training else x.new_zeros(())
    return {"dx": dx, "dweight": (dz.abs() * off).sum(over), "dbias": x.new_zeros(())}


@pytest.mark.parametrize(("kind", "fused"), KINDS, ids=lambda v: str(v))
def test_gradients(kind, fused, backend, device):
    """Off by what torch's are, one unit in the last place and what the bound of x_hat allows; y is that of any other call."""
    inputs = fused.inputs(device, 0, kind == "rows")
    x, _, weight, bias, *_ = inputs
    truth = differentiated(kind, fused, F64, *inputs)
    y, results = run(kind, fused, inputs, "output")
    expected, usual = run(kind, fused, inputs, None)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    allowed, errors = moved(kind, fused, x, weight, bias, truth["dz"]), torch_errors(kind, fused, device)
    terms = cancelling(kind, fused, x, weight, truth["dz"])
    for name, got in results.items():
        assert (got.dtype, got.stride()) == (usual[name].dtype, usual[name].stride())
        summed = 2 * torch.finfo(accumulate(x.dtype)).eps * max(size(truth[name]), terms if name == "dx" else 0)
        one = max(torch.finfo(got.dtype).eps * size(truth[name]), summed)
        over = (got.double() - truth[name]).abs() - allowed[name] - errors[name] * size(truth[name]) - one
        assert over.max() <= 0, f"{name}: {over.max():.3g} more than torch's error, one ulp and what x_hat may be off by"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_far_mean_costs_nothing(dtype, backend, device):
    """Where x has coarser steps than what it is off by, it comes back to the bit."""
    x = (torch.randn(64, 60, device=device) + (1e4 if dtype == F32 else 3e2)).to(dtype)
    for call in (
        lambda x, w, how: fastnorm.batch_norm(x, None, None, w, None, True, recompute=how),
        lambda x, w, how: fastnorm.layer_norm(x, (60,), w, recompute=how),
    ):
        grads = []
        for how in ("output", None):
            a, w = x.clone().requires_grad_(), torch.ones(60, device=device, requires_grad=True)
            y = call(a, w, how)
            grads.append(torch.autograd.grad(y, (a, w), torch.arange(3840.0, device=device).sin().view(64, 60).to(dtype)))
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_half_input_beside_float64_parameters(dtype, backend, device):
    """Parameters of any dtype, whose gradients have it."""
    x = torch.randn(16, 32, device=device).to(dtype).requires_grad_()
    w, b = (torch.rand(32, device=device, dtype=F64).add(0.5).requires_grad_() for _ in range(2))
    results = []
    for function in (
        lambda: fastnorm.layer_norm(x, (32,), w, b, activation=LEAKY, recompute="output"),
        lambda: F.leaky_relu(F.layer_norm(x.double(), (32,), w, b), 0.01),
    ):
        y = function()
        results.append(torch.autograd.grad(y, (x, w, b), torch.ones_like(y)))
    assert [t.dtype for t in results[0]] == [dtype, F64, F64]
    for a, b_ in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b_.double(), rtol=0.05, atol=0.2)


# ---------------------------------------------------------------- columns that y does not give back


TINY = [  # dtype, alpha, weight and bias of four columns, those that are kept
    (F32, None, [0.0, 1.0, -1.0, -0.0], None, [0, 3]),
    (F32, None, [1e-21, 1e-19, -1e-30, 1e-44], None, [0, 2, 3]),
    (F32, None, [1.0, 1.0, -1.0, 1e-3], [7.9, 8.1, -8.1, 7e-3], [1, 2]),
    (F32, None, None, [7.9, -8.1, 0.0, 9.0], [1, 3]),
    (F32, None, [float("inf"), float("nan"), 1.0, 1e30], [0.0, 0.0, float("inf"), 0.0], [0, 1, 2]),
    (F32, 0.01, [1e-19, 1e-17, 1.0, -1e-19], None, [0, 3]),
    (F32, 1e-30, None, None, [0, 1, 2, 3]),
    (F16, None, [6e-5, 7e-5, -1.0, 0.0], None, [0, 3]),
    (F16, 0.01, [6e-3, 7e-3, -6e-3, 1.0], None, [0, 2]),
    (F16, 2.0, [6e-5, 7e-5, 1.0, 1.0], None, [0]),
]


@pytest.mark.parametrize(("dtype", "alpha", "weight", "bias", "expected"), TINY)
def test_which_columns_are_kept(dtype, alpha, weight, bias, expected, backend, device):
    x = torch.randn(5, 4, device=device).to(dtype).requires_grad_()
    weight, bias = (None if p is None else torch.tensor(p, device=device) for p in (weight, bias))
    end = {"activation": None if alpha is None else ("leaky_relu", alpha), "recompute": "output"}
    calls = [
        lambda: fastnorm.batch_norm(x, None, None, weight, bias, True, **end),
        lambda: fastnorm.layer_norm(x, (4,), weight, bias, **end),
    ]
    if bias is None:
        calls.append(lambda: fastnorm.rms_norm(x, (4,), weight, **end))
    for call in calls:
        index, columns = saved(call)[1][-2:]
        assert index.tolist() == expected
        assert torch.equal(columns, x.detach()[:, expected])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(9, 6), (3, 6, 5, 4)])
def test_kept_channels_have_the_usual_gradients(shape, dtype, backend, device):
    """To the bit, in training and evaluation; the other ones are right beside them."""
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    running = torch.randn(6, device=device), torch.tensor([1.0, 2.0, float("inf"), 1.0, 1.0, 1.0], device=device)
    for training in (True, False):
        results = []
        for how in ("output", None):
            w = torch.tensor([0.0, 1e-40, 1.0, -1.0, 1.0, 1e-30], device=device, requires_grad=True)
            b = torch.tensor([1.0, 0.0, 1.0, 0.5, -9.0, 1.0], device=device, requires_grad=True)
            a = x.clone().requires_grad_()
            y = fastnorm.batch_norm(a, *(t.clone() for t in running), w, b, training, recompute=how)
            results.append([y, *torch.autograd.grad(y, (a, w, b), dy)])
        kept = [0, 1, 4, 5] if training else [0, 1, 2, 4, 5]
        ours, usual = ([y[:, kept], dx[:, kept], dw[kept], db[kept]] for y, dx, dw, db in results)
        assert all(map(torch.equal, ours, usual))
        rough = {"rtol": 1e-4, "atol": 1e-4} if dtype == F32 else {"rtol": 0.1, "atol": 0.3}
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **rough)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kept_columns_have_the_usual_gradients(dtype, backend, device):
    """Those of the weight, to the bit; shapes of more than one dimension and rows that lie anywhere."""
    x, dy = torch.randn(2, 9, 2, 3, device=device).to(dtype)
    for apart in (lambda t: t, lambda t: t.mT.contiguous().mT):
        grads = []
        for how in ("output", None):
            w = torch.tensor([[0.0, 1e-40, 1.0], [-1.0, 1.0, 1e-30]], device=device, requires_grad=True)
            b = torch.tensor([[1.0, 0.0, 1.0], [0.5, -9.0, 1.0]], device=device, requires_grad=True)
            y = fastnorm.layer_norm(apart(x), (2, 3), w, b, recompute=how)
            grads.append(torch.autograd.grad(y, (w, b), dy))
        kept = torch.tensor([[True, True, False], [False, True, True]], device=device)
        assert torch.equal(grads[0][0][kept], grads[1][0][kept])
        assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_what_the_activation_takes_into_range(name, backend, device):
    """z may be too large for y's dtype where y is not."""
    x, dy = torch.randn(2, 64, 6, device=device).half()
    weight, bias = torch.full((6,), 2e4, device=device), torch.full((6,), -1.5e5, device=device)
    grads = []
    for how in ("output", None):
        leaf = x.clone().requires_grad_()
        y = LAYERS[name](leaf, weight, bias, activation=LEAKY, recompute=how)
        assert y.isfinite().all()
        grads.append(torch.autograd.grad(y, leaf, dy)[0])
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1)


def test_a_slope_whose_reciprocal_overflows(backend, device):
    """All columns are kept, and the gradients are the usual ones."""
    for call in LAYERS.values():
        grads = []
        for how in ("output", None):
            inputs = leaves(device)
            y = call(*inputs, activation=("leaky_relu", 1e-300), recompute=how)
            assert is_recomputed(y) == (how is not None)
            grads.append(torch.autograd.grad(y.sin().sum(), inputs[:2]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_result_that_overflows(backend, device):
    """Cannot be inverted: NaN, and never a number that is wrong."""
    x, w = torch.randn(9, 6, device=device).half().requires_grad_(), torch.full((6,), 1e5, device=device)
    y = fastnorm.batch_norm(x, None, None, w, training=True, recompute="output")
    over = y.isinf().any(0)
    assert over.any()
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    assert dx[:, over].isnan().all()
