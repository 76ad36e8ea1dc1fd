"""Checks of the audit itself: kernels with planted violations, and its reading of the PTX against the assembler's code."""

import json
import re
import subprocess
import sys

import fastnorm.kernels as K
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from . import code
from .dryrun import record
from .variants import unreached

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    """Sums of every column of a row that is far too long for the registers."""
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        x = tl.load(x_ptr + row * BLOCK + cols)
        total += x * tl.sum(x)
    tl.store(y_ptr + cols, total)


@triton.jit
def _leaking_kernel(x_ptr, y_ptr, eps: tl.float64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, (tl.load(x_ptr + at) + eps).to(tl.float32))


@triton.jit
def _dividing_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x))


@triton.jit
def _rooting_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.sqrt(tl.load(x_ptr + at)))


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """N is a multiple of 8, which the compiler does not know."""
    at = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _hasty_kernel(partial_ptr, y_ptr, BLOCK: tl.constexpr, LOADS: tl.constexpr, STORES: tl.constexpr):
    """Does before it has waited what it must not do."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if LOADS:
        total = tl.load(partial_ptr + at)
    if STORES:
        tl.store(y_ptr + at, total)
    gdc_wait()
    tl.store(y_ptr + at, total + tl.load(partial_ptr + BLOCK + at))


def planted():
    """What the audit finds in each."""
    x, half = torch.empty(1 << 16), torch.empty(1 << 16, dtype=torch.float16)
    launches = {
        "none": lambda: K.row_fwd(half.view(-1, 1024), None, None, 1e-5, 1024),
        "spill": lambda: _spilling_kernel[(1,)](x, x, 4, BLOCK=16384, num_warps=4),
        "fp64": lambda: _leaking_kernel[(1,)](x, x, 1e-5, BLOCK=1024),
        "division": lambda: _dividing_kernel[(1,)](x, x, BLOCK=1024),
        "root": lambda: _rooting_kernel[(1,)](x, x, BLOCK=1024),
        "early load": lambda: _hasty_kernel[(1,)](x, x, BLOCK=1024, LOADS=True, STORES=False),
        "early store": lambda: _hasty_kernel[(1,)](x, x, BLOCK=1024, LOADS=False, STORES=True),
        "waited": lambda: _hasty_kernel[(1,)](x, x, BLOCK=1024, LOADS=False, STORES=False),
        "narrow": lambda: _narrow_kernel[(1,)](half, half, 1000, BLOCK=1024),
    }
    found = {}
    for name, launch in launches.items():
        with record("sm_90", []) as compiled:
            launch()
        found[name] = [code.violations(v, code.read(v), wide=("loads", "stores")) for v in compiled]
    return found


def assembler():
    """Per variant: widths of loads and of stores, and whether there is FP64, in the PTX and in the machine code."""
    with record("sm_90", []) as compiled:
        for dtype, N in ((torch.bfloat16, 1000), (torch.float32, 10), (torch.bfloat16, 20000), (torch.float64, 768)):
            y, mean, rstd = K.row_fwd(torch.empty(64, N, dtype=dtype), None, None, 1e-5, N)
            K.row_bwd(y, y, None, mean, rstd, (True, torch.float32, torch.float32))
        x = torch.empty(4, 16, 6, 6, dtype=torch.float16)
        K.channel_fwd(x, None, None, None, None, True, 0.1, 1e-5)
        K.channel_stats(x.double())
    return [[v.kernel, _in_ptx(v), _in_machine_code(v)] for v in compiled]


def _in_ptx(variant):
    read = code.read(variant)
    widths = lambda accesses: sorted({width for counts in accesses.values() for width in counts})
    return [widths(read.loads), widths(read.stores), read.fp64 > 0]


def _in_machine_code(variant):
    done = subprocess.run([code.TOOLS / "nvdisasm", "-c", variant.files["cubin"]], capture_output=True, text=True, check=True)
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", done.stdout, re.M)
    widths = {"LDG": set(), "LDGSTS": set(), "STG": set()}
    for name, *modifiers in (operation.split(".") for operation in operations):
        if name in widths:
            widths[name].add(next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4))
    fp64 = any(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|\w+\.F64|\w+\.\w+\.F64", operation) for operation in operations)
    return [sorted(widths["LDG"] | widths["LDGSTS"]), sorted(widths["STG"]), fp64]


def ahead():
    """Kernels of long rows, and whether they ask for a row ahead."""
    with record("sm_80", []) as compiled:
        y, mean, rstd = K.row_fwd(torch.empty(64, 8192), None, None, 1e-5, 8192)
        K.row_bwd(y, y, None, mean, rstd, (True, None, None))
    return {v.kernel: "prefetch.global.L2" in v.files["ptx"].read_text() for v in compiled}


if __name__ == "__main__":
    checks = {"planted": planted, "ahead": ahead, "assembler": assembler, "unreached": lambda: unreached([])}
    print(json.dumps(checks[sys.argv[1]]()))
