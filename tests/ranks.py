"""What each rank of test_distributed.py does: python ranks.py RANK FOLDER. Its results go to FOLDER/RANK.pt.

A check is a function of the device; it runs on every rank at once, for every backend, and returns what the tests look at.
"""

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import conftest
import torch
import torch.distributed as dist
from cases import BF16, F16, F32, F64, Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastnorm

BATCHES = (5, 0, 9)
CELLS = [
    *(Case((14, 6, 5), dtype=dtype) for dtype in (F32, BF16, F16)),
    *(Case((14, 6), dtype=dtype, weight=dtype, bias=dtype) for dtype in (F32, BF16, F64)),
    *(Case((14, 6, 4, 3), dtype=dtype, layout="channels_last") for dtype in (F32, BF16)),
    Case((14, 6, 2, 3, 2)),
    Case((14, 6, 5), weight=None, bias=None),
    Case((14, 6, 5), bias=None),
    Case((14, 6, 5), offset=1e4),
    Case((14, 6, 5), scale=1e15),
    Case((14, 3, 67), **dict.fromkeys(("dtype", "weight", "bias"), BF16)),  # 938 values: no bfloat16 holds that count
]


def portion(t, rank, batches=BATCHES):
    return t[sum(batches[:rank]) :][: batches[rank]]


def mine(t):
    return portion(t, dist.get_rank())


def module(case, device, **options):
    """A SyncBatchNorm with the parameters of a case."""
    _, _, weight, bias = case.make_channels(device)
    parameter = lambda t: None if t is None else torch.nn.Parameter(t)
    norm = fastnorm.SyncBatchNorm(case.shape[1], eps=case.eps, affine=weight is not None, device=device, **options)
    norm.weight, norm.bias = parameter(weight), parameter(bias)
    return norm


def train(case, device, norm=None):
    """One step on this rank's portion of a case."""
    norm = norm or module(case, device)
    x, dy, _, _ = case.make_channels(device)
    x = mine(x).detach().requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, *norm.parameters()], mine(dy))
    names = ["dx", *("d" + name for name, _ in norm.named_parameters())]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True)), **dict(norm.named_buffers())}


def cells(device):
    return {str(case): train(case, device) for case in CELLS}


def twice(device):
    return [train(CELLS[0], device) for _ in range(2)]


def collectives(device):
    """How many collectives: forward, backward; for double backward: its two backwards."""
    counts = []

    def count(f):
        before = dist.group.WORLD._get_sequence_number_for_group()
        result = f()
        counts.append(dist.group.WORLD._get_sequence_number_for_group() - before)
        return result

    norm = module(CELLS[0], device)
    x = mine(CELLS[0].make_channels(device)[0]).requires_grad_()
    y = count(lambda: norm(x))
    count(lambda: y.sum().backward())
    y = count(lambda: norm(x))
    (dx,) = count(lambda: torch.autograd.grad(y.square().sum(), x, create_graph=True))
    count(lambda: dx.square().sum().backward())
    norm.eval()
    count(lambda: norm(x))
    return counts


def needs(device):
    """The ranks want different gradients: rank 1 those of its parameters only, rank 2 that of its input only."""
    norm, rank = module(CELLS[0], device), dist.get_rank()
    x, dy, _, _ = CELLS[0].make_channels(device)
    x = mine(x).requires_grad_(rank != 1)
    norm.requires_grad_(rank != 2)
    norm(x).backward(mine(dy))
    return x.grad, norm.weight.grad


def buffers(device):
    """The buffers change in place between forward and backward, as under DDP."""
    norm = module(CELLS[0], device)
    x, dy, _, _ = CELLS[0].make_channels(device)
    x = mine(x).requires_grad_()
    y = norm(x)
    for buffer in norm.buffers():
        buffer.add_(1)
    y.backward(mine(dy))
    return x.grad


def options(device):
    """Three steps and an evaluation for every option."""
    results = {}
    for name, kwargs in OPTIONS.items():
        norm, outputs = fastnorm.SyncBatchNorm(6, device=device, **kwargs), []
        for x in steps(device):
            outputs.append(norm(mine(x)))
        norm.eval()
        outputs.append(norm(mine(steps(device)[0]) if kwargs.get("track_running_stats", True) else steps(device)[0]))
        results[name] = [t.detach() for t in outputs], norm.state_dict()
    return results


OPTIONS = {
    "plain": {},
    "momentum=None": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "no affine": {"affine": False},
    "half": {"dtype": F16},
}


def steps(device):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(14, 6, 5, generator=generator) * (i + 1) + i).to(device) for i in range(3)]


