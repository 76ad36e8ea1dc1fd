"""Layer norm over channels, kernel by kernel: at most as far from float64 as torch's layer norm of the permuted tensor and an
activation, one after the other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, Case
from ended import check_batches, check_kernels, check_wanted
from sequences import Fused

from fastnorm.activations import ACTIVATIONS

SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
SMALL = Case((3, 6, 5, 7))
# One channel, one position, fewer positions than a vector has, no multiple of it, more than a block; channels up to what is
# read twice.
SHAPES = [(2, 6, 1), (3, 4), (1, 4, 16), (5, 1, 9), (3, 12, 5), (2, 96, 14, 14), (1, 3, 1030), (2, 65, 33), (7, 33, 3, 3)]
SHAPES += [(2, 384, 7, 7), (3, 768, 12), (1, 1536, 31), (2, 5000, 9), (9, 16, 4, 64)]
POSITIONS = [
    *(Fused(SMALL, a) for a in ACTIVATIONS),
    *(Fused(replace(SMALL, **SAME(BF16)), a) for a in ACTIVATIONS),
    *(Fused(Case(s, **SAME(d)), a) for s in SHAPES for d, a in ((F32, "identity"), (BF16, "gelu"))),
    *(Fused(Case(s, **SAME(F16))) for s in ((2, 96, 14, 14), (2, 5000, 9))),
    *(Fused(replace(SMALL, **missing), "gelu") for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *(Fused(Case((3, 6, 4, 6), dtype=x, weight=w, bias=b), "relu") for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F64, F64, F64)]),
    *(Fused(replace(SMALL, layout=layout), "silu")
      for layout in ("channels_last", "row_strided", "column_strided", "transposed", "expanded")),
    *(Fused(Case((4, C, 5, 12), offset=1e4), "silu") for C in (8, 600, 5000)),
    *(Fused(Case((4, 8, 5, 5), scale=scale), "leaky_relu") for scale in (1e-4, 1e4)),
]  # fmt: skip


@pytest.mark.parametrize("fused", POSITIONS, ids=str)
def test_positions(fused, backend, device):
    check_kernels("position", fused, backend, device, lambda shape: (*shape[:2], -1), 1)


@pytest.mark.parametrize("shape", [(3, 6, 20), (2, 4, 60, 60), (2, 3000, 9)])
def test_gradients_that_are_not_wanted(shape, backend, device):
    check_wanted("position", Fused(Case(shape)), backend, device)


@pytest.mark.parametrize("C", [2, 40, 3000])
def test_positions_whose_squares_overflow(C, backend, device):
    """Up to 1e30 what is finite stays finite, beside positions of the usual size, and as exact as these."""
    sizes = torch.tensor([1.0, 1e30, 1e18, 1e-3], device=device).repeat_interleave(2)
    x = torch.randn(2, C, 8, device=device) * sizes
    expected = lambda x: F.layer_norm(x.double().mT, (C,)).mT
    y, mean, rstd = backend.position_fwd(x, None, None, "identity", 0.0, 1e-5)
    torch.testing.assert_close(y.double(), expected(x), rtol=2e-6, atol=2e-6)
    dx = backend.position_bwd(x / sizes, x, None, None, "identity", 0.0, mean, rstd, (True, None, None))[0]
    assert dx.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_at_its_position(value, backend, device):
    x = torch.randn(2, 6, 20, device=device)
    x[1, 3, 7] = value
    y = backend.position_fwd(x, None, None, "identity", 0.0, 1e-5)[0]
    torch.testing.assert_close(y, F.layer_norm(x.mT, (6,)).mT, equal_nan=True, rtol=2e-6, atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch(backend, device):
    check_batches("position", Fused(Case((7, 6, 33))), backend, device)
