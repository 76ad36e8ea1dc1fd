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

ORDERS = ("forward", "reverse", "shuffled")
# The order of a block's threads in this process: the same for every test, so that a run can be told apart from another.
in_force = False  # see kernels()
ORDER = os.environ.get("FASTNORM_EMULATOR_ORDER", "forward")


@cache
def load():
    """The library, compiled once for these sources; or the sentence that says why there is none."""
    try:
        target = build.cache_directory() / key() / LIBRARY
        library = ctypes.CDLL(str(build.compile_once(target, command(), "compiling the CUDA kernels for the emulator")))
    except (build.BuildError, OSError) as e:
        return str(e)
    library.emulator_order(ORDERS.index(ORDER))
    return library


def unavailable() -> str | None:
    found = load() if not native.unavailable("cpu") else native.unavailable("cpu")
    return found if isinstance(found, str) else None


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
