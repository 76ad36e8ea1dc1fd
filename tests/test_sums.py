"""Sums of the Triton kernels that cancel: how far gradients of weight and bias are from being rounded once, over many channels.

An addition whose result is s errs by at most 2^-24 |s| in float32, evenly; over all mantissas that is 0.42 * 2^-24 |s| in the
root mean square. The sums s of one level of a tree over random terms t have sum(s^2) = sum(t^2), so that a tree of L levels,
and any number that is rounded L times, errs by 0.42 * 2^-24 * sqrt(L * sum(t^2)). `levels` are those that are added plainly.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from cases import BF16, F32, LAYOUTS, Case
from compare import Rows, assert_no_worse
from conftest import SERVED
from oracle import error as most_off
from oracle import layer_norm, ulp, wide

from fastnorm import heuristics

TRITON = [pytest.param(device, id=f"triton-{device}") for backend, device in SERVED if backend.name == "triton"]
MARGIN = 1.2  # the root mean square over 400 channels, as many draws, is known to a few percent


def error(sums, terms, axes):
    """Root mean square over channels, in units of 2^-24 * sqrt(sum(t^2))."""
    off = (wide(sums) - terms.sum(axes)) / np.sqrt((terms**2).sum(axes))
    return float(np.sqrt((off**2).mean())) * 2**24


def most(roundings):
    return 0.42 * np.sqrt(roundings) * MARGIN


# 196 of the positions of a tile are filled. Those of one thread are added plainly: of dense tensors it has one, as the rest of
# the tile is empty; of rows that start anywhere, where a sample is whole vectors, it has a vector of four. Channels_last tiles
# have a tree over their 64 positions, and a program adds four of them one after another.
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize(("layout", "C", "levels"), [("dense", 401, 0), ("dense", 400, 2), ("channels_last", 400, 8)])
@pytest.mark.parametrize("way", ["slab", "two passes", "evaluation"])
def test_gradients_of_weight_and_bias(way, layout, C, levels, device, monkeypatch):
    import fastnorm.kernels as K

    if way == "two passes":
        monkeypatch.setattr(heuristics, "slab", lambda *sizes, **layout: None)
    torch.manual_seed(5)
    x, dy = (LAYOUTS[layout](torch.randn(4, C, 7, 7)).to(device) for _ in range(2))
    mean, rstd = torch.zeros(2, C, device=device), torch.ones(C, device=device)
    K.forget()  # plans are kept by what the kernels are given, not by what the heuristics say
    need = (False, torch.float32, torch.float32)
    _, dweight, dbias = K.channel_bwd(dy, x, None, mean, rstd, way != "evaluation", need)
    K.forget()
    assert error(dbias, wide(dy), (0, 2, 3)) <= most(levels + 1)
    assert error(dweight, wide(dy) * wide(x), (0, 2, 3)) <= most(levels + 2)  # a product is rounded as well


@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize(("P", "N", "levels"), [(75, 400, 2), (600, 400, 4), (1500, 400, 4), (300, 5000, 4), (64, 33000, 4)])
def test_partial_rows(P, N, levels, device):
    """A thread adds at most 16 rows plainly, and with 75 of them at most 3."""
    from fastnorm.kernels.partial import finalise

    torch.manual_seed(5)
    partial, (dw, db) = torch.randn(2, P, N, device=device), torch.empty(2, N, device=device)
    finalise(partial, dw, db)
    for half, sums in zip(partial, (dw, db), strict=True):
        assert error(sums, wide(half), 0) <= most(levels + 1)


@pytest.mark.parametrize("M", [2, 4, 7])
@pytest.mark.parametrize("parameter", [F32, BF16])
@pytest.mark.parametrize("device", TRITON)
def test_one_program_finishes_alone(M, parameter, device):
    """Few short rows: one program has all of the gradients of weight and bias, and one launch writes them in their dtype."""
    import fastnorm.kernels as K

    case = Case((M, 24), dtype=BF16, weight=parameter, bias=parameter)
    x, dy, weight, bias = case.make_rows(device)
    _, mean, rstd = K.row_fwd(x, weight, bias, 1e-5, 24)
    launches = []
    with mock.patch.object(K.launch.thread, "recorder", launches.append):
        results = K.row_bwd(dy, x, weight, mean, rstd, (True, parameter, parameter))
    assert [launch.kernel.__name__ for launch in launches] == ["_row_bwd_kernel"]
    truth = layer_norm(x, (24,), weight, bias, dy=dy)
    assert_no_worse(Rows, case, "dx", results[0], Rows.truth(case, x, dy, weight, bias), K)
    # x_hat is rounded three times and a product once, then M are added, and the sum is rounded to the parameter's dtype.
    for t, expected, terms in ((results[1], truth.dweight, truth.dz_x_hat), (results[2], truth.dbias, wide(dy))):
        assert t.dtype == parameter
        bound = (case.shape[0] + 4) * 2.0**-24 * abs(terms).sum(0).max()
        assert most_off(t, expected) <= bound + (0 if parameter == F32 else ulp(parameter, abs(expected).max()) / 2)
