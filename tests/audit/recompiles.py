"""What is compiled anew when nothing but the number of rows or samples changes."""

import json
import sys
from itertools import islice

from torch import float16, float32

from . import grid
from .dryrun import record

BATCHES = (2, 16, 1, 3, 4, 5, 7, 8, 12, 15, 17, 24, 31, 32, 33, 48, 64, 100, 128, 257)
NEEDS = ((True, True, True), (True, False, True))
CALLS = {
    "rows": lambda M: grid.rows(M, 1000, float16, float32, None, NEEDS),
    "short rows": lambda M: grid.rows(M, 10, float32, float32),
    "odd rows": lambda M: grid.rows(M, 77, float16, float32, None, NEEDS),
    "long rows": lambda M: grid.rows(M, 20000, float16, float32),
    # Batches of one layer that fit a slab and batches that do not are different kernels, and so are those with few partial rows
    # and with many, and those that L2 holds and that it does not: each of these keeps to one side.
    "NCHW": lambda B: grid.channels((B, 6, 130, 130), "dense", float16, float32),
    "large NCHW": lambda B: grid.channels((B + 60, 32, 130, 130), "dense", float16, float32),
    "odd NCHW": lambda B: grid.channels((B, 3, 131, 129), "dense", float32, float32),
    "NCHW of rows that start anywhere": lambda B: grid.channels((min(B, 200), 8, 131, 129), "dense", float16, float32),
    "channels_last": lambda B: grid.channels((min(B, 64), 24, 130, 130), "channels_last", float16, float32),
    "many channels_last": lambda B: grid.channels((B % 40 + 20, 512, 26, 20), "channels_last", float16, float32),
    "slab NCHW": lambda B: grid.channels((B, 8, 2, 2), "dense", float32, float16),
    "slab of rows that start anywhere": lambda B: grid.channels((B, 4, 5), "dense", float32, float16),
    "odd slab": lambda B: grid.channels((B, 5, 7), "dense", float32, float32),
    "rows in parts": lambda M: grid.parted_rows(4 * M + 4, 1000, float16, float32, grid.FUSED_ROWS[0], parts=M + 1),
    "rows in few parts": lambda M: grid.parted_rows(6 * M, 1000, float32, float32, grid.FUSED_ROWS[0], parts=3),
    "split rows in parts": lambda M: grid.parted_rows(6 * M, 20000, float16, float32, grid.FUSED_ROWS[0], parts=3),
    "groups": lambda B: grid.groups((B, 64, 10, 10), 8, float16, float32, "silu"),
    "large groups": lambda B: grid.groups((B, 64, 40, 40), 8, float16, float32, "silu"),
    "positions": lambda B: grid.positions((B, 64, 10, 10), float16, float32, "silu"),
    "few positions": lambda B: grid.positions((B, 96, 3, 3), float32, float32, "silu"),
    "positions of many channels": lambda B: grid.positions((B, 3000, 4, 4), float16, float32, "silu"),
    "positions without channels' rows": lambda B: grid.positions((B, 1000, 1), float16, float32, "silu"),
    "masked": lambda B: grid.masked((B, 6, 130, 130), "dense", float16, float32),
    "masked channels_last": lambda B: grid.masked((min(B, 64), 24, 130, 130), "channels_last", float16, float32),
    "masked NC": lambda B: grid.masked((B, 65), "dense", float32, float32),
    "masked rows": lambda M: [
        grid.masked_rows(6 * M, 1000, R, P, float16, float32) for R, P in ((M, 1), (M, 1000), (6 * M, 8))
    ],
    "split masked rows": lambda M: [grid.masked_rows(M, 20000, M, P, float16, float32) for P in (1, 20000, 32)],
    "branches": lambda B: [
        grid.branches((B, 20, 1000), float16, float32, row_scales, True, 0.1 / B) for row_scales in (None, "rows", "samples")
    ],
    "branches that are dropped alone": lambda B: grid.branches((B, 100, 768), float32, float32, None, False, 1 - 0.5 / B),
    "branches of rows that vectors do not divide": lambda B: grid.branches((8 * B, 4, 77), float16, float16, "rows", True, 0.1),
    "slab NC": lambda B: grid.channels((B, 65), "dense", float32, float32),
}


def late(call, batches, arch="sm_90"):
    """Kernels that a batch after the second compiled; how many were compiled before."""
    batches = iter(batches)
    with record(arch, []) as compiled:
        for batch in islice(batches, 2):
            call(batch)
        early = len(compiled)
        for batch in batches:
            call(batch)
    return sorted({c.kernel for c in compiled[early:]}), early


def main():
    found = {name: late(call, BATCHES) for name, call in CALLS.items()}
    found["rows, 1000 batches"] = late(lambda M: grid.rows(M, 1000, float32, float32), (2, 16, *range(1, 999)))
    return found


if __name__ == "__main__":
    sys.exit(print(json.dumps(main())))
