"""Whether fastnorm's results of a call are right: values, dtypes, shapes, strides, what was changed and what may not be."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from unittest.mock import patch

import numpy as np
import torch
from torch._prims_common import suggest_memory_format

from fastnorm import channels_first, group

from .calls import Call
from .peers import differentiated, dropped, in_torch, is_plain, of_torch, ours, outcome, torchs
from .truth import truth

LIMITS = [(group, "LEAST"), (group, "LEAST_POSITIONS"), (group, "LEAST_PLAIN_POSITIONS")]
LIMITS += [(channels_first, "LEAST"), (channels_first, "LEAST_POSITIONS")]
count = Counter()  # of what has been held to the truth, for whoever watches


@contextmanager
def sizes(call):
    """Calls that are `small` go to the kernels, whatever they would gain."""
    with ExitStack() as stack:
        for module, name in LIMITS if call.small else ():
            stack.enter_context(patch.object(module, name, 1))
        if call.small:
            stack.enter_context(patch.object(channels_first, "pays", lambda *_: True))
        yield


def bits(t):
    """All of the memory that a tensor lies in, beside it as well."""
    storage = t.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def check(call: Call, again=True):
    """
    Raises:
        AssertionError: something is wrong with what fastnorm makes of the call.
    """
    with sizes(call):
        t = call.make()
        before = {name: bits(v) for name, v in vars(t).items() if isinstance(v, torch.Tensor)}
        results = outcome(call, t, ours)
        if isinstance(results, tuple):
            return refused(call, t, results, before)
        after = {name: bits(getattr(t, name)) for name in before}
        results |= {f"running_{name}": getattr(t, name) for name in ("mean", "var") if call.running is not None}
        if again:
            second = call.make()
            repeated = differentiated(call, second, ours)
            repeated |= {f"running_{name}": getattr(second, name) for name in ("mean", "var") if call.running is not None}
    fresh = call.make()
    for name, was in before.items():
        if name not in ("mean", "var") or not call.training:
            assert torch.equal(was, after[name]), f"{name} was changed"
    if again:
        for name, r in results.items():
            assert torch.equal(bits_of(r), bits_of(repeated[name])), f"{name}: another result from the same call"
    formal(call, fresh, results)
    values(call, fresh, results)


def refused(call, t, raised, before):
    """What torch refuses as well, in the same words; nothing has been changed then."""
    count["refused"] += 1
    theirs = [of_torch(call, call.make())]
    if call.function == "group_norm":  # which is torch's in wider dtypes where torch refuses those given
        theirs.append(outcome(call, call.make(), torchs))
    theirs = [o if isinstance(o, tuple) else "does not" for o in theirs]
    assert raised in theirs, f"raises {raised}, and torch {theirs}"
    with torch.no_grad():
        in_backward = not isinstance(outcome(replace(call, used=""), call.make(), ours), tuple)
    for name, was in before.items():
        if not in_backward or name not in ("mean", "var"):
            assert torch.equal(was, bits(getattr(t, name))), f"{name} was changed by a call that raises"


def bits_of(t):
    return t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def formal(call, t, results):
    """Which results there are, their dtypes, shapes and strides."""
    wanted, y = call.leaves(t), results["y"]
    through = {"y": set(wanted), "h": set(wanted) & {"x", "residual", "layer_scale"}}
    expected = set().union(*(through[used] for used in call.used.replace("yh", "y"))) if wanted else set()
    expected = {f"d{name}" for name in expected}
    found = {name for name in results if name.startswith("d")}
    assert found == expected, f"gradients of {sorted(found)} instead of {sorted(expected)}"
    like = {"y": t.x, "h": t.residual} | {f"d{name}": v for name, v in wanted.items()}
    for name, r in results.items():
        if name.startswith("running"):
            continue
        dtype = {"y": t.x.dtype, "h": call.stream}.get(name, like[name].dtype)
        assert r.dtype == dtype, f"{name} is {r.dtype} instead of {dtype}"
        assert r.shape == like[name].shape, f"{name} is {tuple(r.shape)} instead of {tuple(like[name].shape)}"
        assert type(r) is torch.Tensor
    peer = in_torch(call, t) if is_plain(call) else {}
    for name in ("y", "dx"):
        if name in results and (promised := _strides(call, t, peer.get(name))) is not None and results[name].numel():
            strides = results[name].stride()
            assert _moves(t.x, strides) == _moves(t.x, promised), f"{name} has strides {strides} instead of {promised}"
    assert y.requires_grad == bool(wanted)


def _moves(x, strides):
    """Those of dimensions along which there is anything."""
    return [stride for n, stride in zip(x.shape, strides, strict=True) if n > 1]


def _strides(call, t, peer):
    """Those that torch.nn or our documentation promises; None where neither does."""
    if call.kind == "rows":
        return torch.empty(t.x.shape).stride() if call.mask is None and call.lengths is None else None
    if call.function == "batch_norm":
        return torch.empty_like(t.x, memory_format=suggest_memory_format(t.x)).stride()
    return None if peer is None else peer.stride()


def values(call, t, results):
    if call.dropout:
        t.kept = dropped(call, t)
    exact = truth(call, t)
    if "h" in results:
        held(call, t, "h", results["h"], truth(call, t, results["h"])["h"])
        exact = truth(call, t, results["h"])
    missing = {name for name in results if name not in exact and not name.startswith("running")}
    assert not missing, f"the truth lacks {missing}"
    for name, r in results.items():
        if name in exact:
            held(call, t, name, r, exact[name])
        else:
            assert torch.equal(r, getattr(t, name.removeprefix("running_"))), f"{name} was updated"


def may_be_torchs(call):
    """Whether the documentation leaves this call to torch's own operators."""
    shape, strided = call.x.shape, call.x.strides is not None
    if call.function == "group_norm":
        return strided or not call.small or len(shape) < 3
    if call.function == "instance_norm":
        return strided or not call.training or prod(shape[2:]) == 1
    return False


