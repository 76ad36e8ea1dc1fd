"""Who serves norms. Each is loaded when it is measured; most peers are not installed on most machines, and one says why.

A provider gives an object with functions of fastnorm's names and signatures for the ops that it has: `norms.py` calls them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from norms import MODES, OPS
from operators import Sequences

import fastnorm
from fastnorm import dispatch


@dataclass(frozen=True)
class Provider:
    load: Callable  # -> the functions
    what: str
    ops: tuple[str, ...] = tuple(OPS)
    modes: tuple[str, ...] = MODES
    within: Callable = contextlib.nullcontext  # around all its calls
    wrap: Callable | None = None  # what is done with a call before it is timed
    least: float = 10.0  # seconds: what a norm may take at first on a GPU, most of it compiling

    def serves(self, op: str, mode: str) -> bool:
        return op in self.ops and mode in self.modes


def _backend(name: str) -> Provider:
    """fastnorm with this backend, whichever is the best one."""

    def load():
        kinds = ("cuda",) if torch.cuda.is_available() else ("cpu",)
        backend = dispatch.BACKENDS[dispatch.NAMES.index(name)]
        if reason := next(filter(None, map(backend.why_not, kinds)), None):
            raise RuntimeError(reason)
        return fastnorm

    return Provider(load, f"fastnorm's backend {name!r}", within=lambda: fastnorm.use_backend(name))


def _compiled(mode: str) -> Callable:
    """Compiled anew for every norm, as it is for a model: nothing is known of the other shapes."""

    def wrap(call):
        torch._dynamo.reset()
        importlib.import_module("torch._functorch.config").donated_buffer = False  # one graph is differentiated many times
        return torch.compile(call, dynamic=False, mode=mode)

    return wrap


def _keras():
    if os.environ.setdefault("KERAS_BACKEND", "torch") != "torch":
        raise RuntimeError(f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}, not 'torch'")
    ops = importlib.import_module("keras").ops
    wide = lambda x: x.float() if x.element_size() == 2 else x  # as its layers do

    def layer_norm(x, normalized_shape, weight, bias, eps):
        return ops.layer_normalization(x, weight, bias, axis=-1, epsilon=eps)

    def batch_norm(x, mean, var, weight, bias, training, momentum, eps):
        xf = wide(x)
        if training:
            mean, var = ops.moments(xf, axes=[0, *range(2, x.dim())])
        return ops.batch_normalization(xf, mean, var, axis=1, offset=bias, scale=weight, epsilon=eps).to(x.dtype)

    def rms_norm(x, normalized_shape, weight, eps):
        return ops.rms_normalization(x, weight, axis=-1, epsilon=eps)

    return SimpleNamespace(layer_norm=layer_norm, batch_norm=batch_norm, rms_norm=rms_norm)


def _liger():
    ops = importlib.import_module("liger_kernel.ops")
    LayerNorm, RMSNorm = ops.layer_norm.LigerLayerNormFunction, ops.rms_norm.LigerRMSNormFunction
    return SimpleNamespace(
        layer_norm=lambda x, shape, weight, bias, eps: LayerNorm.apply(x, weight, bias, eps),
        rms_norm=lambda x, shape, weight, eps: RMSNorm.apply(x, weight, eps, 0.0, "llama", False),
    )


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
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    return SimpleNamespace(
        layer_norm=lambda x, shape, weight, bias, eps: norms.fused_layer_norm_affine(x, weight, bias, shape, eps),
        rms_norm=lambda x, shape, weight, eps: norms.fused_rms_norm_affine(x, weight, shape, eps),
    )


def _flash_attn():
    norms = importlib.import_module("flash_attn.ops.triton.layer_norm")
    return SimpleNamespace(
        layer_norm=lambda x, shape, weight, bias, eps: norms.layer_norm_fn(x, weight, bias, eps=eps),
        rms_norm=lambda x, shape, weight, eps: norms.rms_norm_fn(x, weight, None, eps=eps),
        add_layer_norm=lambda x, r, shape, weight, bias, eps: norms.layer_norm_fn(x, weight, bias, r, eps=eps, prenorm=True),
        add_rms_norm=lambda x, r, shape, weight, eps: norms.rms_norm_fn(x, weight, None, r, eps=eps, prenorm=True),
    )


def _inplace_abn():
    abn = importlib.import_module("inplace_abn").abn

    def batch_norm(x, mean, var, weight, bias, training, momentum, eps, *, activation="identity"):
        return abn(x, weight, bias, mean, var, training, momentum, eps, activation)

    return SimpleNamespace(batch_norm=batch_norm)


# In the order of value. The graphs of "max-autotune" would be graphs within a graph.
PROVIDERS = {
    "fastnorm": Provider(lambda: fastnorm, "fastnorm, with the best backend of the device"),
    "torch": Provider(Sequences, "torch's operators, one after the other"),
    "in place": Provider(
        lambda: Sequences(in_place=True),
        "the same, sums and activations in place",
        ("BN+relu", "BN+silu", "BN+add+relu", "GN+silu", "LN2d"),
    ),
    **{name: _backend(name) for name in dispatch.NAMES},
    "compile": Provider(Sequences, "torch.compile of torch's operators", wrap=_compiled("default"), least=40.0),
    "keras": Provider(_keras, "Keras on torch", ("LN", "RMS", "BN")),
    "liger_kernel": Provider(_liger, "Liger's Triton kernels", ("LN", "RMS")),
    "apex": Provider(_apex, "NVIDIA Apex", ("LN", "RMS")),
    "flash_attn": Provider(_flash_attn, "FlashAttention's Triton kernels", ("LN", "RMS", "add+LN", "add+RMS")),
    "inplace_abn": Provider(_inplace_abn, "In-Place ABN's kernels", ("BN", "BN+relu")),
    "quack": Provider(_quack, "QuACK's CuTe kernels", ("LN",), ("forward", "eval")),
    "flag_gems": Provider(_flag_gems, "FlagGems' Triton kernels", ("LN",), ("forward", "eval")),
    "max-autotune": Provider(
        Sequences, "torch.compile, max-autotune", wrap=_compiled("max-autotune-no-cudagraphs"), least=60.0
    ),
}
OURS = ("fastnorm", *dispatch.NAMES)


def absent(name: str) -> str | None:
    """Why a provider cannot be measured here. An import raises many things: for a driver, a version, a missing library."""
    try:
        PROVIDERS[name].load()
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return None
