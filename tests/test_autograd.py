"""Whatever looks at a norm through PyTorch: higher derivatives, transforms, tracing, modes, subclasses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.autograd import gradcheck, gradgradcheck

import fastnorm

D = torch.float64


def leaf(*shape, **kwargs):
    return torch.randn(*shape, dtype=D, **kwargs).requires_grad_()


def norms(device="cpu"):
    """Closures (function, inputs) over all kinds of norms, with and without parameters."""
    make = lambda *shape: leaf(*shape, device=device)
    mean, var = torch.randn(3, dtype=D, device=device), torch.rand(3, dtype=D, device=device) + 0.5
    return {
        "layer_norm": (lambda x, w, b: fastnorm.layer_norm(x, (4,), w, b), (make(3, 4), make(4), make(4))),
        "layer_norm 2": (lambda x, w, b: fastnorm.layer_norm(x, (2, 3), w, b), (make(3, 2, 3), make(2, 3), make(2, 3))),
        "layer_norm plain": (lambda x: fastnorm.layer_norm(x, (4,)), (make(3, 4),)),
        "layer_norm bias only": (lambda x, b: fastnorm.layer_norm(x, (4,), None, b), (make(3, 4), make(4))),
        "training": (lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True), (make(4, 3), make(3), make(3))),
        "training 2d": (lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True), (make(2, 3, 2, 2), make(3), make(3))),
        "training plain": (lambda x: fastnorm.batch_norm(x, None, None, training=True), (make(4, 3, 2),)),
        "evaluation": (lambda x, w, b: fastnorm.batch_norm(x, mean, var, w, b), (make(4, 3), make(3), make(3))),
        "evaluation plain": (lambda x: fastnorm.batch_norm(x, mean, var), (make(4, 3),)),
    }


@pytest.mark.parametrize("name", list(norms()))
def test_first_and_second_derivatives(name, backend, device):
    function, inputs = norms(device)[name]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_gradient_penalty_in_float32(backend, device):
    """Differentiating the backward of a training step, as WGAN-GP does; against torch.nn."""
    for ours, theirs, shape in (
        (fastnorm.LayerNorm, torch.nn.LayerNorm, (5, 8)),
        (fastnorm.BatchNorm1d, torch.nn.BatchNorm1d, (5, 8)),
    ):
        results = []
        for cls in (ours, theirs):
            torch.manual_seed(0)
            norm, x = cls(8).to(device), torch.randn(shape, device=device, requires_grad=True)
            (dx,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
            dx.square().sum().backward()
            results.append((x.grad, norm.weight.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("subset", range(1, 8))
def test_any_subset_of_gradients(subset, backend, device):
    for ours, theirs in (
        (lambda x, w, b: fastnorm.layer_norm(x, (6,), w, b), lambda x, w, b: F.layer_norm(x, (6,), w, b)),
        (
            lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True),
            lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        ),
    ):
        tensors = [torch.randn(s, device=device) for s in ((8, 6), (6,), (6,))]
        dy = torch.randn(8, 6, device=device)
        results = []
        for function in (ours, theirs):
            leaves = [t.clone().requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(tensors)]
            function(*leaves).backward(dy)
            results.append([t.grad for t in leaves])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-5)


def test_no_graph_without_need(backend, device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    with torch.no_grad():
        assert not fastnorm.layer_norm(x, (6,)).requires_grad
    assert not fastnorm.layer_norm(x.detach(), (6,)).requires_grad
    with torch.inference_mode():
        assert fastnorm.BatchNorm1d(6, device=device).eval()(x).is_inference()


def test_retained_graph_and_checkpoint(backend, device):
    norm, x = fastnorm.LayerNorm(6, device=device), torch.randn(4, 6, device=device, requires_grad=True)
    y = norm(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])
    for reentrant in (True, False):
        x.grad = None
        torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(first, x.grad)


def test_changing_a_saved_input_is_noticed(backend, device):
    leaf_x = torch.randn(4, 6, device=device, requires_grad=True)
    for function in (lambda x: fastnorm.layer_norm(x, (6,)), lambda x: fastnorm.batch_norm(x, None, None, training=True)):
        x = leaf_x * 1
        y = function(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", list(norms()))
def test_transforms_and_forward_mode(name, backend, device):
    """torch.func and dual numbers: the derivatives that reverse mode gives."""
    function, inputs = norms(device)[name]
    inputs = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, jvp = torch.func.jvp(function, inputs, tangents)
    jacobians = torch.func.jacrev(function, argnums=tuple(range(len(inputs))))(*inputs)
    expected = sum(torch.tensordot(j, t, dims=t.dim()) for j, t in zip(jacobians, tangents, strict=True))
    torch.testing.assert_close(jvp, expected)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(tangent, expected)


def test_vmap_and_per_sample_gradients(backend, device):
    x, w = torch.randn(5, 4, 6, device=device), torch.randn(6, device=device)
    function = lambda x, w: fastnorm.layer_norm(x, (6,), w).square().sum()
    torch.testing.assert_close(torch.func.vmap(function, in_dims=(0, None))(x, w), torch.stack([function(xi, w) for xi in x]))
    grads = torch.func.vmap(torch.func.grad(function, argnums=1), in_dims=(0, None))(x, w)
    torch.testing.assert_close(grads, torch.stack([torch.func.grad(function, argnums=1)(xi, w) for xi in x]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients(backend, device):
    """torch.autograd.grad(is_grads_batched=True) and vmap over a backward, as jacobian(vectorize=True) does."""
    for function in (
        lambda x, w: fastnorm.layer_norm(x, (6,), w),
        lambda x, w: fastnorm.batch_norm(x, None, None, w, None, True),
    ):
        x, w = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 6), (6,)))
        y, vectors = function(x, w), torch.randn(3, 4, 6, device=device)
        grad = lambda v, **kwargs: torch.autograd.grad(y, (x, w), v, retain_graph=True, **kwargs)
        expected = [torch.stack(g) for g in zip(*map(grad, vectors), strict=True)]
        for batched in (grad(vectors, is_grads_batched=True), torch.func.vmap(grad)(vectors)):
            torch.testing.assert_close(list(batched), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_trace(backend):
    """Not a constant in the place of the norm."""
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), fastnorm.LayerNorm(8), fastnorm.BatchNorm1d(8)).eval()
    traced = torch.jit.trace(network, torch.randn(4, 6))
    x = torch.randn(7, 6)
    torch.testing.assert_close(traced(x), network(x), rtol=1e-4, atol=1e-5)


class Tagged(torch.Tensor):
    """A subclass with torch_function: it must survive the call."""


def test_tensor_subclasses_and_functions_modes(backend):
    x = torch.randn(4, 6).as_subclass(Tagged)
    assert type(fastnorm.layer_norm(x, (6,))) is Tagged
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        fastnorm.layer_norm(torch.randn(4, 6), (6,))
    assert fastnorm.layer_norm in seen


def test_many_threads_at_once(backend, device):
    """Several Python threads, each with its own forward and backward."""
    if backend.__name__ == "fastnorm.kernels" and device == "cpu":
        pytest.skip("Triton's interpreter patches triton.language while a kernel runs, so it runs one at a time")

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 32, generator=generator).to(device).requires_grad_()
        return torch.autograd.grad(fastnorm.layer_norm(x, (32,)).pow(3).sum(), x)[0]

    alone = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(step, range(8)), strict=True))
