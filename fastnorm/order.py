"""In which order a model calls its modules, for `lint` and `fold`. The model itself is not touched to find it.

A copy of it, with every tensor on the meta device, is traced by torch.fx or runs on an example input. So what a forward leaves
in attributes and buffers is left in the copy, and no memory is needed for the weights.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from .tracing import OPTIONS, Scriptable

PER_SAMPLE = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.modules.instancenorm._InstanceNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(eq=False)
class Call:
    """One call of a module or a function.

    Attributes:
        kind: "module", "function", "input", "parameter" or "output".
        name: the module's or the parameter's in the model; the function's or the method's without underscores, so that
            torch.relu, F.relu_ and Tensor.relu are "relu".
        module: the model's own, or None.
        reads, readers: the calls whose results this one reads, and those that read its result.
        plain: its one argument is one tensor.
        shape: of its first tensor, where the model has run.
    """

    kind: str
    name: str
    module: torch.nn.Module | None = None
    reads: list[Call] = field(default_factory=list)
    readers: list[Call] = field(default_factory=list)
    plain: bool = True
    shape: torch.Size | None = None

    def __post_init__(self):
        for call in self.reads:
            call.readers.append(self)


@dataclass(frozen=True)
class Order:
    """Calls of one or more graphs, each before those that read it; `how` says in words where they are from.

    `unseen` has the names of the modules that could not be looked into; what is inside of them has graphs of its own.
    """

    calls: list[Call]
    how: str
    unseen: tuple[str, ...] = ()


def is_per_sample(module) -> bool:
    """Whether it normalises each sample by itself; classes of other libraries are known by their names."""
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and not module._modules
    return named or isinstance(module, PER_SAMPLE)


def option(norm, name):
    """One of the options that our norms have beyond torch.nn's; in other classes an attribute of that name is another thing."""
    return getattr(norm, name, OPTIONS[name]) if isinstance(norm, Scriptable) else OPTIONS[name]


