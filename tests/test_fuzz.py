"""Random calls of every public function, of any shape, strides, dtypes and options, by every backend, held to the truth.

In CI the same few hundred of them each time; `make fuzz` draws others for an hour.
"""

import os
import time
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import AT_SPEED
from fuzzing import wrecks
from fuzzing.draws import STRATEGIES, calls, emptied
from fuzzing.found import FOUND, FOUND_WRECKS
from fuzzing.verdict import check, check_empty, count
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture import providers

import fastnorm
from fastnorm import activations, reference

SECONDS = float(os.environ.get("FASTNORM_FUZZ_SECONDS", 0))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
AT_ONCE = 50  # examples between two looks at the clock


@dataclass(frozen=True)
class Budget:
    """Of a backend: examples in CI, the most elements of an example, of one in ten of them, and whether each is run again."""

    examples: int
    elements: int
    many: int = 0
    again: bool = False


AT_FULL_SPEED, REFERENCE = Budget(100, 3000, 70000, again=True), Budget(40, 3000)
INTERPRETED, EMULATED = Budget(10, 300), Budget(30, 600)
if not SECONDS:  # else numbers in the sources of whatever is imported by then are drawn, too: not the same examples each time
    providers._get_local_constants = lambda: providers._local_constants
TESTS = (len(STRATEGIES) + 1) * 4  # that share FASTNORM_FUZZ_SECONDS


def budget(request):
    """Of the backend that the fixture `served` has put in force."""
    if "emulated" in request.node.name:
        return EMULATED
    if "triton" in request.node.name and not any(p.id.startswith("triton") for p in AT_SPEED):
        return INTERPRETED
    return REFERENCE if "reference" in request.node.name else AT_FULL_SPEED


def fuzz(strategy, holds, examples, start, fixed=True, phases=tuple(Phase)):
    """
    Raises:
        AssertionError: one of so many examples does not hold; the smallest one like it is in its notes, and can be copied to
            fuzzing/found.py.
    """
    options = {"derandomize": fixed, "database": None, "deadline": None, "print_blob": True, "phases": phases}
    fuzzed = given(strategy)(lambda example: holds(example))
    seed(start)(settings(max_examples=examples, suppress_health_check=list(HealthCheck), **options)(fuzzed))()


def fuzz_by_clock(strategy, holds, examples, name):
    """So many examples, always the same ones; with FASTNORM_FUZZ_SECONDS others, until this test's share is over."""
    if not SECONDS:
        return fuzz(strategy, holds, examples, zlib.crc32(name.encode()))
    ends, done = time.monotonic() + SECONDS * WORKERS / TESTS, 0
    count.clear()
    while time.monotonic() < ends:
        start = int.from_bytes(os.urandom(4), "big")
        print(f"{name}: seed {start}, after {done} examples")
        fuzz(strategy, holds, AT_ONCE, start, fixed=False)
        done += AT_ONCE
    print(f"{name}: {done} examples, {dict(count)}")


@pytest.mark.parametrize("function", STRATEGIES)
def test_calls(function, served, request):
    b = budget(request)
    drawn = calls(function, b.elements, b.many)
    fuzz_by_clock(drawn, lambda call: check(call, b.again), b.examples, request.node.name)


def test_invalid_calls(served, request):
    """Beside torch.nn.functional."""
    fuzz_by_clock(wrecks.wrecks(), wrecks.check, 4 * budget(request).examples, request.node.name)


@pytest.mark.parametrize("function", STRATEGIES)
def test_empty_inputs(function, served):
    """Which are torch's, in the dtypes that it takes."""
    drawn = calls(function, 300).map(emptied).filter(lambda call: call is not None)
    fuzz(drawn, check_empty, 20, 0)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, served):
    check(FOUND[name])


@pytest.mark.parametrize("name", FOUND_WRECKS)
def test_invalid_calls_that_were_found(name, served):
    wrecks.check(FOUND_WRECKS[name])


def result(name, i, change):
    """A function of the reference backend whose result i is changed."""
    real = getattr(reference, name)

    def changed(*args, **options):
        out = list(real(*args, **options))
        out[i] = None if out[i] is None else change(out[i])
        return tuple(out)

    return name, changed


