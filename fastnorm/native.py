"""The backend contract over the compiled extension (csrc/): C++ kernels on the CPU.

Beside the contract it has `layer_norm` and `batch_norm`, whole calls of the public functions with gate and autograd node in
C++, which return None for what they do not cover (see `dispatch.direct`).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch  # noqa: F401 (the extension needs torch's libraries in the process)

from . import build

_differentiable = ()


def differentiate_with(layer_norm_backward, batch_norm_backward) -> None:
    """The formulas of `composite`, which the C++ node calls when backward is itself differentiated; given before first use."""
    global _differentiable
    _differentiable = (layer_norm_backward, batch_norm_backward)


@cache
def _extension():
    """The extension module, or the sentence that says why there is none."""
    try:
        spec = importlib.util.spec_from_file_location("fastnorm._C", build.library())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.set_differentiable(*_differentiable)
        return module
    except (build.BuildError, ImportError, OSError) as e:
        return str(e)


def unavailable() -> str | None:
    extension = _extension()
    return extension if isinstance(extension, str) else None


def devices() -> tuple[str, ...]:
    return ("cpu",)


def __getattr__(name):
    """The functions of the contract and the whole calls are the extension's own."""
    if name.startswith(("row_", "channel_")) or name in ("layer_norm", "batch_norm"):
        return globals().setdefault(name, getattr(_extension(), name))  # found without this function from now on
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
