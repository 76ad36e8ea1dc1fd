"""Hypothesis' strategies for calls that every function takes."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from cases import BF16, F16, F32, F64
from hypothesis import strategies as st

from fastnorm.activations import ACTIVATIONS

from .calls import Call, Held

# Around the widths of vectors, of blocks of rows and of programs.
WIDTHS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
SIZES = st.one_of(st.integers(1, 9), st.integers(1, 40), st.sampled_from(WIDTHS))
LONG = st.sampled_from((768, 1021, 1023, 1024, 1025, 2049, 4096, 4097))
DTYPES = st.sampled_from((F32, BF16, F16, F64))
END = st.one_of(
    st.sampled_from([name for name in ACTIVATIONS if name != "identity"]),
    st.sampled_from([("leaky_relu", 0.2), ("leaky_relu", 1.5), ("elu", 0.5)]),
)
some = lambda strategy: st.none() | strategy
yes = st.booleans()


def one_in(n):
    return st.integers(0, n - 1).map(lambda i: i == n - 1)


@st.composite
def shapes(draw, least, most, elements):
    """Of `least` to `most` dimensions and at most so many elements; any dimension may be the long one."""
    dims = draw(st.integers(least, most))
    shape, left = [1] * dims, elements
    for d in draw(st.permutations(range(dims))):
        shape[d] = min(draw(LONG if draw(one_in(8)) else SIZES), max(left, 1))
        left //= shape[d]
    return tuple(shape)


@st.composite
def strides(draw, shape):
    """None where dense; else permuted, with gaps, expanded or overlapping; and the number of elements in front."""
    start = draw(st.sampled_from((0, 0, 0, 1, 2, 3, 5)))
    way = draw(st.sampled_from(("dense", "dense", "dense", "last", "order", "gaps", "expanded", "windows")))
    if way == "dense" or not shape:
        return None, start
    if way == "windows":
        return tuple(draw(st.integers(0, 3)) for _ in shape), start
    order = list(range(len(shape)))  # from the outermost in memory
    if way == "last" and len(shape) > 2:
        order = [0, *range(2, len(shape)), 1]
    elif way in ("order", "gaps"):
        order = draw(st.permutations(order))
    gaps = {d: draw(st.sampled_from((1, 1, 2, 3))) if way == "gaps" else 1 for d in order}
    at, out = 1, [0] * len(shape)
    for d in reversed(order):
        out[d] = at * gaps[d]
        at = out[d] * shape[d]
    if way == "expanded":
        out = [0 if draw(yes) else s for s in out]
    return tuple(out), start


@st.composite
def helds(draw, shape, dtype, grad=True):
    lie, start = draw(strides(shape))
    return Held(shape, dtype, lie, start, draw(yes) if grad is None else grad)


def beside(shape, dtype):
    """A parameter of any dtype, mostly x's or float32, dense or not, that learns or not."""
    return st.one_of(st.just(dtype), st.just(dtype), st.just(F32), DTYPES).flatmap(lambda d: parameters(shape, d))


@st.composite
def parameters(draw, shape, dtype):
    if draw(st.integers(0, 3)):
        return Held(shape, dtype, grad=draw(one_in(4).map(lambda no: not no)))
    return draw(helds(shape, dtype, grad=None))


@st.composite
def gradients_of_y(draw, shape, dtype):
    return draw(some(st.just(Held(shape, dtype)) | helds(shape, dtype, grad=False)))


@st.composite
def numbers(draw, dtype):
    """eps, and what x is drawn from. Half a float16's range is of x's, of 1 / std and of their products with parameters."""
    narrow = dtype == F16
    offset = draw(st.sampled_from((0.0, 0.0, 0.0, 1.0, 30.0) if narrow else (0.0, 0.0, 0.0, 1.0, 100.0, 1e4)))
    spread = draw(st.sampled_from((1.0, 1.0, 0.1, 8.0) if narrow else (1.0, 1.0, 1e-4, 1e-2, 30.0, 1e4)))
    eps = draw(st.sampled_from((1e-5, 1e-5, 1e-3, 0.1, 1, 1e-6 if narrow else 1e-12)))
    values = draw(st.sampled_from(("normal", "normal", "normal", "few", "outlier")))
    return {"offset": offset, "spread": spread, "eps": eps, "values": values, "seed": draw(st.integers(0, 999))}