def held(call, t, name, r, near):
    """Within the bound of truth.py and one rounding to r's dtype; where torch's operators may be at work, each of which rounds,
    as near as they come to the truth and one unit in the last place is near enough."""
    info, got = torch.finfo(r.dtype), r.detach().double().numpy()
    near = near.rounded(info)
    off = np.abs(got - near.v)
    counted = np.isfinite(near.v) & (np.abs(near.v) + near.t < info.max)
    count["numbers"] += got.size
    if not (over := counted & ~(off <= near.t)).any():
        return
    peer = in_torch(call, t).get(name) if may_be_torchs(call) else None
    theirs = np.inf if peer is None else np.abs(np.where(counted, peer.detach().double().numpy() - near.v, 0)).max()
    largest = np.abs(np.where(counted, near.v, 0)).max()
    count["left to torch's own error"] += 1
    allowed = 0 if peer is None else theirs + info.eps * largest
    if np.where(counted, off, 0).max() <= allowed:
        return
    i = tuple(int(n) for n in np.unravel_index(np.argmax(np.where(over, off / near.t, 0)), off.shape))
    what = f"{name}{list(i)} is {got[i]:.9g} instead of {float(near.v[i]):.9g}, off by {float(off[i]):.3g}"
    beyond = f"{over.sum()} of {over.size} are beyond it"
    raise AssertionError(
        f"{what}, where the bound is {float(near.t[i]):.3g}, and torch's own error {float(theirs):.3g}; {beyond}"
    )


def check_empty(call):
    """Results of torch's shapes and dtypes where there is nothing to normalise, or its exception.

    Raises:
        AssertionError: they are others.
    """
    with sizes(call):
        found = outcome(call, call.make(), ours)
    expected = of_torch(call, call.make())
    if isinstance(found, tuple) or isinstance(expected, tuple):
        assert found == expected, f"raises {found}, and torch {expected if isinstance(expected, tuple) else 'does not'}"
        return
    alike = lambda results: {name: (r.shape, r.dtype) for name, r in results.items()}
    assert alike(found) == alike(expected)
    assert all(r.eq(0).all() for name, r in found.items() if name.startswith("d"))
