"""Group norm, kernel by kernel: at most as far from float64 as torch's own group norm and activation, one after the other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, Case
from ended import check_batches, check_kernels, check_wanted
from sequences import Fused, size

from fastnorm.activations import ACTIVATIONS

SAME = lambda dtype: {"dtype": dtype, "weight": dtype, "bias": dtype}
SMALL = Case((3, 6, 5, 7))
# (shape, groups): one channel a group and one group, single elements, runs of every length, groups of any size.
SHAPES = [
    *(((2, 6, 1), 3), ((3, 4), 2), ((1, 4, 16), 1), ((3, 12, 5), 12), ((2, 6, 3, 3), 2), ((5, 32, 8, 8), 8)),
    *(
        ((2, 64, 14, 14), 32),
        ((2, 10, 33), 5),
        ((2, 8, 40, 40), 2),
        ((1, 8, 50, 50), 1),
        ((9, 30, 17), 3),
        ((2, 320, 4, 4), 32),
    ),
]
GROUPS = [
    *(Fused(SMALL, a, groups=3) for a in ACTIVATIONS),
    *(Fused(replace(SMALL, **SAME(BF16)), a, groups=2) for a in ACTIVATIONS),
    *(Fused(Case(s, **SAME(d)), a, groups=g) for s, g in SHAPES for d, a in ((F32, "silu"), (BF16, "identity"))),
    *(Fused(replace(SMALL, **missing), "gelu", groups=3) for missing in
      ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})),
    *(Fused(Case((3, 6, 4, 6), dtype=x, weight=w, bias=b), "relu", groups=3) for x, w, b in
      [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F64, F64, F64)]),
    *(Fused(replace(SMALL, layout=layout), "silu", groups=2)
      for layout in ("channels_last", "row_strided", "column_strided", "transposed", "expanded")),
    Fused(Case((4, 8, 12, 12), offset=1e4), "silu", groups=4),
    Fused(Case((4, 8, 40, 40), offset=1e4), groups=2),
    *(Fused(Case((4, 8, 5, 5), scale=scale), "leaky_relu", groups=4) for scale in (1e-4, 1e4)),
]  # fmt: skip


@pytest.mark.parametrize("fused", GROUPS, ids=str)
def test_groups(fused, backend, device):
    check_kernels("group", fused, backend, device, lambda shape: (shape[0] * fused.groups, -1), 1, fused.groups)


@pytest.mark.parametrize(("shape", "groups"), [((3, 6, 20), 3), ((2, 4, 60, 60), 2)])
def test_gradients_that_are_not_wanted(shape, groups, backend, device):
    check_wanted("group", Fused(Case(shape), groups=groups), backend, device, groups)


@pytest.mark.parametrize("S", [1, 5, 40, 2500])
def test_groups_whose_squares_overflow(S, backend, device):
    """Up to 1e30 what is finite stays finite, beside groups of the usual size, and as exact as these."""
    sizes = torch.tensor([1.0, 1e30, 1e18, 1e-3], device=device).repeat_interleave(2)[None, :, None]
    x = torch.randn(2, 8, S, device=device) * sizes
    y, mean, rstd = backend.group_fwd(x, None, None, "identity", 0.0, 1e-5, 4)
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 4), rtol=2e-6, atol=2e-6)
    dx = backend.group_bwd(x / sizes, x, None, None, "identity", 0.0, mean, rstd, (True, None, None))[0]
    assert dx.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(value, backend, device):
    x = torch.randn(2, 6, 20, device=device)
    x[1, 3, 7] = value
    y = backend.group_fwd(x, None, None, "identity", 0.0, 1e-5, 3)[0]
    torch.testing.assert_close(y, F.group_norm(x, 3), equal_nan=True, rtol=2e-6, atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch(backend, device):
    check_batches("group", Fused(Case((7, 6, 33)), groups=3), backend, device, 3)


def test_sizes_mean_what_they_say():
    """The bound of these tests grows with a result, and is not nothing where there is none."""
    assert size(torch.zeros(3)) > 0
    assert size(torch.tensor([-3.0, 1.0])) == 3
