"""What one call of a small module costs, fastnorm's beside torch.nn's: checks, autograd and Python, hardly any arithmetic.

Times are microseconds of one call on one thread, measured in turn; `ratio` is fastnorm's time over torch.nn's, the median over
the rounds. `forward` builds the graph, `forward + backward` is torch.autograd.grad for input, weight and bias. Nothing is
timed before outputs and gradients match the same module in float64: at most twice torch.nn's own error and one unit in the
last place.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from statistics import median

import torch
from norms import disagreement
from run import machine, number, publish
from timing import in_turn, ratio, spread

import fastnorm

NAMES = ("LayerNorm", "BatchNorm1d")
SHAPES = ((8, 64), (128, 768))
RESULTS = ("y", "dx", "dweight", "dbias")
MODES = ("no_grad", "evaluation", "forward", "forward + backward")


def results(module, x, dy):
    """y, dx, dweight, dbias in training."""
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, module.weight, module.bias), dy)


def mismatch(ours, theirs, x, dy) -> str | None:
    truth = results(copy.deepcopy(theirs).double(), x.double(), dy.double())
    return disagreement(RESULTS, results(ours, x, dy), results(theirs, x, dy), truth)


def call(module, mode, x, dy):
    """What is timed."""
    if mode in ("no_grad", "evaluation"):
        return lambda: module(x)
    leaf = x.clone().requires_grad_()
    if mode == "forward":
        return lambda: module(leaf)
    inputs = (leaf, module.weight, module.bias)
    return lambda: torch.autograd.grad(module(leaf), inputs, dy)


def measure(name, shape, mode, args) -> dict:
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=args.device), torch.randn(shape, device=args.device)
    ours, theirs = (getattr(package, name)(shape[1], device=args.device) for package in (fastnorm, torch.nn))
    row = {"module": name, "shape": shape, "mode": mode}
    if reason := mismatch(ours, theirs, x, dy):
        return {**row, "refused": reason}
    modules = {"fastnorm": ours, "torch": theirs}
    for module in modules.values():
        module.train(mode != "evaluation")
    with torch.set_grad_enabled(mode.startswith("forward")):
        functions = {which: call(module, mode, x, dy) for which, module in modules.items()}
        times = in_turn(functions, args.rounds, args.seconds, threads=1)
    return {
        **row,
        "us": median(times["fastnorm"]),
        "torch_us": median(times["torch"]),
        "ratio": ratio(times, "fastnorm", "torch"),
        "spread": spread([a / b for a, b in zip(times["fastnorm"], times["torch"], strict=True)]),
    }


HEAD = ["module", "shape", "mode", "us", "torch us", "ratio", "+-"]


def line(row: dict) -> list[str]:
    head = [row["module"], "x".join(map(str, row["shape"])), row["mode"]]
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", "", "", ""]
    return [*head, f"{row['us']:.1f}", f"{row['torch_us']:.1f}", f"{row['ratio']:.2f}", f"{row['spread']:.0%}"]


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int), default=25, help="measurements of each in turn (default: 25)")
    p.add_argument("--seconds", type=number(float), default=0.01, help="length of one measurement (default: 0.01)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    args = p.parse_args(argv)
    args.threads = 1
    torch.set_num_threads(1)
    about = machine(args)
    every = [(name, shape, mode) for shape in SHAPES for name in NAMES for mode in MODES]
    rows = [measure(*job, args) for job in every if job[::2] != ("LayerNorm", "evaluation")]  # it is the same as no_grad
    return publish(about, [HEAD, *map(line, rows)], rows, args.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
