"""Ghost batch norm: torch's batch norm of each ghost batch, in values, derivatives, statistics, errors and surroundings."""

import copy
from dataclasses import dataclass
from functools import cache
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, LAYOUTS, SHORT
from compare import accumulate, effort
from conftest import NOT_EMULATED
from ghosts import assert_same, by_parts, calls_of, dealt, formatted
from sequences import size
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm
from fastnorm import ghost

DRAWS = 12
MOMENTUM = 0.3


def test_how_samples_are_dealt():
    assert dealt(6, 2) == [[0, 3], [1, 4], [2, 5]]
    assert dealt(7, 2) == [[0, 1, 2], [3, 5], [4, 6]]
    assert dealt(11, 3) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9, 10]]
    assert dealt(5, 3) == [[0, 1, 2, 3, 4]]
    for B in range(1, 40):
        for n in range(1, 40):
            sizes = sorted(map(len, dealt(B, n)))
            assert sorted(chain(*dealt(B, n))) == list(range(B))
            assert sizes[-1] - sizes[0] <= 1
            assert sizes[0] >= min(B, n)
            assert [q for q, G in ghost.shares(B, n) for _ in range(G)] == sorted(sizes, reverse=True)


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Ghost:
    shape: tuple[int, ...]
    n: int
    dtype: torch.dtype = F32
    parameters: torch.dtype | None = F32
    layout: str = "dense"
    activation: str = "identity"
    residual: str | None = None  # its layout
    offset: float = 0.0
    eps: float = 1e-5

    def __str__(self):
        parameters = "" if self.parameters is None else SHORT[self.parameters]
        more = (self.activation if self.activation != "identity" else "", self.residual or "")
        name = f"{'x'.join(map(str, self.shape))}by{self.n}-{SHORT[self.dtype]}-{parameters}-{self.layout}"
        return "-".join(filter(None, (name, *more)))

    def inputs(self, device, draw):
        """x, dy, weight, bias, residual, running mean and variance"""
        generator = torch.Generator().manual_seed(draw)
        random = lambda shape, dtype: torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(device)
        C, given = self.shape[1:2], self.parameters or F32
        x = LAYOUTS[self.layout](random(self.shape, F64).add(self.offset).to(self.dtype))
        dy, weight, bias = random(self.shape, self.dtype), random(C, given) + 1, random(C, given)
        residual = LAYOUTS[self.residual](random(self.shape, self.dtype)) if self.residual else None
        weight, bias = (None, None) if self.parameters is None else (weight, bias)
        return x, dy, weight, bias, residual, random(C, given), random(C, given).abs() + 0.5


CASES = [
    *(Ghost(shape, n, dtype, dtype) for shape, n in [((12, 5), 4), ((8, 3, 10), 2), ((6, 4, 5, 5), 3), ((8, 3, 2, 3, 4), 4)]
      for dtype in (F32, BF16)),
    *(Ghost(shape, n, dtype, dtype) for shape, n in [((11, 4), 4), ((7, 3, 6), 2), ((5, 3, 4, 4), 2)] for dtype in (F32, BF16)),
    *(Ghost((7, 4, 5, 3), 2, dtype, dtype, "channels_last") for dtype in (F32, BF16)),
    Ghost((6, 4, 5, 3), 2, layout="channels_last"),
    Ghost((6, 4, 2, 5, 3), 2, F16, F16, "channels_last"),
    Ghost((5, 4, 2, 5, 3), 2, layout="channels_last"),
    *(Ghost((6, 4, 9), 2, layout=layout) for layout in ("mT", "transposed", "row_strided", "column_strided", "expanded")),
    *(Ghost((12, 10), 4, layout=layout) for layout in ("mT", "row_strided", "column_strided", "every_second")),
    Ghost((6, 4, 5, 3), 2, layout="every_second"),
    Ghost((6, 1, 5, 3), 2, layout="channels_last"),
    Ghost((6, 4, 1, 1), 2, layout="channels_last"),
    Ghost((6, 4, 1, 1), 3),
    Ghost((4, 3, 6), 1),
    Ghost((5, 3, 6), 8),
    Ghost((6, 3, 6), 3, parameters=None),
    Ghost((12, 5), 3, BF16, F32),
    Ghost((12, 5), 4, offset=1e3),
    Ghost((8, 4, 6), 4, activation="relu"),
    Ghost((8, 4, 6), 4, residual="dense"),
    Ghost((8, 4, 6), 2, BF16, F32, activation="silu", residual="mT"),
    Ghost((7, 4, 3, 3), 2, layout="channels_last", activation="leaky_relu", residual="dense"),
    Ghost((6, 4, 3, 3), 2, BF16, BF16, activation="gelu", residual="channels_last"),
    Ghost((7, 5), 3, activation="tanh", residual="dense"),
    Ghost((80, 16, 3, 3), 8),
]  # fmt: skip


