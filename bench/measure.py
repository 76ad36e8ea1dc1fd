"""One norm in one dtype: every provider is held to the oracle, and those that match are timed in turn, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from allocated import peak, saved
from norms import Inputs, Norm, bound, derivatives, disagreement, expected, make, results
from providers import OURS, PROVIDERS
from timing import NotCaptured, device_in_turn, host_in_turn, in_turn, ratio, spread

US = "fastnorm"


@dataclass(frozen=True)
class How:
    """On a CPU `wall` time is measured. With a `clock`, that of a device: cold, warm and the host's own."""

    device: str = "cpu"
    threads: int = 1
    rounds: int = 9
    seconds: float = 0.01
    clock: object = None
    memory: bool = True

    HOST_CALLS = 20

    def times(self, functions: dict, within: dict) -> dict[str, dict[str, list[float]]]:
        """Microseconds by state and name, a figure for each round."""
        if self.clock is None:
            return {"wall": in_turn(functions, self.rounds, self.seconds, self.threads, within)}
        times = device_in_turn(functions, self.rounds, self.clock, within)
        return {**times, "host": host_in_turn(functions, self.rounds, self.HOST_CALLS, self.clock, within)}


def sentence(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]


def moved(norm: Norm, mode: str) -> float:
    """Tensors of x's size that have to be read or written."""
    forward, backward = norm.how.moved
    return {"forward": forward, "eval": forward, "backward": backward, "both": forward + backward}[mode]


def timed(call: Callable, inputs: Inputs, mode: str) -> Callable:
    """What is timed of a call; `eval` within `surroundings`, which are no part of it."""
    if mode in ("forward", "eval"):
        return call
    if mode == "both":
        return lambda: derivatives(call(), inputs)
    outputs = call()
    return lambda: derivatives(outputs, inputs, retain_graph=True)


def surroundings(name: str, mode: str) -> Callable:
    """A provider's own, and in `eval` without gradients."""
    if mode != "eval":
        return PROVIDERS[name].within

    @contextlib.contextmanager
    def within():
        with PROVIDERS[name].within(), torch.no_grad():
            yield

    return within


class Subject:
    """A norm in one dtype with its inputs, and what each mode's results should be."""

    def __init__(self, norm: Norm, dtype: str, device: str):
        self.norm, self.dtype = norm, dtype
        self.inputs = make(norm, dtype, device)
        self._expected = {}

    def expected(self, mode: str, training: bool):
        """torch's results and the truth; those of `both` are those of `backward`."""
        key = ("backward" if mode == "both" else mode, training)
        if key not in self._expected:
            self._expected[key] = expected(self.norm, self.inputs, *key)
        return self._expected[key]

    def calls(self, name: str, modes) -> dict[str, Callable]:
        """By mode; training's modes share one call, which is compiled once."""
        provider, found = PROVIDERS[name], {}
        functions = provider.load()
        for training in (True, False):
            wanted = [mode for mode in modes if provider.serves(self.norm.op, mode) and (mode != "eval") == training]
            if wanted:
                call = bound(self.norm, functions, self.inputs, training, provider.wrap)
                found |= dict.fromkeys(wanted, call)
        return found

    def wrong(self, name: str, mode: str, call: Callable) -> str | None:
        """Why a call is not timed. Another's dropout draws other numbers: it is compared without them."""
        training = mode != "eval"
        if training and self.norm.how.random and name not in OURS:
            training, call = False, bound(self.norm, PROVIDERS[name].load(), self.inputs, False)
        another = None if name in OURS else self.inputs.tensors[0].dtype
        try:
            found = results(call, self.inputs, mode)
            return disagreement(self.norm.how.names, found, *self.expected(mode, training), another)
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as e:  # a peer's errors are its own; ours are reported the same way, and the run then fails
            return sentence(e)

    def checked(self, name: str, modes) -> tuple[dict, dict]:
        """The calls of a provider by mode, and for the modes that it is wrong in, or cannot be called in, why."""
        try:
            calls = self.calls(name, modes)
        except Exception as e:
            return {}, dict.fromkeys(modes, sentence(e))
        refused = {mode: reason for mode, call in calls.items() if (reason := self.wrong(name, mode, call))}
        return {mode: call for mode, call in calls.items() if mode not in refused}, refused


def measure(norm: Norm, dtype: str, modes, names, how: How) -> list[dict]:
    """A row for each mode; `names` are the providers, in the order in which they are called."""
    subject = Subject(norm, dtype, how.device)
    calls, refused = {}, {}
    for name in names:
        with PROVIDERS[name].within():
            calls[name], refused[name] = subject.checked(name, modes)
    rows = []
    for mode in modes:
        wrong = {name: reasons[mode] for name, reasons in refused.items() if mode in reasons}
        present = {name: by[mode] for name, by in calls.items() if mode in by}
        rows.append(_row(subject, mode, present, wrong, how))
    return rows


def _row(subject: Subject, mode: str, calls: dict, refused: dict, how: How) -> dict:
    norm, x = subject.norm, subject.inputs.tensors[0].detach()
    row = {"op": norm.op, "shape": norm.shape, "layout": norm.layout, "dtype": subject.dtype, "mode": mode}
    row |= {"model": norm.model, "tiny": norm.tiny, "moved": moved(norm, mode), "bytes": x.numel() * x.element_size()}
    if refused:
        row["refused"] = refused
    if not calls or US in refused:
        return row
    within = {name: surroundings(name, mode) for name in calls}
    functions = {}
    for name, call in calls.items():
        with within[name]():
            functions[name] = timed(call, subject.inputs, mode)
            if how.memory:
                row.setdefault("peak", {})[name] = peak(functions[name], how.device)
                if mode != "eval":
                    row.setdefault("saved", {})[name] = saved(call, subject.inputs.tensors[-2:])
    functions["copy"] = lambda: torch.empty_like(x).copy_(x)
    try:
        times = how.times(functions, within)
    except NotCaptured as e:
        del calls[e.name]  # the others are timed without it
        return _row(subject, mode, calls, {**refused, e.name: sentence(e.__cause__)}, how)
    return {**row, **figures(times)}


def figures(times: dict[str, dict[str, list[float]]]) -> dict:
    """Medians, spreads and ratios, of every state."""
    each = lambda function: {state: function(t) for state, t in times.items()}
    others = lambda t: [name for name in t if name not in ("copy", US)]
    return {
        "us": each(lambda t: {name: median(values) for name, values in t.items()}),
        "spread": each(lambda t: {name: spread(values) for name, values in t.items()}),
        "copies": each(lambda t: {name: ratio(t, name, "copy") for name in t if name != "copy"}),
        "speedup": each(lambda t: {name: ratio(t, name, US) for name in others(t)} if US in t else {}),
    }
