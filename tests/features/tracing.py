"""Whatever looks at the operators of a call: compilers, exporters, tracers, modes, subclasses, autocast."""

import copy
import re

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import BF16, always, batch_norm, cotangent, every, feature, gradients, with_a_twin


def training_step(m, x, dy=None):
    y = m(x)
    return y, gradients(m, x, y, dy)


@feature(heavy=True, others=lambda column: column.name == "BatchNorm1d-masked")
def compiled(m, x):
    """Without graph breaks; results, gradients and statistics of what AOTAutograd makes of it."""
    torch._dynamo.reset()
    return training_step(torch.compile(m, fullgraph=True, backend="aot_eager"), x)


@feature(heavy=True)
def exported(m, x):
    program = torch.export.export(m, (x.detach(),))
    buffers = program.graph_signature.buffers_to_mutate.values()
    return [str(node.target) for node in program.graph.nodes], list(buffers), program.module()(x.detach())


@feature()
def fx_traced(m, x):
    """A leaf of the graph, like every module of torch.nn."""
    network = torch.nn.Sequential(torch.nn.Identity(), m)
    graph = torch.fx.symbolic_trace(network)
    return str(graph.graph), graph(x), gradients(m, x, graph(x))


@feature(heavy=True)
def jit_traced(m, x):
    traced = torch.jit.trace(m, x.detach(), check_trace=False)
    return [node.kind() for node in traced.inlined_graph.nodes()], training_step(traced, x)


@feature(heavy=True, columns=with_a_twin)
def jit_scripted(m, x):
    scripted = torch.jit.script(m)
    return [node.kind() for node in scripted.inlined_graph.nodes()], training_step(scripted, x)


@feature(heavy=True)
def made_fx(m, x):
    """The graphs of the forward and of a whole training step are torch.nn's."""
    dy = cotangent(x)  # made out here: a graph of torch 2.11 cannot hold its generator
    forward, step = make_fx(m)(x.detach()), make_fx(lambda x, dy: training_step(m, x, dy))(x, dy)
    return forward.code, [str(node.target) for node in step.graph.nodes], step(x, dy)


@feature()
def fake_tensors(m, x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        y = m(fake)
        grads = gradients(m, fake, y, torch.ones_like(y))
    return [(t.shape, t.stride(), t.dtype, t.device) for t in (y, *grads)]


@feature()
def meta_tensors(m, x):
    m, x = m.to("meta"), x.detach().to("meta").requires_grad_()
    y = m(x)
    return [(t.shape, t.stride(), t.dtype, t.device) for t in (y, *gradients(m, x, y, torch.empty_like(y)))]


@feature(refused=always)
def meta_input_beside_real_parameters(m, x):
    m(x.detach().to("meta").requires_grad_()).cpu()


@feature()
def torch_function_mode(m, x):
    """A mode sees one function of that name, and may answer in its place."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in ("layer_norm", "batch_norm") and name not in seen:
                seen.append(name)
                return function(*args, **(kwargs or {})) * 2
            return function(*args, **(kwargs or {}))

    with Mode():
        y = m(x)
    return seen, y, gradients(m, x, y)


@feature()
def torch_dispatch_mode(m, x):
    """Forward and backward, in the operators that torch.nn is made of."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        results = training_step(m, x)
    return [name for name in seen if "norm" in name], results


@feature(others=every)
def torch_dispatch_mode_around_backward(m, x):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    y = m(x)
    with Mode():
        return gradients(m, x, y)


class Tagged(torch.Tensor):
    """A subclass by __torch_function__: it survives the call."""


@feature(others=every)
def function_subclass(m, x):
    y = m(x.as_subclass(Tagged))
    return type(y).__name__, y.as_subclass(torch.Tensor), gradients(m, x, y.as_subclass(torch.Tensor))


class Wrapped(torch.Tensor):
    """A subclass by __torch_dispatch__, which has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda t: t.inner if isinstance(t, Wrapped) else t
        wrap = lambda t: Wrapped(t) if isinstance(t, torch.Tensor) else t
        return tree_map(wrap, function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))


@feature(others=every)
def dispatch_subclass(m, x):
    wrapped = Wrapped(x.detach()).requires_grad_()
    y = m(wrapped)
    grads = gradients(m, wrapped, y, Wrapped(cotangent(x)))
    return [(type(t).__name__, t.inner if isinstance(t, Wrapped) else t) for t in (y.detach(), *grads)]


@feature(others=every)
def wrapped_gradient(m, x):
    y = m(x)
    return [type(g).__name__ for g in gradients(m, x, y, Wrapped(cotangent(y)))]


@feature(others=every)
def wrapped_parameters(m, x):
    parameters = {name: Wrapped(p.detach()) for name, p in m.named_parameters()}
    y = torch.func.functional_call(m, parameters, (x,))
    return type(y).__name__, y.detach().inner


@feature(columns=with_a_twin)
def nested_tensors(m, x):
    """Layer norm serves them, jagged and strided; batch norm raises."""
    results, m = [], m.eval()
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([x.detach(), x.detach()[:2]], layout=layout)
        try:
            results.append([t.clone() for t in m(nested).unbind()])
        except Exception as e:
            results.append((type(e), re.sub(r"\bj\d+", "j", str(e))))  # each ragged dimension has a number
    return results


@feature()
def cpu_autocast(m, x):
    """Neither norm is on the CPU's list: bfloat16 in, from a linear layer, is bfloat16 out, beside float32 parameters.

    torch's layer norm takes the two together on the CPU only. On a GPU all is bfloat16 here; ours is in test_autocast.py.
    """
    mixed = batch_norm(m) or not x.is_cuda
    with torch.autocast("cpu", BF16):
        y, low = m(x), (m if mixed else copy.deepcopy(m).bfloat16())(x.bfloat16())
    return y.dtype, low.dtype, low, y, gradients(m, x, y)


@feature()
def functionalized(m, x):
    return torch.func.functionalize(m)(x.detach())
