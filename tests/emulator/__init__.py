"""The CUDA kernels on a CPU: emulator.h says how.

Within `kernels()` the compiled extension hands tensors of the CPU to them, so that every test of a backend runs them with their
own host code, their checks and their autograd.
"""

import contextlib
import ctypes
import os
from functools import cache

from fastnorm import build, extension, native

from .compile import LIBRARY, command, key

in_force = False  # see kernels()
# Of a block's threads. FASTNORM_EMULATOR_ORDER: this one for the whole process, and no other backend is tested.
ORDERS = ("forward", "reverse", "shuffled")
ORDER = os.environ.get("FASTNORM_EMULATOR_ORDER", "forward")
ALONE = "FASTNORM_EMULATOR_ORDER" in os.environ


@cache
def load():
    """The library, compiled once for these sources; or the sentence that says why there is none."""
    try:
        target = build.cache_directory() / key() / LIBRARY
        what = "fastnorm: compiling the CUDA kernels for the emulator"
        library = ctypes.CDLL(str(build.compile_once(target, command(), what)))
    except (build.BuildError, OSError) as e:
        return str(e)
    library.emulator_order(ORDERS.index(ORDER))
    return library


def unavailable() -> str | None:
    """Why it cannot run here: there is no compiler for it, or for the extension that calls it."""
    reason = native.unavailable("cpu")
    return reason or (load() if isinstance(load(), str) else None)


@contextlib.contextmanager
def kernels():
    """Tensors of the CPU are served by the emulated kernels."""
    global in_force
    extension.load().set_kernels("cpu", native.table(load()), 0)
    in_force = True
    try:
        yield
    finally:
        extension.load().set_kernels("cpu", 0, 0)
        in_force = False
