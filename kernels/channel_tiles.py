"""Channels (B, C, S) in memory: how tensors of one shape are cut into tiles, and the pointers to a tile.

A tile is [BLOCK_B * BLOCK_S positions, BLOCK_C channels] with block sizes that suit the first tensor's strides, and every
tensor has its own strides: one kernel serves every layout.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from .. import heuristics
from ..geometry import Channels
from .launch import launch, sm_count, vector

# Which dimension of a tensor has stride 1.
POSITIONS, CHANNELS, NEITHER = 0, 1, 2

# What a new batch size or another stride must not compile anew.
SIZES = ["P", "B", "S_v", "C_v", "x_strides", "dy_strides", "y_strides", "dx_strides"]


@triton.jit
def program_block(C, BLOCK_C: tl.constexpr):
    """Which of the programs of its block of channels a program is, and its first channel; neighbours take neighbouring ones."""
    blocks = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_C


@triton.jit
def tile_count(B, S, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    return (tl.cdiv(B, BLOCK_B) * tl.cdiv(S, BLOCK_S)).to(tl.int32)


@triton.jit
def tile_inside(BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Sample, place [positions, 1] and channel [1, BLOCK_C] within a tile."""
    i = tl.arange(0, BLOCK_B * BLOCK_S)[:, None]
    return (i // BLOCK_S).to(INDEX), (i % BLOCK_S).to(INDEX), tl.arange(0, BLOCK_C)[None, :].to(INDEX)


@triton.jit
def tile_corner(tile, c, S, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    """First sample, place and channel of a tile."""
    across = tl.cdiv(S, BLOCK_S)
    return tile // across * BLOCK_B, tile % across * BLOCK_S, c


@triton.jit
def tile_exists(corner, inside, B, S):
    return (inside[0] < B - corner[0]) & (inside[1] < S - corner[1])


@triton.jit
def tile_at(ptr, strides, corner, inside, FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr):
    """Pointers to a tile; strides come divided by the vector of the fastest dimension. The corner's offset is int64."""
    b, s, c = inside
    INDEX: tl.constexpr = b.dtype
    b0, s0, c0 = tl.cast(corner[0], tl.int64), tl.cast(corner[1], tl.int64), tl.cast(corner[2], tl.int64)
    if FASTEST == 0:
        ptr += b0 * strides[0] * VEC_S + c0 * strides[1] * VEC_S + s0
        return ptr + (b * (tl.cast(strides[0], INDEX) * VEC_S) + c * (tl.cast(strides[1], INDEX) * VEC_S) + s)
    elif FASTEST == 1:
        ptr += b0 * strides[0] * VEC_C + s0 * strides[2] * VEC_C + c0
        return ptr + (b * (tl.cast(strides[0], INDEX) * VEC_C) + s * (tl.cast(strides[2], INDEX) * VEC_C) + c)
    else:
        ptr += b0 * strides[0] + s0 * strides[2] + c0 * strides[1]
        return ptr + (b * tl.cast(strides[0], INDEX) + s * tl.cast(strides[2], INDEX) + c * tl.cast(strides[1], INDEX))


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, c, C):
    mask = c < C
    high = tl.load(mean_ptr + c, mask=mask, other=0.0)
    low = tl.load(mean_ptr + C + c, mask=mask, other=0.0)
    return high, low, tl.load(rstd_ptr + c, mask=mask, other=0.0)


@triton.jit
def update_running(ptr, cols, C, value, momentum, rest):
    old = tl.load(ptr + cols, mask=cols < C, other=0.0).to(value.dtype)
    tl.store(ptr + cols, (old * rest + value * momentum).to(ptr.dtype.element_ty), mask=cols < C)


@dataclass(frozen=True)
class Layout:
    """Tensors of one shape as kernels see them: (B, C, S) with the batch folded into S where one stride serves both."""

    B: int
    C: int
    S: int
    folded: bool
    strides: tuple[tuple[int, int, int], ...]  # in elements, of the batch, the channel and the position
    fastest: tuple[int, ...]
    vec_s: int
    vec_c: int
    itemsize: int
    copied: tuple[bool, ...]  # whether the tensor has no such strides, so that Channels.view copies it

    @classmethod
    def of(cls, shape, strides, itemsizes):
        c = Channels.of(shape)
        inner = [_folded_stride(shape[2:], s[2:]) for s in strides]
        copied = tuple(s is None for s in inner)
        strides = [(c.C * c.S, c.S, 1) if i is None else (*s[:2], i) for s, i in zip(strides, inner, strict=True)]
        B, S = c.B, c.S
        # Whether the batch continues the positions, so that one stride serves both. A batch of one has no stride to tell: it
        # is taken as larger batches of the same layout are, so that it needs no variant of its own.
        continues = lambda b, s: b == S * s if B > 1 else c.C == 1 or s != 1
        folded = S == 1 or all(continues(b, s) for b, _, s in strides)
        if folded:
            strides = [(0, c, b if S == 1 else s) for b, c, s in strides]
            B, S = 1, B * S
        fastest = tuple(_fastest(s, S, c.C) for s in strides)
        itemsize = min(itemsizes)
        of = lambda dim: [s for s, f in zip(strides, fastest, strict=True) if f == dim]
        vec_s = vector(itemsize, S, *(n for b, c, _ in of(POSITIONS) for n in (b, c))) if of(POSITIONS) else 1
        vec_c = vector(itemsize, c.C, *(n for b, _, s in of(CHANNELS) for n in (b, s))) if of(CHANNELS) else 1
        return cls(B, c.C, S, folded, tuple(strides), fastest, vec_s, vec_c, itemsize, copied)

    @property
    def vectors(self):
        """The vector of every tensor's fastest dimension."""
        of = {POSITIONS: self.vec_s, CHANNELS: self.vec_c, NEITHER: 1}
        return [of[f] for f in self.fastest]

    @property
    def narrow(self):
        """Whether a load is narrower than 8 bytes."""
        return min(self.vectors) * self.itemsize < 8

    def divided(self):
        return tuple(tuple(n // v for n in s) for s, v in zip(self.strides, self.vectors, strict=True))

    def index(self, block):
        """The type of offsets within a block of (samples, channels, positions)."""
        span = max(sum((n - 1) * stride for n, stride in zip(block, s, strict=True)) for s in self.strides)
        return tl.int32 if span < 2**31 else tl.int64


def _folded_stride(sizes, strides):
    """The one stride of some dimensions taken as one, or None."""
    dims = [(n, stride) for n, stride in zip(sizes, strides, strict=True) if n != 1]
    if any(outer != n * inner for (_, outer), (n, inner) in pairwise(dims)):
        return None
    return dims[-1][1] if dims else 1


def _fastest(strides, S, C):
    if strides[2] == 1 and S > 1:
        return POSITIONS
    return CHANNELS if strides[1] == 1 or C == 1 else NEITHER


class Plan:
    """The launch of one tile kernel."""

    def __init__(self, layout, device, reading):
        self.layout, self.device = layout, device
        config = heuristics.channel(
            layout.B, layout.C, layout.S, layout.itemsize, sm_count(device), reading, folded=layout.folded,
            channels_fastest=layout.fastest[0] == CHANNELS, narrow=layout.narrow)  # fmt: skip
        self.P, self.fastest, self.strides = config.programs, layout.fastest, layout.divided()
        self.programs = config.programs * heuristics.cdiv(layout.C, config.block_c)
        self.few = config.programs * config.block_c <= heuristics.MERGED_WITH_READING
        self.sizes = (self.P, layout.B, layout.S // layout.vec_s, layout.C // layout.vec_c)
        self.constants = dict(VEC_S=layout.vec_s, VEC_C=layout.vec_c, BLOCK_B=config.block_b, BLOCK_S=config.block_s,
                              BLOCK_C=config.block_c, INDEX=layout.index((config.block_b, config.block_c, config.block_s)),
                              STAGES=config.stages, warps=config.warps, registers=config.registers)  # fmt: skip
        if reading != "sums":
            self.constants["BLOCK_P"] = max(1, heuristics.MERGED_AT_ONCE // config.block_c)

    def launch(self, kernel, *args, **fastest):
        """args end where the kernel takes the sizes."""
        launch(kernel, self.programs, self.device, *args, *self.sizes, **fastest, **self.constants)


@lru_cache(maxsize=1024)
def _plan(shape, strides, itemsizes, device, reading):
    return Plan(Layout.of(shape, strides, itemsizes), device, reading)


def described(tensors):
    """What a plan depends on."""
    return tensors[0].shape, tuple(t.stride() for t in tensors), tuple(t.element_size() for t in tensors)


def planned(*tensors, reading):
    """The plan of the launch, and the tensors as it takes them; the first of them decides the shape of the tile."""
    plan = _plan(*described(tensors), tensors[0].device, reading)
    return plan, as_planned(plan.layout, tensors)


def as_planned(layout, tensors):
    c = Channels.of(tensors[0].shape)
    return [c.view(t) if copied else t for t, copied in zip(tensors, layout.copied, strict=True)]


def like(x):
    """Memory for y or dx."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))
