"""Times fastnorm's norms beside torch's operators, others that are installed, and a copy of the same tensor, in turn.

Nothing is timed before its results match the float64 oracle: at most twice torch's own error in this dtype, and one unit in
the last place; others may be off by 16 times as much, and by two roundings of the input's dtype. Times are medians over rounds,
in microseconds of one call; on a GPU they are the device's, from a cold L2, and the JSON has those from a warm one and the
host's as well. `GB/s` is the ideal traffic (forward of a plain norm: x read, y
written; backward: x and dy read, dx written) over the time; `copies` is the time in copies of x; `x torch` is torch's time over
ours, the median over rounds. `peak` is the most memory that a call has at once, and `saved` what autograd keeps, in tensors of
x's size, with torch's in brackets.

`both` is a forward and its backward; `eval` is without gradients, and a batch norm's with running statistics.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import json
import platform
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from checkout import sources
from measure import US, How, measure
from norms import DTYPES, MODES, NORMS, OPS, Norm
from providers import PROVIDERS, absent
from record import copies, primary, speedup, write
from slowdown import slower
from table import aligned
from timing import clock_of, keep_freed_memory

import fastnorm
from fastnorm import dispatch

USUAL = ("fastnorm", "torch", "in place")
OUT = Path(__file__).resolve().parent / "out" / "run.json"
AGAIN = 2  # times that a row which looks slower than before is measured again: what was chance does not come back


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [text.split(":")[1].strip() for text in info.read_text().splitlines() if text.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Of a checkout; with a + where tracked files have changed since."""
    git = lambda *args: subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    try:
        head = git("rev-parse", "--short", "HEAD")
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")