def results(function, dtype, x, dy, weight, bias, residual, mean, var):
    """y, running statistics and gradients, by name, of a function that returns the first three."""
    leaf = lambda t: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
    leaves = {"dx": leaf(x), "dweight": leaf(weight), "dbias": leaf(bias), "dresidual": leaf(residual)}
    mean, var = (t.to(dtype or t.dtype) for t in (mean, var))
    y, mean, var = function(*(leaves[name] for name in ("dx", "dweight", "dbias", "dresidual")), mean, var)
    leaves = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), "mean": mean, "var": var, **dict(zip(leaves, grads, strict=True))}


def torchs(case):
    def run(x, weight, bias, residual, mean, var):
        return by_parts(x, mean, var, weight, bias, case.n, MOMENTUM, case.eps, case.activation, 0.01, residual)

    return run


def ours(case):
    def run(x, weight, bias, residual, mean, var):
        mean, var = mean.clone(), var.clone()
        extras = {"activation": None if case.activation == "identity" else case.activation, "residual": residual}
        options = (True, MOMENTUM, case.eps)
        y = fastnorm.ghost_batch_norm(x, mean, var, weight, bias, *options, virtual_batch_size=case.n, **extras)
        return y, mean, var

    return run


@cache
def torch_errors(case, device):
    """The largest error of torch's own, of several draws: the error of one is luck."""
    worst = {}
    for draw in range(DRAWS):
        inputs = case.inputs(device, draw)
        truth = results(torchs(case), F64, *inputs)
        for name, t in results(torchs(case), None, *inputs).items():
            worst[name] = max(worst.get(name, 0), size(t.double() - truth[name]))
    return worst


def cancelling(case, x, dy, weight):
    """The largest of what cancels in dx: dz * weight * rstd, of a ghost batch."""
    axes, g = (0, *range(2, x.dim())), dy.double()
    if weight is not None:
        g = g * weight.double().view(-1, *[1] * (x.dim() - 2))
    scaled = lambda part: g[part] * torch.rsqrt(x[part].double().var(axes, correction=0, keepdim=True) + case.eps)
    return max(size(scaled(part)) for part in dealt(len(x), case.n))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_statistics(case, backend, device):
    """Each is off by at most what torch's is and one unit in the last place; y and dx lie as batch norm's do."""
    inputs = case.inputs(device, 0)
    got, truth, errors = results(ours(case), None, *inputs), results(torchs(case), F64, *inputs), torch_errors(case, device)
    assert set(got) == set(truth)
    dtypes = {"y": case.dtype, "dx": case.dtype, "dresidual": case.dtype}
    for name, t in got.items():
        assert (t.shape, t.dtype) == (truth[name].shape, dtypes.get(name, case.parameters or F32)), name
        terms = cancelling(case, *inputs[:3]) if name == "dx" else 0
        summed = 2 * torch.finfo(accumulate(case.dtype)).eps * max(size(truth[name]), terms)
        one = max(torch.finfo(t.dtype).eps * size(truth[name]), summed)
        error, theirs = size(t.double() - truth[name]), errors[name]
        assert error <= theirs + one, f"{name}: error {error:.3g}, torch's {theirs:.3g} + one ulp {one:.3g}"
    assert got["y"].stride() == got["dx"].stride() == formatted(inputs[0])


STRIDED = [((6, 4, 5, 3), "channels_last"), ((6, 4, 2, 5, 3), "channels_last"), ((6, 4, 9), "mT"), ((12, 10), "mT")]


@pytest.mark.parametrize(
    ("shape", "layout"), [((12, 5), "dense"), ((6, 4, 5, 3), "dense"), ((6, 4, 9), "row_strided"), *STRIDED]
)
def test_inputs_are_read_in_place(shape, layout, monkeypatch, backend, device):
    """One call where channels and ghost batches lie as channels; else one for each ghost batch."""
    x = LAYOUTS[layout](torch.randn(shape, device=device))
    calls = calls_of(monkeypatch, lambda: fastnorm.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2))
    G = shape[0] // 2
    strided = (shape, layout) in STRIDED
    assert [tuple(args[0].shape) for args in calls] == ([(2, *shape[1:])] * G if strided else [(2, G * shape[1], *shape[2:])])
    assert {args[0].untyped_storage().data_ptr() for args in calls} == {x.untyped_storage().data_ptr()}


