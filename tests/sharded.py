"""What each of two processes of test_compile.py runs: a module of its own, for they import no more than it needs."""

from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

import fastnorm


def rows_in_two_processes(rank, file):
    """Raises where one of them sees another result than one process does."""
    options = {"init_method": f"file://{file}", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=90)}
    torch.distributed.init_process_group("gloo", **options)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    x, dy, w, b = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.randn(8), torch.randn(8)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y = fastnorm.layer_norm(leaves[0], (8,), *leaves[1:])
    expected = [y, *torch.autograd.grad(y, leaves, dy)]
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        place = lambda t, p: distribute_tensor(t, mesh, [p]).requires_grad_()
        leaves = [place(x, placement), place(w, Replicate()), place(b, Replicate())]
        y = fastnorm.layer_norm(leaves[0], (8,), *leaves[1:])
        assert "fastnorm" in type(y.grad_fn).__name__
        results = [y, *torch.autograd.grad(y, leaves, distribute_tensor(dy, mesh, [placement]))]
        rows = Replicate() if placement == Shard(2) else placement  # a split row is gathered
        gradient = Replicate() if rows == Replicate() else Partial()
        assert [t.placements for t in results] == [(rows,), (rows,), (gradient,), (gradient,)]
        torch.testing.assert_close([t.full_tensor() for t in results], expected, rtol=1e-4, atol=1e-5)
    norm = distribute_module(fastnorm.BatchNorm1d(8), mesh)
    y = norm(distribute_tensor(x[:, 0].contiguous(), mesh, [Shard(0)]))
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), fastnorm.BatchNorm1d(8)(x[:, 0]), rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()
    Path(file).with_name(f"agreed-{rank}").touch()
