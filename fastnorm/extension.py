"""The compiled extension of csrc/, loaded once: kernels for the CPU, and whole calls for every backend that has them there."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch  # noqa: F401 (the extension needs torch's libraries in the process)

from . import build
from .settings import config

_differentiable = ()


def differentiate_with(*formulas) -> None:
    """The formulas of `composite`, which the C++ node calls when backward is itself differentiated; given before first use."""
    global _differentiable
    _differentiable = formulas


@cache
def load():
    """The extension module, or the sentence that says why there is none."""
    try:
        spec = importlib.util.spec_from_file_location("fastnorm._C", build.library())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.set_differentiable(*_differentiable)
        module.set_config(config)
        return module
    except (build.BuildError, ImportError, OSError) as e:
        return str(e)


def loaded():
    """The extension where it has been loaded, else None."""
    module = load() if load.cache_info().currsize else None
    return None if isinstance(module, str) else module
