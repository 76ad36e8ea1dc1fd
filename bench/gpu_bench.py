"""Section `bench`: host and device time of fastnorm and others, beside torch.nn's and a copy of the same bytes, in turn.

Host: the wall time of putting one call into the queue. Device: replays of a CUDA graph, with what L2 holds after the call
before (warm) and with an L2 full of something else (cold). Nothing is timed before it matches the float64 oracle as
`run.py` has it; who does not is written down as wrong.
"""

from __future__ import annotations

import gc
import sys
from itertools import product

import torch
from gpu_state import Section, progress, script
from measure import US, How, measure, sentence
from norms import SWEEP, Norm
from providers import OURS, PROVIDERS, absent
from record import copies
from timing import clock_of

ROWS = [(8192, n) for n in (1024, 4096, 8192, 16384, 2048, 64, 128, 256, 512)]
ROWS += [(8, 64), (65536, 64), (4096, 16384), (200000, 10), (2048, 40000)]
CHANNELS = [(64, 256, 56, 56), (16, 64, 56, 56), (64, 64, 112, 112), (64, 256, 14, 14), (64, 512, 7, 7), (20, 6, 65536)]
CHANNELS += [(2048, 512), (8, 64), (16, 128, 1000), (64, 256, 27, 27)]
OTHER_LAYOUTS = [((16, 64, 56, 56), "channels_last"), ((64, 64, 112, 112), "channels_last"), ((16, 128, 1000), "mT")]
SHAPES = (
    *(Norm("LN", shape, model=SWEEP if shape[0] == 8192 else "", tiny=shape == (8, 64)) for shape in ROWS),
    *(Norm("BN", shape, tiny=shape == (8, 64)) for shape in CHANNELS),
    *(Norm("BN", shape, layout) for shape, layout in OTHER_LAYOUTS),
)
DTYPES = ("bf16", "fp32", "fp16")
MODES = ("forward", "backward")
# In the order of value. The best backend serves fastnorm, and torch is beside every row.
WHO = (US, "native", *(name for name in PROVIDERS if name not in (*OURS, "torch", "in place")))
ROUNDS = 9
STATES = ("cold", "warm", "host")


def torch_over(row: dict, state: str, name: str) -> float:
    """How many times as fast as torch.nn a provider is."""
    speedup = row["speedup"][state]
    return speedup["torch"] if name == US else speedup["torch"] / speedup[name]


def measure_norm(name: str, norm: Norm, dtype: str, device: str, clock) -> dict:
    """One row: a provider's figures of both modes beside torch's and fastnorm's, or why there are none."""
    found = {"provider": name}
    refused = "failed" if name in OURS else "not timed"
    modes = [mode for mode in MODES if PROVIDERS[name].serves(norm.op, mode)]
    how = How(device, rounds=ROUNDS, clock=clock, memory=False)
    try:
        rows = measure(norm, dtype, modes, dict.fromkeys((US, "torch", name)), how)
    except torch.OutOfMemoryError:
        return {**found, "not timed": "out of memory"}
    except Exception as e:
        rows, found[refused] = [], sentence(e)
    clock.synchronize()  # raises again where an error has broken the device for this process
    reasons = [row["refused"][name] for row in rows if name in row.get("refused", {})]
    if reasons:
        found[refused] = f"wrong: {reasons[0]}"
    return {**found, "rows": [] if reasons else rows}


def lines(name: str, norm: Norm, dtype: str, found: dict):
    """What is printed of a row: one line for each mode."""
    if reason := found.get("failed") or found.get("not timed"):
        yield f"{name}: {norm} {dtype} {reason}"
    for row in found.get("rows", []):
        state = lambda s, row=row: f"{s} {row['us'][s][name]:.1f} us, {torch_over(row, s, name):.2f} x torch"
        device = lambda s, row=row: f"{state(s)}, {copies(row, s, name):.2f} copies, +-{row['spread'][s][name]:.0%}"
        host = f"{state('host')}, +-{row['spread']['host'][name]:.0%}"
        yield f"{name}: {norm} {dtype} {row['mode']}: {device('cold')}; {device('warm')}; {host}"


def bench(section: Section, device: str, shapes=SHAPES, dtypes=DTYPES, names=WHO) -> None:
    section.data["providers"] = {name: absent(name) for name in names}
    present = [name for name in names if section.data["providers"][name] is None]
    every = (cell for cell in product(present, dtypes, shapes) if cell[2].op in PROVIDERS[cell[0]].ops)
    cells = {f"{name}, {norm}, {dtype}": (name, norm, dtype) for name, dtype, norm in every}
    clock = clock_of(device)

    def measure_cell(name):
        row = measure_norm(*cells[name], device, clock)
        print(*lines(*cells[name], row), sep="\n", flush=True)
        gc.collect()  # graphs hold their memory
        return row

    with clock.stream():
        section.each(progress(cells), measure_cell, least=lambda name: PROVIDERS[cells[name][0]].least)


if __name__ == "__main__":
    sys.exit(script(bench, __doc__))
