"""Calls of torch.nn.functional's norms of which one argument is another than it should be, mostly one that torch refuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from hypothesis import strategies as st

import fastnorm

from .calls import Call, Held
from .draws import parameters, shapes
from .peers import PLAIN, plain_arguments
from .verdict import bits, sizes

TENSORS = {
    "as it is": lambda v: v,
    "empty": lambda v: v[..., :0],
    "no samples": lambda v: v[:0],
    "of integers": lambda v: v.detach().nan_to_num().long(),
    "complex": lambda v: v.detach().to(torch.complex64),
    "of fewer dimensions": lambda v: v[0],
    "of more dimensions": lambda v: v.unsqueeze(0),
    "a number": lambda v: v.flatten()[0],
    "twice as long": lambda v: torch.cat((v, v), -1),
    "elsewhere": lambda v: v.detach().to("meta"),
    "none": lambda v: None,
    "no tensor": lambda v: 1.0,
    "learning": lambda v: v.detach().requires_grad_(),
}
NUMBERS = {
    "none": lambda v: None,
    "negative": lambda v: -9 - v,
    "zero": lambda v: 0,
    "a word": lambda v: "1",
    "an int": lambda v: 3,
}
NUMBERS |= {"half": lambda v: v + 0.5, "a list": lambda v: [v], "a tensor": lambda v: torch.tensor(v)}
SHAPES = {
    "shorter": lambda v: v[1:],
    "longer": lambda v: (2, *v),
    "another": lambda v: (*v[:-1], v[-1] + 1),
    "none": lambda v: None,
}
SHAPES |= {"a list": list, "an int": lambda v: v[-1], "of floats": lambda v: tuple(map(float, v)), "negative": lambda v: (-1,)}


def ways(argument):
    if isinstance(argument, torch.Tensor):
        return TENSORS
    return SHAPES if isinstance(argument, tuple) else NUMBERS


@dataclass(frozen=True)
class Wreck:
    call: Call
    position: int  # of the argument that is changed
    how: str

    def arguments(self):
        out = list(plain_arguments(self.call, self.call.make()))
        out[self.position] = ways(out[self.position])[self.how](out[self.position])
        return out


@st.composite
def wrecks(draw):
    function, dtype = draw(st.sampled_from(PLAIN)), draw(st.sampled_from((F32, F32, BF16, F16, F64)))
    rows = function in ("layer_norm", "rms_norm")
    shape = draw(shapes(1 if rows else 2, 5, 200))
    dims = draw(st.integers(1, len(shape)))
    of = shape[len(shape) - dims :] if rows else shape[1:2]
    given = {"x": Held(shape, dtype, start=draw(st.integers(0, 3)), grad=draw(st.booleans())), "dims": dims}
    given |= {name: draw(st.none() | parameters(of, dtype)) for name in ("weight", "bias")}
    if function in ("batch_norm", "instance_norm"):
        given |= {"running": draw(st.sampled_from((None, dtype))), "training": draw(st.booleans())}
    call = Call(function, **given, groups=draw(st.integers(1, 4)), small=draw(st.booleans()))
    arguments = plain_arguments(call, call.make())
    position = draw(st.sampled_from([i for i, a in enumerate(arguments) if a is not None]))
    return Wreck(call, position, draw(st.sampled_from(sorted(ways(arguments[position])))))


def outcome(module, wreck):
    """The result, or what is raised and the first line of what is said; and which arguments that changed."""
    arguments = wreck.arguments()
    before = [bits(a) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else None for a in arguments]
    try:
        result = getattr(module, wreck.call.function)(*arguments)
    except Exception as e:
        result = type(e), str(e).splitlines()[0]
    pairs = enumerate(zip(arguments, before, strict=True))
    return result, {i for i, (a, was) in pairs if was is not None and not torch.equal(bits(a), was)}


def check(wreck: Wreck):
    """Torch's exception in torch's words, and its result where it has one; what raises leaves the running statistics alone, but
    where torch's own function changes them before it finds out.

    Raises:
        AssertionError: it is not so.
    """
    with sizes(wreck.call):
        ours, changed = outcome(fastnorm, wreck)
    theirs, by_torch = outcome(F, wreck)
    if isinstance(theirs, tuple) or isinstance(ours, tuple):
        assert isinstance(ours, tuple), f"torch raises {theirs}, and fastnorm does not"
        assert ours == theirs, f"raises {ours}, and torch {theirs if isinstance(theirs, tuple) else 'does not'}"
        assert changed <= by_torch, f"arguments {changed - by_torch} were changed by a call that raises"
        return
    assert changed == by_torch, f"arguments {changed} were changed, and {by_torch} by torch"
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    assert ours.requires_grad == theirs.requires_grad
    if ours.device.type == "cpu" and ours.numel():
        near = 64 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near, equal_nan=True)
