"""Plans: what one call of the contract launched, as data that csrc/replay.cpp launches again without Python.

A plan holds for every call with the same shapes, strides, dtypes, alignments and options: launches depend on nothing else.
Where its numbers are `Count`s it holds for other numbers of rows as well. It is taken from a call that is watched: which memory
it made, which kernels it started, with which arguments. A call that does anything beside that (a copy of a parameter that is
not dense, say) has no plan and stays in Python.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import struct
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import INTERPRETED, Count, Launch, thread

# Parameter kinds, as in csrc/replay.cpp.
INPUT, OUTPUT, SCRATCH, NUMBER = range(4)
# Of each piece of scratch memory, in bytes: that of torch's own allocations.
ALIGNMENT = 512
MAKERS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default,
          torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default}  # fmt: skip


class _Unplannable(Exception):
    """What keeps this call from having a plan."""


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made, self.launches, self.others = [], [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in MAKERS:
            self.made.append(result)
        elif not function.is_view:
            self.others.add(str(function))
        return result

    def __enter__(self):
        thread.recorder = self.launches.append
        return super().__enter__()

    def __exit__(self, *error):
        thread.recorder = None
        return super().__exit__(*error)


def record(function, args, wanted: bool):
    """The results of function(*args), and its plan where that is wanted and there is one, else None.

    Args:
        function: one of the contract's; `args` are in its order.
    """
    if not wanted:
        return function(*args), None
    with _Watch() as watch:
        results = function(*args)
    try:
        return results, _plan(watch, args, results)
    except _Unplannable:
        return results, None


def _plan(watch, args, results):
    if watch.others:
        raise _Unplannable
    memory = _Memory([a if isinstance(a, torch.Tensor) else None for a in args], results, watch.made)
    steps = [_step(launch, memory) for launch in watch.launches]
    numbers = [n for _, programs, *_, parameters in steps for n in (programs, *(p[2:] for p in parameters))]
    outputs = [None if r is None else (tuple(r.shape), r.stride(), r.dtype) for r in results]
    return outputs, memory.scratch, steps, any(per for _, per in numbers)


class _Memory:
    """Where an address lies: in an input, in an output, or in scratch memory."""

    def __init__(self, inputs, outputs, made):
        self.regions, self.scratch = [], 0
        for kind, tensors in ((INPUT, inputs), (OUTPUT, outputs)):
            for i, t in enumerate(tensors):
                if t is not None:
                    self.regions.append((t.data_ptr(), t.data_ptr() + _extent(t), kind, i, 0))
        kept = {t.untyped_storage().data_ptr() for t in outputs if t is not None}
        fresh = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
        if not kept <= set(fresh) or len(kept) < sum(t is not None for t in outputs):
            raise _Unplannable  # an output is no fresh tensor, or two share their memory
        for start, nbytes in fresh.items():
            if start not in kept and nbytes:
                self.regions.append((start, start + nbytes, SCRATCH, 0, self.scratch))
                self.scratch += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def parameter(self, t):
        """(kind, tensor, offset, 0); parameters that are views of one storage are told apart by where they start."""
        address = t.data_ptr()
        around = [r for r in self.regions if r[0] <= address < r[1]]
        exact = [r for r in around if r[0] == address]
        if len(exact or around) != 1:
            raise _Unplannable
        start, _, kind, i, base = (exact or around)[0]
        return kind, i, base + address - start, 0


def _extent(t) -> int:
    """Bytes from its first element to the end of its last one."""
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size() if t.numel() else 0


def _number(n):
    """(value, per), see Number in csrc/replay.cpp."""
    return (n.most, n.per) if isinstance(n, Count) else (int(n), 0)


def _step(launch: Launch, memory):
    types = _types(launch)
    parameters = []
    for name, a in launch.arguments.items():
        parameters += _parameters(types[name], a, memory)
    if launch.compiled is None:
        return _interpreted_step(launch), _number(launch.programs), 32, 0, False, parameters
    m = launch.compiled.metadata
    if m.num_ctas != 1 or m.global_scratch_size or m.profile_scratch_size or m.launch_cooperative_grid:
        raise _Unplannable
    threads = m.target.warp_size * m.num_warps
    return launch.compiled.function, _number(launch.programs), threads, m.shared, m.launch_pdl, parameters


def _parameters(kind, a, memory):
    if isinstance(kind, tuple):
        return [p for k, part in zip(kind, a, strict=True) for p in _parameters(k, part, memory)]
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [memory.parameter(a)]
    if kind == "fp32":
        return [(NUMBER, 0, struct.unpack("<i", struct.pack("<f", a))[0], 0)]
    if kind in ("i32", "i64"):
        return [(NUMBER, 0, *_number(a))]
    raise _Unplannable


def _types(launch) -> dict[str, object]:
    """Triton's type of each argument; those that are part of the compiled code are "constexpr"."""
    if launch.compiled is not None:
        return launch.compiled.src.signature
    constants = {name for name, kind in inspect.get_annotations(launch.kernel.fn).items() if "constexpr" in str(kind)}
    return {name: "constexpr" if name in constants else _type(a) for name, a in launch.arguments.items()}


def _type(a):
    if isinstance(a, tuple):
        return tuple(map(_type, a))
    if a is None:
        return "constexpr"
    if isinstance(a, torch.Tensor):
        return "*"
    return "fp32" if isinstance(a, float) else "i32" if -(2**31) <= a < 2**31 else "i64"


# ---------------------------------------------------------------- who launches


@cache
def _libraries():
    return ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))


def driver() -> tuple[int, int]:
    """The addresses of cuLaunchKernelEx and of what gives the current stream; in the interpreter, of a stand-in, and 0.

    Raises:
        OSError, AttributeError: this torch is none for CUDA, or has no such function.
    """
    if INTERPRETED:
        return ctypes.cast(_stand_in(), ctypes.c_void_p).value, 0
    cuda, torch_cuda = _libraries()
    functions = cuda.cuLaunchKernelEx, torch_cuda.aoti_torch_get_current_cuda_stream
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in functions)


# (kernel, type of each argument, the constants among them and the dtypes of the tensors); a step's function is a place here.
_interpreted: list[tuple] = []


def _interpreted_step(launch) -> int:
    dtype = lambda a: a.dtype if isinstance(a, torch.Tensor) else a
    _interpreted.append((launch.kernel, _types(launch), {name: dtype(a) for name, a in launch.arguments.items()}))
    return len(_interpreted)


def _interpret(config, function, parameters, extra):
    """As cuLaunchKernelEx, for the interpreter: reads each parameter where a GPU would."""
    if function > len(_interpreted):
        return 400  # CUDA_ERROR_INVALID_HANDLE
    kernel, types, kept = _interpreted[function - 1]
    programs = ctypes.cast(config, ctypes.POINTER(ctypes.c_uint)).contents.value
    places = itertools.count()
    read = lambda ctype: ctypes.cast(parameters[next(places)], ctypes.POINTER(ctype)).contents.value

    def value(kind, a):
        if isinstance(kind, tuple):
            return tuple(value(k, part) for k, part in zip(kind, a, strict=True))
        if kind == "constexpr":
            return a
        if kind == "*":  # the interpreter takes no more of a tensor than its address and dtype
            return torch.frombuffer((ctypes.c_char * 8).from_address(read(ctypes.c_uint64)), dtype=torch.uint8).view(a)
        return read({"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind])

    kernel[(programs,)](**{name: value(types[name], a) for name, a in kept.items()})
    return 0


@cache
def _stand_in():
    signature = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
    return ctypes.CFUNCTYPE(ctypes.c_int, *signature)(_interpret)
