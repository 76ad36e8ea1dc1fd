"""THE table of what is measured: every public norm, over the shapes of models; how it is called, and what its results are.

A call is written once, for any namespace with functions of fastnorm's names and signatures: `fastnorm` itself, torch's
operators (`operators.py`), or a peer (`providers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from operators import Oracle
from shapes import MODELS, Model, label

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "backward", "both", "eval")
EPS = 1e-5
DROPPED = 0.1
GROUPS = 32
GHOST = 16  # samples


@dataclass(frozen=True)
class Op:
    """`call(functions, training, running, x, *others, weight, bias)`; `moved`: the tensors of x's size that a forward and a
    backward have to read or write."""

    call: Callable
    what: str
    names: tuple[str, ...] = ("y", "dx", "dweight", "dbias")
    moved: tuple[float, float] = (2, 3)
    others: int = 0  # tensors of x's shape beside x
    channels: bool = False  # weight and bias are of dim 1, in float32 beside half inputs
    parameters: Callable = field(default=lambda shape: shape[-1:])
    random: bool = False


def _rows(**extras):
    return lambda f, training, running, x, w, b: f.layer_norm(x, x.shape[-1:], w, b, EPS, **extras)


def _batch(**extras):
    """Of a residual, too, where one is given."""

    def call(f, training, running, x, *rest):
        *residual, w, b = rest
        given = {"residual": residual[0]} if residual else {}
        return f.batch_norm(x, *running, w, b, training, 0.1, EPS, **extras, **given)

    return call


def _sum(**extras):
    return lambda f, training, running, x, r, w, b: f.add_layer_norm(x, r, x.shape[-1:], w, b, EPS, **extras)


def _dropped(f, training, running, x, r, w, b):
    return f.add_layer_norm(x, r, x.shape[-1:], w, b, EPS, **({"dropout": DROPPED} if training else {}))


def counting(x):
    """Padding: of the samples (B, C, L) the first L / B positions count, 2 L / B, and so on; (B, L)."""
    B, _, L = x.shape
    return torch.arange(L, device=x.device) * B < torch.arange(1, B + 1, device=x.device).unsqueeze(1) * L


def _masked_batch(f, training, running, x, w, b):
    return f.batch_norm(x, *running, w, b, training, 0.1, EPS, mask=counting(x))


def _masked_rows(f, training, running, x, w, b):
    return f.layer_norm(x, x.shape[-1:], w, b, EPS, mask=counting(x).unsqueeze(1))


def _ghost(f, training, running, x, w, b):
    return f.ghost_batch_norm(x, *running, w, b, training, 0.1, EPS, virtual_batch_size=GHOST)


def _group(**extras):
    return lambda f, training, running, x, w, b: f.group_norm(x, GROUPS, w, b, EPS, **extras)


_SUM = {"names": ("y", "h", "dx", "dresidual", "dweight", "dbias"), "moved": (4, 4), "others": 1}
_C = {"channels": True, "parameters": lambda shape: shape[1:2]}
_NO_BIAS = ("y", "dx", "dweight")

OPS = {
    "LN": Op(_rows(), "layer_norm"),
    "BN": Op(_batch(), "batch_norm", **_C),
    "RMS": Op(lambda f, t, s, x, w, b: f.rms_norm(x, x.shape[-1:], w, EPS), "rms_norm", names=_NO_BIAS),
    "GN": Op(_group(), "group_norm", parameters=_C["parameters"]),
    "IN": Op(lambda f, t, s, x, w, b: f.instance_norm(x, None, None, w, b, True, 0.1, EPS), "instance_norm",
             parameters=_C["parameters"]),
    "LN2d": Op(lambda f, t, s, x, w, b: f.channels_first_layer_norm(x, w, b, EPS), "channels_first_layer_norm",
               parameters=_C["parameters"]),
    "LN+gelu": Op(_rows(activation="gelu"), "layer_norm"),
    "add+LN": Op(_sum(), "add_layer_norm", **_SUM),
    "add+RMS": Op(lambda f, t, s, x, r, w, b: f.add_rms_norm(x, r, x.shape[-1:], w, EPS), "add_rms_norm",
                  **{**_SUM, "names": ("y", "h", "dx", "dresidual", "dweight")}),
    "drop+add+LN": Op(_dropped, "add_layer_norm", random=True, **{**_SUM, "moved": (4, 5)}),
    "scale+add+LN": Op(lambda f, t, s, x, r, w, b: _sum(layer_scale=w)(f, t, s, x, r, w, b), "add_layer_norm",
                       **{**_SUM, "moved": (4, 6)}),
    "LN*(1+s)+t": Op(lambda f, t, s, x, w, b: f.modulated_layer_norm(x, x.shape[-1:], w, b, eps=EPS), "modulated_layer_norm",
                     names=("y", "dx", "dscale", "dshift"), parameters=lambda shape: (shape[0], 1, shape[-1])),
    "BN+relu": Op(_batch(activation="relu"), "batch_norm", **_C),
    "BN+silu": Op(_batch(activation="silu"), "batch_norm", **_C),
    "BN+add+relu": Op(_batch(activation="relu"), "batch_norm", names=("y", "dx", "dresidual", "dweight", "dbias"), moved=(3, 4),
                      others=1, **_C),
    "GN+silu": Op(_group(activation="silu"), "group_norm", parameters=_C["parameters"]),
    "BN masked": Op(_masked_batch, "batch_norm", **_C),
    "LN masked": Op(_masked_rows, "layer_norm"),
    "BN ghost": Op(_ghost, "ghost_batch_norm", **_C),
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    op: str
    shape: tuple[int, ...]
    layout: str = "dense"  # or "channels_last", or "mT": (B, L, C) seen as (B, C, L)
    model: str = ""  # whose shape it is
    tiny: bool = False  # microseconds of work: the call itself is what is measured

    @classmethod
    def of(cls, model: Model) -> Norm:
        return cls("LN" if model.kind == "rows" else "BN", model.shape, model.layout, model.name, model.tiny)

    def __str__(self):
        return label(self.op, self.shape, self.layout)

    @property
    def how(self) -> Op:
        return OPS[self.op]


SWEEP, ELEMENTS = "sweep over N", 3 << 20  # of each of its norms: 12 MB in float32
_STAGES = ((16, 64, 56, 56), (64, 256, 14, 14), (64, 512, 7, 7))
_FUSED = (
    *((op, shape) for shape in ((1024, 768), (8192, 1024), (4096, 4096)) for op in ("LN+gelu", "add+LN", "RMS", "add+RMS")),
    *((op, shape) for shape in _STAGES for op in ("BN+relu", "BN+add+relu", "BN+silu")),
    *((op, _STAGES[0], "channels_last") for op in ("BN+relu", "BN+add+relu", "BN+silu")),
    ("IN", (8, 128, 32, 32)),
    *(("LN*(1+s)+t", shape) for shape in ((8, 256, 1152), (2, 1024, 3072))),
    *((op, shape) for shape in ((4, 320, 64, 64), (4, 1280, 16, 16)) for op in ("GN", "GN+silu")),
    *(("LN2d", shape) for shape in ((8, 96, 56, 56), (8, 384, 14, 14), (8, 768, 7, 7))),
    *((op, shape) for shape in ((32, 256, 512), (16, 64, 3136)) for op in ("BN masked", "LN masked")),
    *((op, (8192, 1024)) for op in ("drop+add+LN", "scale+add+LN")),
    ("BN ghost", (64, 256, 14, 14)),
    ("BN ghost", (2048, 512)),
)
NORMS = (
    *map(Norm.of, MODELS),
    *(Norm("LN", (ELEMENTS // N, N), model=SWEEP) for N in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)),
    *(Norm(*row) for row in _FUSED),
)


@dataclass
class Inputs:
    """x, those beside it, weight, bias: leaves; running mean and variance; a gradient for each output."""

    tensors: list[torch.Tensor]
    running: tuple[torch.Tensor, torch.Tensor]
    gradients: list[torch.Tensor]

    def wide(self) -> Inputs:
        """In float64."""
        double = lambda tensors: [t.detach().double() for t in tensors]
        tensors = [t.requires_grad_() for t in double(self.tensors)]
        return Inputs(tensors, tuple(double(self.running)), double(self.gradients))


def make(norm: Norm, dtype: str, device: str, seed: int = 0) -> Inputs:
    """Random ones; parameters of a batch norm are float32 beside half inputs, as torch.nn has them."""
    torch.manual_seed(seed)
    own, how = DTYPES[dtype], norm.how
    parameter = torch.float32 if how.channels and own.itemsize == 2 else own
    B, C, *rest = norm.shape if norm.layout == "mT" else (0, 0)
    shape = (B, *rest, C) if norm.layout == "mT" else norm.shape

    def random():
        t = torch.randn(shape, device=device).to(own)
        if norm.layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        return t.mT if norm.layout == "mT" else t

    tensors = [random() for _ in range(1 + how.others)]
    tensors += [torch.randn(how.parameters(norm.shape), device=device).to(parameter) for _ in range(2)]
    C = how.parameters(norm.shape)[-1]
    running = (torch.randn(C, device=device).to(parameter), (torch.rand(C, device=device) + 0.5).to(parameter))
    return Inputs([t.requires_grad_() for t in tensors], running, [random() for _ in range(2)])


def bound(norm: Norm, functions, inputs: Inputs, training: bool, wrap: Callable | None = None) -> Callable:
    """The call without arguments. `wrap` takes the function of tensors that is called, and gives another one."""
    running = (None, None) if training and norm.how.channels else inputs.running
    call = partial(norm.how.call, functions, training, running)
    return partial(wrap(lambda *tensors: call(*tensors)) if wrap else call, *inputs.tensors)


def derivatives(outputs, inputs: Inputs, **options) -> tuple:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = {"allow_unused": True, **options}
    return torch.autograd.grad(outputs, inputs.tensors, inputs.gradients[: len(outputs)], **given)


def results(call: Callable, inputs: Inputs, mode: str) -> list[torch.Tensor]:
    """Outputs, and gradients where the mode has them; random numbers begin anew."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(mode != "eval"):
        outputs = call()
    gradients = derivatives(outputs, inputs) if mode in ("backward", "both") else ()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t.detach() for t in (*outputs, *gradients) if t is not None]


