"""The backend contract over the compiled kernels (csrc/): C++ on the CPU, and CUDA where Triton is not there."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from . import build
from .extension import load


def unavailable(device_type: str) -> str | None:
    extension = load()
    if isinstance(extension, str):
        return extension
    if device_type == "cuda":
        return _open_cuda()
    return None if device_type == "cpu" else f"it serves cpu and cuda tensors, not {device_type}"


def table(library) -> int:
    """The address of a library's row for the table of kernels, see csrc/kernels.h."""
    library.fastnorm_kernels.restype = ctypes.c_void_p
    return library.fastnorm_kernels()


@cache
def _open_cuda() -> str | None:
    """Has the extension run the CUDA kernels, which are compiled now where they never were; why not, where that fails."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "the CUDA kernels need a CUDA device, and there is none"
    try:
        library = build.cuda_library(build.gpu_architectures())
        stream = ctypes.CDLL("libtorch_cuda.so").aoti_torch_get_current_cuda_stream
        load().set_kernels("cuda", table(ctypes.CDLL(str(library))), ctypes.cast(stream, ctypes.c_void_p).value)
        x = torch.arange(256.0, device="cuda").view(16, 16)
        y = load().row_fwd(x, None, None, 1e-5, 16)[0]
        expected = torch.nn.functional.layer_norm(x, (16,))
        return None if torch.allclose(y, expected, atol=1e-5) else "its first kernel gave a wrong result"
    except (build.BuildError, OSError, AttributeError, RuntimeError) as e:
        return f"its first kernel did not run ({str(e).splitlines()[0]})"


def whole_calls(device_type: str):
    """See `dispatch.direct`."""
    module = load()
    module.serve_natively(device_type, True)
    return module.layer_norm, module.batch_norm, module.fused_rows, module.fused_batch_norm


def __getattr__(name):
    """The functions of the contract are the extension's own."""
    if name.startswith(("row_", "channel_", "group_", "position_", "branch_")):
        return globals().setdefault(name, getattr(load(), name))  # found without this function from now on
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
