"""Drives Triton's real JIT without a GPU: its own specialisation and compiler, down to machine code, and no launch.

Within `record(arch, compiled)` functions that launch kernels run unchanged on CPU tensors (their results are garbage); what was
compiled, and only what was compiled anew, is appended to `compiled`. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import re
import subprocess
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# compute capability -> most shared memory of a block, SMs
DEVICES = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}


@dataclass(frozen=True)
class Compiled:
    kernel: str
    cubin: str
    warps: int
    shared: int

    def usage(self) -> dict[str, int]:
        """REG, STACK and LOCAL (bytes per thread) as the assembler left them."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", self.cubin], capture_output=True, text=True, check=True).stdout
        return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args, **kwargs):
        pass


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, capability: int, device: int):
        self.target, self.device = GPUTarget("cuda", capability, 32), device
        shared, sms = DEVICES[capability]
        properties = {"max_shared_mem": shared, "max_num_regs": 65536, "multiprocessor_count": sms, "warpSize": 32}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: dict(properties),
            load_binary=lambda *args: (1, 1, 0, 0, 1024),
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


@contextlib.contextmanager
def record(capability: int, compiled: list):
    """Kernels launched in the block are compiled for this compute capability, each variant once per process."""
    before, listener = triton.runtime.driver._active, knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        cubin = next(path for name, path in metadata_group.items() if name.endswith(".cubin"))
        compiled.append(Compiled(metadata["name"], cubin, metadata["num_warps"], metadata["shared"]))

    # The JIT keeps its variants by device number: one made-up number per capability.
    triton.runtime.driver.set_active(_Driver(capability, 1000 + capability))
    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        triton.runtime.driver._active = before
        knobs.compilation.listener = listener
