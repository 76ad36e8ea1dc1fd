"""The backend contract over the compiled extension (csrc/): C++ kernels on the CPU."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch  # noqa: F401 (the extension needs torch's libraries in the process)

from . import build


@cache
def _extension():
    """The extension module, or the sentence that says why there is none."""
    try:
        spec = importlib.util.spec_from_file_location("fastnorm._C", build.library())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (build.BuildError, ImportError, OSError) as e:
        return str(e)


def unavailable() -> str | None:
    extension = _extension()
    return extension if isinstance(extension, str) else None


def devices() -> tuple[str, ...]:
    return ("cpu",)


def __getattr__(name):
    """The functions of the contract are the extension's own."""
    if name.startswith(("row_", "channel_")):
        return globals().setdefault(name, getattr(_extension(), name))  # found without this function from now on
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
