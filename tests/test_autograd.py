"""What the table of features (test_features.py) has no cell for: norms without parameters, dynamic shapes, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from compare import effort
from conftest import NOT_EMULATED
from torch.autograd import gradcheck, gradgradcheck

import fastnorm

D = torch.float64


def leaf(*shape, **kwargs):
    return torch.randn(*shape, dtype=D, **kwargs).requires_grad_()


def norms(device="cpu"):
    """Closures (function, inputs) over norms without all of their parameters."""
    make = lambda *shape: leaf(*shape, device=device)
    mean, var = torch.randn(3, dtype=D, device=device), torch.rand(3, dtype=D, device=device) + 0.5
    return {
        "layer_norm plain": (lambda x: fastnorm.layer_norm(x, (4,)), (make(3, 4),)),
        "layer_norm bias only": (lambda x, b: fastnorm.layer_norm(x, (4,), None, b), (make(3, 4), make(4))),
        "training plain": (lambda x: fastnorm.batch_norm(x, None, None, training=True), (make(4, 3, 2),)),
        "training bias only": (lambda x, b: fastnorm.batch_norm(x, None, None, None, b, True), (make(4, 3), make(3))),
        "evaluation plain": (lambda x: fastnorm.batch_norm(x, mean, var), (make(4, 3),)),
    }


@pytest.mark.parametrize("name", list(norms()))
def test_first_and_second_derivatives(name, backend, device):
    function, inputs = norms(device)[name]
    assert gradcheck(function, inputs, **effort(backend, device))
    assert gradgradcheck(function, inputs, **effort(backend, device))


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


class Tagged(torch.Tensor):
    """A subclass with torch_function: it must survive the call."""


def test_tensor_subclasses_and_functions_modes(backend, device):
    x = torch.randn(4, 6, device=device).as_subclass(Tagged)
    assert type(fastnorm.layer_norm(x, (6,))) is Tagged
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        fastnorm.layer_norm(torch.randn(4, 6, device=device), (6,))
    assert fastnorm.layer_norm in seen


PLAIN_NORMS = (fastnorm.LayerNorm, fastnorm.BatchNorm1d)


def _with_activation(norm):
    return lambda n, device: norm(n, activation="gelu", device=device)


@pytest.mark.parametrize(
    "norm",
    [*PLAIN_NORMS, fastnorm.RMSNorm, *map(_with_activation, PLAIN_NORMS)],
    ids=["layer", "batch", "rms", "layer-gelu", "batch-gelu"],
)
@pytest.mark.parametrize("served", NOT_EMULATED, indirect=True)
def test_dynamo_traces_the_backward(norm, backend, device):
    """Compiled autograd, with Dynamo, without graph breaks."""
    m = norm(6, device=device)
    for batch in (4, 5, 7):  # from the second one on the sizes are symbols
        x = torch.randn(batch, 6, device=device, requires_grad=True)
        expected = torch.autograd.grad(m(x).square().sum(), x)[0]
        y = m(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True, dynamic=True)):
            y.backward()
        torch.testing.assert_close(x.grad, expected)
    torch._dynamo.reset()


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
