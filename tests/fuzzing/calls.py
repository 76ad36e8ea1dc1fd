"""What a call is: a few numbers, from which its tensors are made. Its repr makes it again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from types import SimpleNamespace

import torch

GRADIENTS = ("x", "weight", "bias", "residual", "scale", "shift", "layer_scale")


class _Short:
    """The fields that are not as usual."""

    def __repr__(self):
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def _repr_pretty_(self, printer, _):
        """Hypothesis' printer would write out every field."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Held(_Short):
    """A tensor and where it lies: `strides` may be None for dense, 0, or such that elements share memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    strides: tuple[int, ...] | None = None
    start: int = 0  # elements in front of the first, which is therefore not aligned
    grad: bool = False

    def make(self, values):
        """A view of memory that is NaN elsewhere, with these values, (*shape); what shares memory has the last of them."""
        strides = contiguous(self.shape) if self.strides is None else self.strides
        place = torch.full((), self.start)
        for dim, (n, stride) in enumerate(zip(self.shape, strides, strict=True)):
            place = place + (torch.arange(n) * stride).view(-1, *[1] * (len(self.shape) - dim - 1))
        end = int(place.max()) + 1 if place.numel() else self.start
        memory = torch.full((end + 3,), float("nan"), dtype=self.dtype)
        memory[place.flatten()] = values.to(self.dtype).flatten()
        return memory.as_strided(self.shape, strides, self.start).detach().requires_grad_(self.grad)


def contiguous(shape):
    return tuple(prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True, repr=False)
class Call(_Short):
    function: str
    x: Held
    weight: Held | None = None
    bias: Held | None = None
    residual: Held | None = None
    scale: Held | None = None
    shift: Held | None = None
    row_scale: Held | None = None
    layer_scale: Held | None = None
    dy: Held | None = None  # None: of ones that are one element, as from y.sum()
    dims: int = 1  # rows: how many trailing dimensions are normalised
    running: torch.dtype | None = None  # of the running statistics
    training: bool = True
    momentum: float | None = 0.1
    eps: float | None = 1e-5
    activation: str | tuple | None = None
    mask: tuple[int, ...] | None = None  # its shape
    share: float = 0.6  # of the mask's elements that count
    lengths: tuple[int, ...] | None = None
    groups: int = 1
    ghosts: int = 0  # virtual_batch_size
    axis: int | None = None  # of a module's channels
    dropout: float = 0.0
    wide: bool = False  # residual_in_fp32
    recompute: bool = False
    used: str = "y"  # of y and h, the results that gradients go through
    small: bool = True  # the kernels take inputs that would be left to torch for their size
    offset: float = 0.0  # mean / std of x
    spread: float = 1.0  # std of x
    values: str = "normal"
    seed: int = 0

    @property
    def kind(self):
        return KINDS[self.function]

    @property
    def normalized_shape(self):
        return self.x.shape[len(self.x.shape) - self.dims :]

    @property
    def channels(self):
        """The dimension of x that has them."""
        return 1 if self.axis is None else range(len(self.x.shape))[self.axis]

    @property
    def branched(self):
        """Whether something happens to a branch on its way onto the stream."""
        return bool(self.dropout or self.wide or self.row_scale or self.layer_scale)

    @property
    def alpha(self):
        """The activation's name and number."""
        name, *number = self.activation if isinstance(self.activation, tuple) else (self.activation or "identity",)
        return name, float(number[0] if number else {"leaky_relu": 0.01, "elu": 1.0}.get(name, 0.0))

    @property
    def stream(self):
        """The dtype of h."""
        return torch.promote_types(self.x.dtype, torch.float32) if self.wide else self.x.dtype

    def make(self):
        """Its tensors by name, None where there is none."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
        x = draw(self.x.shape)
        if self.values == "few":  # of a few values, among them 0
            x = x.round()
        elif self.values == "outlier" and x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] *= 1e3
        t = SimpleNamespace(x=self.x.make((x + self.offset) * self.spread))
        around = {"weight": 1.0, "row_scale": 2.0}
        for name in ("weight", "bias", "residual", "scale", "shift", "row_scale", "layer_scale"):
            held = getattr(self, name)
            setattr(t, name, None if held is None else held.make(draw(held.shape) + around.get(name, 0.0)))
        t.dy = torch.ones((), dtype=self.x.dtype).expand(self.x.shape) if self.dy is None else self.dy.make(draw(self.dy.shape))
        t.dh = draw(self.x.shape).to(self.stream)
        channels = () if self.kind != "channels" else (self.x.shape[self.channels],)
        t.mean, t.var = (None, None) if self.running is None else (draw(channels), draw(channels).square() + 0.25)
        t.mean, t.var = (None if s is None else s.to(self.running) for s in (t.mean, t.var))
        t.mask = None if self.mask is None else torch.rand(self.mask, generator=generator) < self.share
        t.lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)
        return t

    def leaves(self, t):
        """What gradients are asked for, by name."""
        return {name: v for name in GRADIENTS if (v := getattr(t, name)) is not None and v.requires_grad}


KINDS = dict.fromkeys(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "modulated_layer_norm"), "rows")
KINDS |= dict.fromkeys(("batch_norm", "ghost_batch_norm", "BatchNorm", "instance_norm"), "channels")
KINDS |= {"group_norm": "groups", "channels_first_layer_norm": "positions"}