def expected(norm: Norm, inputs: Inputs, mode: str, training: bool):
    """What torch's operators give in this dtype, for the error that they have, and the truth: the same in float64."""
    wide = inputs.wide()
    torchs = results(bound(norm, Oracle(), inputs, training), inputs, mode)
    return torchs, results(bound(norm, Oracle(), wide, training), wide, mode)


# What others may be off by: so many times as much, and so many roundings of the least exact input. Less exact is not wrong.
TIMES, ROUNDINGS = 16, 2


def disagreement(names, ours, torchs, truth, another: torch.dtype | None = None) -> str | None:
    """What differs from the truth by more than twice torch's own error and one unit in the last place; None if nothing.

    In float64 torch is the truth, whose own error is not known: a few units. With the dtype of its x another's results are
    held to TIMES and ROUNDINGS: torch.compile, say, rounds to bfloat16 between the parts of a backward.
    """
    for name, a, b, t in zip(names[: len(truth)], ours, torchs, truth, strict=True):
        error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
        units = 4 if a.dtype == torch.float64 else 1
        largest = t.abs().max().item()
        allowed = 2 * allowed + units * torch.finfo(a.dtype).eps * largest
        if another is not None:
            allowed = TIMES * allowed + ROUNDINGS * torch.finfo(another).eps * largest
        if not error <= allowed:
            return f"{name} is off by {error:.2g}, {allowed:.2g} is allowed"
    return None
