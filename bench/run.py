"""Times fastnorm's norms, forward and backward, beside torch.nn's and a copy of the same tensor.

Nothing is timed before its results match the float64 oracle: at most twice torch.nn's own error in this run, and one unit in
the last place. Times are microseconds of one call;
`GB/s` is the ideal traffic over the time (forward: x read, y written; backward: x and dy read, dx written), `copies` is the
time in copies of x, and `x torch` is torch.nn's time over ours, the median over rounds measured in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from shapes import MODELS, Model, label
from table import aligned
from timing import in_turn, keep_freed_memory, ratio, spread

import fastnorm
from fastnorm import dispatch, reference

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = {"layer_norm": "rows", "batch_norm": "channels"}
MODES = ("forward", "backward")
RESULTS = ("y", "dx", "dweight", "dbias")
TENSORS_MOVED = {"forward": 2, "backward": 3}
EPS = 1e-5


@dataclass(frozen=True)
class Job:
    model: Model
    dtype: str
    mode: str

    def __str__(self):
        op = next(op for op, kind in OPS.items() if kind == self.model.kind)
        shape = " x ".join(map(str, self.model.shape))
        layout = "" if self.model.layout == "dense" else f" {self.model.layout}"
        return f"{op} {self.mode} {self.dtype} {shape}{layout} ({self.model.name})"


def make(job: Job, device: str):
    """x, dy, weight, bias as torch.nn has them: float32 parameters beside half inputs of a batch norm."""
    torch.manual_seed(0)
    model, dtype = job.model, DTYPES[job.dtype]
    shape = (model.shape[0], model.shape[2], model.shape[1]) if model.layout == "mT" else model.shape
    random = lambda: torch.randn(shape, device=device).to(dtype)
    x, dy = random(), random()
    if model.layout == "mT":
        x, dy = x.mT, dy.mT
    if model.layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    rows = model.kind == "rows"
    parameter = torch.float64 if dtype == torch.float64 else dtype if rows else torch.float32
    size = model.shape[-1] if rows else model.shape[1]
    weight, bias = (torch.randn(size, device=device).to(parameter).requires_grad_() for _ in range(2))
    return x, dy, weight, bias


def call(functional, job: Job, x, weight, bias):
    if job.model.kind == "rows":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return functional.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)


def gradients(functional, job, x, dy, weight, bias):
    """y, dx, dweight, dbias"""
    x = x.detach().requires_grad_()
    y = call(functional, job, x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


def truth_of(job, x, dy, weight, bias):
    """The reference backend in float64."""
    x, dy, weight, bias = (t.detach().double() for t in (x, dy, weight, bias))
    need = (True, torch.float64, torch.float64)
    if job.model.kind == "rows":
        y, mean, rstd = reference.row_fwd(x, weight, bias, EPS, x.shape[-1])
        return y, *reference.row_bwd(dy, x, weight, mean, rstd, need)
    y, mean, rstd = reference.channel_fwd(x, weight, bias, None, None, True, 0.1, EPS)
    return y, *reference.channel_bwd(dy, x, weight, mean, rstd, True, need)


def mismatch(job, inputs) -> str | None:
    """What differs from the oracle by more than twice torch.nn's own error and one unit in the last place; None if nothing."""
    return disagreement(*(gradients(functional, job, *inputs) for functional in (fastnorm, F)), truth_of(job, *inputs))


def disagreement(ours, torchs, truth) -> str | None:
    """The same for y, dx, dweight, dbias of each, or for y alone."""
    for name, a, b, t in zip(RESULTS[: len(ours)], ours, torchs, truth, strict=True):
        error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
        allowed = 2 * allowed + torch.finfo(a.dtype).eps * t.abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.2g}, {allowed:.2g} is allowed"
    return None