def machine(args) -> dict:
    """Where the figures hold."""
    return {
        "fastnorm": fastnorm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "backend": getattr(dispatch.select(torch.device(args.device).type), "__name__", "torch itself"),
        "commit": commit(),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


def number(convert):
    def parse(text):
        value = convert(text)
        if value <= 0:
            raise ValueError
        return value

    parse.__name__ = "positive number"
    return parse


# ---------------------------------------------------------------- rows as text


def microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def head(names) -> list[str]:
    others = [f"x {name}" for name in names if name not in (US, "torch")]
    return ["norm", "dtype", "mode", "us", "torch us", "copy us", "GB/s", "copies", "x torch", *others, "peak", "saved", "+-"]


def line(row: dict, names) -> list[str]:
    cells = [str(Norm(row["op"], tuple(row["shape"]), row["layout"])), row["dtype"], row["mode"]]
    width = len(head(names))
    refused = row.get("refused", {})
    if "us" not in row:
        return [*cells, f"refused: {refused.get(US, 'nothing was timed')}", *[""] * (width - 4)]
    state = primary(row)
    us = row["us"][state]
    cells += [microseconds(us[name]) if name in us else "" for name in (US, "torch", "copy")]
    cells += [f"{row['moved'] * row['bytes'] / us[US] / 1e3:.1f}", f"{copies(row, state, US):.2f}"]
    for name in ("torch", *(name for name in names if name not in (US, "torch"))):
        ratio = speedup(row, state, name)
        cells.append("wrong" if name in refused else f"{ratio:.2f}" if ratio else "")
    for what in ("peak", "saved"):
        found = row.get(what, {})
        sizes = [f"{found[name] / row['bytes']:.2f}" for name in (US, "torch") if name in found]
        cells.append(f"{sizes[0]} ({sizes[1]})" if len(sizes) == 2 else "".join(sizes))
    return [*cells, f"{row['spread'][state][US]:.0%}"]


def notes(rows: list[dict]) -> list[str]:
    """Who was not timed, and why."""
    return [
        f"{Norm(row['op'], tuple(row['shape']), row['layout'])} {row['dtype']} {row['mode']}: {name} is not timed: {reason}"
        for row in rows
        for name, reason in row.get("refused", {}).items()
        if name != US
    ]


def publish(about: dict, lines: list[list[str]], rows: list[dict], path: Path | None) -> int:
    """Print the table, write the JSON if a path is given; the exit status: 1 where a row was refused."""
    print(", ".join(f"{name} {value}" for name, value in about.items() if not isinstance(value, (list, dict))), end="\n\n")
    print(aligned(lines))
    if path:
        write(path, {"machine": about, "rows": rows})
    return 1 if any("refused" in row for row in rows) else 0


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    every = "; ".join(f"{name}: {p.what}" for name, p in PROVIDERS.items())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    p.add_argument("--mode", nargs="+", choices=MODES, default=["forward", "backward"], help="default: forward backward")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    layouts = sorted({norm.layout for norm in NORMS})
    p.add_argument("--layout", nargs="+", choices=layouts, default=layouts, help="default: all")
    p.add_argument("--provider", nargs="+", choices=[*PROVIDERS, "all"], default=list(USUAL), metavar="NAME",
                   help=f"default: {', '.join(USUAL)}; all: all that are found here; {every}")  # fmt: skip
    p.add_argument("--filter", default="", metavar="TEXT", help="only rows whose description has TEXT in it, see --list")
    p.add_argument("--list", action="store_true", help="print the rows, and who is found here and who is not, and stop")
    p.add_argument("--backend", choices=dispatch.NAMES, help="of fastnorm; default: the best one for the device")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--rounds", type=number(int), default=9, help="measurements of each in turn (default: 9)")
    p.add_argument("--seconds", type=number(float), default=0.01, help="length of one measurement on a CPU (default: 0.01)")
    p.add_argument("--json", type=Path, metavar="PATH", default=OUT, help="where figures go; default: bench/out/run.json")
    p.add_argument("--resume", action="store_true", help="go on with what is in the JSON, where all else is the same")
    p.add_argument("--compare", type=Path, metavar="OLD", help="another JSON: exits with 1 where a row is slower than there by "
                   "more than the spread of both, alone and beside torch, three times in a row")  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def description(norm: Norm, dtype: str, mode: str) -> str:
    return f"{norm} {dtype} {mode}" + (f" ({norm.model})" if norm.model else "")


def jobs_of(args) -> list[tuple[Norm, str, tuple[str, ...]]]:
    """Norm, dtype, and those of its modes that are wanted."""
    norms = [norm for norm in NORMS if norm.op in args.op and norm.layout in args.layout]
    wanted = lambda *norm: tuple(mode for mode in args.mode if args.filter in description(*norm, mode))
    return [(*norm, modes) for norm in product(norms, args.dtype) if (modes := wanted(*norm))]


def chosen(args) -> tuple[list[str], dict[str, str]]:
    """The providers that are measured, fastnorm first, and why others are not."""
    wanted = list(PROVIDERS) if "all" in args.provider else args.provider
    reasons = {name: reason for name in wanted if (reason := absent(name))}
    names = [name for name in PROVIDERS if name == US or (name in wanted and name not in reasons)]
    if "all" in args.provider and "native" in names and not args.device.startswith("cuda"):
        names.remove("native")
        reasons["native"] = "it is what serves fastnorm on a CPU"
    return names, reasons


def key(row: dict) -> tuple:
    return (row["op"], tuple(row["shape"]), row["layout"], row["dtype"], row["mode"])


def identity(about: dict) -> dict:
    """Where all of this is the same, figures belong together."""
    return {name: value for name, value in about.items() if name not in ("date", "commit", "absent")}


def read(path: Path) -> tuple[dict, str | None]:
    """A document of this script, or why there is none in the file."""
    try:
        found = json.loads(path.read_text())
        if {"op", "shape", "layout", "dtype", "mode"} <= set(found["rows"][0]) and "machine" in found:
            return found, None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        pass
    return {}, f"{path} is no JSON that this script has written"


class Run:
    """The rows of one JSON, which is replaced as a whole after every norm: the command may be killed at any time."""

    def __init__(self, about: dict, path: Path, names: list[str], how: How):
        self.about, self.path, self.names, self.how = about, path, names, how
        self.rows: dict[tuple, dict] = {}

    def resume(self) -> str | None:
        """Take over what is in the JSON; or why that cannot be."""
        if not self.path.exists():
            return None
        found, reason = read(self.path)
        if reason:
            return reason
        then, now = identity(found["machine"]), identity(self.about)
        if differing := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            return f"{self.path} cannot be gone on with, {', '.join(differing)} differ: without --resume it is measured anew"
        self.rows = {key(row): row for row in found["rows"]}
        return None

    def measure(self, norm: Norm, dtype: str, modes) -> list[dict]:
        rows = measure(norm, dtype, modes, self.names, self.how)
        for row in rows:
            self.rows[key(row)] = row
        write(self.path, {"machine": self.about, "rows": list(self.rows.values())})
        gc.collect()  # what is compiled holds its inputs
        return rows

    def complete(self, jobs, bar) -> list[dict]:
        """The rows of all jobs, what is missing is measured."""
        found = []
        for norm, dtype, modes in bar(jobs):
            keys = [(norm.op, norm.shape, norm.layout, dtype, mode) for mode in modes]
            missing = tuple(k[4] for k in keys if k not in self.rows)
            if missing:
                self.measure(norm, dtype, missing)
            found += [self.rows[k] for k in keys]
        return found

    def compare(self, rows: list[dict], old: Path, then: list[dict]) -> list[str]:
        """What is slower than in the rows of another JSON, three times in a row."""
        before = {key(row): row for row in then}
        pairs = [(row, before[key(row)]) for row in rows if key(row) in before]
        if not pairs:
            return [f"{old} has none of these rows: nothing was compared"]
        reasons = []
        for row, then in pairs:
            reason, again = slower(row, then), 0
            while reason and again < AGAIN:
                norm = Norm(row["op"], tuple(row["shape"]), row["layout"], row["model"], row["tiny"])
                (row,), again = self.measure(norm, row["dtype"], (row["mode"],)), again + 1
                reason = slower(row, then)
            reasons += [reason] if reason else []
        print(f"\n{len(pairs)} of {len(rows)} rows compared with {old}: {len(reasons)} slower")
        return reasons


def listed(jobs, args) -> str:
    rows = [description(norm, dtype, mode) for norm, dtype, modes in jobs for mode in modes]
    names, reasons = chosen(args)
    return "\n".join([*rows, f"beside: {', '.join(names)}", *(f"not here: {name}: {why}" for name, why in reasons.items())])


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    jobs = jobs_of(args)
    if not jobs:
        p.error(f"no row has {args.filter!r} in its description; --list shows them all")
    if args.list:
        print(listed(jobs, args))
        return 0
    if importlib.util.find_spec("tqdm") is None:
        p.error("tqdm is not installed: pip install tqdm")
    old, reason = read(args.compare) if args.compare else ({}, None)
    if reason:
        p.error(f"nothing to compare with: {reason}")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    try:
        fastnorm.use_backend(args.backend)
        about = {**machine(args), "sources": sources(), "freed memory": keep_freed_memory()}
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        p.error(str(e).splitlines()[0])
    names, reasons = chosen(args)
    about |= {"providers": names, "rounds": args.rounds, "absent": reasons}
    clock = clock_of(args.device) if args.device.startswith("cuda") else None
    run = Run(about, args.json, names, How(args.device, args.threads, args.rounds, args.seconds, clock))
    if args.resume and (reason := run.resume()):
        p.error(reason)
    with clock.stream() if clock else contextlib.nullcontext():
        rows = run.complete(jobs, lambda jobs: tqdm(jobs, unit="norm", disable=args.quiet))
        publish(about, [head(names), *(line(row, names) for row in rows)], [], None)
        slow = run.compare(rows, args.compare, old["rows"]) if args.compare else []
    for text in (*notes(rows), *slow):
        print(text)
    return 1 if slow or any(US in row.get("refused", {}) for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
