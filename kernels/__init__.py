"""The Triton backend, installed as fastnorm.kernels: the only place that imports triton."""

import traceback
from functools import cache

import torch

from .channel import channel_apply, channel_bwd, channel_fwd, channel_grad, channel_stats, channel_sums
from .launch import INTERPRETED
from .row import row_bwd, row_fwd

__all__ = [
    "channel_apply",
    "channel_bwd",
    "channel_fwd",
    "channel_grad",
    "channel_stats",
    "channel_sums",
    "devices",
    "row_bwd",
    "row_fwd",
    "unavailable",
]


@cache
def unavailable() -> str | None:
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "Triton needs a CUDA device, and there is none"
    try:
        row_fwd(torch.ones(1, 16, device="cuda"), None, None, 1e-5, 16)
    except Exception as e:  # whatever keeps Triton from compiling and launching: a missing C compiler, a driver, a version
        return f"its first kernel did not run ({''.join(traceback.format_exception_only(e)).splitlines()[0]})"
    return None


def devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if INTERPRETED else ("cuda",)
