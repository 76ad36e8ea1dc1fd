"""Training steps of common blocks from end to end: with torch.nn, after `fastnorm.convert`, of the fused modules, and of those
with `recompute="output"` where a block's activation has an inverse; with --compile beside each but the last compiled.

A step is forward, loss, backward and Adam. `step` is its time, measured in turn; `x torch` is torch.nn's time over it, the
median over the rounds. `peak` is the most that is allocated at once during a step beyond what was there before (parameters,
Adam's averages, the batch); `saved` is what autograd keeps between forward and backward, parameters and the batch aside, each
storage once. `loss` is that of the first and of the last step of a curve: every network trains from the same weights on the
same small batches. `difference` is the largest relative one to torch.nn's curve, and `nudged` that of torch.nn with every
initial weight moved by one unit in the last place, which is what rounding alone does.

A figure is printed only beside an output and gradients that are off from those of torch.nn in float64 by no more than twice
what torch.nn's are off in the dtype at hand, and a little, for gradients jump where relu's input is next to zero.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from allocated import peak, saved
from blocks import BLOCKS, Block
from run import DTYPES, machine, number, publish
from timing import in_turn, keep_freed_memory, ratio, spread
from torch import nn

import fastnorm

BATCHES = 4  # that come again and again, so that there is something to learn
LR = 3e-4
ALLOWED = (1e-5, 0.02)  # of the norm of an output and of a gradient, beside twice torch.nn's error


@dataclass(frozen=True)
class Variant:
    norms: str
    compiled: bool
    network: nn.Module

    def __str__(self):
        return f"{self.norms}{' compiled' if self.compiled else ''}"


def variants(block: Block, dtype, device, compiled: bool = False) -> list[Variant]:
    """All with the same weights, torch.nn's first."""
    torch.manual_seed(0)
    torchs, fused = block.norms
    plain = block.make(block.shape, torchs, False).to(device, dtype)
    networks = {"torch.nn": plain, "convert": copy.deepcopy(plain), "fused": block.make(block.shape, fused, True)}
    fastnorm.convert(networks["convert"])
    if block.invertible:
        networks["recompute"] = block.make(block.shape, fused, True, "output")
    for network in networks.values():
        network.to(device, dtype).load_state_dict(plain.state_dict())
    every = [Variant(norms, False, network) for norms, network in networks.items()]
    for variant in [v for v in every if compiled and v.norms != "recompute"]:
        network = copy.deepcopy(variant.network)
        network.compile(dynamic=False, fullgraph=True)
        every.append(Variant(variant.norms, True, network))
    return every


