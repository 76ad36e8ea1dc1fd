"""Sums of the Triton kernels that cancel: how far gradients of weight and bias are from being rounded once, over many channels.

An addition whose result is s errs by at most 2^-24 |s| in float32, evenly; over all mantissas that is 0.42 * 2^-24 |s| in the
root mean square. The sums s of one level of a tree over random terms t have sum(s^2) = sum(t^2), so that a tree of L levels,
and any number that is rounded L times, errs by 0.42 * 2^-24 * sqrt(L * sum(t^2)). `levels` are those that are added plainly.
"""

import numpy as np
import pytest
import torch
from cases import LAYOUTS
from conftest import SERVED
from oracle import wide

from fastnorm import heuristics

TRITON = [device for backend, device in SERVED if backend.name == "triton"]
CHANNELS = 400  # of as many draws: the root mean square of their errors is known to a few percent
MARGIN = 1.2


def error(sums, terms, axes):
    """Root mean square over channels, in units of 2^-24 * sqrt(sum(t^2))."""
    off = (wide(sums) - terms.sum(axes)) / np.sqrt((terms**2).sum(axes))
    return float(np.sqrt((off**2).mean())) * 2**24


def most(roundings):
    return 0.42 * np.sqrt(roundings) * MARGIN


# 196 of the positions of a tile are filled. Those of one thread are added plainly: of dense tensors it has one, as the rest of
# the tile is empty. Channels_last tiles have a tree over their 64 positions, and a program adds four of them one after another.
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize(("way", "layout", "levels"), [
    ("slab", "dense", 0), ("slab", "channels_last", 8), ("two passes", "dense", 0), ("two passes", "channels_last", 8),
    ("evaluation", "dense", 0), ("evaluation", "channels_last", 8),
])  # fmt: skip
def test_gradients_of_weight_and_bias(way, layout, levels, device, monkeypatch):
    import fastnorm.kernels as K

    if way == "two passes":
        monkeypatch.setattr(heuristics, "slab", lambda *sizes, **layout: None)
    torch.manual_seed(5)
    x, dy = (LAYOUTS[layout](torch.randn(4, CHANNELS, 7, 7)).to(device) for _ in range(2))
    mean, rstd = torch.zeros(2, CHANNELS, device=device), torch.ones(CHANNELS, device=device)
    K.forget()  # plans are kept by what the kernels are given, not by what the heuristics say
    need = (False, torch.float32, torch.float32)
    _, dweight, dbias = K.channel_bwd(dy, x, None, mean, rstd, way != "evaluation", need)
    K.forget()
    assert error(dbias, wide(dy), (0, 2, 3)) <= most(levels + 1)
    assert error(dweight, wide(dy) * wide(x), (0, 2, 3)) <= most(levels + 2)  # a product is rounded as well


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize(("P", "N", "levels"), [(75, 400, 2), (600, 400, 4), (1500, 400, 4), (300, 5000, 4), (300, 40000, 4)])
def test_partial_rows(P, N, levels, device):
    """A thread adds at most 16 rows plainly, and with 75 of them at most 3."""
    from fastnorm.kernels.partial import finalise

    torch.manual_seed(5)
    partial, (dw, db) = torch.randn(2, P, N, device=device), torch.empty(2, N, device=device)
    finalise(partial, dw, db)
    for half, sums in zip(partial, (dw, db), strict=True):
        assert error(sums, wide(half), 0) <= most(levels + 1)
