"""Counts bytes: the most that a call has at once, and what autograd keeps between forward and backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch


def saved(function: Callable, known: Iterable[torch.Tensor]) -> int:
    """Bytes of what autograd keeps of a call, each storage once; the storages of `known` are not counted."""
    known = {t.untyped_storage().data_ptr() for t in known}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = function()  # else an address could be given away again, and be counted once for two tensors
    del alive
    return sum(kept.values())


def peak(run: Callable, device: str) -> int:
    """The most bytes that `run` has at once, beyond what was there before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile writes two lines to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
