"""Memory of a training step of common blocks: with torch.nn, after `fastnorm.convert`, of the fused modules, and of those with
`recompute="output"` where a block's activation has an inverse.

`peak` is the most that is allocated at once during forward and backward beyond what was there before (input, parameters);
`saved` is what autograd keeps between the two, each storage once. Both are in MiB. A figure is printed only beside outputs and
gradients that match the block of torch.nn.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from run import DTYPES, machine, publish
from torch import nn

import fastnorm


class Bottleneck(nn.Module):
    """ResNet's, (B, 4 C, H, W): norms of `norm`, fused where that takes an activation; the first two can be recomputed."""

    def __init__(self, C, norm, fused, recompute=None, end="relu"):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(4 * C, C, 1, bias=False),
                nn.Conv2d(C, C, 3, padding=1, bias=False),
                nn.Conv2d(C, 4 * C, 1, bias=False),
            ]
        )
        options = {"activation": end} if fused else {}
        more = {"recompute": recompute} if fused else {}
        self.norms = nn.ModuleList([norm(C, **options, **more), norm(C, **options, **more), norm(4 * C, **options)])
        self.fused, self.end = fused, getattr(F, end)

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs[:2], self.norms[:2], strict=True):
            y = norm(conv(y)) if self.fused else self.end(norm(conv(y)), inplace=True)
        y = self.convs[2](y)
        return self.norms[2](y, x) if self.fused else self.end(self.norms[2](y) + x, inplace=True)


class PreNorm(nn.Module):
    """A transformer's block over (branch, stream), (B, T, N): attention and a multilayer perceptron, each after its norm."""

    def __init__(self, N, norm, fused):
        super().__init__()
        self.norms = nn.ModuleList([norm(N), norm(N)])
        self.qkv, self.out, self.up, self.down = nn.Linear(N, 3 * N), nn.Linear(N, N), nn.Linear(N, 4 * N), nn.Linear(4 * N, N)
        self.fused = fused

    def _add_norm(self, norm, branch, stream):
        if self.fused:
            return norm(branch, stream)
        stream = branch + stream
        return norm(stream), stream

    def forward(self, x):
        y, stream = self._add_norm(self.norms[0], x, x)
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        branch = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y, stream = self._add_norm(self.norms[1], branch, stream)
        return self.down(F.gelu(self.up(y))) + stream


class Diffusion(nn.Module):
    """A residual block of a diffusion model's U-Net, (B, C, H, W): group norm and silu before each convolution."""

    def __init__(self, C, norm, fused):
        super().__init__()
        options = {"activation": "silu"} if fused else {}
        self.norms = nn.ModuleList([norm(32, C, **options) for _ in range(2)])
        self.convs = nn.ModuleList([nn.Conv2d(C, C, 3, padding=1) for _ in range(2)])
        self.fused = fused

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(norm(y) if self.fused else F.silu(norm(y)))
        return x + y


@dataclass(frozen=True)
class Block:
    name: str
    shape: tuple[int, ...]
    make: Callable  # (norm, fused) -> module
    norms: tuple[type, type]  # torch.nn's, and the fused one
    invertible: bool = False  # (norm, fused, recompute) -> module, too


NORMS = {
    "batch": (nn.BatchNorm2d, fastnorm.BatchNorm2d),
    "layer": (nn.LayerNorm, fastnorm.AddLayerNorm),
    "rms": (nn.RMSNorm, fastnorm.AddRMSNorm),
    "group": (nn.GroupNorm, fastnorm.GroupNorm),
}
BLOCKS = (
    Block("ResNet bottleneck", (16, 256, 56, 56), lambda *args: Bottleneck(64, *args), NORMS["batch"]),
    Block("pre-norm LayerNorm", (8, 256, 768), lambda *args: PreNorm(768, *args), NORMS["layer"]),
    Block("pre-norm RMSNorm", (8, 256, 768), lambda *args: PreNorm(768, *args), NORMS["rms"]),
    Block("diffusion GroupNorm", (4, 320, 32, 32), lambda *args: Diffusion(320, *args), NORMS["group"]),
    Block("leaky bottleneck", (16, 256, 56, 56), lambda *args: Bottleneck(64, *args, end="leaky_relu"), NORMS["batch"], True),
)


def variants(block: Block, dtype, device) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    torchs, fused = block.norms
    plain = block.make(torchs, False).to(device, dtype)
    converted, ours = copy.deepcopy(plain), {"fused": block.make(fused, True)}
    fastnorm.convert(converted)
    if block.invertible:
        ours["recompute"] = block.make(fused, True, "output")
    for module in ours.values():
        module.to(device, dtype).load_state_dict(plain.state_dict())
    return {"torch.nn": plain, "convert": converted, **ours}


def step(module, x):
    """Output and gradients of one training step."""
    x = x.detach().requires_grad_()
    y = module(x)
    wanted = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


def matches(got, expected) -> bool:
    """Outputs closely; gradients on the whole, for they jump where relu's input is next to zero."""
    closely = 0.05 if got[0].dtype != torch.float32 else 1e-4
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    return off[0] <= closely and max(off) <= 0.1


def saved(module, x) -> int:
    """Bytes of what autograd keeps, parameters and the input aside."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = module(x)
    del alive
    return sum(kept.values())


def peak(run, device) -> int:
    """The most bytes that `run` has at once."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(block: Block, dtype: str, device: str) -> list[dict]:
    rows, expected = [], None
    x = torch.randn(block.shape, dtype=DTYPES[dtype], device=device)
    for name, module in variants(block, DTYPES[dtype], device).items():
        got = step(module, x)
        expected = expected or got
        job = f"{block.name} {dtype} {name}"
        about = {"job": job, "block": block.name, "shape": block.shape, "dtype": dtype, "norms": name}
        if not matches(got, expected):
            rows.append({**about, "refused": "outputs or gradients are not those of torch.nn"})
            continue
        rows.append({**about, "peak": peak(lambda module=module: step(module, x), device), "saved": saved(module, x)})
    return rows


HEAD = ["block", "shape", "dtype", "norms", "peak", "saved"]


def line(row: dict) -> list[str]:
    head = [row["block"], "x".join(map(str, row["shape"])), row["dtype"], row["norms"]]
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", ""]
    return [*head, *(f"{row[key] / 2**20:.1f}" for key in ("peak", "saved"))]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="default: fp32")
    p.add_argument("--filter", default="", metavar="TEXT", help="only blocks whose name has TEXT in it")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    return p


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    blocks = [block for block in BLOCKS if args.filter in block.name]
    if not blocks:
        p.error(f"no block has {args.filter!r} in its name: {', '.join(block.name for block in BLOCKS)}")
    torch.set_num_threads(args.threads)
    rows = [row for block in blocks for dtype in args.dtype for row in measure(block, dtype, args.device)]
    return publish(machine(args), [HEAD, *map(line, rows)], rows, args.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
