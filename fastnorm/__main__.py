"""`python -m fastnorm`: which backends are there, which one serves what, and why the others do not."""

from __future__ import annotations

import platform

import torch

from . import __version__, dispatch


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _name(device_type: str) -> str:
    try:
        module = dispatch.select(device_type)
    except RuntimeError:  # forced, and cannot serve; the table above says why
        return "nothing"
    return next((b.name for b in dispatch.BACKENDS if module is not None and b.module == module.__name__), "torch itself")


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def report() -> str:
    """The text that `python -m fastnorm` prints."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    head = f"fastnorm {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {cpu}, {gpu}"
    backends = [["backend", "what", *_devices()]]
    for backend in dispatch.BACKENDS:
        reasons = [backend.why_not(device) for device in _devices()]
        backends.append([backend.name, backend.what, *("yes" if r is None else f"no: {r}" for r in reasons)])
    names = [str(d).removeprefix("torch.") for d in dispatch.DTYPES]
    serves = [["device", *names]] + [[device, *[_name(device)] * len(names)] for device in _devices()]
    choice = f"forced to {dispatch.forced()!r}" if dispatch.forced() else "chosen automatically"
    return f"{head}\n\n{_table(backends)}\n\nserved by ({choice}):\n{_table(serves)}"


if __name__ == "__main__":
    print(report())