@st.composite
def rows(draw, function, elements):
    shape, dtype = draw(shapes(1, 5, elements)), draw(DTYPES)
    dims = draw(st.integers(1, min(len(shape), 3)))
    n = shape[len(shape) - dims :]
    more = {
        "x": draw(helds(shape, dtype, None)),
        "dy": draw(gradients_of_y(shape, dtype)),
        "dims": dims,
        **draw(numbers(dtype)),
    }
    more["weight"] = draw(some(beside(n, dtype)))
    if "rms" not in function:
        more["bias"] = draw(some(beside(n, dtype)))
    elif draw(yes):
        more["eps"] = None
    more["activation"] = draw(some(END))
    if function.startswith("add_"):
        more |= draw(branches(function, shape, dtype, n))
    elif function == "modulated_layer_norm":
        lead = tuple(1 if i else s for i, s in enumerate(shape[: len(shape) - dims]))
        more |= {name: draw(parameters((*lead, *n), draw(st.sampled_from((dtype, dtype, F32))))) for name in ("scale", "shift")}
    else:
        more |= draw(extras(shape, dtype, masks=function == "layer_norm"))
    return Call(function, **more)


@st.composite
def extras(draw, shape, dtype, masks, without=None):
    """Of a norm: a residual, a mask or lengths, or recompute. `without` is the dimension of x that a mask lacks."""
    way = draw(st.sampled_from(("", "", "residual", "recompute", "mask", "lengths")))
    counted = tuple(s for i, s in enumerate(shape) if i != without)
    if way == "recompute":
        return {"recompute": True, "activation": draw(st.sampled_from((None, "leaky_relu", ("leaky_relu", 0.2))))}
    out = {"residual": draw(helds(shape, dtype, None))} if way == "residual" or (way and draw(yes)) else {}
    if not masks or way not in ("mask", "lengths") or (way == "lengths" and len(counted) < 2):
        return out
    if way == "lengths":
        return out | {"lengths": tuple(draw(st.integers(0, counted[1])) for _ in range(counted[0]))}
    dims = len(counted) if without is not None else draw(st.integers(1, len(counted)))
    mask = tuple(1 if draw(one_in(4)) else s for s in counted[:dims])
    return out | {"mask": mask, "share": draw(st.sampled_from((0.6, 0.6, 0.2, 0.0, 1.0)))}


@st.composite
def branches(draw, function, shape, dtype, n):
    out = {"residual": draw(helds(shape, dtype, None)), "used": draw(st.sampled_from(("y", "h", "yh", "yh")))}
    if draw(yes):
        return out
    out["dropout"] = draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
    out["wide"] = draw(yes)
    if out["wide"] and draw(yes):
        out["residual"] = draw(helds(shape, torch.promote_types(dtype, F32), None))
    if draw(yes):
        out["row_scale"] = Held(shape[: draw(st.integers(0, len(shape) - len(n)))], draw(st.sampled_from((dtype, F32))))
    if draw(yes):
        out["layer_scale"] = draw(parameters(n, dtype))
    return out


def _trains(shape, channels):
    """Whether torch normalises it: more than one value per channel."""
    return prod(shape) > shape[channels]