def order(model, inputs=None) -> Order:
    """The calls that `model` makes: traced, or of a run where `inputs`, (args, kwargs), are given.

    Traced are the calls of ``model(x)`` with no more than the required arguments, in the modes that the modules are in.
    Where the model cannot be copied, it is the order within each nn.Sequential.

    Raises:
        Exception: what the model itself raises for `inputs`.
    """
    devices = {t.device.index for t in model.parameters() if t.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            replica, replicated = _replica(model, inputs, "meta")
        except Exception as error:  # a lock, a lazy parameter: whatever copy.deepcopy does not take
            return Order(_neighbours(model), f"neighbours in nn.Sequential: no copy of the model ({type(error).__name__})")
        if inputs is None:
            return _traced(model, replica)
        try:
            return _run(model, replica, replicated)
        except Exception:  # whatever needs values, which the meta device has not
            return _run(model, *_replica(model, inputs, None))


def tensors(tree):
    """Those in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(branch)


def held(module):
    """The tensors that a module holds itself, as parameters, buffers and plain attributes."""
    things = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [t for t in things if isinstance(t, torch.Tensor)]


def _replica(model, inputs, device):
    """(model, inputs) copied without hooks, the tensors to `device`; None copies them where they are."""
    memo = {}
    for t in (*(t for m in model.modules() for t in held(m)), *tensors(inputs)):
        new = t.detach().to(device) if device else t.detach().clone()
        memo[id(t)] = torch.nn.Parameter(new, False) if isinstance(t, torch.nn.Parameter) else new
    model, inputs = copy.deepcopy((model, inputs), memo)
    for module in model.modules():
        for name in HOOKS:
            getattr(module, name).clear()
    return model, inputs


def _is_leaf(module) -> bool:
    """Whether it is one call: a norm, or nothing but a forward of torch.nn's."""
    if isinstance(module, (_NormBase, torch.jit.ScriptModule)) or is_per_sample(module):
        return True
    parts = set(module._modules) - {"parametrizations"}
    return not parts and type(module).forward.__module__.startswith("torch.nn.") and not _is_sequential(module)


def _is_sequential(module) -> bool:
    return isinstance(module, torch.nn.Sequential) and type(module).forward is torch.nn.Sequential.forward


# ---------------------------------------------------------------- torch.fx


class _Whole(torch.nn.Module):
    """A model called with its required arguments alone; torch.fx by itself makes Proxies of the others, too, and a
    ``mask=None`` is not None then."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.positional, self.keywords = 0, []
        for name, parameter in inspect.signature(model.forward).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
                self.keywords.append(name)
            elif parameter.kind is parameter.VAR_POSITIONAL or parameter.default is parameter.empty:
                self.positional += parameter.kind is not parameter.VAR_KEYWORD
        if not self.keywords:
            self.positional = max(self.positional, 1)

    def forward(self, inputs):
        return self.model(*(inputs[i] for i in range(self.positional)), **{name: inputs[name] for name in self.keywords})


class _Tracer(fx.Tracer):
    def __init__(self, opaque):
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, module, name):
        return module in self.opaque or _is_leaf(module)


def _traced(model, replica) -> Order:
    """From the inside out, so that what cannot be traced is a leaf of what is around it."""
    originals = dict(model.named_modules(remove_duplicate=False))
    graphs: dict[torch.nn.Module, list[Call]] = {}
    opaque: dict[torch.nn.Module, str] = {}
    for name, module in reversed(list(replica.named_modules())):
        if _is_leaf(module) or type(module).forward is torch.nn.Module.forward:
            continue
        attributes = [(m, dict(vars(m))) for m in module.modules()]
        try:
            graph = _Tracer(opaque).trace(_Whole(module))
            graphs[originals[name]] = _calls_of(graph, name, originals)
        except Exception:  # whatever their code raises when it meets a Proxy
            opaque[module] = name
        for m, before in attributes:  # the next trace must not meet this one's Proxies
            vars(m).clear()
            vars(m).update(before)
    calls: list[Call] = []
    seen: set[torch.nn.Module] = set()
    _collect("", model, graphs, calls, seen)
    return Order(calls, "torch.fx", tuple(sorted(name for name in opaque.values() if originals[name] in seen)))


def _collect(name, module, graphs, calls, seen):
    """The graph of a module, and those within what could not be traced."""
    if module in seen:
        return
    seen.add(module)
    if _is_leaf(module):
        calls.append(Call("input", "input"))
        calls.append(Call("module", name, module, [calls[-1]]))
    elif module in graphs:
        calls += graphs[module]
        for call in graphs[module]:
            if call.module is not None and not _is_leaf(call.module):
                _collect(call.name, call.module, graphs, calls, seen)
    else:
        for child, inner in module.named_children():
            _collect(f"{name}.{child}" if name else child, inner, graphs, calls, seen)


def _calls_of(graph, prefix, originals) -> list[Call]:
    made: dict[torch.fx.Node, Call] = {}
    for node in graph.nodes:
        kind, name, module = "function", getattr(node.target, "__name__", str(node.target)).strip("_"), None
        if node.op in ("call_module", "get_attr"):
            path = node.target.removeprefix("model").removeprefix(".")
            name = ".".join(part for part in (prefix, path) if part)
            kind, module = ("module", originals[name]) if node.op == "call_module" else ("parameter", None)
        elif node.op in ("placeholder", "output"):
            kind = "input" if node.op == "placeholder" else "output"
        if name == "getattr":  # x.mT
            name = node.args[1]
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        made[node] = Call(kind, name, module, [made[n] for n in node.all_input_nodes], plain=plain)
    return list(made.values())


# ---------------------------------------------------------------- a run


class _Recorder(TorchFunctionMode):
    """Every call of a leaf module, and of a function outside of them."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.depth = [], {}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.depth:
            name = func.__name__ if func.__name__ != "__get__" else getattr(func.__self__, "__name__", "")
            self.add("function", name.strip("_"), (args, kwargs or {}), result)
        return result

    def add(self, kind, name, inputs, result, module=None):
        results, given = list(tensors(result)), list(tensors(inputs))
        if kind != "output" and not results:
            return
        reads = list(dict.fromkeys(map(self._maker, given)))
        shape, plain = (given[0].shape if given else None), len(given) == 1
        self.calls.append(Call(kind, name, module, reads, plain=plain, shape=shape))
        for t in results:
            self.made[id(t)] = (t, self.calls[-1])  # t as well: an id is used again once its object is gone

    def _maker(self, t):
        if id(t) not in self.made:
            kind = "parameter" if isinstance(t, torch.nn.Parameter) else "input"
            self.calls.append(Call(kind, kind, shape=t.shape))
            self.made[id(t)] = (t, self.calls[-1])
        return self.made[id(t)][1]

    def watch(self, name, replica, original):
        def enter(*_):
            self.depth += 1

        def leave(_, args, kwargs, result):
            self.depth -= 1
            if not self.depth:
                self.add("module", name, (args, kwargs), result, original)

        replica.register_forward_pre_hook(enter)
        replica.register_forward_hook(leave, with_kwargs=True)


def _run(model, replica, inputs) -> Order:
    recorder, originals = _Recorder(), dict(model.named_modules())
    for name, module in replica.named_modules():
        if isinstance(module, _NormBase):  # which raises for one value per channel, and waits for other ranks
            module.forward = lambda input, *_, **__: input.clone()
        if _is_leaf(module) and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            recorder.watch(name, module, originals[name])
    args, kwargs = inputs
    with recorder:
        result = replica(*args, **kwargs)
    recorder.add("output", "output", result, None)
    return Order(recorder.calls, "a run on the input")


# ---------------------------------------------------------------- neighbours


def _neighbours(model) -> list[Call]:
    """The calls of each nn.Sequential that is in no other; what is in there and is none is one call."""
    calls: list[Call] = []
    done: set[torch.nn.Module] = set()

    def walk(prefix, sequential):
        done.add(sequential)
        for child, module in sequential._modules.items():
            name = f"{prefix}.{child}" if prefix else child
            if _is_sequential(module):
                walk(name, module)
            else:
                calls.append(Call("module", name, module, [calls[-1]]))

    for name, module in model.named_modules():
        if _is_sequential(module) and module not in done:
            calls.append(Call("input", "input"))
            walk(name, module)
            calls.append(Call("output", "output", reads=[calls[-1]]))
    return calls
