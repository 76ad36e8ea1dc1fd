"""Drives Triton's real JIT without a GPU: its own specialisation and compiler, down to machine code, and no launch.

Within `record(arch, compiled)` functions that launch kernels run unchanged on CPU tensors (their results are garbage); what was
compiled, and only what was compiled anew, is appended to `compiled`. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Device:
    """`shared`: the most shared memory of a block, in bytes; `threads`: the most threads."""

    target: GPUTarget
    shared: int
    sms: int
    threads: int = 1024


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 166912, 108),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 232448, 132),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 232448, 148),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 101376, 170),
    # Only compiled: 32 warps of 64 lanes would be too many threads, and some tiles are more than its 64 KB of shared memory.
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 1 << 20, 304, 2048),
}


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel. `parameters`: (name, type) of everything that is passed to it, in order."""

    kernel: str
    arch: str
    warps: int
    shared: int
    follows: bool  # may start before the launch before has ended
    parameters: tuple[tuple[str, str], ...]
    files: dict[str, Path]  # "ptx", "cubin"; "amdgcn"

    @property
    def is_float64(self) -> bool:
        return any(kind == "*fp64" for _, kind in self.parameters)


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args, **kwargs):
        pass


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, arch: str):
        # The JIT keeps its variants by device number: one made-up number per architecture.
        self.target, self.device = DEVICES[arch].target, 1000 + list(DEVICES).index(arch)
        properties = {"max_shared_mem": DEVICES[arch].shared, "max_num_regs": 65536, "warpSize": self.target.warp_size,
                      "multiprocessor_count": DEVICES[arch].sms}  # fmt: skip
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: dict(properties),
            load_binary=lambda *args: (1, 1, 0, 0, DEVICES[arch].threads),
            unload_module=lambda module: None,
            unload_binary=lambda module: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return kind


def _parameters(name, kind):
    if isinstance(kind, tuple):
        for i, inner in enumerate(kind):
            yield from _parameters(f"{name}[{i}]", inner)
    elif kind != "constexpr":
        yield name, kind


@contextlib.contextmanager
def record(arch: str, compiled: list):
    """Kernels launched in the block are compiled for this architecture, each variant once per process."""
    before, listener = triton.runtime.driver._active, knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        parameters = tuple(p for name, kind in src.signature.items() for p in _parameters(name, kind))
        files = {name.rpartition(".")[2]: Path(path) for name, path in metadata_group.items()}
        compiled.append(Compiled(metadata["name"], arch, metadata["num_warps"], metadata["shared"],
                                 metadata.get("launch_pdl", False), parameters, files))  # fmt: skip

    triton.runtime.driver.set_active(_Driver(arch))
    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        triton.runtime.driver._active = before
        knobs.compilation.listener = listener
