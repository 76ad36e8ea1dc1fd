"""The Triton backend, installed as fastnorm.kernels: the only place that imports triton."""

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


def unavailable() -> str | None:
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "Triton needs a CUDA device, and there is none"


def devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if INTERPRETED else ("cuda",)
