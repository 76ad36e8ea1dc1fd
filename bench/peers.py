"""Who else has norms. Each is loaded when it is measured; most of them are not installed on most machines, and one says why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

BOTH = ("forward", "backward")


@dataclass(frozen=True)
class Peer:
    """`load` gives an object with layer_norm or batch_norm, which are called as torch.nn.functional's are."""

    load: Callable
    kinds: tuple[str, ...] = ("rows", "channels")
    modes: tuple[str, ...] = BOTH
    least: float = 10.0  # seconds: what a norm may take at first, most of it compiling


def _fastnorm():
    return importlib.import_module("fastnorm")


def _native():
    """Whole calls of the CUDA kernels, whichever backend is in force."""
    native = importlib.import_module("fastnorm.native")
    if reason := native.unavailable("cuda"):
        raise RuntimeError(reason)
    module = importlib.import_module("fastnorm.extension").load()

    def natively(function):
        def call(*args):
            module.serve_natively("cuda", True)
            try:
                return function(*args)
            finally:
                module.serve_natively("cuda", False)

        return call

    return SimpleNamespace(layer_norm=natively(module.layer_norm), batch_norm=natively(module.batch_norm))


def _compiled(mode: str):
    """Compiled anew for every norm, as it is for a model: nothing is known of the other shapes."""

    def load():
        torch._dynamo.reset()
        importlib.import_module("torch._functorch.config").donated_buffer = False  # one graph is differentiated many times
        wrap = lambda f: torch.compile(lambda x, *rest: f(x, *rest), dynamic=False, mode=mode)
        return SimpleNamespace(layer_norm=wrap(F.layer_norm), batch_norm=wrap(F.batch_norm))

    return load


def _liger():
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return SimpleNamespace(layer_norm=lambda x, shape, weight, bias, eps: function.apply(x, weight, bias, eps))


def _flag_gems():
    gems = importlib.import_module("flag_gems")

    def layer_norm(x, shape, weight, bias, eps):
        y = gems.layer_norm(x, shape, weight, bias, eps)
        return y[0] if isinstance(y, tuple) else y

    return SimpleNamespace(layer_norm=layer_norm)


def _quack():
    forward = importlib.import_module("quack.rmsnorm").layernorm_fwd
    kept = {}

    def wide(p):
        """It takes parameters in float32 alone: converted once, so that this is not what is timed."""
        if p not in kept:
            kept[p] = p.detach().float()
        return kept[p]

    return SimpleNamespace(layer_norm=lambda x, shape, weight, bias, eps: forward(x, wide(weight), wide(bias), eps=eps))


def _apex():
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return SimpleNamespace(layer_norm=lambda x, shape, weight, bias, eps: function(x, weight, bias, shape, eps))


# In the order of value. The graphs of "max-autotune" would be graphs within a graph.
PEERS = {
    "fastnorm": Peer(_fastnorm),
    "native": Peer(_native),
    "compile": Peer(_compiled("default"), least=40.0),
    "liger_kernel": Peer(_liger, ("rows",)),
    "apex": Peer(_apex, ("rows",)),
    "quack": Peer(_quack, ("rows",), ("forward",)),
    "flag_gems": Peer(_flag_gems, ("rows",), ("forward",)),
    "max-autotune": Peer(_compiled("max-autotune-no-cudagraphs"), least=60.0),
}


def absent(name: str) -> str | None:
    """Why a peer cannot be measured here. Whatever an import raises is its reason: a driver, a version, a missing library."""
    try:
        PEERS[name].load()
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None
