"""THE table of cases. Every numerics test runs over these; shapes of real models come from the benchmark's table, cut short."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from shapes import MODELS

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT = {F64: "f64", F32: "f32", BF16: "bf16", F16: "f16"}

# Layouts: how a tensor of a given shape comes to lie in memory.
LAYOUTS = {
    "dense": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d),
    "row_strided": lambda t: torch.cat((t, t.flip(-1)), -1)[..., : t.shape[-1]],
    "column_strided": lambda t: torch.stack((t, t.flip(-1)), -1)[..., 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "mT": lambda t: t.mT.contiguous().mT,
    "every_second": lambda t: torch.stack((t, t.flip(0)), 1)[:, 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dims: int = 1  # rows: how many trailing dimensions are normalised
    dtype: torch.dtype = F32
    weight: torch.dtype | None = F32
    bias: torch.dtype | None = F32
    layout: str = "dense"
    offset: float = 0.0  # mean / std of the input
    scale: float = 1.0
    eps: float = 1e-5

    def __str__(self):
        parameters = "".join("-" if p is None else f"-{SHORT[p]}" for p in (self.weight, self.bias))
        numbers = "".join(f"-{n}{v:g}" for n, v, usual in (("offset", self.offset, 0), ("scale", self.scale, 1)) if v != usual)
        dims = f"/{self.dims}" if self.dims != 1 else ""
        return f"{'x'.join(map(str, self.shape))}{dims}-{SHORT[self.dtype]}{parameters}-{self.layout}{numbers}"

    @property
    def normalized_shape(self):
        return self.shape[len(self.shape) - self.dims :]

    def _tensor(self, generator, shape, dtype, around=0.0):
        return (torch.randn(shape, generator=generator, dtype=F64) + around).to(dtype)

    def make(self, parameter_shape, device, draw):
        """x, dy (dense), weight, bias"""
        generator = torch.Generator().manual_seed(prod(self.shape) + 100 * len(str(self)) + draw)
        x = ((torch.randn(self.shape, generator=generator, dtype=F64) + self.offset) * self.scale).to(self.dtype)
        dy = self._tensor(generator, self.shape, self.dtype)
        weight = None if self.weight is None else self._tensor(generator, parameter_shape, self.weight, 1.0).to(device)
        bias = None if self.bias is None else self._tensor(generator, parameter_shape, self.bias).to(device)
        return LAYOUTS[self.layout](x.to(device)), dy.to(device), weight, bias

    def make_rows(self, device="cpu", draw=0):
        return self.make(self.normalized_shape, device, draw)

    def make_channels(self, device="cpu", draw=0):
        return self.make(self.shape[1:2], device, draw)

    def running(self, device="cpu", dtype=None):
        """running_mean, running_var"""
        generator = torch.Generator().manual_seed(1)
        C, dtype = self.shape[1], dtype or self.weight or F32
        mean = torch.randn(C, generator=generator).to(dtype).to(device)
        return mean, (torch.rand(C, generator=generator) + 0.5).to(dtype).to(device)


def _same(dtype):
    return {"dtype": dtype, "weight": dtype, "bias": dtype}


def _options(case):
    """The case with every combination of parameters that is not there."""
    return [replace(case, **missing) for missing in ({"bias": None}, {"weight": None}, {"weight": None, "bias": None})]


def _models(kind, elements):
    """The benchmark's shapes with as few rows or samples as keep the shape's character."""
    for model in MODELS:
        if model.kind != kind or prod(model.shape[1:]) > elements:
            continue
        lead = max(2, min(model.shape[0], elements // prod(model.shape[1:])))
        yield Case((lead, *model.shape[1:]), layout=model.layout)


HALVES = (BF16, F16)
MIXED = [(BF16, F32, F32), (F16, F32, F32), (F32, BF16, F16), (F32, F64, F64), (F64, F32, F32), (F16, BF16, F32)]

# N = 1, around the vector width, primes, one block of rows and more, one register tile and more, up to the chunked kernels.
_ROW_SHAPES = [(1, 1), (3, 1), (2, 2), (5, 7), (8, 10), (9, 15), (4, 16), (6, 17), (40, 31), (70, 24), (33, 64), (5, 127)]
_ROW_SHAPES += [(2, 3, 100), (3, 768), (2, 1000), (1, 1021), (3, 4097), (1, 10241), (2, 33000)]
# The backward of long rows that are read twice, by one program and by two, and beside wider parameters.
_LONG = [((5, 8192), F32), ((9, 10240), F32), ((3, 12288), BF16), ((9, 12288), F32), ((2, 16384), F16)]
ROWS = [
    *(Case(shape, **_same(dtype)) for shape in _ROW_SHAPES for dtype in (F32, BF16)),
    *(Case(shape, **_same(dtype)) for shape in [(8, 10), (6, 17), (33, 64), (2, 1000), (2, 9001)] for dtype in (F64, F16)),
    *(Case((6, 33), dtype=x, weight=w, bias=b) for x, w, b in MIXED),
    *_options(Case((7, 40))),
    *_options(Case((7, 40), **_same(BF16))),
    *(Case((2, 5, 6, 4), dims=d) for d in (2, 3, 4)),
    *(Case((6, 12), layout=layout) for layout in ("row_strided", "column_strided", "transposed", "every_second", "expanded")),
    *(Case((4, 6, 24), layout=layout) for layout in ("row_strided", "transposed", "mT", "every_second")),
    *(Case((3, 8, 5, 6), dims=d, layout="channels_last") for d in (1, 3)),
    Case((2, 4, 2, 3, 8), dims=4, layout="channels_last"),
    Case((6, 24), layout="row_strided", **_same(BF16)),
    Case((5, 96), eps=0.1),
    *(Case((4, 512), offset=offset) for offset in (1e2, 1e4)),
    Case((3, 5000), offset=1e4),
    Case((4, 512), offset=1e2, **_same(F16)),
    *(Case((4, 48), scale=scale) for scale in (1e-4, 1e4)),
    *_models("rows", 4096),
    *(Case(shape, **_same(dtype)) for shape, dtype in _LONG),
    Case((3, 12288), dtype=BF16, weight=F32, bias=F32),
    Case((3, 12288), layout="row_strided", **_same(BF16)),
]

_CHANNEL_SHAPES = [(2, 1), (8, 5), (33, 17), (64, 64), (4, 6, 10), (2, 3, 300), (2, 3, 7, 7), (1, 1, 3, 5), (3, 65, 5, 5)]
_CHANNEL_SHAPES += [(2, 3, 2, 3, 4), (5, 1, 9), (2, 16, 14, 14)]
CHANNELS = [
    *(Case(shape, **_same(dtype)) for shape in _CHANNEL_SHAPES for dtype in (F32, BF16)),
    *(Case(shape, **_same(dtype)) for shape in [(8, 5), (2, 3, 7, 7), (4, 6, 10)] for dtype in (F64, F16)),
    *(Case((3, 4, 5, 5), dtype=x, weight=w, bias=b) for x, w, b in MIXED),
    *_options(Case((4, 6, 5))),
    *_options(Case((4, 6, 5, 3), layout="channels_last", **_same(BF16))),
    *(
        Case((4, 6, 5, 7), layout=layout)
        for layout in ("channels_last", "row_strided", "column_strided", "transposed", "expanded")
    ),
    *(Case((4, 6, 5, 7), layout=layout, **_same(BF16)) for layout in ("channels_last", "every_second", "mT")),
    *(Case((3, 20, 9), layout=layout) for layout in ("mT", "transposed", "row_strided")),
    *(Case((12, 10), layout=layout) for layout in ("mT", "row_strided", "column_strided", "every_second")),
    *(Case((2, 8, 2, 3, 4), layout="channels_last", **_same(dtype)) for dtype in (F32, F16)),
    Case((6, 70, 4, 4), layout="channels_last"),
    *(Case(shape, offset=offset) for shape in [(64, 4, 6), (64, 4, 8, 8)] for offset in (1e2, 1e4)),
    Case((64, 4, 8, 8), layout="channels_last", offset=1e4),
    Case((300, 3), offset=1e4),
    Case((4, 6, 8), eps=0.1),
    *_models("channels", 8192),
]

ROWS, CHANNELS = (list(dict.fromkeys(cases)) for cases in (ROWS, CHANNELS))  # models share shapes

# Each of these takes every way that the Triton kernels have through a training step, and test_channel_ways.py says so.
WAYS = [
    *(Case(shape, layout=layout, **_same(dtype)) for layout in ("dense", "channels_last")
      for shape, dtype in [((3, 1, 7, 7), F32), ((6, 3, 7, 7), BF16), ((4, 5, 7, 7), F32), ((6, 5, 7, 7), F32),
                           ((8, 65, 2, 2), F32)]),
    *(Case((40, C), **_same(dtype)) for C, dtype in [(1, F32), (5, BF16), (65, F32)]),
    *(Case((3, 6, 40), layout=layout) for layout in ("mT", "transposed", "row_strided", "column_strided", "expanded")),
    Case((3, 6, 2, 4, 5), layout="channels_last", **_same(F16)),
    Case((5, 3, 16), **_same(F64)),
    *_options(Case((3, 5, 8, 3), layout="channels_last")),
    # Rows of channels that start anywhere in a vector: one, more than one and less than one tile of the test's long.
    *(Case((3, 8, 7, 7), layout=layout, **_same(BF16)) for layout in ("dense", "every_second", "expanded")),
    *(Case((2, 8, 5, 27), **_same(dtype)) for dtype in (F32, F16)),
    Case((2, 8, 382), **_same(BF16)),  # of some channels the last tile holds nothing
    Case((9, 4, 9)),
    Case((8, 8, 3, 7), offset=1e4),
    *(Case((8, 5, 3, 7), layout=layout, offset=1e4) for layout in ("dense", "channels_last")),
]  # fmt: skip
