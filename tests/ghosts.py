"""Ghost batch norm by torch's own batch norm of each ghost batch, and what its tests share."""

from itertools import chain

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from fastnorm import functional
from fastnorm.activations import ACTIVATIONS


def dealt(B, n):
    """The samples of each ghost batch, as the docstring has it."""
    G = max(1, B // n)
    q, more = divmod(B, G)
    first, rest = list(range(more * (q + 1))), list(range(more * (q + 1), B))
    return [first[g::more] for g in range(more)] + [rest[g :: G - more] for g in range(G - more)]


def by_parts(x, mean, var, weight, bias, n, momentum, eps, activation="identity", alpha=0.0, residual=None):
    """y, and what the running statistics are afterwards, with torch's batch norm of each ghost batch."""
    ys, new, order = [], [0, 0], dealt(len(x), n)
    for samples in order:
        own = [torch.zeros_like(t) for t in (mean, var)]
        ys.append(F.batch_norm(x[samples], *own, weight, bias, True, 1.0, eps))
        new = [t + o * (len(samples) / len(x)) for t, o in zip(new, own, strict=True)]
    y = torch.cat(ys)[torch.tensor([*chain(*order)]).argsort()]
    y = ACTIVATIONS[activation].value(y if residual is None else y + residual, alpha)
    return y, *((1 - momentum) * t + momentum * v for t, v in zip((mean, var), new, strict=True))


def calls_of(monkeypatch, function):
    """The arguments of every batch norm that a call is made of."""
    calls, real = [], functional.batch_norm
    with monkeypatch.context() as patch:
        patch.setattr(functional, "batch_norm", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
        function()
    return calls


def formatted(x):
    return torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()


def assert_same(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
