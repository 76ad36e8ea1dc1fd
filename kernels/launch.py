"""What all launches share: device, fixed options, how a tensor is described to a kernel, and compiled kernels at hand."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from dataclasses import dataclass
from math import gcd

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

from .. import heuristics

# Decided once, as triton.jit decides it: by the environment at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Without a GPU a small number, so that the interpreter has few programs to run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def _cuda_capability(device):
    return None if torch.version.hip else 10 * torch.cuda.get_device_capability(device)[0]


def _capability(device) -> int:
    """Ten times the major compute capability that kernels are compiled for; 0 in the interpreter and for other GPUs."""
    if INTERPRETED:
        return 0
    if device.type == "cuda":
        return _cuda_capability(device) or 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch // 10 * 10 if target.backend == "cuda" else 0


def assembles(device: torch.device) -> bool:
    """Whether a kernel may hold NVIDIA's assembly."""
    return _capability(device) > 0


def overlaps(device: torch.device) -> bool:
    """Whether a launch may start before the one before has ended, see chain.py."""
    return _capability(device) >= 90


def registers_in_pairs(device: torch.device) -> bool:
    """Whether the assembler takes registers in pairs for two operations at once, so that they run out earlier."""
    return _capability(device) == 100


def leads(device: torch.device, nbytes: int) -> bool:
    """Whether a launch that reads so many bytes lets the next one start early."""
    return nbytes <= heuristics.LEADING and overlaps(device)


class Count(int):
    """A number that follows M, the rows of the call: ceil(M / per), at most `most`.

    A launch whose numbers are such counts is right for other M as well, see plans.py.
    """

    def __new__(cls, M: int, per: int = 1, most: int = 2**63 - 1):
        count = super().__new__(cls, min(most, -(-M // per)))
        count.per, count.most = per, most
        return count


@dataclass(frozen=True)
class Launch:
    """One launch that took place; `compiled` is Triton's compiled kernel, None in the interpreter."""

    kernel: object
    compiled: object
    programs: int
    arguments: dict[str, object]  # of the kernel, in its order


class _Thread(threading.local):
    recorder = None  # a function that is told of every Launch


thread = _Thread()


def launch(
    kernel, programs: int, device: torch.device, *args, warps: int, stages: int = 2, registers: int | None = None, **constants
) -> None:
    """Run a one-dimensional grid on `device`, on its current stream; `registers`: the most of a thread.

    What FOLLOWS the launch before, see chain.py, may start before that has ended.
    """
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    watched = thread.recorder is not None
    with (
        torch.cuda.device(device) if elsewhere else contextlib.nullcontext(),
        _disable_current_modes() if watched else contextlib.nullcontext(),  # the interpreter is made of torch's operators
    ):
        options = warps, stages, registers, constants.get("FOLLOWS", False)
        compiled = _start(kernel, programs, device, args, options, constants)
    if watched:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        thread.recorder(Launch(kernel, compiled, programs, {name: arguments[name] for name in kernel.arg_names}))


# ---------------------------------------------------------------- compiled kernels


class _Compiled:
    """Compiled kernels by all that Triton specialises on, so that its front end (7 us and more) is passed once a variant.

    `trusted` is set by `check`, which holds such a launch to an ordinary one: how a compiled kernel is called is Triton's own
    affair and may change.
    """

    def __init__(self):
        self.kernels, self.trusted = {}, False


_compiled = _Compiled()


def _kind(a):
    """What Triton specialises on in an argument; on the values of integers in tuples alone, for the others say not to."""
    if isinstance(a, torch.Tensor):
        return a.dtype, a.data_ptr() % 16 == 0
    if isinstance(a, int):
        return -(2**31) <= a < 2**31
    return tuple((_kind(n), n == 1, n % 16 == 0) for n in a) if isinstance(a, tuple) else type(a)


def _start(kernel, programs, device, args, options, constants):
    key = (id(kernel), device.index, *options, *constants.values(), *map(_kind, args)) if _compiled.trusted else None
    at_hand = _compiled.kernels.get(key) if key else None
    if at_hand is None or triton.knobs.runtime.launch_enter_hook.calls:  # a profiler's hook is called by Triton alone
        # FP fusion is what later Tritons turn off by default.
        named = dict(zip(("num_warps", "num_stages", "maxnreg", "launch_pdl"), options, strict=True), enable_fp_fusion=True)
        if INTERPRETED or triton.runtime.driver.active.get_current_target().backend != "cuda":
            del named["maxnreg"], named["launch_pdl"]  # NVIDIA's assembler and driver alone take them
        compiled = kernel[(int(programs),)](*map(_plain, args), **named, **constants)
        if key:
            order = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            _compiled.kernels[key] = compiled, order
        return compiled
    compiled, order = at_hand
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    addresses = (a.data_ptr() if isinstance(a, torch.Tensor) else _plain(a) for a in args)
    compiled.run(int(programs), 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *order)
    return compiled


def _plain(a):
    return int(a) if type(a) is Count else a


def check(call) -> None:
    """Decides whether compiled kernels are launched without Triton's front end: results have to be those of an ordinary launch.

    Args:
        call: returns a tensor that one launch has filled. During the capture of a CUDA graph nothing can be compared.
    """
    if INTERPRETED or torch.cuda.is_current_stream_capturing():
        return
    expected = call()
    _compiled.trusted = True
    try:
        call()  # keeps the kernel
        _compiled.trusted = torch.equal(call(), expected)
    except (AttributeError, TypeError, ValueError):  # another Triton calls its kernels in another way
        _compiled.trusted = False
    finally:
        if not _compiled.trusted:
            _compiled.kernels.clear()


# ---------------------------------------------------------------- arguments


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
