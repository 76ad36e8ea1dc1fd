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

# Which dimension of a tensor has stride 1. SKEWED: that of the positions, but a channel's row may start anywhere (7 x 7). Its
# tiles start at the whole vector before: loads are as wide as any, and what they find beside the row is the sample's own.
POSITIONS, CHANNELS, NEITHER, SKEWED = 0, 1, 2, 3
# Rows of so many positions are skewed although a few more tiles are needed for it.
LONG_ROW = 8192

# What a new batch size, another stride or number must not compile anew.
SIZES = ["P", "B", "S_v", "C_v", *(f"{name}_strides" for name in ("x", "dy", "y", "dx", "residual", "dz")), "alpha"]


@triton.jit
def program_block(C, BLOCK_C: tl.constexpr):
    """Which of the programs of its block of channels a program is, and its first channel; neighbours take neighbouring ones."""
    blocks = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_C


@triton.jit
def tile_span(ptr, S, FASTEST: tl.constexpr):
    """Positions that tiles have to cover so that every channel's S are among them."""
    if FASTEST == 3:
        S += 128 // ptr.dtype.element_ty.primitive_bitwidth - 1
    return S


@triton.jit
def tile_count(B, span, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    return (tl.cdiv(B, BLOCK_B) * tl.cdiv(span, BLOCK_S)).to(tl.int32)


@triton.jit
def tile_inside(BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Sample, place [positions, 1] and channel [1, BLOCK_C] within a tile."""
    i = tl.arange(0, BLOCK_B * BLOCK_S)[:, None]
    return (i // BLOCK_S).to(INDEX), (i % BLOCK_S).to(INDEX), tl.arange(0, BLOCK_C)[None, :].to(INDEX)


@triton.jit
def tile_corner(tile, c, span, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    """First sample, place and channel of a tile."""
    across = tl.cdiv(span, BLOCK_S)
    return tile // across * BLOCK_B, tile % across * BLOCK_S, c


@triton.jit
def tile_places(x_ptr, strides, corner, inside, B, S, C, FASTEST: tl.constexpr):
    """How far places are ahead of positions, by channel; which places exist; and which are loaded."""
    b, place, c = inside
    exists = (b < B - corner[0]) & (c < C - corner[2])
    if FASTEST == 3:
        VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        skew = ((tl.cast(corner[2], tl.int64) + c) * strides[1] % VEC).to(place.dtype)
        loaded = exists & (place < tl.cdiv(S + skew, VEC) * VEC - corner[1])
        position = (place - (skew - corner[1])).to(tl.uint32)  # one that is negative is too large as well
        exists = exists & (position < S)
        return skew, exists, loaded
    else:
        exists = exists & (place < S - corner[1])
        return 0, exists, exists


@triton.jit
def tile_positions(corner, places, B, S, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many positions of a channel a tile holds."""
    start = corner[1] - places[0]
    return tl.minimum(B - corner[0], BLOCK_B) * tl.maximum(tl.minimum(S - start, BLOCK_S) - tl.maximum(-start, 0), 0)


@triton.jit
def tile_at(ptr, strides, corner, inside, FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr):
    """Pointers to positions; strides come divided by the vector of the fastest dimension. The corner's offset is int64."""
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
def _skewed_at(ptr, strides, corner, inside, WHOLE: tl.constexpr):
    """Pointers to places of SKEWED rows; WHOLE: the compiler is told that rows of places start at whole vectors."""
    VEC: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    b, place, c = inside
    row = (tl.cast(corner[2], tl.int64) + c) * strides[1]
    row = row // VEC * VEC if WHOLE else row - row % VEC
    ptr += tl.cast(corner[0], tl.int64) * strides[0] * VEC + corner[1]
    return ptr + row + (b * (tl.cast(strides[0], b.dtype) * VEC) + place)


@triton.jit
def tile_load(ptr, strides, corner, inside, places, FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr):
    """A tile's elements, 0 where there are none; beside a SKEWED row there are others, see `existing`."""
    if FASTEST == 3:
        at = _skewed_at(ptr, strides, corner, inside, True)
    else:
        at = tile_at(ptr, strides, corner, inside, FASTEST, VEC_S, VEC_C)
    return tl.load(at, mask=places[2], other=0.0)


@triton.jit
def existing(tile, places, FASTEST: tl.constexpr):
    """What tile_load gave, with 0 where there is no element of the tile."""
    if FASTEST == 3:
        tile = tl.where(places[1], tile, tl.zeros_like(tile))
    return tile


@triton.jit
def tile_store(ptr, strides, corner, inside, places, tile, FASTEST: tl.constexpr, VEC_S: tl.constexpr, VEC_C: tl.constexpr):
    """Beside a skewed row stands another program's, so that its elements are stored one by one, neighbours by neighbours."""
    if FASTEST == 3:
        at = _skewed_at(ptr, strides, corner, inside, False)
    else:
        at = tile_at(ptr, strides, corner, inside, FASTEST, VEC_S, VEC_C)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=places[1])


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, c, C):
    mask = c < C
    high = tl.load(mean_ptr + c, mask=mask, other=0.0)
    low = tl.load(mean_ptr + C + c, mask=mask, other=0.0)
    return high, low, tl.load(rstd_ptr + c, mask=mask, other=0.0)


