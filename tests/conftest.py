"""Fixtures: every backend on every device it serves, memory full of NaN where nothing was written, fixed seeds."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported, so before anything imports them

import emulator
import pytest

import fastnorm
from fastnorm import build, dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()


def _served():
    """(backend, device) for all that can run here; FASTNORM_BACKEND narrows it to one backend."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for backend in dispatch.BACKENDS:
        if dispatch.forced() in (None, backend.name):
            yield from ((backend, device) for device in devices if backend.why_not(device) is None)


SERVED = [] if emulator.ALONE else list(_served())
NATIVE = dispatch.BACKENDS[dispatch.NAMES.index("native")]
# The CUDA kernels of the native backend, on a CPU; where another backend is asked for, that one alone is tested.
EMULATED = [] if dispatch.forced() or emulator.unavailable() else [(NATIVE, "cpu")]


def pytest_sessionstart():
    """A backend that should be there and is not must not turn into tests that are not run."""
    present = {backend.name for backend, _ in SERVED}
    if dispatch.forced() and not present:
        pytest.exit(f"FASTNORM_BACKEND={dispatch.forced()} cannot run here: {_reason(dispatch.forced())}", returncode=2)
    if dispatch.forced() or (not emulator.ALONE and not _compiler()):
        return
    if reason := NATIVE.why_not("cpu") or emulator.unavailable():
        pytest.exit(f"there is a C++ compiler, but no native backend: {reason}", returncode=2)


def _reason(name):
    return dispatch.BACKENDS[dispatch.NAMES.index(name)].why_not("cpu")


def _compiler():
    try:
        return build.compiler()
    except build.BuildError:
        return None


def _parameters():
    yield from (pytest.param(served, id=f"{served[0].name}-{served[1]}") for served in SERVED)
    yield from (pytest.param((*served, "emulated"), id="emulated") for served in EMULATED)


# Without the emulated kernels, which are called in the graphs of native-cpu: for tests of what is traced or compiled.
NOT_EMULATED = [p for p in _parameters() if p.id != "emulated"]
# Without those that are interpreted or emulated.
AT_SPEED = [p for p in _parameters() if p.id not in ("triton-cpu", "emulated")]


@contextlib.contextmanager
def in_force(served):
    backend, device, *emulated = served
    with fastnorm.use_backend(backend.name), emulator.kernels() if emulated else contextlib.nullcontext():
        yield backend.load(), device


@pytest.fixture(params=_parameters())
def served(request):
    """The backend module in force, and its device, for one test."""
    with in_force(request.param) as served:
        yield served


@pytest.fixture
def backend(served):
    return served[0]


@pytest.fixture
def device(served):
    return served[1]


@pytest.fixture(autouse=True)
def _fixed_surroundings():
    """torch.empty hands out NaN; one thread a worker; a seed."""
    # torch.manual_seed keeps a traceback for a GPU that is not there, a millisecond a test.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure():
    torch.set_num_threads(1)
    fastnorm.instance.LEAST = 1  # small inputs would be left to torch