@st.composite
def channels(draw, function, elements):
    module = function == "BatchNorm"
    least = 3 if function == "instance_norm" else 2
    shape, dtype = draw(shapes(least, 5, elements)), draw(DTYPES)
    axis = draw(st.integers(-len(shape), len(shape) - 1)) if module and draw(yes) else None
    c = 1 if axis is None else range(len(shape))[axis]
    C = shape[c : c + 1]
    x = draw(helds(shape, dtype, None))
    more = {"x": x, "dy": draw(gradients_of_y(shape, dtype)), "axis": axis, **draw(numbers(dtype))}
    more |= {name: draw(some(beside(C, dtype))) for name in ("weight", "bias")}
    more["running"] = draw(some(st.one_of(st.just(dtype), st.just(F32), DTYPES)))
    more["training"] = not draw(one_in(4)) or (more["running"] is None and not module)
    if not _trains(shape, c) or (function == "instance_norm" and prod(shape[2:]) == 1):
        more |= {"training": False, "running": more["running"] or F32}
    more["momentum"] = draw(st.sampled_from((0.1, 0.1, 0.0, 1.0, 0.37, *([None] * 2 if module else []))))
    if function == "instance_norm":
        return Call(function, **more)
    more["activation"] = draw(some(END))
    if function == "ghost_batch_norm" or (module and draw(one_in(3))):
        alone = shape[c] * max(1, shape[1 if c == 0 else 0]) == prod(shape)  # a ghost batch has two values a channel or more
        more["ghosts"] = draw(st.integers(2 if alone else 1, max(2, shape[1 if c == 0 else 0] + 1)))
        more["residual"] = draw(some(helds(shape, dtype, None)))
    else:
        more |= draw(extras(shape, dtype, True, c))
    return Call(function, **more)


@st.composite
def groups(draw, function, elements):
    shape, dtype = draw(shapes(2, 5, elements)), draw(DTYPES)
    C = shape[1:2]
    more = {"x": draw(helds(shape, dtype, None)), "dy": draw(gradients_of_y(shape, dtype)), **draw(numbers(dtype))}
    more |= {name: draw(some(beside(C, dtype))) for name in ("weight", "bias")} | {"activation": draw(some(END))}
    more["small"] = not draw(one_in(5))
    if function == "group_norm":
        more["groups"] = draw(st.sampled_from([g for g in range(1, C[0] + 1) if C[0] % g == 0]))
        more["small"] &= prod(shape) > more["groups"]  # torch refuses a single value, and none are left to kernels
    if function == "group_norm" and (more["x"].strides is not None or not more["small"] or len(shape) < 3):
        # Torch 2.13 has these: without x's gradient it wants a device of no tensor, and of channels_last memory of nobody's.
        more["x"] = replace(more["x"], grad=True)
    return Call(function, **more)


STRATEGIES = dict.fromkeys(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "modulated_layer_norm"), rows)
STRATEGIES |= dict.fromkeys(("batch_norm", "ghost_batch_norm", "BatchNorm", "instance_norm"), channels)
STRATEGIES |= dict.fromkeys(("group_norm", "channels_first_layer_norm"), groups)


@st.composite
def calls(draw, function, elements, many=0):
    """Of at most so many elements, a tenth of them of at most `many`."""
    most = many if many and draw(one_in(10)) else draw(st.sampled_from((64, elements)))
    return draw(STRATEGIES[function](function, most))


def emptied(call):
    """The call without its samples, in one dtype, in which torch takes it; None where dimension 0 of x is not of samples."""
    B, dtype = call.x.shape[0], call.x.dtype
    if call.channels == 0 or call.dropout or (call.kind == "rows" and call.dims == len(call.x.shape)):
        return None

    def without(held):
        if held is None or held.shape[:1] != (B,):
            return held and replace(held, dtype=dtype)
        return Held((0, *held.shape[1:]), dtype, grad=held.grad)

    given = {name: without(getattr(call, name)) for name in ("x", "residual", "scale", "shift", "row_scale", "dy")}
    same = {name: replace(p, dtype=dtype) for name in ("weight", "bias", "layer_scale") if (p := getattr(call, name))}
    mask = call.mask and (0 if call.mask[0] == B else 1, *call.mask[1:])
    given |= same | {"running": call.running and dtype}
    return replace(call, **given, mask=mask, lengths=None if call.lengths is None else ())