def functions(job, x, dy, weight, bias, functionals):
    """What is timed: the call of each functional, and a copy of x into new memory."""
    if job.mode == "forward":
        run = lambda functional: lambda: call(functional, job, x, weight, bias)
    else:
        x = x.detach().requires_grad_()

        def run(functional):
            y = call(functional, job, x, weight, bias)
            return lambda: torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)

    source = x.detach()
    calls = {name: run(functional) for name, functional in functionals.items()}
    return {**calls, "copy": lambda: torch.empty_like(source).copy_(source)}


def measure(job: Job, args) -> dict:
    """One row: figures, or the sentence that says why there are none."""
    inputs = make(job, args.device)
    row = {"job": str(job), **asdict(job.model), "dtype": job.dtype, "mode": job.mode}
    if reason := mismatch(job, inputs):
        return {**row, "refused": reason}
    calls = functions(job, *inputs, {"fastnorm": fastnorm, "torch": F})
    times = in_turn(calls, args.rounds, args.seconds, args.threads)
    us = median(times["fastnorm"])
    moved = TENSORS_MOVED[job.mode] * inputs[0].numel() * inputs[0].element_size()
    return {
        **row,
        "us": us,
        "torch_us": median(times["torch"]),
        "copy_us": median(times["copy"]),
        "gb_per_s": moved / us / 1e3,
        "copies": ratio(times, "fastnorm", "copy"),
        "speedup": ratio(times, "torch", "fastnorm"),
        "spread": spread(times["fastnorm"]),
    }


HEAD = ["norm", "dtype", "mode", "us", "torch us", "copy us", "GB/s", "copies", "x torch", "+-"]


def line(row: dict) -> list[str]:
    head = [label(row["kind"], row["shape"], row["layout"]), row["dtype"], row["mode"]]
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", *[""] * (len(HEAD) - 4)]
    times = [f"{row[k]:.1f}" if row[k] < 1000 else f"{row[k]:.0f}" for k in ("us", "torch_us", "copy_us")]
    return [*head, *times, f"{row['gb_per_s']:.1f}", f"{row['copies']:.2f}", f"{row['speedup']:.2f}", f"{row['spread']:.0%}"]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [text.split(":")[1].strip() for text in info.read_text().splitlines() if text.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(args) -> dict:
    """Where the figures hold."""
    return {
        "fastnorm": fastnorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "backend": dispatch.select(torch.device(args.device).type).__name__,
    }


def number(convert):
    def parse(text):
        value = convert(text)
        if value <= 0:
            raise ValueError
        return value

    parse.__name__ = "positive number"
    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    p.add_argument("--filter", default="", metavar="TEXT", help="only rows whose description has TEXT in it, see --list")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--backend", choices=dispatch.NAMES, help="default: the best one for the device")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--rounds", type=number(int), default=9, help="measurements of each in turn (default: 9)")
    p.add_argument("--seconds", type=number(float), default=0.01, help="length of one measurement (default: 0.01)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def jobs_of(args) -> list[Job]:
    kinds = {OPS[op] for op in args.op}
    models = [m for m in MODELS if m.kind in kinds]
    every = [Job(m, dtype, mode) for m in models for dtype in args.dtype for mode in args.mode]
    return [job for job in every if args.filter in str(job)]


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    jobs = jobs_of(args)
    if not jobs:
        p.error(f"no row has {args.filter!r} in its description; --list shows them all")
    if args.list:
        print("\n".join(map(str, jobs)))
        return 0
    if importlib.util.find_spec("tqdm") is None:
        p.error("tqdm is not installed: pip install tqdm")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    try:
        fastnorm.use_backend(args.backend)
        about = {**machine(args), "freed memory": keep_freed_memory()}
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        p.error(str(e).splitlines()[0])
    rows = [measure(job, args) for job in tqdm(jobs, unit="row", disable=args.quiet)]
    return publish(about, [HEAD, *map(line, rows)], rows, args.json)


def publish(about: dict, lines: list[list[str]], rows: list[dict], path: Path | None) -> int:
    """Print the table, write the JSON if a path is given; the exit status: 1 where a row was refused."""
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(aligned(lines))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return 1 if any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
