"""The native backend's whole calls: what they cover, what they leave to the general path, and that both agree."""

import pytest
import torch
from cases import BF16, F16, F32, F64

import fastnorm
from fastnorm import dispatch, extension
from fastnorm.autograd import BatchNormFunction, LayerNormFunction


@pytest.fixture
def direct():
    if dispatch.BACKENDS[dispatch.NAMES.index("native")].why_not("cpu") is not None:
        pytest.skip("the native backend is not there: no compiler")
    with fastnorm.use_backend("native"):
        dispatch.select("cpu")
        yield dispatch.direct


def tensor(*shape, dtype=F32, **kwargs):
    return torch.randn(*shape, **kwargs).to(dtype)


LAYER_NORMS = {
    "tuple": lambda: (tensor(4, 6), (6,), tensor(6), tensor(6), 1e-5),
    "list": lambda: (tensor(4, 6), [6], tensor(6), tensor(6), 1e-5),
    "size": lambda: (tensor(4, 6), torch.Size([6]), tensor(6), tensor(6), 1e-5),
    "two dimensions": lambda: (tensor(4, 2, 3), (2, 3), tensor(2, 3), tensor(2, 3), 1e-5),
    "all dimensions": lambda: (tensor(2, 3), (2, 3), tensor(2, 3), None, 1e-5),
    "no parameters": lambda: (tensor(4, 6), (6,), None, None, 1e-5),
    "bias alone": lambda: (tensor(4, 2, 3), (2, 3), None, tensor(2, 3), 1e-5),
    "an integer eps": lambda: (tensor(4, 6), (6,), tensor(6), None, 1),
    "float64": lambda: (tensor(4, 6, dtype=F64), (6,), tensor(6, dtype=F64), None, 1e-5),
    "mixed": lambda: (tensor(4, 6, dtype=BF16), (6,), tensor(6), tensor(6, dtype=F16), 1e-5),
    "transposed": lambda: (tensor(6, 4).t(), (6,), tensor(6), tensor(6), 1e-5),
    "parameters": lambda: (tensor(4, 6), (6,), torch.nn.Parameter(tensor(6)), torch.nn.Parameter(tensor(6)), 1e-5),
}
BATCH_NORMS = {
    "training": lambda: (tensor(4, 3), torch.zeros(3), torch.ones(3), tensor(3), tensor(3), True, 0.1, 1e-5),
    "no statistics": lambda: (tensor(4, 3, 2), None, None, tensor(3), None, True, 0.1, 1e-5),
    "no parameters": lambda: (tensor(4, 3, 2, 2), torch.zeros(3), torch.ones(3), None, None, True, 0.1, 1e-5),
    "evaluation": lambda: (tensor(4, 3), torch.zeros(3), torch.ones(3), tensor(3), tensor(3), False, 0.1, 1e-5),
    "evaluation with eps 0": lambda: (tensor(4, 3), torch.zeros(3), torch.ones(3), None, tensor(3), False, 0.1, 0.0),
    "integer momentum": lambda: (tensor(4, 3), torch.zeros(3), torch.ones(3), None, None, True, 1, 1e-5),
    "mixed": lambda: (tensor(4, 3, dtype=BF16), torch.zeros(3), torch.ones(3), tensor(3), tensor(3), True, 0.1, 1e-5),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_is_covered_and_equal_to_the_general_path(name, direct):
    x, shape, weight, bias, eps = LAYER_NORMS[name]()
    backend, N = dispatch.select("cpu"), torch.Size(shape).numel()
    general = lambda x, w, b: LayerNormFunction.apply(x, w, b, eps, N, backend, None)
    assert_same(lambda x, w, b: direct.layer_norm(x, shape, w, b, eps), general, x, weight, bias)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_is_covered_and_equal_to_the_general_path(name, direct):
    x, mean, var, weight, bias, training, momentum, eps = BATCH_NORMS[name]()
    backend = dispatch.select("cpu")
    twin = [None if t is None else t.clone() for t in (mean, var)]
    general = lambda x, w, b: BatchNormFunction.apply(x, w, b, *twin, training, momentum, eps, backend)
    assert_same(lambda x, w, b: direct.batch_norm(x, mean, var, w, b, training, momentum, eps), general, x, weight, bias)
    for a, b in zip((mean, var), twin, strict=True):
        assert a is b or torch.equal(a, b)


def assert_same(ours, general, x, weight, bias):
    """The same bits, with and without a graph, and first and second derivatives."""
    results = []
    for function in (ours, general):
        tensors = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        wanted = [t for t in tensors if t is not None]
        y = function(*tensors)
        assert y is not None
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        grads = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        penalty = torch.autograd.grad(y, wanted[0], dy, create_graph=True)[0].float().square().sum()
        results.append([y, *grads, *torch.autograd.grad(penalty, wanted, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride())


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_no_graph_where_no_gradient_is_wanted(name, direct):
    args = LAYER_NORMS[name]()
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    assert direct.layer_norm(*plain).grad_fn is None
    with torch.no_grad():
        assert torch.equal(direct.layer_norm(*args), direct.layer_norm(*plain))
    with torch.inference_mode():
        assert direct.layer_norm(*plain).is_inference()


def imaginary(*shape):
    """A real tensor whose sign is still to be turned over."""
    t = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert t.is_neg()
    return t


class Subclass(torch.Tensor):
    pass


X = lambda: tensor(4, 6)
NOT_COVERED = {
    "an integer tensor": lambda: (torch.ones(4, 6, dtype=torch.int32), (6,), None, None, 1e-5),
    "no tensor": lambda: ([[1.0, 2.0]], (2,), None, None, 1e-5),
    "another shape": lambda: (X(), (5,), None, None, 1e-5),
    "too many dimensions": lambda: (X(), (2, 4, 6), None, None, 1e-5),
    "an empty shape": lambda: (X(), (), None, None, 1e-5),
    "a shape that is a number": lambda: (X(), 6, None, None, 1e-5),
    "a shape of floats": lambda: (X(), (6.0,), None, None, 1e-5),
    "a huge shape": lambda: (X(), (1 << 70,), None, None, 1e-5),
    "a weight of another shape": lambda: (X(), (6,), tensor(1, 6), None, 1e-5),
    "a bias on another device": lambda: (X(), (6,), None, torch.empty(6, device="meta"), 1e-5),
    "an eps that is a string": lambda: (X(), (6,), None, None, "1e-5"),
    "an eps that is huge": lambda: (X(), (6,), None, None, 1 << 2000),
    "no elements": lambda: (tensor(0, 6), (6,), None, None, 1e-5),
    "a sparse tensor": lambda: (X().to_sparse(), (6,), None, None, 1e-5),
    "a meta tensor": lambda: (X().to("meta"), (6,), None, None, 1e-5),
    "a negative view": lambda: (imaginary(4, 6), (6,), None, None, 1e-5),
    "a zero tensor": lambda: (torch._efficientzerotensor(4, 6), (6,), None, None, 1e-5),
    "a subclass": lambda: (X().as_subclass(Subclass), (6,), None, None, 1e-5),
    "too few arguments": lambda: (X(), (6,), None, None),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered(name, direct):
    assert direct.layer_norm(*NOT_COVERED[name]()) is None


def B(x=None, m=0, v=1, w=None, b=None, t=True, momentum=0.1, eps=1e-5):
    """Arguments of a call that is covered, but for those given. `m` and `v` that are numbers fill a buffer."""
    buffer = lambda value: torch.full((3,), float(value)) if type(value) is int else value
    return [tensor(4, 3) if x is None else x, buffer(m), buffer(v), w, b, t, momentum, eps]


NOT_COVERED_CHANNELS = {
    "one value per channel": lambda: B(x=tensor(1, 3)),
    "one dimension": lambda: B(x=tensor(3)),
    "one statistic": lambda: B(v=None),
    "no statistics in evaluation": lambda: B(m=None, v=None, t=False),
    "statistics that require gradients": lambda: B(m=torch.zeros(3, requires_grad=True)),
    "another number of channels": lambda: B(w=torch.ones(4)),
    "eps 0 in training": lambda: B(eps=0.0),
    "a negative eps": lambda: B(eps=-1.0),
    "eps not a number": lambda: B(eps=float("nan")),
    "a training flag that is a number": lambda: B(t=1),
    "no momentum": lambda: B(momentum=None),
    "too few arguments": lambda: B()[:-1],
}


@pytest.mark.parametrize("name", NOT_COVERED_CHANNELS)
def test_what_is_not_covered_of_batch_norm(name, direct):
    args = NOT_COVERED_CHANNELS[name]()
    assert direct.batch_norm(*args) is None
    for t, value in zip(args[1:3], (0, 1), strict=True):
        assert t is None or (t == value).all()


def test_watched_calls_are_not_covered(direct):
    """Transforms, modes and tangents: torch's operators have to be seen."""
    x, uncovered = tensor(4, 6), []
    look = lambda x: (uncovered.append(direct.layer_norm(x, (6,), None, None, 1e-5) is None), x * 1)[1]
    torch.func.vmap(look)(tensor(2, 4, 6))
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        look(torch.autograd.forward_ad.make_dual(x, x))
    with torch._subclasses.FakeTensorMode():
        look(torch.ones(4, 6))
    with torch.overrides.BaseTorchFunctionMode():
        look(x)
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    assert uncovered
    assert all(uncovered)
    assert direct.layer_norm(x, (6,), None, None, 1e-5) is not None


def test_an_exception_in_a_second_backward_is_passed_on(direct):
    """Through the engine and the C++ node, with its type."""

    class Odd(Exception):
        pass

    def fail(*args):
        raise Odd("this")

    extension.load().set_differentiable(fail, fail, fail, fail)
    try:
        x = tensor(4, 6).requires_grad_()
        for y in (
            direct.layer_norm(x, (6,), None, None, 1e-5),
            direct.fused_rows(x, None, (6,), None, None, 1e-5, "relu", 0.0, None, True)[0],
            direct.fused_batch_norm(x, None, None, None, None, True, 0.1, 1e-5, "relu", 0.0, None, None),
        ):
            with pytest.raises(Odd, match="this"):
                torch.autograd.grad(y.sum(), x, create_graph=True)
    finally:
        extension.load().set_differentiable(*extension._differentiable)


def test_the_choice_of_a_backend_is_obeyed():
    """Whole calls of CPU tensors are the native backend's."""
    x = tensor(4, 6)
    for name in ("reference", "native", "reference"):
        backend = dispatch.BACKENDS[dispatch.NAMES.index(name)]
        if backend.why_not("cpu"):
            continue
        with fastnorm.use_backend(name):
            fastnorm.layer_norm(x, (6,))
            assert (dispatch.direct.layer_norm(x, (6,), None, None, 1e-5) is not None) == (name == "native")
        assert dispatch.direct.layer_norm(x, (6,), None, None, 1e-5) is None  # to be chosen anew
