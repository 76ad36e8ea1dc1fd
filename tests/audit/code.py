"""Reads what a compiled variant is made of: registers, spills, FP64, rough arithmetic, how wide each pointer is accessed, and
whether a launch that may start early touches anything before it has waited.

Registers and spills are the assembler's own report. Widths and FP64 are read from the PTX, where every address can be followed
back to the kernel's parameter it came from; tests/test_audit.py holds that the assembler keeps both as they are.
"""

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import triton

from .dryrun import DEVICES, Compiled

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# The tensors whose every access must be 16 bytes wide where sizes, strides and alignment allow it.
WHOLE = tuple(f"{name}_ptr" for name in ("x", "dy", "y", "dx", "addend", "residual", "h", "dh", "dresidual", "dz"))

_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\s[^\[]*\[\s*(%rd\d+)")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[[^\]]*\]\s*,\s*\[\s*(%rd\d+)[^\]]*\]\s*,\s*(0x[0-9a-f]+|\d+)")
_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%rd\d+),\s*\[\w+_param_(\d+)\]")
# Off by up to two units of the last place. rsqrt is in no other form, and torch's own kernels take it.
_ROUGH = re.compile(r"\b(?:div\.(?:full|approx)|sqrt\.approx)(?:\.ftz)?\.f32\b")
# Of a launch that may start before the one before has ended: what waits for it, see kernels/chain.py.
WAIT = "griddepcontrol.wait"
# What that one may write; and of these kernels, statistics, which a backward is given as they are, and dz in the place of dy.
EARLIER = ("partial_ptr", "c_ptr", "c1_ptr", "c2_ptr")
EARLIER_OF = {"_channel_apply_kernel": ("mean_ptr", "rstd_ptr"), "_channel_grad_kernel": ("dy_ptr",),
              "_row_bwd_columns_kernel": ("dy_ptr",)}  # fmt: skip
_STEP = re.compile(r"\b[a-z][\w.]*\s+(%rd\d+)\s*,\s*([^;]*);")


@dataclass(frozen=True)
class Code:
    registers: int
    spill: int  # bytes a thread
    fp64: int
    rough: int  # divisions and roots that are not rounded to nearest
    loads: dict[str, dict[int, int]]  # pointer -> {bytes of one access: how many of them}
    stores: dict[str, dict[int, int]]
    early: tuple[str, ...] = ()  # what is stored, or read of what an earlier launch writes, before that is waited for


def read(variant: Compiled) -> Code:
    return _read_amd(variant) if "amdgcn" in variant.files else _read_nvidia(variant)


def _read_nvidia(variant):
    dump = lambda what: subprocess.run([TOOLS / "cuobjdump", what, variant.files["cubin"]], capture_output=True, text=True,
                                       check=True).stdout  # fmt: skip
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
    spill = usage["STACK"] + usage["LOCAL"]
    if spill and not re.search(r"\b(STL|LDL)\b", dump("-sass")):
        spill = 0  # a frame that the assembler reserves and no instruction touches
    ptx = variant.files["ptx"].read_text()
    fp64 = len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?!ld|st|mov|selp)[a-z]\w*\.[\w.]*f64\b", ptx, re.M))
    names = [name for name, _ in variant.parameters]
    loads, stores = _widths(ptx, names)
    return Code(usage["REG"], spill, fp64, len(_ROUGH.findall(ptx)), loads, stores,
                _early(ptx, names, (*EARLIER, *EARLIER_OF.get(variant.kernel, ()))))  # fmt: skip


def _early(ptx, names, earlier):
    before, wait, _ = ptx.partition(WAIT)
    if not wait:
        return ()
    loads, stores = _widths(before, names)
    return (*stores, *(name for name in loads if name in earlier))


def _widths(ptx, names):
    """Follow addresses from the parameters to the accesses; a value that was loaded is no address of the same tensor."""
    origins = defaultdict(set)
    for register, index in _PARAMETER.findall(ptx):
        if int(index) < len(names):
            origins[register].add(names[int(index)])
    steps = [(to, re.findall(r"%rd\d+", of)) for to, of in _STEP.findall(ptx)]
    size = -1
    while size != (size := sum(map(len, origins.values()))):
        for to, of in steps:
            origins[to].update(*(origins[register] for register in of))
    found = {"ld": defaultdict(Counter), "st": defaultdict(Counter)}
    accesses = [(kind, int(v or 1) * int(bits) // 8, at) for kind, v, bits, at in _ACCESS.findall(ptx)]
    accesses += [("ld", int(size, 0), at) for at, size in _ASYNC.findall(ptx)]
    for kind, width, at in accesses:
        pointers = {name for name in origins[at] if name.endswith("_ptr")}
        if not pointers or (kind == "ld" and len(pointers) > 1):
            raise ValueError(f"an access at {at} that comes from {sorted(origins[at])}, and not from one pointer")
        for name in pointers:  # a store to one of two is one to both
            found[kind][name][width] += 1
    return found["ld"], found["st"]


def _read_amd(variant):
    text = variant.files["amdgcn"].read_text()
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
    return Code(number("vgpr_count"), number("private_segment_fixed_size"), 0, 0, {}, {})


def violations(variant: Compiled, code: Code, wide: Collection[str]) -> list[str]:
    """`wide`: "loads" and "stores", where sizes, strides and alignment allow 16-byte ones. AMD's code has only to compile."""
    if "amdgcn" in variant.files:
        return []
    found = []
    if code.spill:
        found.append("SPILL")
    if code.fp64 and not variant.is_float64:
        found.append("FP64")
    if code.rough:
        found.append("ROUGH")
    if code.early:
        found.append("EARLY")
    if variant.shared > DEVICES[variant.arch].shared:
        found.append("SHARED")
    accesses = [(name, width) for kind in wide for name, widths in getattr(code, kind).items() for width in widths]
    if any(name in WHOLE and width < 16 for name, width in accesses):
        found.append("NARROW")
    return found
