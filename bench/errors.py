"""How far fastnorm's norms and torch.nn's are from the truth: for the shapes of the benchmark, and over the mean of the input.

An error is the largest absolute difference from the norm in float64, over the largest value of that result in float64, of eight
draws of the inputs: over a handful of results that of one draw is luck. `allowed` is torch.nn's error in the same dtype and one
unit in the last place of the largest value. Exits 1 where fastnorm's is larger. The second table is y's error where the input's
mean is so many times its standard deviation.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from norms import DTYPES, NORMS, OPS, Inputs, Norm, bound, expected, make, results
from run import machine, number, publish
from shapes import label

import fastnorm

USUAL = ("LN", "BN")
HEAD = ["norm", "dtype", "result", "error", "torch's error", "allowed", ""]
DRAWS = 8
RATIOS = tuple(10.0**e for e in range(7))  # mean / std
SHIFTED = (Norm("LN", (64, 4096)), Norm("BN", (16, 64, 28, 28)), Norm("BN", (16, 64, 28, 28), "channels_last"))


def errors(norm: Norm, inputs: Inputs, mode: str):
    """(result's name, ours, torch's, one unit in the last place), relative."""
    ours = results(bound(norm, fastnorm, inputs, True), inputs, mode)
    theirs, truths = expected(norm, inputs, mode, True)
    for name, a, b, truth in zip(norm.how.names[: len(truths)], ours, theirs, truths, strict=True):
        size = truth.abs().max().item()
        error, torch_error = ((t.double() - truth).abs().max().item() / size for t in (a, b))
        yield name, error, torch_error, 2.0 ** math.floor(math.log2(size)) * torch.finfo(a.dtype).eps / size


def measure(norm: Norm, dtype: str, device: str) -> list[dict]:
    """One row for each result of one norm."""
    about = {"op": norm.op, "shape": norm.shape, "layout": norm.layout, "dtype": dtype}
    draws = [list(errors(norm, make(norm, dtype, device, seed), "backward")) for seed in range(DRAWS)]
    rows = []
    for each in zip(*draws, strict=True):
        (name, *_), *_ = each
        error, torch_error, ulp = (max(draw[i] for draw in each) for i in (1, 2, 3))
        rows.append({**about, "result": name, "error": error, "torch_error": torch_error, "allowed": torch_error + ulp})
    return rows


def shifted(norm: Norm, dtype: str, ratio: float, device: str) -> dict:
    """y's errors where every value is moved by `ratio` standard deviations; the truth is of what that is rounded to."""
    inputs = make(norm, dtype, device)
    inputs.tensors[0] = (inputs.tensors[0].detach() + ratio).requires_grad_()
    ((name, error, torch_error, _),) = errors(norm, inputs, "forward")
    about = {"op": norm.op, "shape": norm.shape, "layout": norm.layout, "dtype": dtype}
    return {**about, "ratio": ratio, "result": name, "error": error, "torch_error": torch_error}


def line(row: dict) -> list[str]:
    name = label(row["op"], row["shape"], row["layout"])
    figures = [f"{row[k]:.1e}" for k in ("error", "torch_error", "allowed") if k in row]
    if "ratio" in row:
        return [f"{name}, mean / std {row['ratio']:.0e}", row["dtype"], row["result"], *figures, "", ""]
    return [name, row["dtype"], row["result"], *figures, "" if row["error"] <= row["allowed"] else "LARGER"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", nargs="+", choices=OPS, default=list(USUAL), help="default: LN BN")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16", "fp16"], help="default: fp32 bf16 fp16")
    p.add_argument("--filter", default="", metavar="TEXT", help="only norms whose description has TEXT in it")
    p.add_argument("--list", action="store_true", help="print the norms and stop")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    return p


def jobs_of(args) -> list[tuple[Norm, str]]:
    jobs = [(norm, dtype) for norm in NORMS if norm.op in args.op for dtype in args.dtype]
    return [(norm, dtype) for norm, dtype in jobs if args.filter in f"{norm} {dtype} ({norm.model})"]


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    jobs = jobs_of(args)
    if not jobs:
        p.error(f"no norm has {args.filter!r} in its description")
    if args.list:
        print("\n".join(f"{norm} {dtype}" for norm, dtype in jobs))
        return 0
    rows = [row for job in jobs for row in measure(*job, args.device)]
    of_means = [norm for norm in SHIFTED if norm.op in args.op and "fp32" in args.dtype and not args.filter]
    rows += [shifted(norm, "fp32", ratio, args.device) for norm in of_means for ratio in RATIOS]
    publish(machine(args), [HEAD, *map(line, rows)], rows, args.json)
    return 1 if any(row["error"] > row.get("allowed", math.inf) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