def batches(block: Block, samples: int, dtype, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x, of `dtype` where it is no token, and target"""
    torch.manual_seed(1)
    pairs = [block.data((samples, *block.shape[1:])) for _ in range(BATCHES)]
    return [(x.to(device, dtype if x.is_floating_point() else None), target.to(device)) for x, target in pairs]


def leaf(block: Block, x):
    """x with a gradient of its own, as that of a block within a model."""
    return x.detach().requires_grad_(x.is_floating_point() and not block.first)


def results(block: Block, network, x, target):
    """Output and gradients of one training step."""
    x = leaf(block, x)
    y = network(x)
    wanted = [t for t in (x, *network.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(block.loss(y, target), wanted)]


def errors(block: Block, network, x, target, truth) -> list[float]:
    """Of the results, relative to the norm of each."""
    got = results(block, network, x, target)
    return [((a.double() - t).norm() / t.norm()).item() for a, t in zip(got, truth, strict=True)]


def truth_of(block: Block, network, x, target):
    """The results in float64."""
    return results(block, copy.deepcopy(network).double(), x.double() if x.is_floating_point() else x, target)


def disagreement(ours: list[float], torchs: list[float]) -> str | None:
    """What is off by more than is allowed; None if nothing."""
    for i, (error, theirs) in enumerate(zip(ours, torchs, strict=True)):
        allowed = 2 * theirs + ALLOWED[i > 0]
        if not error <= allowed:
            return f"{f'gradient {i}' if i else 'the output'} is off by {error:.2g}, {allowed:.2g} is allowed"
    return None


class Training:
    """A network in training: each call is a step on the next batch."""

    def __init__(self, block: Block, network, data, lr: float):
        self.block, self.network, self.data = block, network, cycle(data)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)

    def __call__(self):
        x, target = next(self.data)
        self.optimizer.zero_grad()
        loss = self.block.loss(self.network(leaf(self.block, x)), target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def memory(block: Block, network, data, device) -> dict[str, int]:
    """peak and saved"""
    training, (x, target) = Training(block, network, data, lr=0.0), data[0]
    training()  # allocates Adam's averages
    training.optimizer.zero_grad()
    x = leaf(block, x)
    known = (x, target, *network.parameters(), *network.buffers())
    return {"peak": peak(training, device), "saved": saved(lambda: block.loss(network(x), target), known)}


def curve(block: Block, network, data, steps: int) -> torch.Tensor:
    """The loss of every step, float64."""
    training = Training(block, network, data, LR)
    return torch.stack([training() for _ in range(steps)]).double().cpu()


@torch.no_grad()
def nudge(network):
    """Moves every parameter by one unit in the last place, up or down."""
    torch.manual_seed(2)
    for p in network.parameters():
        up = torch.rand(p.shape).to(p.device) < 0.5
        p.copy_(torch.nextafter(p, torch.where(up, math.inf, -math.inf).to(p.dtype)))


def off(losses, torchs) -> float:
    """The largest relative difference of a curve to torch.nn's."""
    return ((losses - torchs).abs() / torchs.abs()).max().item()


def curves(block: Block, networks: dict[str, nn.Module], data, steps: int) -> dict[str, dict]:
    """loss, difference and nudged of each, all from the weights that torch.nn's has now."""
    initial = copy.deepcopy(networks["torch.nn"].state_dict())
    losses = {}
    for name, network in networks.items():
        network.load_state_dict(initial)
        losses[name] = curve(block, network, data, steps)
    torchs, network = losses["torch.nn"], networks["torch.nn"]
    network.load_state_dict(initial)
    nudge(network)
    nudged = off(curve(block, network, data, steps), torchs)
    return {name: {"loss": c.tolist(), "difference": off(c, torchs), "nudged": nudged} for name, c in losses.items()}


def measure(block: Block, dtype: str, args) -> list[dict]:
    """One row for each variant: figures, or the sentence that says why there are none."""
    if args.compile:
        torch._dynamo.reset()
    every = variants(block, DTYPES[dtype], args.device, args.compile)
    data, few = (batches(block, samples, DTYPES[dtype], args.device) for samples in (block.shape[0], block.few))
    truth = truth_of(block, every[0].network, *data[0])
    rows, sound, torchs = {}, {}, None
    for variant in every:
        name, ours = str(variant), errors(block, variant.network, *data[0], truth)
        torchs = torchs or ours
        about = {"job": f"{job(block, dtype)} {name}", "block": block.name, "shape": block.shape, "dtype": dtype}
        rows[name] = {**about, "norms": variant.norms, "compiled": variant.compiled}
        if reason := disagreement(ours, torchs):
            rows[name]["refused"] = reason
        else:
            sound[name] = variant.network
    # At a rate of 0 all stay where they are, however many steps each takes.
    steps = {name: Training(block, network, data, lr=0.0) for name, network in sound.items()}
    times = in_turn(steps, args.rounds, args.seconds, args.threads)
    for name, network in sound.items():
        rows[name] |= {"step_us": median(times[name]), "spread": spread(times[name]), "x torch": ratio(times, "torch.nn", name)}
        rows[name] |= memory(block, network, data, args.device)
    for name, figures in curves(block, sound, few, args.steps).items():
        rows[name] |= figures
    return list(rows.values())


HEAD = ["block", "shape", "dtype", "norms", "step ms", "x torch", "+-", "peak MiB", "saved MiB", "loss", "difference", "nudged"]


def line(row: dict) -> list[str]:
    head = [row["block"], "x".join(map(str, row["shape"])), row["dtype"]]
    head.append(f"{row['norms']}{' compiled' if row['compiled'] else ''}")
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", *[""] * (len(HEAD) - len(head) - 1)]
    return [
        *head,
        f"{row['step_us'] / 1e3:.4g}",
        f"{row['x torch']:.2f}",
        f"{row['spread']:.0%}",
        *(f"{row[key] / 2**20:.1f}" if row[key] >= 2**20 else f"{row[key] / 2**20:.4f}" for key in ("peak", "saved")),
        f"{row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}",
        *(f"{row[key]:.1e}" for key in ("difference", "nudged")),
    ]


def job(block: Block, dtype: str) -> str:
    return f"{block.name} {'x'.join(map(str, block.shape))} {dtype}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="default: fp32")
    p.add_argument("--filter", default="", metavar="TEXT", help="only blocks whose description has TEXT in it, see --list")
    p.add_argument("--list", action="store_true", help="print the blocks and stop")
    p.add_argument("--compile", action="store_true", help="beside torch.compile of each, too (tens of seconds a block)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--rounds", type=number(int), default=5, help="measurements of each in turn (default: 5)")
    p.add_argument("--seconds", type=number(float), default=0.2, help="length of one measurement (default: 0.2)")
    p.add_argument("--steps", type=number(int), default=30, help="of a loss curve (default: 30)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    jobs = [(block, dtype) for block in BLOCKS for dtype in args.dtype if args.filter in job(block, dtype)]
    if not jobs:
        p.error(f"no block has {args.filter!r} in its description; --list shows them all")
    if args.list:
        print("\n".join(job(*pair) for pair in jobs))
        return 0
    if importlib.util.find_spec("tqdm") is None:
        p.error("tqdm is not installed: pip install tqdm")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    try:
        about = {**machine(args), "freed memory": keep_freed_memory()}
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        p.error(str(e).splitlines()[0])
    rows = [row for pair in tqdm(jobs, unit="block", disable=args.quiet) for row in measure(*pair, args)]
    return publish(about, [HEAD, *map(line, rows)], rows, args.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
