"""The CUDA kernels of csrc/cuda as machine code: registers, spills, FP64, and the widths of their accesses.

`python -m audit.cuda sm_90` prints a line for each kernel and exits 1 on a violation. nvcc compiles; the tools that read are
those that come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from fastnorm import build

from .code import TOOLS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MOST_REGISTERS = {
    "row": 128,
    "channel": 255,
    "group": 255,
    "position": 255,
    "branch": 255,
    "finish": 255,
    "merge": 255,
}  # a block of 512 threads, or of 256

# Of what is fused, the 16-byte loads and stores of a window or unit: x, and what surrounds the norm.
FUSED = {
    "row_fwd_kernel": (3, 2),
    "row_bwd_kernel": (3, 1),
    "row_means_kernel": (3, 0),
    "channel_fwd_kernel": (2, 1),
    "channel_apply_kernel": (2, 1),
    "channel_sums_kernel": (3, 1),
    "channel_grad_kernel": (3, 2),
    "channel_bwd_kernel": (3, 2),
}

_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Z0-9_]+)*)", re.M)
# Conversions count as well: they take the units of FP64.
_FP64 = re.compile(r"^(D(ADD|MUL|FMA|SETP|MNMX)|(F2F|I2F|F2I)\S*\.F64)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # a modifier, and the bytes that it means; 4 without one
_NAME = re.compile(r"(?:void )?(?:fastnorm::cuda::)?(\w+)<(.*)>\(")


@dataclass(frozen=True)
class Kernel:
    name: str
    arguments: tuple[str, ...]  # of the template: a type, elements of an access, ...
    registers: int
    spill: bool
    fp64: int
    loads: Counter  # bytes of an access -> instructions
    stores: Counter

    @property
    def is_float64(self) -> bool:
        return self.arguments[0] == "double"

    @property
    def window(self) -> int:
        """Elements of one access; 1 in kernels that have none of tensors, or go through them one by one."""
        return int(self.arguments[1]) if len(self.arguments) > 1 else 1

    @property
    def windows(self) -> int:
        """Accesses of a thread to one tensor that are written out."""
        return max(1, int(self.arguments[2])) if self.name in ("row_fwd_kernel", "row_bwd_kernel") else 1

    @property
    def fused(self) -> bool:
        return self.name in FUSED and (self.arguments[-1] == "true" or self.arguments[-1].startswith("Fused"))

    @property
    def wide_accesses(self) -> tuple[int, int]:
        """16-byte loads and stores that there are at least, of each window."""
        if self.fused:
            return FUSED[self.name]
        return 2 if re.search("bwd|sums|grad|means", self.name) else 1, not re.search("stats|sums|means", self.name)


def violations(kernel: Kernel) -> list[str]:
    found = []
    if kernel.spill:
        found.append("SPILL")
    if kernel.fp64 and not kernel.is_float64:
        found.append("FP64")
    if kernel.registers > MOST_REGISTERS[kernel.name.partition("_")[0]]:
        found.append("REGISTERS")
    # Every way through a tensor has its 16-byte accesses, beside those one by one for other strides.
    loads, stores = (n * kernel.windows for n in kernel.wide_accesses)
    if kernel.window > 1 and (kernel.loads[16] < loads or kernel.stores[16] < stores):
        found.append("NARROW")
    return found


def read(cubin: Path) -> list[Kernel]:
    output = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = _USAGE.findall(output(TOOLS / "cuobjdump", "-res-usage", cubin))
    usage = {name: [int(n) for n in numbers] for name, *numbers in used}
    names = dict(zip(usage, output("c++filt", *usage).splitlines(), strict=True))
    counts = defaultdict(Counter)
    for section in re.split(r"^\.text\.", output(TOOLS / "nvdisasm", "-c", cubin), flags=re.M)[1:]:
        name = section.partition(":")[0]
        counts[name].update("".join(found) for found in _INSTRUCTION.findall(section))
    return [_kernel(names[mangled], counts[mangled], *numbers) for mangled, numbers in usage.items()]


def _kernel(demangled, counts, registers, stack, _shared, local):
    name, arguments = _NAME.search(demangled).groups()
    arguments = re.sub(r"\(.*?\)|<.*?>|fastnorm::cuda::", "", arguments)  # without casts, and a policy's own arguments
    arguments = tuple(a.strip() for a in arguments.split(","))
    spill = stack + local > 0 and any(op.startswith(("LDL", "STL")) for op in counts)
    fp64 = sum(n for op, n in counts.items() if _FP64.match(op))
    return Kernel(name, arguments, registers, spill, fp64, _widths(counts, "LDG"), _widths(counts, "STG"))


def _widths(counts, kind):
    widths = Counter()
    for op, n in counts.items():
        base, *modifiers = op.split(".")
        if base == kind:
            width = next((bits for text, bits in _WIDTHS.items() if text in modifiers), 4)
            widths[width] += n
    return widths


def audit(arch: str) -> list[Kernel]:
    """Of the library as it is loaded; compiled now where there is none."""
    number = arch.removeprefix("sm_")
    library = build.cuda_library([f"{number[:-1]}.{number[-1]}"])
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, stdout=subprocess.DEVNULL, check=True)
        return [kernel for cubin in sorted(Path(folder).glob("*.cubin")) for kernel in read(cubin)]


def table(kernels: list[Kernel]) -> list[str]:
    widths = lambda counter: " ".join(f"{n}x{width}" for width, n in sorted(counter.items(), reverse=True))
    layout = "{:21} {:30} {:>9} {:>5} {:>4}  {:26} {:22} {}"
    lines = [layout.format("kernel", "template", "registers", "spill", "FP64", "loads (n x bytes)", "stores", "verdict")]
    for k in sorted(kernels, key=lambda k: (k.name, k.arguments)):
        spill, verdict = "yes" if k.spill else "no", " ".join(violations(k)) or "ok"
        cells = k.name, ", ".join(k.arguments), k.registers, spill, k.fp64, widths(k.loads), widths(k.stores)
        lines.append(layout.format(*cells, verdict))
    return lines


def main(arch: str) -> int:
    start = time.monotonic()
    kernels = audit(arch)
    seconds = time.monotonic() - start
    bad = [k for k in kernels if violations(k)]
    print(*table(kernels), sep="\n")
    fused = sum(k.fused for k in kernels)
    counts = f"{len(kernels)} CUDA kernels, {fused} of them fused, {len(bad)} with violations"
    print(f"{arch}: {counts}, compiled and read in {seconds:.0f} s")
    return bool(bad or not kernels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
