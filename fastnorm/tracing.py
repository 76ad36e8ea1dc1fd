"""What tracers make of our modules: the same as of torch.nn's, which they know by the name of the Python module.

`torch.fx` records a module of `torch.nn` as one node and traces through every other one, and `torch.jit.script` compiles the
source of `forward`, which has to be TorchScript. Both are answered with the class of torch.nn that a module of ours stands for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import Proxy
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.proxy import TraceError


def counterpart(cls: type) -> type:
    """The class that `cls` stands for: torch.nn's for ours, the original for a converted one, any other class for itself."""
    if cls.__module__.startswith("fastnorm."):
        return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))
    return vars(cls).get("_stands_for", cls)


OPTIONS: dict[str, Any] = {
    "activation": None,
    "zero_centred": False,
    "addend": False,
    "modulated": False,
    "channels_first": False,
    "channel_axis": 1,
    "frozen": False,
    "virtual_batch_size": None,
    "recompute": None,
}


def extras(module: Any) -> list[str]:
    """The options in force that torch.nn's class does not have."""
    return [name for name, default in OPTIONS.items() if getattr(module, name, default) != default]


def twin(module: Any) -> Any:
    """The module as an instance of its counterpart; parameters, buffers and hooks are shared."""
    twin = copy.copy(module)
    twin.__class__ = counterpart(type(module))
    return twin


def leaf(module: Any, proxy: Any, residual: Any = None, **named: Any) -> Any:
    """The call_module node of torch.fx for `module(proxy)`, with a residual and others by their names where these are not None;
    None where torch.nn's module would be traced through as well.

    Raises:
        TraceError: the module has forward hooks. They have run by now and would run again with the node.
    """
    tracer = proxy.tracer
    if module is tracer.root or not type(module).__module__.startswith("fastnorm."):
        return None
    path = tracer.path_of_module(module)
    if not tracer.is_leaf_module(twin(module), path):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        raise TraceError(f"{path} has forward hooks, which torch.fx cannot see past: trace after fastnorm.revert(model)")
    named = {name: t for name, t in named.items() if t is not None}
    return tracer.create_proxy("call_module", path, (proxy,) if residual is None else (proxy, residual), named)


def given(module: torch.nn.Module, residual: Any) -> Any:
    """None for an optional argument (a residual, say) of a root that is traced through by itself: its placeholder has the
    default, None, and a graph that is called with anything else says so."""
    tracer: Any = residual.tracer if isinstance(residual, Proxy) else None
    if tracer is None or module is not tracer.root:
        return residual
    message = f"this graph was traced without a {residual.node.target}"
    tracer.create_proxy("call_function", _assert_is_none, (residual, message), {})
    return None


class Scriptable:
    """torch.jit.script compiles torch.nn's forward instead of ours.

    The hook is torch's, and torch also puts what it returns into the model that is scripted: its norms are torch.nn's
    afterwards, with the same parameters, until `fastnorm.convert(model)` is called again.

    Raises:
        RuntimeError: the norm has options that torch.nn's forward does not.
    """

    def __prepare_scriptable__(self) -> Any:
        if options := extras(self):
            raise RuntimeError(f"torch.jit.script compiles torch.nn's forward, which has no {' and no '.join(options)}")
        return self if counterpart(type(self)) is type(self) else twin(self)