def test_small_batches_are_batch_norm(monkeypatch, backend, device):
    """To the bit, and none is cut in vain."""
    w, b, *running = torch.rand(4, 3, device=device)
    for B, n in ((5, 8), (7, 7), (7, 4)):
        x, pairs = torch.randn(B, 3, 4, device=device), []
        for options in ({"virtual_batch_size": n}, {}):
            function = fastnorm.ghost_batch_norm if options else fastnorm.batch_norm
            stats = [t.clone() for t in running]
            pairs.append([function(x, *stats, w, b, True, 0.3, **options), *stats])
        assert all(map(torch.equal, *pairs))
    evaluation = lambda: fastnorm.ghost_batch_norm(torch.randn(8, 3, device=device), *running, w, b, virtual_batch_size=2)
    assert len(calls_of(monkeypatch, evaluation)) == 1


def test_running_statistics_of_remainders(backend, device):
    """Each ghost batch counts by its number of samples: the mean is that of all, the variance the mean of theirs."""
    x = torch.randn(7, 3, 10, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    fastnorm.ghost_batch_norm(x, mean, var, None, None, True, 1.0, virtual_batch_size=2)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, sum(x[s].transpose(0, 1).flatten(1).var(1) * len(s) / 7 for s in dealt(7, 2)))


