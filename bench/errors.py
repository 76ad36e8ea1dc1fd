"""How far fastnorm's norms and torch.nn's are from the truth, for every shape of the benchmark.

An error is the largest absolute difference from the norm in float64, over the largest value of that result in float64;
`allowed` is torch.nn's error in the same dtype and one unit in the last place of the largest value. Exits 1 where fastnorm's
is larger.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from run import DTYPES, OPS, RESULTS, Job, gradients, machine, make, number, publish, truth_of
from shapes import MODELS, label

import fastnorm

HEAD = ["norm", "dtype", "result", "error", "torch's error", "allowed", ""]


def measure(job: Job, device: str) -> list[dict]:
    """One row for each result of one norm."""
    inputs = make(job, device)
    ours, theirs = (gradients(functional, job, *inputs) for functional in (fastnorm, F))
    rows = []
    for name, a, b, truth in zip(RESULTS, ours, theirs, truth_of(job, *inputs), strict=True):
        size = truth.abs().max().item()
        error, torch_error = ((t.double() - truth).abs().max().item() / size for t in (a, b))
        row = {"shape": job.model.shape, "layout": job.model.layout, "kind": job.model.kind, "dtype": job.dtype, "result": name}
        ulp = 2.0 ** math.floor(math.log2(size)) * torch.finfo(a.dtype).eps / size
        rows.append({**row, "error": error, "torch_error": torch_error, "allowed": torch_error + ulp})
    return rows


def line(row: dict) -> list[str]:
    figures = [f"{row[k]:.1e}" for k in ("error", "torch_error", "allowed")]
    verdict = "" if row["error"] <= row["allowed"] else "LARGER"
    return [label(row["kind"], row["shape"], row["layout"]), row["dtype"], row["result"], *figures, verdict]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16", "fp16"], help="default: fp32 bf16 fp16")
    p.add_argument("--filter", default="", metavar="TEXT", help="only norms whose description has TEXT in it")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    return p


def jobs_of(args) -> list[Job]:
    kinds = {OPS[op] for op in args.op}
    jobs = [Job(m, dtype, "backward") for m in MODELS if m.kind in kinds for dtype in args.dtype]
    return [job for job in jobs if args.filter in str(job)]


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    jobs = jobs_of(args)
    if not jobs:
        p.error(f"no norm has {args.filter!r} in its description")
    rows = [row for job in jobs for row in measure(job, args.device)]
    publish(machine(args), [HEAD, *map(line, rows)], rows, args.json)
    return 1 if any(row["error"] > row["allowed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
