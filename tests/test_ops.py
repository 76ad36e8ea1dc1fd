"""torch.ops.fastnorm: every registered operator by itself."""

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32, LAYOUTS
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

import fastnorm
from fastnorm import ops

OPS = torch.ops.fastnorm
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others compile
D = torch.float64


def parameters(size, present, dtype, device="cpu"):
    return [torch.randn(size, dtype=dtype, device=device, requires_grad=True) if p else None for p in present]


def dtypes(*tensors):
    return [None if t is None else t.dtype for t in tensors]


def layer_norm_arguments(present, dtype, device="cpu", shape=(3, 4, 8)):
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    return x, [8], *parameters(8, present, dtype, device), 1e-5


def batch_norm_arguments(present, dtype, layout, device="cpu", shape=(2, 6, 3, 2)):
    x = LAYOUTS[layout](torch.randn(shape, dtype=dtype, device=device)).requires_grad_()
    return x, *parameters(6, present, dtype, device), 1e-5


def detached(arguments):
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)


present = pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
half_too = pytest.mark.parametrize("dtype", [F32, BF16])


@present
@half_too
def test_opcheck_of_layer_norm(present, dtype):
    arguments = layer_norm_arguments(present, dtype)
    opcheck(OPS.layer_norm.default, arguments)
    x, shape, weight, bias, eps = detached(arguments)
    y, mean, rstd = OPS.layer_norm(x, shape, weight, bias, eps)
    backward = lambda dy, *need: (dy, x, shape, mean, rstd, weight, *need)
    opcheck(OPS.layer_norm_backward.default, backward(torch.ones_like(y[:1, :1]).expand(y.shape), True, *dtypes(weight, bias)))
    for need in ((False, None, F32), (True, None, None)):
        opcheck(OPS.layer_norm_backward.default, backward(torch.randn_like(y.mT).mT, *need), test_utils=QUICK)


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("dtype", "layout"), [(F32, "dense"), (F32, "every_second"), (BF16, "channels_last")])
def test_opcheck_of_batch_norm(present, dtype, layout):
    arguments = batch_norm_arguments(present, dtype, layout)
    x, weight, bias, eps = detached(arguments)
    running = torch.randn(6), torch.rand(6)
    opcheck(OPS.batch_norm_train.default, arguments)
    opcheck(OPS.batch_norm_eval.default, (*arguments[:3], *running, eps))
    y, mean, rstd, _ = OPS.batch_norm_train(x, weight, bias, eps)
    backward = lambda dy, *others: (dy, x, mean, rstd, weight, *others)
    expanded, wanted = torch.ones_like(y[:1]).expand(y.shape), dtypes(weight, bias)
    opcheck(OPS.batch_norm_backward.default, backward(expanded, True, True, *wanted))
    opcheck(OPS.batch_norm_backward.default, backward(expanded, False, True, *wanted), test_utils=QUICK)
    opcheck(OPS.batch_norm_backward.default, backward(torch.randn_like(y), True, False, F32, None), test_utils=QUICK)


@pytest.mark.parametrize(("dtype", "layout"), [(F32, "dense"), (BF16, "channels_last"), (F32, "transposed")])
def test_fake_kernels_promise_what_every_backend_returns(dtype, layout, backend, device):
    """Shapes, dtypes, strides."""
    check = lambda op, *arguments: opcheck(op.default, arguments, test_utils=QUICK)
    x, weight, bias, eps = detached(batch_norm_arguments((True, True), dtype, layout, device))
    dy = torch.ones_like(x[:1]).expand(x.shape)
    check(OPS.layer_norm, x, x.shape[2:], None, None, eps)
    _, mean, rstd = OPS.layer_norm(x, x.shape[2:], None, None, eps)
    check(OPS.layer_norm_backward, dy, x, x.shape[2:], mean, rstd, None, True, dtype, None)
    check(OPS.batch_norm_train, x, weight, bias, eps)
    check(OPS.batch_norm_eval, x, weight, bias, weight, bias.abs(), eps)
    _, mean, rstd, _ = OPS.batch_norm_train(x, weight, bias, eps)
    for training in (True, False):
        check(OPS.batch_norm_backward, dy, x, mean, rstd, weight, training, training, dtype, F32)


