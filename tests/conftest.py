"""Fixtures: every backend on every device it serves, memory full of NaN where nothing was written, fixed seeds."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported, so before anything imports them

import pytest

import fastnorm
from fastnorm import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()


def _served():
    """(backend, device) for all that can run here; FASTNORM_BACKEND narrows it to one backend."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for backend in dispatch.BACKENDS:
        if dispatch.forced() in (None, backend.name):
            yield from ((backend, device) for device in devices if backend.why_not(device) is None)


@pytest.fixture(params=_served(), ids=lambda p: f"{p[0].name}-{p[1]}")
def served(request):
    """The backend module in force, and its device, for one test."""
    backend, device = request.param
    with fastnorm.use_backend(backend.name):
        yield backend.load(), device


@pytest.fixture
def backend(served):
    return served[0]


@pytest.fixture
def device(served):
    return served[1]


@pytest.fixture(autouse=True)
def _fixed_surroundings():
    """torch.empty hands out NaN; one thread a worker; a seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure():
    torch.set_num_threads(1)
