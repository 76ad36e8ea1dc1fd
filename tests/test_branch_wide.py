"""The Triton kernels of a branch where 32 bits do not count its elements."""

from unittest import mock

import pytest
import torch
from cases import BF16, F32
from conftest import SERVED

from fastnorm import heuristics_branch, reference

TRITON = [pytest.param(*served, id=f"triton-{served[1]}") for served in SERVED if served[0].name == "triton"]
if TRITON:
    import triton
    import triton.language as tl
    from fastnorm.kernels.branch import kept

    @triton.jit
    def _kept_kernel(seed_ptr, kept_ptr, first, least, BLOCK: tl.constexpr):
        at = tl.cast(first, tl.int64) + tl.zeros((1, 1), tl.int64)
        keeps = kept(tl.load(seed_ptr), at, least, BLOCK)
        tl.store(kept_ptr + tl.arange(0, BLOCK)[None, :], keeps.to(tl.int8))


@pytest.mark.parametrize(("backend", "device"), TRITON)
@pytest.mark.parametrize("first", [0, 1 << 31, (1 << 33) + 64, (1 << 34) - 64, 1 << 34, (1 << 40) + 192])
def test_what_is_kept_far_on(first, backend, device):
    """From element 2^34 on a counter takes more than 32 bits."""
    seed, result = torch.tensor([-5], device=device), torch.empty(256, dtype=torch.int8, device=device)
    _kept_kernel[(1,)](seed, result, first, 1 << 30, BLOCK=256)
    words = reference.philox(seed, torch.arange(first // 4, first // 4 + 64, device=device)).view(-1)
    assert torch.equal(result.bool(), words >= 1 << 30)
    assert 0.6 < result.float().mean().item() < 0.9


@pytest.mark.parametrize(("backend", "device"), TRITON)
@pytest.mark.parametrize("rows", [None, "samples", "rows"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 7, 33), (9, 768), (2, 3, 5000)])
def test_offsets_of_64_bits_change_nothing(shape, rows, backend, device):
    kernels, seed = backend.load(), torch.tensor([9], device=device)
    x, addend = torch.randn(shape, device=device).to(BF16), torch.randn(shape, device=device)
    R = {"samples": shape[0], "rows": torch.Size(shape[:-1]).numel(), None: None}[rows]
    scales = None if R is None else torch.rand(R, device=device), torch.randn(shape[-1], device=device)

    def results():
        h = kernels.branch_fwd(x, addend, *scales, 0.2, seed, F32)
        return h, *kernels.branch_bwd(addend, x, *scales, 0.2, seed, BF16, F32)

    plain = results()
    with mock.patch.object(heuristics_branch, "WIDE", 0):
        assert all(torch.equal(a, b) for a, b in zip(plain, results(), strict=True))
