"""Section `compile`: what `bench` is going to run, compiled in as many processes as there are cores.

Triton and Inductor keep what they compile on disk, so that `bench`, which times in one process, finds it there.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import product

import torch
from gpu_bench import DTYPES, SHAPES
from gpu_state import OutOfTime, Section, script
from norms import Norm, bound, make, results
from providers import PROVIDERS, absent

WORTH_IT = ("fastnorm", "compile")  # what compiles for longer than it runs, in the order of value
MOST_PROCESSES = 16  # each has tensors of its own on the GPU


def one_of_many() -> None:
    """Inductor would start processes of its own in each of ours."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def first_call(name: str, norm: Norm, dtype: str, device: str) -> str | None:
    """A norm forward and backward; why it did not run, which is for `bench` to judge."""
    provider = PROVIDERS[name]
    try:
        inputs = make(norm, dtype, device)
        results(bound(norm, provider.load(), inputs, True, provider.wrap), inputs, "backward")
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return None


def compile_all(section: Section, device: str, shapes=SHAPES, dtypes=DTYPES, names=WORTH_IT) -> None:
    """A row is a provider."""

    def measure(name):
        began, done, refused = time.monotonic(), 0, {}
        processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(shapes))
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), one_of_many)
        calls = {pool.submit(first_call, name, *norm, device): norm for norm in product(shapes, dtypes)}
        try:
            for call in as_completed(calls, timeout=section.left()):
                reason, done = call.result(), done + 1
                if reason is not None:
                    refused[" ".join(map(str, calls[call]))] = reason
        except TimeoutError:
            raise OutOfTime({"norms": done, "refused": refused}) from None
        except BrokenProcessPool:
            return {"norms": done, "refused": refused, "failed": "a process died while it compiled"}
        finally:
            for process in multiprocessing.active_children():
                process.kill()  # what still compiles is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
        seconds = round(time.monotonic() - began, 1)
        print(f"{name}: {done} norms in {seconds} s, {len(refused)} refused", flush=True)
        return {"norms": done, "refused": refused, "seconds": seconds}

    section.each([name for name in names if absent(name) is None], measure, least=lambda name: 20.0)


if __name__ == "__main__":
    sys.exit(script(compile_all, __doc__))
