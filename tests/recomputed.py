"""What the tests of recompute="output" share."""

import torch
from cases import F32, F64

import fastnorm

LEAKY = ("leaky_relu", 0.01)
LAYERS = {
    "batch_norm": lambda x, w, b, **o: fastnorm.batch_norm(x, None, None, w, b, True, **o),
    "layer_norm": lambda x, w, b, **o: fastnorm.layer_norm(x, w.shape, w, b, **o),
    "rms_norm": lambda x, w, b, **o: fastnorm.rms_norm(x, w.shape, w, **o),
}


def saved(function):
    """The result, and what autograd keeps for it."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return function(), kept


def leaves(device, dtype=F32):
    """x (16, 32), w, b; no column of x is one to keep"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 32, generator=generator, dtype=F64).to(device, dtype).requires_grad_()
    return x, *(torch.rand(32, generator=generator).add(0.5).to(device).requires_grad_() for _ in range(2))


def is_recomputed(y) -> bool:
    return type(y.grad_fn).__name__.startswith("Recomputed")
