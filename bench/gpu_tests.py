"""Sections `tests` and `sanitizer`: every backend that serves the device, and a few tests under NVIDIA's sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu_plugin
from checkout import ROOT
from gpu_state import OutOfTime, Section, script

HERE = Path(__file__).resolve().parent
LEAST = 30.0  # seconds: with less, no start is worth it
KEPT = 50  # failures with their first line; the others are only counted
BACKENDS = ("triton", "native", "reference")  # those that serve CUDA tensors
NUMERICS = ("rows", "channels", "contract")
# With caching every access inside torch's pool looks right.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
KERNELS = ("triton", "native")  # the backends with kernels of our own
# One shape for each kernel: several rows a program, one row, chunked; runs of positions, channels fastest, turned.
FEW = "5x127 or 33x64 or 3x768 or 2x33000 or 2x3x7x7 or 4x6x5x7 or 33x17"
TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def numerics() -> list[str]:
    return [str(ROOT / "tests" / f"test_{name}.py") for name in NUMERICS]


def others() -> list[str]:
    return sorted({str(path) for path in (ROOT / "tests").glob("test_*.py")} - set(numerics()))


def workers() -> list[str]:
    return ["-n", "auto"] if importlib.util.find_spec("xdist") else []


def pytest(arguments, seconds: float, prefix=(), **environment) -> tuple[dict, int]:
    """Counts and failures of one run, and the process's exit status; OutOfTime where it had to be ended."""
    if importlib.util.find_spec("pytest") is None:
        return {**counts([]), "failed": "pytest is not installed"}, 0
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes")
        outcomes.touch()
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, gpu_plugin.PLACE: str(outcomes), **environment}
        # A test file whose imports are not there must not stop the others.
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "gpu_plugin"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
        # A folder without a fastnorm, which Python would find before the one that is to be tested.
        child = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise OutOfTime({**read(outcomes), "seconds": round(seconds)}) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return read(outcomes), child.returncode


def read(outcomes: Path) -> dict:
    """The last line may be cut off."""
    lines = outcomes.read_text().split("\n")[:-1]
    return counts([json.loads(line) for line in lines])


def counts(outcomes: list) -> dict:
    """A test whose teardown fails has passed before, and one that cannot be collected is told of by every worker."""
    failing = {test: message for test, outcome, message in outcomes if outcome == "failed"}
    others = {test: outcome for test, outcome, _ in outcomes if test not in failing}
    passed = sum(outcome == "passed" for outcome in others.values())
    found = {"passed": passed, "skipped": len(others) - passed, "failures": len(failing)}
    found["failing"] = [f"{test}: {message}" for test, message in failing.items()][:KEPT]
    if failing:
        found["failed"] = f"{len(failing)} of {len(failing) + passed} tests fail"
    return found


def run_tests(section: Section, device: str, files=None) -> None:
    """Rows are a backend and its numerics, or the rest of its tests."""
    groups = files or {"numerics": numerics(), "the rest": others()}
    names = [f"{backend}, {group}" for group in groups for backend in BACKENDS]

    def measure(name):
        backend, group = name.split(", ")
        arguments = [*workers(), "-k", f"{backend}-{device}", *groups[group]]
        row, status = pytest(arguments, section.left(), FASTNORM_BACKEND=backend)
        if status not in (0, 1, 5) or (status and "failed" not in row):  # 5: no test at all
            row["failed"] = row.get("failed", f"pytest ended with status {status}, {row['passed']} tests passed")
        print(f"{name}: {row['passed']} passed, {row['skipped']} skipped, {row['failures']} failed", flush=True)
        return row

    section.each(names, measure, least=lambda name: LEAST)


def tool() -> str | None:
    """compute-sanitizer, which a toolkit does not always put on the path."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def verdict(log: str, status: int) -> dict:
    """What the sanitizer's log says."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    wrong = [line for line in summaries if not re.match(r"0 (errors|hazards)", line)]
    row = {"summary": summaries[:10]}
    if wrong or status not in (0, 1) or not summaries:
        row["failed"] = "; ".join(wrong) or f"no summary, the process ended with status {status}"
        row["log"] = log[:5000]
    return row


def run_sanitizer(section: Section, device: str, command: str | None = None) -> None:
    command = command or tool()

    def measure(name):
        if command is None:
            return {"not there": "compute-sanitizer"}
        tool, backend = name.split(", ")
        few = ["-k", f"{backend}-{device} and test_forward_and_gradients and ({FEW})", *numerics()[:2]]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            prefix = [command, "--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
            counted, status = pytest(few, section.left(), prefix, FASTNORM_BACKEND=backend, **SANITIZED)
            row = {**counted, **verdict(log.read_text() if log.exists() else "", status)}
        print(f"{name}: {row['summary']}, {row['passed']} tests passed", flush=True)
        return row

    section.each([f"{tool}, {backend}" for backend in KERNELS for tool in TOOLS], measure, least=lambda name: LEAST)


if __name__ == "__main__":
    run = {"tests": run_tests, "sanitizer": run_sanitizer}
    sys.exit(script(lambda section, device: run[section.name](section, device), __doc__))
