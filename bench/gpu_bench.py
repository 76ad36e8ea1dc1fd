"""Section `bench`: host and device time of fastnorm and its peers, beside torch.nn's and a copy of the same bytes, in turn.

Host: the wall time of putting one call into the queue. Device: replays of a CUDA graph, with what L2 holds after the call
before (warm) and with an L2 full of something else (cold). Nothing is timed before it matches the float64 oracle as
`run.py` has it; a peer that does not is written down as wrong.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from gpu_state import Section, progress, script
from peers import PEERS, absent
from run import Job, call, disagreement, functions, gradients, make, truth_of
from shapes import Model, label
from timing import clock_of, device_in_turn, host_in_turn, ratio, spread

import fastnorm

ROWS = [(8192, n) for n in (1024, 4096, 8192, 16384, 2048, 64, 128, 256, 512)]
ROWS += [(8, 64), (65536, 64), (4096, 16384), (200000, 10), (2048, 40000)]
CHANNELS = [(64, 256, 56, 56), (16, 64, 56, 56), (64, 64, 112, 112), (64, 256, 14, 14), (64, 512, 7, 7), (20, 6, 65536)]
CHANNELS += [(2048, 512), (8, 64), (16, 128, 1000), (64, 256, 27, 27)]
OTHER_LAYOUTS = [((16, 64, 56, 56), "channels_last"), ((64, 64, 112, 112), "channels_last"), ((16, 128, 1000), "mT")]
SHAPES = (
    *(Model("", "rows", shape) for shape in ROWS),
    *(Model("", "channels", shape) for shape in CHANNELS),
    *(Model("", "channels", shape, layout) for shape, layout in OTHER_LAYOUTS),
)
DTYPES = ("bf16", "fp32", "fp16")
ROUNDS, HOST_CALLS = 9, 20
STATES = ("cold", "warm", "host")
OURS = ("fastnorm", "native")


def wrong(functional, modes, job, inputs) -> str | None:
    """What of a peer's results differs from the oracle."""
    torchs, truth = gradients(F, job, *inputs), truth_of(job, *inputs)
    if "backward" in modes:
        return disagreement(gradients(functional, job, *inputs), torchs, truth)
    x, _, weight, bias = inputs
    return disagreement((call(functional, job, x, weight, bias).detach(),), torchs[:1], truth[:1])


def figures(job: Job, inputs, functionals: dict, clock) -> dict:
    """Times of the first functional, and its ratios to the others; in turn within each of cold, warm and host."""
    calls = functions(job, *inputs, functionals)
    times = device_in_turn(calls, ROUNDS, clock)
    times["host"] = host_in_turn(calls, ROUNDS, HOST_CALLS, clock)
    first = next(iter(functionals))
    each = lambda function: {state: function(times[state]) for state in STATES}
    return {
        "us": each(lambda t: {name: median(values) for name, values in t.items()}),
        "spread": each(lambda t: spread(t[first])),
        "copies": each(lambda t: ratio(t, first, "copy")),
        # How many times as fast as torch.nn, and as fastnorm where it is a peer's row.
        **{f"x {other}": each(lambda t: ratio(t, other, first)) for other in list(functionals)[1:]},
    }


def measure_norm(name: str, model: Model, dtype: str, device: str, clock) -> dict:
    """One row: a peer's figures of both modes, or why there are none."""
    peer = PEERS[name]
    row = {"peer": name, "model": asdict(model), "dtype": dtype}
    refused = "failed" if name in OURS else "not timed"
    try:
        functional, inputs = peer.load(), make(Job(model, dtype, "forward"), device)
        if reason := wrong(functional, peer.modes, Job(model, dtype, "forward"), inputs):
            return {**row, refused: f"wrong: {reason}"}
        functionals = {name: functional, "torch": F, **({} if name == "fastnorm" else {"fastnorm": fastnorm})}
        for mode in peer.modes:
            row[mode] = figures(Job(model, dtype, mode), inputs, functionals, clock)
    except torch.OutOfMemoryError:
        row["not timed"] = "out of memory"
    except Exception as e:
        clock.synchronize()  # raises again where the error has broken the device for this process
        row[refused] = f"{type(e).__name__}: {e}".splitlines()[0]
    return row


def lines(row: dict):
    """What is printed of a row: one line for each mode."""
    head = f"{row['peer']}: {label(**{key: row['model'][key] for key in ('kind', 'shape', 'layout')})} {row['dtype']}"
    if reason := row.get("failed") or row.get("not timed"):
        yield f"{head} {reason}"
    for mode in (mode for mode in ("forward", "backward") if mode in row):
        f = row[mode]
        state = lambda s: f"{s} {f['us'][s][row['peer']]:.1f} us, {f['x torch'][s]:.2f} x torch"
        copies = lambda s: f"{state(s)}, {f['copies'][s]:.2f} copies, +-{f['spread'][s]:.0%}"
        yield f"{head} {mode}: {copies('cold')}; {copies('warm')}; {state('host')}, +-{f['spread']['host']:.0%}"


def bench(section: Section, device: str, shapes=SHAPES, dtypes=DTYPES, peers=tuple(PEERS)) -> None:
    section.data["peers"] = {name: absent(name) for name in peers}
    present = [name for name in peers if section.data["peers"][name] is None]
    cells = {f"{n}, {label(m.kind, m.shape, m.layout)}, {d}": (n, m, d) for n, d, m in product(present, dtypes, shapes)
             if m.kind in PEERS[n].kinds}  # fmt: skip
    clock = clock_of(device)

    def measure(name):
        row = measure_norm(*cells[name], device, clock)
        print(*lines(row), sep="\n", flush=True)
        gc.collect()  # graphs hold their memory
        return row

    with clock.stream():
        section.each(progress(cells), measure, least=lambda name: PEERS[cells[name][0]].least)


if __name__ == "__main__":
    sys.exit(script(bench, __doc__))
