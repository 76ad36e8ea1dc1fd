"""Section `compile`: what `bench` is going to run, compiled in as many processes as there are cores.

Triton and Inductor keep what they compile on disk, so that `bench`, which times in one process, finds it there.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import torch
from gpu_bench import DTYPES, SHAPES
from gpu_state import OutOfTime, Section, script
from peers import PEERS, absent
from run import Job, call, gradients, make
from shapes import Model, label

WORTH_IT = ("fastnorm", "compile")  # what compiles for longer than it runs, in the order of value
MOST_PROCESSES = 16  # each has tensors of its own on the GPU


def first_call(job: tuple[str, Model, str, str]) -> tuple[str, str | None]:
    """Forward and, where there is one, backward of a norm: its label, and why it did not run, which is for `bench` to judge."""
    peer, model, dtype, device = job
    name = label(model.kind, model.shape, model.layout)
    try:
        functional, inputs = PEERS[peer].load(), make(Job(model, dtype, "forward"), device)
        if "backward" in PEERS[peer].modes:
            gradients(functional, Job(model, dtype, "forward"), *inputs)
        else:
            x, _, weight, bias = inputs
            call(functional, Job(model, dtype, "forward"), x, weight, bias)
        if device == "cuda":
            torch.cuda.synchronize()
            del inputs
            torch.cuda.empty_cache()
    except Exception as e:
        return name, f"{type(e).__name__}: {e}".splitlines()[0]
    return name, None


def compile_all(section: Section, device: str, shapes=SHAPES, dtypes=DTYPES, peers=WORTH_IT) -> None:
    """Rows are a peer and a dtype."""
    cells = {f"{peer}, {dtype}": (peer, dtype) for peer in peers if absent(peer) is None for dtype in dtypes}

    def measure(name):
        peer, dtype = cells[name]
        began, answers = time.monotonic(), []
        jobs = [(peer, model, dtype, device) for model in shapes if model.kind in PEERS[peer].kinds]
        calls = pool.imap_unordered(first_call, jobs)
        result = lambda: {"norms": len(answers), "refused": {norm: reason for norm, reason in answers if reason is not None}}
        try:
            while len(answers) < len(jobs):
                answers.append(calls.next(timeout=section.left()))
        except multiprocessing.TimeoutError:
            raise OutOfTime(result()) from None
        seconds = round(time.monotonic() - began, 1)
        print(f"{name}: {len(jobs)} norms in {seconds} s, {len(result()['refused'])} refused", flush=True)
        return {**result(), "seconds": seconds}

    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(shapes))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        section.each(cells, measure, least=lambda name: 20.0)


if __name__ == "__main__":
    sys.exit(script(compile_all, __doc__))
