"""What all launches share: the device, the fixed options, and how a tensor is described to a kernel."""

import contextlib
import ctypes
import functools
from math import gcd

import torch
import triton

# Decided once, as triton.jit decides it: by the environment at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Without a GPU a small number, so that the interpreter has few programs to run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def launch(kernel, programs: int, device: torch.device, *args, warps: int, stages: int = 2, **constants) -> None:
    """Run a one-dimensional grid on `device`, on its current stream. FP fusion is what later Tritons turn off by default."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector(itemsize: int, *sizes: int) -> int:
    """Elements, at most 16 bytes, that every size and stride given is a multiple of.

    Kernels get sizes and strides divided by it and multiply by it as a constant: the compiler then knows the divisibility (from
    an integer it only ever learns "a multiple of 16"), and nothing is recompiled when a size changes.
    """
    return gcd(16 // itemsize, *sizes)


def dense(p):
    """A parameter or a statistic as consecutive elements, or None."""
    return None if p is None else p.contiguous()


def float_pair(value: float) -> tuple[float, float]:
    """A float as the sum of two that survive Triton's rounding of arguments to float32."""
    high = ctypes.c_float(value).value
    return high, value - high