def calls(device="cpu", dtype=F32):
    """(through the operator, through fastnorm.functional, inputs) for each differentiable operator."""
    mean, var = torch.randn(6, dtype=dtype, device=device), torch.rand(6, dtype=dtype, device=device) + 0.5
    layer = layer_norm_arguments((True, True), dtype, device, (2, 3, 8))
    batch = batch_norm_arguments((True, True), dtype, "dense", device, (3, 6, 2))
    return {
        "layer_norm": (
            lambda x, w, b: OPS.layer_norm(x, [8], w, b, 1e-5)[0],
            lambda x, w, b: fastnorm.layer_norm(x, (8,), w, b),
            (layer[0], *layer[2:4]),
        ),
        "batch_norm_train": (
            lambda x, w, b: OPS.batch_norm_train(x, w, b, 1e-5)[0],
            lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True),
            batch[:3],
        ),
        "batch_norm_eval": (
            lambda x, w, b: OPS.batch_norm_eval(x, w, b, mean, var, 1e-5)[0],
            lambda x, w, b: fastnorm.batch_norm(x, mean, var, w, b),
            batch[:3],
        ),
    }


by_operator = pytest.mark.parametrize("name", ["layer_norm", "batch_norm_train", "batch_norm_eval"])


@by_operator
@pytest.mark.parametrize("subset", [0b111, 0b001, 0b110, 0b010])
def test_is_the_eager_kernel_bit_for_bit(name, subset, backend, device):
    operator, eager, inputs = calls(device)[name]
    inputs = [t.detach().requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(inputs)]
    wanted = [t for t in inputs if t.requires_grad]
    results = []
    for function in (operator, eager):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, wanted, torch.cos(y.detach()))])
    assert all(map(torch.equal, *results))


def test_statistics_are_those_of_the_batch(backend, device):
    x = torch.randn(5, 6, 4, device=device) * 3 + 7
    _, mean, rstd, var = OPS.batch_norm_train(x, None, None, 1e-5)
    torch.testing.assert_close(mean.sum(0), x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2)))
    torch.testing.assert_close(rstd, torch.rsqrt(x.var((0, 2), correction=0) + 1e-5))
    _, mean, rstd = OPS.layer_norm(x, [6, 4], None, None, 1e-5)
    assert (mean.shape, rstd.shape) == ((2, 5), (5,))
    torch.testing.assert_close(mean.sum(0), x.mean((1, 2)))


@by_operator
def test_second_derivatives(name):
    operator, _, inputs = calls(dtype=D)[name]
    assert gradcheck(operator, inputs)
    assert gradgradcheck(operator, inputs)


@by_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients(name):
    operator, _, inputs = calls()[name]
    y = operator(*inputs)
    vectors = torch.randn(3, *y.shape)
    grad = lambda v, **kwargs: torch.autograd.grad(y, inputs, v, retain_graph=True, **kwargs)
    expected = [torch.stack(g) for g in zip(*map(grad, vectors), strict=True)]
    torch.testing.assert_close(list(grad(vectors, is_grads_batched=True)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(torch.func.vmap(grad)(vectors)), expected, rtol=1e-4, atol=1e-5)


def backward_calls():
    """The backward operators as functions of dy."""
    x = torch.randn(4, 8)
    _, mean, rstd = OPS.layer_norm(x, [8], None, None, 1e-5)
    _, c_mean, c_rstd, _ = OPS.batch_norm_train(x, None, None, 1e-5)
    return (
        lambda dy: OPS.layer_norm_backward(dy, x, [8], mean, rstd, None, True, None, F32),
        lambda dy: OPS.batch_norm_backward(dy, x, c_mean, c_rstd, None, True, True, None, F32),
    )


@pytest.mark.parametrize("which", [0, 1])
def test_backward_operators_are_no_constants(which):
    """Called directly on what requires grad, or carries a tangent, they raise."""
    backward, dy = backward_calls()[which], torch.randn(4, 8)
    for output in (0, 2):
        d = backward(dy.clone().requires_grad_())[output]
        with pytest.raises(NotImplementedError, match="create_graph=True"):
            d.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda dy: backward(dy)[0], (dy,), (dy,))


