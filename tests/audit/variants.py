"""Compiles the grid for one architecture and judges every variant."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass

import triton

from . import code, grid
from .dryrun import DEVICES, Compiled, record


@dataclass(frozen=True)
class Judged:
    variant: Compiled
    code: code.Code
    call: str
    violations: list[str]


def audit(arch: str, calls: list[grid.Call]) -> list[Judged]:
    judged = []
    for call in calls:
        with record(arch, []) as compiled:
            call.run()
        for variant in compiled:
            read = code.read(variant)
            judged.append(Judged(variant, read, call.name, code.violations(variant, read, call.wide)))
    return judged


def unreached(judged: list[Judged]) -> list[str]:
    """Kernels of the package that no call compiled."""
    defined = {name for module in grid.modules() for name in vars(module) if name.endswith("_kernel")}
    return sorted(defined - {j.variant.kernel for j in judged})


HEADER = ("kernel", "arch", "warps", "registers", "spill", "shared", "FP64", "loads", "stores", "verdict")
_LAYOUT = "{:28} {:7} {:>5} {:>9} {:>5} {:>7} {:>4}  {:64} {:40} {}"


def table(judged: list[Judged]) -> list[str]:
    """Equal lines are one; widths are bytes of one access."""
    lines = Counter(_LAYOUT.format(*_cells(j)) for j in judged)
    return [_LAYOUT.format(*HEADER)] + [line if n == 1 else f"{line} ({n} variants)" for line, n in sorted(lines.items())]


def _cells(j: Judged):
    v, c = j.variant, j.code
    widths = lambda accesses: " ".join(
        f"{name.removesuffix('_ptr')} {'+'.join(map(str, sorted(accesses[name], reverse=True)))}" for name in accesses
    )
    verdict = " ".join(j.violations) + f" in {j.call}" if j.violations else "ok"
    return v.kernel, v.arch, v.warps, c.registers, c.spill, v.shared, c.fp64, widths(c.loads), widths(c.stores), verdict


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="audit.variants", description=__doc__)
    p.add_argument("arch", choices=DEVICES)
    p.add_argument("--few", action="store_true", help="the reduced grid")
    p.add_argument(
        "--only", default="", metavar="TEXT", help="only calls whose name begins with TEXT, which need not reach all kernels"
    )
    args = p.parse_args(argv)
    judged = audit(args.arch, [call for call in grid.calls(args.few) if call.name.startswith(args.only)])
    print(*table(judged), sep="\n")
    missed = [] if args.only else unreached(judged)
    bad = [j for j in judged if j.violations]
    counted = f"{args.arch}, triton {triton.__version__}: {len(judged)} variants, {len(bad)} with violations"
    print(f"{counted}; kernels not reached: {', '.join(missed) or 'none'}")
    return bool(bad or missed or not judged)


if __name__ == "__main__":
    sys.exit(main())
