"""A branch onto a stream, kernel by kernel: scales, dropout, the sum, and their gradients."""

import pytest
import torch
from cases import BF16, F16, F32, F64

from fastnorm import reference
from fastnorm.reference import accumulate_dtype

SHAPES = [(1, 1), (3, 5), (4, 7, 33), (9, 768), (70, 40), (2, 3, 5000), (130, 64)]


def scales(shape, rows, columns, dtype, device):
    """row_scale for the samples, or for every row, or None; column_scale or None"""
    R = {"samples": shape[0], "rows": torch.Size(shape[:-1]).numel(), None: None}[rows]
    row_scale = None if R is None else torch.rand(R, device=device).add(0.5).to(dtype)
    return row_scale, torch.randn(shape[-1], device=device).to(dtype) if columns else None


def truth(x, addend, row_scale, column_scale, mask, p):
    """h in float64, by torch's operators."""
    u = x * mask / (1 - p)
    if row_scale is not None:
        u = u * row_scale.double().repeat_interleave(x.numel() // len(row_scale)).view(x.shape)
    return addend + (u if column_scale is None else u * column_scale)


def seed_on(device, value=1234567890123456789):
    return torch.tensor([value], device=device)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])  # from a half on, the words that are dropped reach into the sign of an int32
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [None, "samples", "rows"])
@pytest.mark.parametrize(("dtype", "stream"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F64, F64)])
def test_values_and_gradients(dtype, stream, rows, columns, p, backend, device):
    for shape in SHAPES:
        acc, seed = accumulate_dtype(dtype), seed_on(device) if p else None
        x, addend = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(stream)
        row_scale, column_scale = scales(shape, rows, columns, acc, device)
        mask = reference.kept(x.numel(), p, seed).view(shape) if p else torch.ones(shape, dtype=torch.bool, device=device)
        leaves = [t.double().requires_grad_() for t in (x, addend) if t is not None]
        wide = None if column_scale is None else column_scale.double().requires_grad_()
        expected = truth(*leaves, row_scale, wide, mask, p)
        h = backend.branch_fwd(x, addend, row_scale, column_scale, p, seed, stream)
        size = expected.abs().max().item() + addend.abs().max().item()
        assert (h.dtype, h.is_contiguous()) == (stream, True)
        assert (h.double() - expected).abs().max() <= (torch.finfo(stream).eps / 2 + 3 * torch.finfo(acc).eps) * size
        dh = torch.randn(shape, device=device).to(stream)
        grads = torch.autograd.grad(expected, [leaves[0], *([wide] if columns else [])], dh.double())
        saved = x if columns else None
        dx, dcolumn = backend.branch_bwd(dh, saved, row_scale, column_scale, p, seed, dtype, acc if columns else None)
        assert (dx.dtype, dx.is_contiguous()) == (dtype, True)
        size = grads[0].abs().max().item()
        assert (dx.double() - grads[0]).abs().max() <= (torch.finfo(dtype).eps / 2 + 3 * torch.finfo(acc).eps) * size
        assert (dcolumn is None) == (not columns)
        if columns:
            terms = (dh.double() * x.double()).abs().view(-1, shape[-1]).sum(0).max().item() * 3
            assert (dcolumn.double() - grads[1]).abs().max() <= 2 * torch.finfo(acc).eps * terms


def test_the_generator_is_philox():
    """Its authors' known answers, from the tests of Random123: counters and keys of zeros, and of ones."""
    words = reference.philox(torch.tensor([0]), torch.tensor([0]))
    assert [hex(w) for w in words[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("n", [1, 3, 4, 1000, 70001])
@pytest.mark.parametrize("value", [0, -1, 1 << 40, 987654321])
def test_what_is_kept(n, value, backend, device):
    """Every backend drops the same elements, wherever rows begin."""
    seed = seed_on(device, value)
    ones = torch.ones(n, device=device)
    for p in (0.25, 0.9):
        h = backend.branch_fwd(ones, torch.zeros_like(ones), None, None, p, seed, F32)
        expected = torch.where(reference.kept(n, p, seed), torch.tensor(1 / (1 - p), device=device), 0)
        torch.testing.assert_close(h, expected, rtol=1e-6, atol=0)
        dx, _ = backend.branch_bwd(ones, None, None, None, p, seed, F32, None)
        assert torch.equal(dx, h)


def test_shares(backend, device):
    """A fraction 1 - p is kept, by each seed another one."""
    ones = torch.ones(400, 250, device=device)
    kept = [backend.branch_fwd(ones, ones, None, None, 0.3, seed_on(device, s), F32) > 1 for s in range(4)]
    for k in kept:
        assert abs(k.float().mean().item() - 0.7) < 5 * (0.7 * 0.3 / 1e5) ** 0.5
    for a in range(4):
        for b in range(a):
            assert abs((kept[a] == kept[b]).float().mean().item() - (0.49 + 0.09)) < 0.01


def test_nothing_is_kept(backend, device):
    """Where p is 1, without a division by nothing."""
    x, addend = torch.randn(2, 3, 40, device=device)
    c = torch.randn(40, device=device)
    assert torch.equal(backend.branch_fwd(x, addend, None, c, 1.0, seed_on(device), F32), addend)
    dx, dcolumn = backend.branch_bwd(x, x, None, c, 1.0, seed_on(device), F32, F32)
    assert not dx.any()
    assert not dcolumn.any()


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_are_not_wanted(wanted, backend, device):
    dh, x = torch.randn(2, 30, 40, device=device)
    c, seed = torch.randn(40, device=device), seed_on(device)
    run = lambda a, b: backend.branch_bwd(dh, x if b else None, None, c, 0.2, seed, F32 if a else None, F32 if b else None)
    some, full = run(wanted & 1, wanted & 2), run(True, True)
    for bit, one, all_ in zip((wanted & 1, wanted & 2), some, full, strict=True):
        assert (one is not None) == bool(bit)
        if bit:
            torch.testing.assert_close(one, all_)


@pytest.mark.parametrize("strided", ["mT", "every second"])
def test_any_strides(strided, backend, device):
    way = (lambda t: t.mT.contiguous().mT) if strided == "mT" else lambda t: torch.stack((t, t + 1), -1)[..., 0]
    x, addend = torch.randn(2, 5, 6, 8, device=device)
    c, r, seed = torch.randn(8, device=device), torch.rand(5, device=device), seed_on(device)
    run = lambda x, addend: backend.branch_fwd(x, addend, r, c, 0.5, seed, F32)
    assert torch.equal(run(x, addend), run(way(x), way(addend)))
    back = lambda dh, x: backend.branch_bwd(dh, x, r, c, 0.5, seed, F32, F32)
    for a, b in zip(back(addend, x), back(way(addend), way(x)), strict=True):
        assert torch.equal(a, b)
