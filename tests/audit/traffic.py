"""The bytes that every op moves, counted in Triton's interpreter and put through a model of the L2.

A launch's accesses are recorded program by program in sectors of 32 bytes, and replayed as a GPU would run them: as many
programs side by side as 1024 threads per SM allow, access by access. A load misses where its sector was never touched, or where
more than the L2 holds has been touched since; a store costs its bytes once, unless the same sector was stored a short while
ago. The L2 is a GPU's 50 MB, divided by as much as its 132 SMs are.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import fastnorm.kernels as K
import numpy as np
import torch
from triton.runtime import interpreter as triton_interpreter

from .grid import modules

THREADS = 1024  # of one SM
SECTOR, PAGE = 32, 1 << 15  # bytes; sectors
MOST = 1.15  # times the ideal


class Memory:
    """Counts what comes from and goes to DRAM; `moved` is everything that passes the L2."""

    def __init__(self, size: int):
        self.size, self.clock = size, 0
        self.read = self.written = self.moved = 0
        fresh = lambda: np.full((2, PAGE), -(1 << 60))
        self.pages = defaultdict(fresh)  # page -> clocks of each sector's last touch and last store

    def touch(self, is_store: bool, sectors):
        self.moved += SECTOR * len(sectors)
        cuts = np.flatnonzero(np.diff(sectors // PAGE)) + 1
        for part in np.split(sectors, cuts):
            touched, stored = self.pages[int(part[0]) // PAGE]
            at = part % PAGE
            age = self.clock - touched[at]
            if is_store:
                self.written += SECTOR * int((self.clock - stored[at] > self.size).sum())
                stored[at] = self.clock
            else:
                self.read += SECTOR * int((age > self.size).sum())
            # What was touched a moment ago pushes nothing out.
            self.clock += SECTOR * int((age > self.size // 16).sum())
            touched[at] = self.clock


class _Recorder:
    """The accesses of one launch: program -> [(is_store, sectors)]."""

    def __init__(self, memory, sms):
        self.memory, self.sms, self.programs = memory, sms, defaultdict(list)

    def access(self, builder, is_store, pointers, mask):
        at = np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data)]
        if at.size:
            self.programs[tuple(builder.grid_idx)].append((is_store, np.unique(at.astype(np.int64) // SECTOR)))

    def replay(self, warps):
        side_by_side = self.sms * max(1, THREADS // (32 * warps))
        programs = list(self.programs.values())
        self.programs.clear()
        for first in range(0, len(programs), side_by_side):
            wave = programs[first : first + side_by_side]
            for step in range(max(map(len, wave))):
                for accesses in wave:
                    if step < len(accesses):
                        self.memory.touch(*accesses[step])


def count(run, sms: int) -> Memory:
    """All that the kernels launched by `run` move, with a cold cache, on a GPU of `sms` SMs."""
    l2 = (50 << 20) * sms // 132
    memory = Memory(l2)
    recorder = _Recorder(memory, sms)
    builder, executor = triton_interpreter.InterpreterBuilder, triton_interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def masked_load(self, pointers, mask, *rest):
        recorder.access(self, False, pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        recorder.access(self, True, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launch(self, *args, num_warps, **kwargs):
        call(self, *args, num_warps=num_warps, **kwargs)
        recorder.replay(num_warps)

    with ExitStack() as stack:
        patch = lambda *args, **kwargs: stack.enter_context(mock.patch.object(*args, **kwargs))
        patch(builder, "create_masked_load", masked_load)
        patch(builder, "create_masked_store", masked_store)
        patch(executor, "__call__", launch)
        for module in modules():
            if hasattr(module, "sm_count"):
                patch(module, "sm_count", return_value=sms)
        K.forget()  # what the kernels keep was chosen for another GPU
        run()
    K.forget()
    return memory


@dataclass(frozen=True)
class Op:
    """`ideal`: how many times the bytes of x must go through DRAM."""

    name: str
    ideal: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "dense"
    sms: int = 1

    @property
    def least(self) -> float:
        """What is read twice is read from its end the second time, which the L2 may still hold."""
        return 0.95 if self.ideal == ONCE[self.name] else 0.75


# Tensors that an op reads and writes. Addend, residual, h and their gradients are as many more.
ONCE = {"row_fwd": 2, "row_bwd": 3, "evaluation": 2, "channel_fwd": 2, "channel_bwd": 3, "row_fused_fwd": 5, "row_fused_bwd": 6,
        "row_parted_fwd": 2, "row_parted_bwd": 3, "group_fwd": 2, "group_bwd": 3, "position_fwd": 2, "position_bwd": 3,
        "masked_stats": 1, "masked_grad": 3, "row_masked_fwd": 2, "row_masked_bwd": 3, "row_masked_fwd_columns": 2,
        "row_masked_bwd_columns": 3, "branch_fwd": 3, "branch_bwd": 2, "branch_bwd_columns": 3,
        "fused_evaluation": 3, "frozen_bwd": 5, "channel_fused_fwd": 3, "channel_fused_bwd": 5}  # fmt: skip
PARTS, GROUPS = 8, 4
BF16, F32 = torch.bfloat16, torch.float32
# Larger than the L2 by as much as it takes, and with few SMs no larger: a program takes the interpreter milliseconds.
_ROWS = (((2048, 64), F32), ((256, 1024), BF16), ((32, 8192), BF16))
# A slab; and larger than the L2 of one SM, in every layout.
_SLAB = (((32, 64, 7, 7), "dense"), ((4, 64, 24, 24), "dense"))
_LARGE = (((4, 256, 12, 12), "channels_last"), ((576, 256), "dense"), ((4, 4, 160, 160), "dense"))
# The same for the L2 of 2 SMs.
_LARGER = (((8, 256, 12, 12), "channels_last"), ((1152, 256), "dense"), ((8, 4, 160, 160), "dense"))
# In two passes: x once more, and backward what dz is made of, which with a residual is stored between them.
_TWICE = (("channel_fwd", 3), ("channel_bwd", 5), ("channel_fused_fwd", 4), ("channel_fused_bwd", 7))
# With a mask of rows, and of columns of each.
_MASKED_ROWS = "row_masked_fwd", "row_masked_bwd", "row_masked_fwd_columns", "row_masked_bwd_columns"
OPS = (
    *(Op(name, ONCE[name], *row) for row in _ROWS for name in ("row_fwd", "row_bwd", "row_fused_fwd", "row_fused_bwd")),
    # Enough SMs that parameters are little beside the L2. Split rows are read twice where the L2 does not hold all of them.
    Op("row_fwd", 2, (100, 20000), BF16, sms=16),
    Op("row_bwd", 3, (60, 9000), BF16, sms=16),
    Op("row_bwd", 5, (150, 9000), BF16),
    # Long rows are read twice, the second time from where they have just been; by one program, and by two.
    Op("row_bwd", 3, (32, 8192), F32),
    Op("row_bwd", 3, (64, 12288), F32, sms=2),
    Op("row_fused_fwd", 5, (40, 20000), BF16, sms=16),
    Op("row_fused_bwd", 6, (40, 9000), BF16, sms=16),
    Op("row_fused_bwd", 6, (32, 4096), F32),
    *(Op(name, ONCE[name], (256, 1024), BF16) for name in ("row_parted_fwd", "row_parted_bwd")),
    # A group that a tile holds; several that the L2 holds, which are read twice; and larger ones.
    *(Op(name, ONCE[name], (32, 64, 7, 7), F32) for name in ("group_fwd", "group_bwd")),
    *(Op(name, ONCE[name], (8, 64, 24, 24), F32, sms=16) for name in ("group_fwd", "group_bwd")),
    *(Op(name, ideal, (4, 8, 160, 160), F32) for name, ideal in (("group_fwd", 3), ("group_bwd", 5))),
    # All channels of a position in one tile, whatever the positions of a sample are; and in several, which the L2 holds.
    *(Op(name, ONCE[name], shape, dtype) for shape, dtype in (((8, 64, 24, 24), F32), ((32, 128, 7, 7), BF16))
      for name in ("position_fwd", "position_bwd")),
    *(Op(name, ONCE[name], (12, 1536, 8, 8), BF16, sms=4) for name in ("position_fwd", "position_bwd")),
    *(Op(name, ONCE[name], *row, sms=2) for row in (*_ROWS, ((150, 1001), F32))
      for name in ("branch_fwd", "branch_bwd", "branch_bwd_columns")),
    *(Op(name, ONCE[name], shape, dtype, layout) for shape, layout in _LARGE for dtype in (F32, BF16)
      for name in ("masked_stats", "masked_grad")),
    *(Op(name, ONCE[name], *row) for row in (*_ROWS, ((32, 4096), F32)) for name in _MASKED_ROWS),
    *(Op(name, ONCE[name], (60, 20000 if "fwd" in name else 9000), BF16, sms=16) for name in _MASKED_ROWS),
    *(Op(name, ONCE[name], shape, F32, layout) for shape, layout in _LARGE
      for name in ("evaluation", "fused_evaluation", "frozen_bwd")),
    *(Op(name, ONCE[name], shape, F32, layout) for shape, layout in _SLAB for name, _ in _TWICE),
    *(Op(name, ideal, shape, F32, layout, sms=2) for shape, layout in _LARGER for name, ideal in _TWICE),
)  # fmt: skip


def _run(op: Op):
    """The call to count; what it needs is made without being counted."""
    x = torch.randn(op.shape).to(op.dtype)
    if op.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    rows = op.name.startswith(("row", "branch"))
    N = x.shape[-1] if rows else x.shape[1]
    weight, bias, running = torch.randn(N), torch.randn(N), (torch.randn(N), torch.rand(N))
    mean, rstd = torch.zeros(2, x.numel() // N if rows else N), torch.ones(x.numel() // N if rows else N)
    dy, residual, addend, need = x.clone(), x.clone(), x.clone(), (True, torch.float32, torch.float32)
    parted, made = weight.repeat(PARTS).view(PARTS, N), lambda n: (torch.zeros(2, n), torch.ones(n))
    groups, positions = made(GROUPS * len(x)), made(x.numel() // N)
    row_scale, seed = torch.rand(len(x)), torch.tensor([1])
    mask = torch.rand(len(x), *x.shape[2:]) < 0.7
    of_rows, of_columns = torch.rand(len(x), 1) < 0.7, torch.rand(len(x), N) < 0.7
    fwd = lambda training: K.channel_fwd(x, weight, bias, *running, training, 0.1, 1e-5)
    fused_fwd = lambda training: K.channel_fused_fwd(x, weight, bias, residual, "relu", 0.0, *running, training, 0.1, 1e-5)
    fused_bwd = lambda training, need: K.channel_fused_bwd(
        dy, x, residual, weight, bias, "relu", 0.0, mean, rstd, training, need
    )
    runs = {
        "row_fwd": lambda: K.row_fwd(x, weight, bias, 1e-5, N),
        "row_bwd": lambda: K.row_bwd(dy, x, weight, mean, rstd, need),
        "row_fused_fwd": lambda: K.row_fused_fwd(x, addend, weight, bias, residual, "silu", 0.0, 1e-5, N),
        "row_fused_bwd": lambda: K.row_fused_bwd(dy, addend, x, residual, weight, bias, "silu", 0.0, mean, rstd, (*need, True)),
        "row_parted_fwd": lambda: K.row_fused_fwd(x, None, parted, parted, None, "silu", 0.0, 1e-5, N),
        "row_parted_bwd": lambda: K.row_fused_bwd(dy, None, x, None, parted, parted, "silu", 0.0, mean, rstd, (*need, False)),
        "group_fwd": lambda: K.group_fwd(x, weight, bias, "silu", 0.0, 1e-5, GROUPS),
        "group_bwd": lambda: K.group_bwd(dy, x, weight, bias, "silu", 0.0, *groups, need),
        "position_fwd": lambda: K.position_fwd(x, weight, bias, "silu", 0.0, 1e-5),
        "position_bwd": lambda: K.position_bwd(dy, x, weight, bias, "silu", 0.0, *positions, need),
        "masked_stats": lambda: K.channel_masked_stats(x, mask),
        "masked_grad": lambda: K.channel_masked_grad(dy, x, mask, mean, rstd, weight, rstd, rstd),
        "row_masked_fwd": lambda: K.row_masked_fwd(x, of_rows, weight, bias, 1e-5, N),
        "row_masked_bwd": lambda: K.row_masked_bwd(dy, x, of_rows, weight, mean, rstd, need),
        "row_masked_fwd_columns": lambda: K.row_masked_fwd(x, of_columns, weight, bias, 1e-5, N),
        "row_masked_bwd_columns": lambda: K.row_masked_bwd(dy, x, of_columns, weight, mean, rstd, need),
        "branch_fwd": lambda: K.branch_fwd(x, addend, row_scale, weight, 0.1, seed, x.dtype),
        "branch_bwd": lambda: K.branch_bwd(dy, None, row_scale, weight, 0.1, seed, x.dtype, None),
        "branch_bwd_columns": lambda: K.branch_bwd(dy, x, row_scale, weight, 0.1, seed, x.dtype, weight.dtype),
        "evaluation": lambda: fwd(False),
        "channel_fwd": lambda: fwd(True),
        "channel_bwd": lambda: K.channel_bwd(dy, x, weight, mean, rstd, True, need),
        "fused_evaluation": lambda: fused_fwd(False),
        "frozen_bwd": lambda: fused_bwd(False, (True, None, None, True)),
        "channel_fused_fwd": lambda: fused_fwd(True),
        "channel_fused_bwd": lambda: fused_bwd(True, (*need, True)),
    }
    return x, runs[op.name]


def ratios(op: Op) -> tuple[float, float]:
    """DRAM traffic and everything that passes the L2, both over the ideal."""
    x, run = _run(op)
    memory = count(run, op.sms)
    ideal = op.ideal * x.numel() * x.element_size()
    if op.name.startswith("masked"):
        ideal += x.numel() // x.shape[1]  # a byte of the mask for all channels
    elif "masked" in op.name:
        ideal += x.numel() if op.name.endswith("columns") else len(x)
    return (memory.read + memory.written) / ideal, memory.moved / ideal


def main() -> int:
    print(f"{'op':17} {'shape':20} {'dtype':9} {'layout':14} {'ideal':>5} {'DRAM':>6} {'L2':>6}  verdict")
    bad = 0
    for op in OPS:
        dram, moved = ratios(op)
        bad += dram > MOST
        shape, dtype = "x".join(map(str, op.shape)), str(op.dtype).removeprefix("torch.")
        verdict = "ok" if dram <= MOST else f"more than {MOST} times the ideal"
        print(f"{op.name:17} {shape:20} {dtype:9} {op.layout:14} {op.ideal:4}e {dram:6.2f} {moved:6.2f}  {verdict}", flush=True)
    return bool(bad)


if __name__ == "__main__":
    import interpreter

    interpreter.install()
    sys.exit(main())