@by_operator
@pytest.mark.parametrize("requires_grad", [True, False])
def test_tangents_are_not_dropped(name, requires_grad):
    operator, eager, inputs = calls()[name]
    inputs = [t.detach().requires_grad_(requires_grad) for t in inputs]
    for i in range(3):
        with forward_ad.dual_level():
            duals = list(inputs)
            operator(*duals)  # nothing carries a tangent yet
            duals[i] = forward_ad.make_dual(duals[i], torch.ones_like(duals[i]))
            with pytest.raises(NotImplementedError, match=f"fastnorm::{name}"):
                operator(*duals)
            assert forward_ad.unpack_dual(eager(*duals)).tangent is not None
    with pytest.raises(NotImplementedError, match=f"fastnorm::{name}"):
        torch.func.jvp(lambda x: operator(x, *inputs[1:]), (inputs[0],), (inputs[0],))


def test_derivative_by_running_statistics_is_refused():
    mean = torch.zeros(6, requires_grad=True)
    y = OPS.batch_norm_eval(torch.randn(4, 6), None, None, mean, torch.ones(6), 1e-5)[0]
    with pytest.raises(NotImplementedError, match="running statistics"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_rows(shape, backend, device):
    x, _, w, b, _ = layer_norm_arguments((True, True), F32, device, shape)
    y = OPS.layer_norm(x, [8], w, b, 1e-5)[0]
    expected = F.layer_norm(x, (8,), w, b)
    assert y.shape == expected.shape
    for a, e in zip(torch.autograd.grad(y.sum(), (x, w, b)), torch.autograd.grad(expected.sum(), (x, w, b)), strict=True):
        assert torch.equal(a, e)
    opcheck(OPS.layer_norm.default, (x, [8], w, b, 1e-5), test_utils="test_faketensor")


@pytest.mark.parametrize("shape", [(0, 6), (2, 6, 0)])
def test_empty_channels(shape, backend, device):
    x, w, b, _ = batch_norm_arguments((True, True), F32, "dense", device, shape)
    running = torch.zeros(6, device=device), torch.ones(6, device=device)
    for y in (OPS.batch_norm_train(x, w, b, 1e-5)[0], OPS.batch_norm_eval(x, w, b, *running, 1e-5)[0]):
        assert y.shape == x.shape
        for t, d in zip((x, w, b), torch.autograd.grad(y.sum(), (x, w, b)), strict=True):
            assert torch.equal(d, torch.zeros_like(t))


@by_operator
def test_where_no_backend_serves(name, monkeypatch):
    """Plain torch operators, for a device that is in no row of the table."""
    operator, eager, inputs = calls()[name]
    with fastnorm.use_backend("reference"):
        expected = eager(*inputs)
    monkeypatch.setattr(ops, "select", lambda device_type: None)
    assert torch.equal(operator(*inputs), expected)


def test_wrong_shapes_are_refused():
    x, w = torch.randn(4, 6), torch.randn(5)
    for call in (
        lambda: OPS.layer_norm(x, [5], None, None, 1e-5),
        lambda: OPS.layer_norm(x, [2, 4, 6], None, None, 1e-5),
        lambda: OPS.layer_norm(x, [], None, None, 1e-5),
        lambda: OPS.layer_norm(x, [6], w, None, 1e-5),
        lambda: OPS.layer_norm(x, [6], None, w, 1e-5),
        lambda: OPS.batch_norm_train(x, w, None, 1e-5),
        lambda: OPS.batch_norm_eval(x, None, None, w, w, 1e-5),
    ):
        for mode in (torch.no_grad(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)):
            with mode, pytest.raises(RuntimeError, match="expected"):
                call()


@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (0, 0, None), (2, 1, 0), (None, 0, 0), (None, None, 1)])
@half_too
def test_vmap_of_layer_norm(dims, dtype):
    x, w, b = torch.randn(3, 4, 8), torch.randn(8), torch.randn(8)
    batch = [t if d is None else torch.stack([t, t.cos(), t.sin()], d) for t, d in zip((x, w, b), dims, strict=True)]
    batch[0] = batch[0].to(dtype)
    function = lambda x, w, b: OPS.layer_norm(x, [8], w, b, 1e-5)
    each = [[t if d is None else t.select(d, i) for t, d in zip(batch, dims, strict=True)] for i in range(3)]
    expected = [torch.stack(t) for t in zip(*(function(*e) for e in each), strict=True)]
    torch.testing.assert_close(list(torch.func.vmap(function, dims)(*batch)), expected)
