"""The two geometries that every norm is a reshape onto.

Rows (M, N): statistics per row (layer norm). Channels (B, C, S): statistics per channel over B and S (batch norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rows:
    """M rows of N normalised elements."""

    M: int
    N: int

    @classmethod
    def of(cls, shape, N: int) -> Rows:
        """Fold everything in front of the last N elements into rows; N >= 1."""
        return cls(prod(shape) // N, N)

    def view(self, x):
        """x as (M, N); copies only where no single row stride and no single column stride describe it."""
        return x.reshape(self.M, self.N)


@dataclass(frozen=True)
class Channels:
    """B samples of C channels with S positions each: dim 1 is the channel, S = 1 for (B, C) inputs."""

    B: int
    C: int
    S: int

    @classmethod
    def of(cls, shape) -> Channels:
        return cls(shape[0], shape[1], prod(shape[2:]))

    @property
    def count(self) -> int:
        """Elements of one channel."""
        return self.B * self.S

    def view(self, x):
        """x as (B, C, S); copies only where the spatial dimensions do not fold into one stride."""
        return x.reshape(self.B, self.C, self.S)


def around(shape, axis: int) -> tuple[int, ...]:
    """The shape (B, C, S) of a tensor whose channels are dimension `axis`; (B, C) where nothing comes after them."""
    axis = range(len(shape))[axis]
    before, after = prod(shape[:axis]), prod(shape[axis + 1 :])
    return (before, shape[axis]) if axis == len(shape) - 1 else (before, shape[axis], after)
