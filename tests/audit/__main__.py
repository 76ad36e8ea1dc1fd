"""Both tables, an architecture per process; exits 1 on a violation."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def run(module, *args, interpret=False):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"audit.{module}", *args], env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, f"({time.monotonic() - start:.0f} s)", sep="", flush=True)
    return done.returncode


def main():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [pool.submit(run, "traffic", interpret=True), *(pool.submit(run, "variants", arch) for arch in ARCHITECTURES)]
        return int(any(future.result() for future in failed))


if __name__ == "__main__":
    sys.exit(main())
