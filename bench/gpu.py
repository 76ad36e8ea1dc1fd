"""Everything that only a GPU can tell, in one command: tests, sanitizer, CUDA graphs, errors, times beside peers, pictures.

Each section is a process of its own with a time limit. Results go into one JSON, which is replaced as a whole after every row:
the command may be killed at any time, and goes on where it was when it is started again. What is there already for these
sources, this torch, Triton and GPU is not run again. Nothing is installed and nothing is downloaded.

Exits 0: all is there and nothing failed; 1: something failed; 2: it cannot run here; 3: something is not measured yet.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkout import ROOT, importable, sources, without_torch
from gpu_state import failures, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
IDENTITY = ("sources", "torch", "triton", "gpu")  # of a machine: results are taken over where all of these are the same
GRACE = 30.0  # a section that goes on for so long after its time is killed


@dataclass(frozen=True)
class Spec:
    """A section: its script, the most seconds it gets, and with how few it is not worth a start."""

    script: Path
    limit: float = 450.0
    least: float = 20.0
    anew: bool = False  # made from the other sections' results: quickly, and each time


# In the order of value: what is wrong comes before what is slow.
SECTIONS = {
    "tests": Spec(HERE / "gpu_tests.py", least=60.0),
    "graphs": Spec(HERE / "gpu_graphs.py", limit=300.0),
    "compile": Spec(HERE / "gpu_compile.py", limit=300.0, least=30.0),
    "bench": Spec(HERE / "gpu_bench.py", least=40.0),
    "errors": Spec(HERE / "gpu_errors.py", limit=240.0),
    "sanitizer": Spec(HERE / "gpu_tests.py", least=60.0),
    "plots": Spec(HERE / "gpu_report.py", limit=60.0, anew=True),
}


def cannot_run(device: str) -> str | None:
    """Why nothing can be measured here, in one line."""
    if reason := without_torch():
        return reason
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here: make gpu needs one"
    return None


def answer(*command) -> str | None:
    """The first line that a command prints; None where the command is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else None


def machine(device: str) -> dict:
    import torch

    about = {"gpu": platform.processor() or platform.machine()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        about = {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count, "l2": p.L2_cache_size}
        about |= {"memory": p.total_memory, "devices": torch.cuda.device_count(), "cuda": torch.version.cuda}
        about["driver"] = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    about |= {"torch": torch.__version__, "triton": None, "python": platform.python_version(), "sources": sources()}
    if importlib.util.find_spec("triton"):
        about["triton"] = importlib.import_module("triton").__version__
    return {**about, "commit": answer("git", "rev-parse", "HEAD")}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fits(path: Path, about: dict) -> bool:
    """Whether the results in a file are of this machine and these sources."""
    found = json.loads(path.read_text())["machine"]
    return all(found.get(key) == about[key] for key in IDENTITY)


def default_path(about: dict, prefix: str = "") -> Path:
    """Today's file of this GPU, or the last one that can be gone on with; the results of other sources are left alone."""
    folder = RESULTS / slug(about["gpu"])
    day = datetime.date.today().isoformat()
    for path in sorted(folder.glob(f"{prefix}[0-9]*.json"), reverse=True):
        if fits(path, about):
            return path
    for number in range(1, 1000):
        path = folder / f"{prefix}{day}{'' if number == 1 else f'-{number}'}.json"
        if not path.exists():
            return path
    raise RuntimeError(f"{folder} has a thousand results of today")


def opened(path: Path, about: dict) -> dict:
    """The document to go on with."""
    if path.exists() and fits(path, about):
        return {**json.loads(path.read_text()), "machine": about}
    if path.exists():
        print(f"{path} is of other sources or another machine: everything is measured anew", flush=True)
    return {"machine": about, "sections": {}}


def run(name: str, spec: Spec, path: Path, seconds: float, device: str, surroundings) -> None:
    """One section in a process of its own. One that dies has failed; one that is killed is not complete, and goes on later.

    What hangs is not hidden by that: a row that is running when its process ends twice has failed, too.
    """
    folder, environment = surroundings
    command = [sys.executable, str(spec.script), name, "--json", str(path), "--device", device, "--seconds", f"{seconds:.0f}"]
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    ended = None
    try:
        if status := child.wait(seconds + GRACE):
            ended = f"the process ended with status {status}"
    except subprocess.TimeoutExpired:
        print(f"{name}: killed after {seconds + GRACE:.0f} s", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started goes with it
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    document = json.loads(path.read_text())
    section = document["sections"].setdefault(name, {"complete": False, "rows": []})
    if ended:
        section["ended"] = ended
    section["seconds"] = round(section.get("seconds", 0) + time.monotonic() - began, 1)
    write(path, document)


def run_all(names, path: Path, budget: float, device: str, surroundings) -> None:
    end = time.monotonic() + budget
    for name in names:
        spec = SECTIONS[name]
        section = json.loads(path.read_text())["sections"].get(name, {})
        left = end - time.monotonic()
        if section.get("complete") and not spec.anew:
            print(f"== {name}: is there already", flush=True)
        elif left < spec.least and not spec.anew:
            print(f"== {name}: not started, {left:.0f} s are left and it needs {spec.least:.0f}", flush=True)
        else:
            print(f"== {name}", flush=True)
            forget(path, name, whole=spec.anew)
            run(name, spec, path, spec.limit if spec.anew else min(spec.limit, left), device, surroundings)


def forget(path: Path, name: str, whole: bool) -> None:
    """How the section ended the last time, or all of it."""
    document = json.loads(path.read_text())
    document["sections"].get(name, {}).pop("ended", None)
    if whole:
        document["sections"].pop(name, None)
    write(path, document)


def conclusion(document: dict, names) -> int:
    """Prints what failed and what is missing; the exit status."""
    sections = {name: document["sections"].get(name, {"complete": False, "rows": []}) for name in names}
    failed = {name: failures(section) for name, section in sections.items()}
    missing = [name for name, section in sections.items() if not section["complete"]]
    for name, lines in failed.items():
        print(*(f"FAILED {name}: {line}" for line in lines), sep="\n", end="\n" if lines else "")
    if missing:
        print(f"not complete yet: {', '.join(missing)}; the same command goes on")
    return 1 if any(failed.values()) else 3 if missing else 0


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all, in this order")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start nothing that does not fit")
    p.add_argument("--out", type=Path, metavar="PATH", help="default: bench/results/GPU/DATE.json")
    p.add_argument("--again", action="store_true", help="measure anew what is there already")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tries out the command itself")
    args = p.parse_args(argv)
    if reason := cannot_run(args.device):
        print(reason, file=sys.stderr)
        return 2
    about = machine(args.device)
    path = (args.out or default_path(about)).resolve()
    document = opened(path, about)
    if args.again:
        document["sections"] = {name: s for name, s in document["sections"].items() if name not in args.sections}
    write(path, document)
    print(", ".join(f"{name} {value}" for name, value in about.items()), f"results: {path}", sep="\n", flush=True)
    with importable() as surroundings:
        run_all(args.sections, path, args.budget, args.device, surroundings)
    return conclusion(json.loads(path.read_text()), args.sections)


def command() -> int:
    """main() as a process of its own: however it is ended, short of SIGKILL, the section that is running is ended with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(command())
