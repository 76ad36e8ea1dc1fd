"""The backend contract over the compiled extension (csrc/): C++ kernels on the CPU."""

from __future__ import annotations

from .extension import load


def unavailable() -> str | None:
    extension = load()
    return extension if isinstance(extension, str) else None


def devices() -> tuple[str, ...]:
    return ("cpu",)


def whole_calls(device_type: str):
    """layer_norm and batch_norm, see `dispatch.direct`."""
    load().serve_natively(True)
    return load().layer_norm, load().batch_norm


def __getattr__(name):
    """The functions of the contract are the extension's own."""
    if name.startswith(("row_", "channel_")):
        return globals().setdefault(name, getattr(load(), name))  # found without this function from now on
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
