"""All tables, an architecture per process; exits 1 on a violation."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from fastnorm import build

from . import cuda

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run(module, *args, interpret=False):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"audit.{module}", *args], env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, f"({time.monotonic() - start:.0f} s)", sep="", flush=True)
    return done.returncode


def tables():
    """(module, arguments, whether in the interpreter)"""
    yield "traffic", (), True
    yield from (("variants", (arch,), False) for arch in ARCHITECTURES)
    try:
        build.nvcc()
    except build.BuildError as e:
        print(f"no table of the CUDA kernels: {e}", flush=True)
    else:
        yield from (("cuda", (arch,), False) for arch in cuda.ARCHITECTURES)


def main():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(run, module, *args, interpret=interpret) for module, args, interpret in tables()]
        return int(any([future.result() for future in started]))


if __name__ == "__main__":
    sys.exit(main())