@pytest.mark.parametrize("shape", [(64, 3, 9), (64, 3, 4, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_over_ghost_batches_are_rounded_once(shape, compiled, backend, device):
    """bfloat16 parameters and statistics: half a unit in the last place, however many ghost batches.

    A compiler gets torch's operators, whose sums over bfloat16 inputs are off by up to 3 % on a GPU.
    """
    dtype = F32 if compiled and device == "cuda" else BF16
    x, dy = torch.randn(2, *shape, device=device).bfloat16().to(dtype)
    x = LAYOUTS["channels_last" if len(shape) == 4 else "dense"](x) + 1
    weight, bias, mean, var = torch.rand(4, 3, device=device).bfloat16()

    def run(x, weight, bias, mean, var):
        return fastnorm.ghost_batch_norm(x, mean, var, weight, bias, True, 1.0, virtual_batch_size=4)

    def gradients(function, *tensors):
        x, weight, bias, mean, var = (t.clone() for t in tensors)
        y, *new = function(x, weight.requires_grad_(), bias.requires_grad_(), mean, var)
        return [*torch.autograd.grad(y, (weight, bias), dy.to(y.dtype)), *(new or (mean, var))]

    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    tensors = x, weight, bias, mean, var
    got = gradients(lambda *a: (function(*a),), *tensors)
    parts = lambda x, w, b, m, v: by_parts(x, m, v, w, b, 4, 1.0, 1e-5)
    for a, b in zip(got, gradients(parts, *(t.double() for t in tensors)), strict=True):
        unit = torch.finfo(torch.bfloat16).eps * torch.exp2(b.abs().log2().floor())
        assert (a.double() - b).abs().le(0.505 * unit).all()
    torch._dynamo.reset()


# ---------------------------------------------------------------- what PyTorch does with it


def pair(n=2, activation="silu"):
    """(ours, in torch's operators), of x, residual, weight and bias."""

    def reference(x, r, w, b):
        none = [torch.zeros_like(x[0].reshape(len(w), -1)[:, 0].detach())] * 2
        return by_parts(x, *none, w, b, n, 0.0, 1e-5, activation, 0.01, r)[0]

    options = {"virtual_batch_size": n, "activation": activation}
    return lambda x, r, w, b: fastnorm.ghost_batch_norm(x, None, None, w, b, True, residual=r, **options), reference


def leaves(shape, device, dtype=F32, layout="dense"):
    generator = torch.Generator().manual_seed(0)
    make = lambda s: torch.randn(s, generator=generator, dtype=F64).to(device, dtype)
    tensors = LAYOUTS[layout](make(shape)), make(shape), make(shape[1:2]), make(shape[1:2])
    return [t.requires_grad_() for t in tensors]


def differentiated(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


SHAPES = [((4, 2, 3), "dense"), ((5, 2, 3), "dense"), ((6, 2), "dense"), ((5, 2, 3, 2), "channels_last")]
every_shape = pytest.mark.parametrize(("shape", "layout"), SHAPES)


@every_shape
def test_first_and_second_derivatives(shape, layout, backend, device):
    inputs = leaves(shape, device, F64, layout)
    function = pair(2 if len(shape) > 2 else 3, "tanh")[0]
    assert gradcheck(function, inputs, **effort(backend, device))
    assert gradgradcheck(function, inputs, **effort(backend, device))


@every_shape
def test_transforms(shape, layout, backend, device):
    """Forward mode, torch.func and vmap."""
    inputs, (ours, theirs) = [t.detach() for t in leaves(shape, device, layout=layout)], pair()
    tangents = [torch.randn_like(t) for t in inputs]
    assert_same(*(torch.func.jvp(f, tuple(inputs), tuple(tangents)) for f in (ours, theirs)))
    summed = [lambda *a, f=f: f(*a).sin().sum() for f in (ours, theirs)]
    assert_same(*(torch.func.grad(f, (0, 1, 2, 3))(*inputs) for f in summed))
    batched = [torch.stack((t, t + 1)) for t in inputs]
    of_all, refused = vmapped(ours, batched)
    if refused:  # on a GPU torch does not take channels_last in every case
        assert refused == vmapped(lambda x, _, w, b: F.batch_norm(x, None, None, w, b, training=True), batched)[1]
    else:
        assert_same([of_all], [torch.stack([theirs(*i) for i in zip(*batched, strict=True)])])


def vmapped(function, inputs):
    """The result, or what torch says where it refuses."""
    try:
        return torch.func.vmap(function)(*inputs), None
    except RuntimeError as e:
        return None, str(e)


@every_shape
@pytest.mark.parametrize("served", NOT_EMULATED, indirect=True)
def test_compiled(shape, layout, backend, device):
    """One graph, y in the memory format of x."""
    ours, theirs = pair()
    inputs = leaves(shape, device, layout=layout)
    for choice in ("torch", "fastnorm"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fastnorm.config, "compile", choice)
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
            results = differentiated(compiled, inputs)
        assert_same(results, differentiated(theirs, inputs))
        assert results[0].stride() == formatted(inputs[0])
        torch._dynamo.reset()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_module_takes_any_multiple(momentum):
    """Two graphs, one of them for all batches that virtual_batch_size divides, with the running statistics."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    norm = fastnorm.BatchNorm1d(3, momentum=momentum, virtual_batch_size=4)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for G in (2, 3, 5, 7, 9):
        x = torch.randn(4 * G, 3)
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(norm.state_dict(), twin.state_dict())
    assert counter.frame_count == 2


def test_traced():
    """By torch.fx as one node, function and module; by torch.jit.trace, make_fx and torch.export as operators."""
    x, norm = torch.randn(6, 3, 4), fastnorm.BatchNorm1d(3, virtual_batch_size=2)
    net = nn.Sequential(norm)
    expected = copy.deepcopy(net)(x)
    graph = fx.symbolic_trace(copy.deepcopy(net))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(graph(x), expected)
    call = lambda x: fastnorm.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2)
    graph = fx.symbolic_trace(call)
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.equal(graph(x), call(x))
    torch.testing.assert_close(make_fx(call)(x)(x), call(x))
    exported = torch.export.export(copy.deepcopy(net).train(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_traced_by_jit():
    call = lambda x: fastnorm.ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2)
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(torch.jit.trace(call, x)(x), call(x))


@pytest.mark.parametrize(("shape", "layout"), [*SHAPES, ((4, 3, 2, 2), "channels_last")])
def test_tensors_without_memory(shape, layout):
    norm = fastnorm.ghost_batch_norm
    x = LAYOUTS[layout](torch.randn(shape))
    y = norm(x.to("meta"), None, None, training=True, virtual_batch_size=2)
    assert (y.device.type, y.shape, y.stride()) == ("meta", shape, formatted(x))
    with torch._subclasses.FakeTensorMode() as mode:
        y = norm(mode.from_tensor(x), None, None, training=True, virtual_batch_size=2)
    assert (y.shape, y.stride()) == (shape, formatted(x))


class Marked(torch.Tensor):
    pass


def test_subclasses_and_modes(backend, device):
    x, call = (
        torch.randn(6, 3, device=device),
        lambda x: fastnorm.ghost_batch_norm(x, None, None, None, None, True, virtual_batch_size=2),
    )
    y = call(x.as_subclass(Marked))
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(torch.Tensor), call(x))
    with torch.inference_mode():
        assert torch.equal(call(x), call(x.clone()))
    with torch.no_grad():
        assert not call(x.requires_grad_()).requires_grad
