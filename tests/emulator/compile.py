"""Compiles csrc/cuda with a C++ compiler, unchanged, against emulator.h; a process of its own, whose words go to a log.

FASTNORM_EMULATOR_SANITIZE=1: with what finds reads and writes out of bounds, misaligned ones and undefined behaviour.
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


def flags():
    sanitized = os.environ.get("FASTNORM_EMULATOR_SANITIZE") == "1"
    return [*FLAGS, *(build.SANITIZE if sanitized else OPTIMIZED), "-DFASTNORM_BUILD_KEY=emulated"]


def key():
    own = [path.read_text() for path in sorted(HERE.glob("*.*")) if path.suffix in (".h", ".cpp")]
    return f"emulated-{build.digest([build.csrc() / 'cuda', build.csrc()], f'{flags()} {own}')}"


def command():
    return [sys.executable, __file__]


def main(directory):
    sources = [*sorted((build.csrc() / "cuda").glob("*.cu")), HERE / "memory.cpp"]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        objects = [str(Path(temporary) / f"{source.stem}.o") for source in sources]
        compiling = [[build.compiler(), *flags(), "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        list(pool.map(lambda line: subprocess.run(line, check=True), compiling))
        # Not linked with the sanitizers' runtime, as in build.py.
        subprocess.run([build.compiler(), "-shared", *objects, "-o", str(Path(directory) / LIBRARY)], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
