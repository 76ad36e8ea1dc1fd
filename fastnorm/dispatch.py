"""THE table of backends, and which one serves a tensor. Nothing else in the package asks which device a tensor is on.

A backend is a module with the functions of `reference.py` (the contract is written there) plus
`unavailable(device_type) -> str | None`, why it does not serve this type of device here. It may have `whole_calls(device_type)`
as well, see `direct`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Literal

import torch

from . import extension

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    name: str
    module: str
    what: str
    automatic: tuple[str, ...]  # the device types it is chosen for unasked

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def why_not(self, device_type: str) -> str | None:
        """None when it serves this device, else one sentence that says why it does not."""
        try:
            return self.load().unavailable(device_type)
        except ImportError as e:
            return f"it cannot be imported ({e})"


# In the order of preference. Devices that are in no row are left to torch itself.
BACKENDS = (
    Backend("triton", "fastnorm.kernels", "fused Triton kernels", ("cuda",)),
    Backend("native", "fastnorm.native", "fused C++ and CUDA kernels", ("cpu", "cuda")),
    # Not chosen unasked: it is several times slower than torch's own norms, which then serve.
    Backend("reference", "fastnorm.reference", "plain torch operators", ()),
)
NAMES = tuple(b.name for b in BACKENDS)
Name = Literal["triton", "native", "reference"]  # the same, for those who check types
DEVICES = frozenset(device for b in BACKENDS for device in b.automatic)

_forced: str | None = None
_selected: dict[str, ModuleType | None] = {}  # device type -> backend module or None


def _not_covered(*args: Any) -> None:
    return None


class _Direct:
    """Whole calls, at torch's own overhead: layer_norm and batch_norm with all their arguments in torch's order, and those of
    fused norms.

    One set of C++ functions serves every device whose backend has opened it (checks, autograd and kernel in one). They
    return None for every call that they do not cover, so the general path follows. Until a backend is chosen nothing is.
    """

    layer_norm: Any
    batch_norm: Any
    fused_rows: Any
    fused_batch_norm: Any
    layer_norm = batch_norm = fused_rows = fused_batch_norm = staticmethod(_not_covered)

    def install(self, module: ModuleType | None, device_type: str) -> None:
        if module is not None and hasattr(module, "whole_calls") and (calls := module.whole_calls(device_type)):
            self.layer_norm, self.batch_norm, self.fused_rows, self.fused_batch_norm = calls

    def clear(self) -> None:
        vars(self).clear()
        if module := extension.loaded():
            for device_type in DEVICES:
                module.serve_natively(device_type, False)
            module.close_replays()


direct = _Direct()


def _checked(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"fastnorm has no backend {name!r}; choose one of {', '.join(NAMES)}, or None for the best one")
    return name


class use_backend:
    """Force one backend for the whole process, or go back to the best one with None.

    Takes effect at the call; as a context manager it restores the earlier choice on leaving the block. The environment
    variable FASTNORM_BACKEND does the same from outside.

    Args:
        name: "triton", "native", "reference" or None.

    Raises:
        ValueError: the name is none of these. A backend that cannot serve a tensor raises RuntimeError at the call that
            needs it, and says why.

    >>> with use_backend("reference"):
    ...     forced()
    'reference'
    """

    def __init__(self, name: Name | None) -> None:
        global _forced
        self._before = _forced
        _forced = _checked(name)
        _choose_anew()

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _forced
        _forced = self._before
        _choose_anew()


def _choose_anew() -> None:
    _selected.clear()
    direct.clear()


def forget() -> None:
    """Launches that are kept for calls like earlier ones are worked out anew: something that they depend on has changed."""
    for module in filter(None, (sys.modules.get(backend.module) for backend in BACKENDS)):
        if hasattr(module, "forget"):
            module.forget()
    if module := extension.loaded():
        module.forget_replays()


def forced() -> str | None:
    return _forced or _checked(os.environ.get("FASTNORM_BACKEND") or None)


def select(device_type: str) -> ModuleType | None:
    """The backend module that serves tensors of this device type; None where torch itself is the best there is.

    Raises:
        RuntimeError: a backend was forced by the user and cannot serve this device.
    """
    try:
        return _selected[device_type]
    except KeyError:
        _selected[device_type] = module = _choose(device_type)
        direct.install(module, device_type)
        return module


def _choose(device_type: str) -> ModuleType | None:
    name = forced()
    missed: list[str] = []
    if name is not None:
        backend = BACKENDS[NAMES.index(name)]
        reason = backend.why_not(device_type)
        if reason is not None:
            raise RuntimeError(f"the backend {name!r} was asked for, but {reason}")
        return backend.load()
    for backend in BACKENDS:
        if device_type not in backend.automatic:
            continue
        reason = backend.why_not(device_type)
        if reason is None:
            if missed:
                what = f"fastnorm computes norms of {device_type} tensors with {backend.what}"
                warnings.warn(f"{what}: {'; '.join(missed)}", RuntimeWarning, stacklevel=4)
            return backend.load()
        missed.append(f"the backend {backend.name!r} is not used, {reason}")
    if missed:
        what = f"fastnorm leaves norms of {device_type} tensors to torch itself"
        warnings.warn(f"{what}: {'; '.join(missed)}", RuntimeWarning, stacklevel=4)
    return None