@triton.jit
def update_running(ptr, cols, C, old, value, momentum):
    """`old` is what the pointer, where there is one, has been loaded from."""
    if ptr is not None:
        new = old.to(value.dtype) * (1.0 - momentum) + value * momentum
        tl.store(ptr + cols, new.to(ptr.dtype.element_ty), mask=cols < C)


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
        if not folded and vec_s * itemsize < 8 and _skewed(strides, fastest, itemsizes, c.C, S):
            fastest = (SKEWED,) * len(fastest)
        return cls(B, c.C, S, folded, tuple(strides), fastest, vec_s, vec_c, itemsize, copied)

    @property
    def vectors(self):
        """The elements of one load from every tensor."""
        of = {POSITIONS: self.vec_s, CHANNELS: self.vec_c, NEITHER: 1, SKEWED: 16 // self.itemsize}
        return [of[f] for f in self.fastest]

    @property
    def span(self):
        """See tile_span."""
        return self.S + (self.vectors[0] - 1 if self.fastest[0] == SKEWED else 0)

    @property
    def width(self):
        """Bytes of the narrowest load."""
        return self.itemsize * min(self.vectors)

    def divided(self):
        if self.fastest[0] == SKEWED:
            return tuple((b // v, c, s) for (b, c, s), v in zip(self.strides, self.vectors, strict=True))
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


def _skewed(strides, fastest, itemsizes, C, S):
    """Whether whole vectors can be loaded from where no row starts: samples are made of such, and tiles hold little else."""
    vec = 16 // itemsizes[0]
    span, block = S + vec - 1, heuristics.power_of_two(S)
    return (
        set(fastest) == {POSITIONS}
        and len(set(itemsizes)) == 1
        and len({c % vec for _, c, _ in strides}) == 1
        and all(b % vec == 0 and ((C - 1) * c + S) % vec == 0 for b, c, _ in strides)
        and (span <= block or S >= LONG_ROW)
    )


class Plan:
    """The launch of one tile kernel."""

    def __init__(self, layout, device, reading, there, fused):
        self.layout, self.device, self.copied = layout, device, spread(layout.copied, there)
        sums, first = reading in heuristics.SUMS, layout.fastest[0]
        config = heuristics.channel(
            layout.B, layout.C, layout.span, layout.itemsize, sm_count(device), reading, folded=layout.folded,
            channels_fastest=first == CHANNELS, skewed=first == SKEWED, turned=len(set(layout.fastest)) > 1,
            width=layout.width, fused=fused)  # fmt: skip
        self.P, self.fastest, self.strides = config.programs, spread(layout.fastest, there), spread(layout.divided(), there)
        self.programs = config.programs * heuristics.cdiv(layout.C, config.block_c)
        self.few = config.programs * config.block_c <= heuristics.MERGED_WITH_READING
        self.sizes = (self.P, layout.B, layout.S // layout.vec_s, layout.C // layout.vec_c)
        index = layout.index((config.block_b, config.block_c, config.block_s))
        if first == SKEWED and not sums and config.block_s >= 32 * config.warps:
            index = tl.int64  # a thread's places, a pass of the warps apart, are then numbers in its instructions
        self.constants = dict(VEC_S=layout.vec_s, VEC_C=layout.vec_c, BLOCK_B=config.block_b, BLOCK_S=config.block_s,
                              BLOCK_C=config.block_c, INDEX=index, warps=config.warps,
                              registers=config.registers)  # fmt: skip
        self.constants |= {"HELD": config.held} if reading == "y" else {"STAGES": config.stages}
        if not sums:
            self.constants["BLOCK_P"] = max(1, heuristics.MERGED_AT_ONCE // config.block_c)

    def launch(self, kernel, *args, **fastest):
        """args end where the kernel takes the sizes."""
        launch(kernel, self.programs, self.device, *args, *self.sizes, **fastest, **self.constants)


@lru_cache(maxsize=1024)
def _plan(shape, strides, itemsizes, device, reading, there, fused):
    return Plan(Layout.of(shape, strides, itemsizes), device, reading, there, fused)


def described(tensors):
    """What a plan depends on; tensors that are not there are None."""
    present = [t for t in tensors if t is not None]
    return tensors[0].shape, tuple(t.stride() for t in present), tuple(t.element_size() for t in present)


def presence(tensors):
    return tuple(t is not None for t in tensors)


def spread(values, there):
    """The values of the tensors that are there, and None for those that are not."""
    values = iter(values)
    return tuple(next(values) if is_there else None for is_there in there)


def planned(*tensors, reading, fused=False):
    """The plan of the launch, and the tensors as it takes them; the first of them decides the shape of the tile."""
    plan = _plan(*described(tensors), tensors[0].device, reading, presence(tensors), fused)
    return plan, as_planned(plan, tensors)


def as_planned(plan, tensors):
    c = Channels.of(tensors[0].shape)
    return [c.view(t) if copied else t for t, copied in zip(tensors, plan.copied, strict=True)]


def is_fused(residual, activation):
    return residual is not None or activation != "identity"


def like(x):
    """Memory for y or dx."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))