def few(device):
    """Batches without a variance: empty on all ranks; one value in total."""
    results = []
    for B in (0, 1):
        norm = fastnorm.SyncBatchNorm(6, device=device)
        x = torch.ones(B if dist.get_rank() == 2 else 0, 6, device=device, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        results.append((y.detach(), x.grad, norm.weight.grad, norm.state_dict()))
    return results


def penalty(norm, x, coefficients):
    """A loss of a gradient: its own gradients are second derivatives of the norm."""
    (dx,) = torch.autograd.grad((norm(x) * coefficients).sum(), x, create_graph=True)
    return (dx.square() * coefficients).sum()


def double_backward(device):
    results = {}
    for case in DOUBLE:
        norm = module(case, device)
        x, coefficients = (mine(t).detach().requires_grad_() for t in case.make_channels(device)[:2])
        inputs = [x, coefficients, *list(norm.parameters())[:1]]
        results[str(case)] = torch.autograd.grad(penalty(norm, x, coefficients), inputs)
    return results


DOUBLE = [Case((14, 6, 5), **dict.fromkeys(("dtype", "weight", "bias"), F64)), Case((14, 6), weight=None, bias=None, dtype=F64)]


def groups(device):
    """Ranks 0 and 2 are a group; rank 1, and then every rank, is alone."""
    pair = dist.new_group([0, 2])
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    x = torch.randn(14, 6, generator=torch.Generator().manual_seed(5)).to(device)
    x = portion(x, dist.get_rank(), (4, 2, 8))
    outputs = [fastnorm.SyncBatchNorm(6, process_group=group, device=device)(x).detach() for group in (pair, alone)]
    try:
        fastnorm.SyncBatchNorm(6, process_group=alone, device=device)(x[:1])
    except ValueError as e:
        return *outputs, str(e)


def errors(device):
    """Calls that raise, on every rank and before a collective; the state afterwards."""
    norm, raised = fastnorm.SyncBatchNorm(6, device=device), []
    calls = [torch.ones(6), torch.ones(5, 0), torch.ones(4, 5), torch.ones(4, 6, dtype=torch.int64)]
    for x in calls:
        try:
            norm(x.to(device))
        except Exception as e:
            raised.append((type(e).__name__, str(e)))
    wrong = fastnorm.SyncBatchNorm(6, device=device)
    wrong.weight = torch.nn.Parameter(torch.ones(6, device="meta"))
    try:
        wrong(torch.ones(4, 6, device=device))
    except RuntimeError as e:
        raised.append((type(e).__name__, str(e)))
    return raised, norm.state_dict(), wrong.running_mean


class NoHostSync(TorchDispatchMode):
    """Fails on every operator that reads a tensor's values on the host, or whose result's shape depends on them."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        if name in self.FORBIDDEN or any(t is not None and t.dtype == torch.bool for t in indices):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def host(device):
    try:  # the guard itself works
        with NoHostSync():
            float(torch.ones(1))
        return "float(tensor) was not noticed"
    except AssertionError:
        pass
    norm = module(CELLS[0], device, momentum=None)
    with NoHostSync():
        return train(CELLS[0], device, norm)


def transforms(device):
    """What becomes of calls that no collective can serve; fake tensors of the right shape where none is needed."""
    norm, x = fastnorm.SyncBatchNorm(6, device=device), torch.randn(5, 6, device=device)
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        calls = {
            "func.grad": lambda: torch.func.grad(lambda x: norm(x).sum())(x),
            "vmap": lambda: torch.vmap(norm)(x[None]),
            "jvp": lambda: torch.func.jvp(norm, (x,), (x,)),
            "dual": lambda: norm(dual),
            "batched gradients": lambda: torch.autograd.grad(
                y.sum(0), leaf, torch.eye(6, device=device), is_grads_batched=True
            ),
        }
        results = {name: _raised(call) for name, call in calls.items()}
    with FakeTensorMode():
        x = torch.randn(5, 6, device=device, requires_grad=True)
        fastnorm.SyncBatchNorm(6, momentum=None, device=device)(x).sum().backward()
    return results, type(x.grad).__name__, tuple(x.grad.shape)


def _raised(call):
    try:
        call()
    except (RuntimeError, NotImplementedError) as e:
        return type(e).__name__


def compiled(device):
    norm = module(CELLS[0], device)
    norm.compile(backend="aot_eager", fullgraph=True)
    return train(CELLS[0], device, norm)


def checkpointed(device):
    norm = module(CELLS[0], device)
    return train(CELLS[0], device, _Checkpointed(norm))


class _Checkpointed(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return checkpoint(self.norm, x, use_reentrant=False)

    def named_parameters(self):
        return self.norm.named_parameters()

    def parameters(self):
        return self.norm.parameters()


def model(norms):
    """A small float64 net; `norms` has the three classes."""
    torch.manual_seed(11)
    layers = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        norms.LayerNorm(8),
        torch.nn.Linear(8, 8),
        norms.BatchNorm1d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(8, 6),
        norms.SyncBatchNorm(6),
        torch.nn.Linear(6, 2),
    )
    return layers.double()


def batch(rank, draw=0):
    """Four samples of a rank: plain BatchNorm1d is in the model, so no rank is empty."""
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(20 + rank + 10 * draw), dtype=F64)


def ddp(device):
    """Two forwards, whose buffers DDP broadcasts in place, before the one backward."""
    net = model(fastnorm).to(device)
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    loss = sum(parallel(batch(dist.get_rank(), draw).to(device)).square().sum() for draw in (0, 1))
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


def ddp_empty(device):
    """A rank without samples."""
    case = CELLS[0]
    net = torch.nn.Sequential(module(case, device))
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    x, dy, _, _ = case.make_channels(device)
    parallel(mine(x)).backward(mine(dy))
    return {name: p.grad for name, p in net[0].named_parameters()}


def fsdp(device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model(fastnorm).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net(batch(dist.get_rank()).to(device)).square().sum().backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


EVERY_BACKEND = [cells, twice, collectives, needs, buffers, options, few, double_backward, groups, errors, host]
EVERY_BACKEND += [transforms, ddp, ddp_empty, fsdp]
ONE_BACKEND = [compiled, checkpointed]


def served():
    """(name, backend, device), as in the `served` fixture."""
    return [(f"{backend.name}-{device}", backend.name, device) for backend, device in conftest.SERVED]


def main(rank, folder):
    torch.set_num_threads(1)
    results = {}
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=len(BATCHES), timeout=timedelta(seconds=90)
        )
        for i, (name, backend, device) in enumerate(served()):
            with fastnorm.use_backend(backend):
                for check in EVERY_BACKEND + (ONE_BACKEND if i == 0 else []):
                    results["running"] = f"{check.__name__} on {name}"
                    results[check.__name__, name] = check(device)
    except Exception:  # the ranks are out of step now: nothing after this would mean anything
        results["failed"] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