def argument(name, i, change):
    real = getattr(reference, name)
    return name, lambda *args, **options: real(*(change(a) if k == i else a for k, a in enumerate(args)), **options)


def but_one(t):
    """Its last element is forgotten."""
    t = t.clone()
    t.view(-1)[-1:] = 0
    return t


def all_true(mask):
    return torch.ones_like(mask)


def without_low(mean):
    return torch.stack((mean[0], torch.zeros_like(mean[1])))


def in_place(x):
    read = x.clone()
    x.data.zero_()
    return read


def as_channels_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t


# Mistakes in a backend, each with a function whose random calls have to notice it.
MUTANTS = {
    "dweight is a hundredth too large": ("layer_norm", result("row_bwd", 1, lambda t: t * 1.01)),
    "dbias without its last element": ("layer_norm", result("row_bwd", 2, but_one)),
    "eps is ignored": ("layer_norm", argument("row_fwd", 3, lambda eps: 1e-30)),
    "rstd a few units too large": ("layer_norm", ("rstd_of", lambda *a, of=reference.rstd_of: of(*a) * (1 + 16 * 2.0**-23))),
    "y in other strides": ("layer_norm", result("row_fwd", 0, as_channels_first)),
    "x is changed": ("layer_norm", argument("row_fwd", 0, in_place)),
    "h is rounded in float16": ("add_layer_norm", result("row_fused_fwd", 1, lambda h: h.half().to(h.dtype))),
    "h has no gradient": ("add_layer_norm", argument("row_fused_bwd", 1, lambda dh: None)),
    "what dropout keeps is as it was": (
        "add_rms_norm",
        ("_dropped", lambda t, r, p, seed, of=reference._dropped: of(t, r, p, seed) * (1 - p)),
    ),
    "the mean is one number": ("batch_norm", result("moments", 1, without_low)),
    "momentum is a hundredth too large": ("batch_norm", ("updated", lambda r, v, m, of=reference.updated: of(r, v, m * 1.01))),
    "the variance is the biased one": (
        "ghost_batch_norm",
        ("updated", lambda r, v, m, of=reference.updated: of(r, v * 0.95, m)),
    ),
    "everything counts": ("batch_norm", argument("channel_masked_stats", 1, all_true)),
    "everything counts in rows": ("layer_norm", argument("row_masked_fwd", 1, all_true)),
    "dresidual is dy": ("batch_norm", ("_grad_epilogue", lambda dy, *_: dy)),
    "c1 is a hundredth too large": (
        "group_norm",
        ("grad_input", lambda g, x, r, c1, c2, of=reference.grad_input: of(g, x, r, c1 * 1.01, c2)),
    ),
    "a group too few": ("group_norm", result("group_fwd", 0, but_one)),
    "a position too few": ("channels_first_layer_norm", result("position_fwd", 0, but_one)),
    "a scale for all": (
        "modulated_layer_norm",
        ("_by_rows", lambda p, rows, dtype: None if p is None else p.reshape(-1)[: rows.N].to(dtype)),
    ),
    "instances share their statistics": ("instance_norm", result("channel_fwd", 0, lambda y: y * 0.999)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name, monkeypatch):
    """Each within the examples of CI."""
    function, (of, changed) = MUTANTS[name]
    monkeypatch.setattr(reference, of, changed)
    with fastnorm.use_backend("reference"), pytest.raises(AssertionError):
        fuzz(calls(function, 300), lambda call: check(call, again=False), 60, 0, phases=[Phase.generate])


def test_a_wrong_slope_is_noticed(monkeypatch):
    """Of the activations, which have a table of their own here."""
    wrong = replace(activations.ACTIVATIONS["silu"], slope=lambda z, _: torch.sigmoid(z))
    monkeypatch.setitem(activations.ACTIVATIONS, "silu", wrong)
    activated = calls("rms_norm", 300).map(lambda call: replace(call, activation="silu", recompute=False))
    with fastnorm.use_backend("reference"), pytest.raises(AssertionError):
        fuzz(activated, lambda call: check(call, again=False), 60, 0, phases=[Phase.generate])
