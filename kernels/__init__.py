"""The Triton backend, installed as fastnorm.kernels: the only place that imports triton."""

import traceback
import warnings
from functools import cache

import torch

from .. import extension
from . import channel_tiles, plans, slab
from .branch import branch_bwd, branch_fwd
from .channel import (
    channel_apply,
    channel_bwd,
    channel_fused_bwd,
    channel_fused_fwd,
    channel_fwd,
    channel_grad,
    channel_stats,
    channel_sums,
)
from .group import group_bwd, group_fwd
from .launch import INTERPRETED, check
from .masked import channel_masked_grad, channel_masked_stats
from .position import position_bwd, position_fwd, position_pays
from .row import row_bwd, row_fwd
from .row_fused import row_fused_bwd, row_fused_fwd
from .row_masked import row_masked_bwd, row_masked_fwd

__all__ = [
    "branch_bwd",
    "branch_fwd",
    "channel_apply",
    "channel_bwd",
    "channel_fused_bwd",
    "channel_fused_fwd",
    "channel_fwd",
    "channel_grad",
    "channel_masked_grad",
    "channel_masked_stats",
    "channel_stats",
    "channel_sums",
    "forget",
    "group_bwd",
    "group_fwd",
    "position_bwd",
    "position_fwd",
    "position_pays",
    "row_bwd",
    "row_fused_bwd",
    "row_fused_fwd",
    "row_fwd",
    "row_masked_bwd",
    "row_masked_fwd",
    "unavailable",
    "whole_calls",
]

# What whole calls are made of.
CONTRACT = {f.__name__: f for f in (row_fwd, row_bwd, channel_fwd, channel_bwd)}


def unavailable(device_type: str) -> str | None:
    if not INTERPRETED and (reason := _without_gpu()):
        return reason
    served = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return None if device_type in served else f"it serves {' and '.join(served)} tensors, not {device_type}"


@cache
def _without_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "Triton needs a CUDA device, and there is none"
    if torch.version.hip is not None:
        return "its launch choices are made for NVIDIA GPUs, and this one has other limits"
    try:
        x = torch.arange(256.0, device="cuda").view(16, 16)
        check(lambda: row_fwd(x, None, None, 1e-5, 16)[0])
    except Exception as e:  # whatever keeps Triton from compiling and launching: a missing C compiler, a driver, a version
        return f"its first kernel did not run ({''.join(traceback.format_exception_only(e)).splitlines()[0]})"
    return None


def forget() -> None:
    """Launch choices that are kept are asked of the heuristics again."""
    for kept in (channel_tiles._plan, slab._plan):
        kept.cache_clear()


def whole_calls(device_type: str):
    """See `dispatch.direct`; None where the compiled extension is missing or gives other results."""
    module = extension.load()
    reason = module if isinstance(module, str) else _open(module, device_type)
    if reason is None:
        return module.layer_norm, module.batch_norm, module.fused_rows, module.fused_batch_norm
    warnings.warn(f"norms of {device_type} tensors cost the host several times what torch.nn's do: {reason}", RuntimeWarning,
                  stacklevel=6)  # fmt: skip
    return None


def _open(module, device_type: str) -> str | None:
    """Opens the device for replayed calls, and holds one to its original; why not, where that fails."""
    try:
        launch, stream = plans.driver()
    except (OSError, AttributeError) as e:
        return f"there is no driver to launch kernels with ({e})"
    module.serve_replays(device_type, CONTRACT, plans.record, launch, stream)
    if INTERPRETED:
        return None
    if torch.cuda.is_current_stream_capturing():
        module.close_replays()
        return "fastnorm was used first while a CUDA graph was captured"
    x = torch.arange(256.0, device=device_type).view(16, 16)
    results = [module.layer_norm(x, (16,), None, None, 1e-5) for _ in range(3)]  # seen, planned, replayed
    if module.count_replays(device_type)[2] and torch.equal(results[0], results[2]):
        return None
    module.close_replays()
    return "a replayed call does not give what the call gave"
