"""Compiles csrc/cuda with a C++ compiler, unchanged, against emulator.h; a process of its own, whose words go to a log.

FASTNORM_EMULATOR_SANITIZE=1: with what finds reads and writes out of bounds, misaligned ones and undefined behaviour.
FASTNORM_EMULATOR_SANITIZE=plain: with the same, and the kernels of plain norms alone: sanitized ones take minutes to compile.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastnorm import build

HERE = Path(__file__).resolve().parent
LIBRARY = "emulated.so"
FLAGS = ["-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", f"-I{HERE}"]
OPTIMIZED = ["-O1", "-g0"]
SANITIZED = {"1": "all", "plain": "plain"}.get(os.environ.get("FASTNORM_EMULATOR_SANITIZE"))


def flags():
    return [*FLAGS, *(build.SANITIZE if SANITIZED else OPTIMIZED), "-DFASTNORM_BUILD_KEY=emulated"]


def sources():
    kernels = build.csrc() / "cuda"
    plain = [kernels / "channel.cu", kernels / "row.cu", HERE / "plain.cpp"]
    return [*(plain if SANITIZED == "plain" else sorted(kernels.glob("*.cu"))), HERE / "memory.cpp"]


def key():
    own = [path.read_text() for path in sorted(HERE.glob("*.*")) if path.suffix in (".h", ".cpp")]
    return f"emulated-{build.digest([build.csrc() / 'cuda', build.csrc()], f'{flags()} {SANITIZED} {own}')}"


def command():
    return [sys.executable, __file__]


def main(directory):
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        objects = [str(Path(temporary) / f"{source.stem}.o") for source in sources()]
        compiling = [[build.compiler(), *flags(), "-c", str(s), "-o", o] for s, o in zip(sources(), objects, strict=True)]
        list(pool.map(lambda line: subprocess.run(line, check=True), compiling))
        # Not linked with the sanitizers' runtime, as in build.py.
        subprocess.run([build.compiler(), "-shared", *objects, "-o", str(Path(directory) / LIBRARY)], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
