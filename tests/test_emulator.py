"""The emulator itself finds what it is there to find; and the CUDA kernels in other orders and under the sanitizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from conftest import EMULATED
from emulator import compile

import fastnorm
from fastnorm import build

pytestmark = pytest.mark.skipif(not EMULATED, reason="there is no C++ compiler, or one backend alone is tested")

HERE = Path(__file__).resolve().parent
NUMERICS = ("rows", "channels", "contract", "sums", "fused")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """planted.cpp, and the same under the sanitizers."""
    folder = tmp_path_factory.mktemp("planted")
    flags = [flag for flag in compile.FLAGS if flag != "-fPIC"]
    sources = [str(compile.HERE / name) for name in ("planted.cpp", "memory.cpp")]
    for name, options in (("plain", compile.OPTIMIZED), ("sanitized", build.SANITIZE)):
        command = [build.compiler(), *flags, *options, *sources, "-o", str(folder / name)]
        subprocess.run(command, check=True, env={**os.environ, "LD_PRELOAD": ""})

    def run(how, order, bug):
        command = [str(folder / how), str(emulator.ORDERS.index(order)), bug]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_what_has_no_bug_is_right(order, planted):
    for how in ("plain", "sanitized"):
        assert planted(how, order, "none") == (0, "right\n")


@pytest.mark.parametrize("bug", ["no barrier", "no second barrier", "not written"])
def test_what_a_barrier_is_missing_for_is_wrong_in_one_of_the_orders(bug, planted):
    results = {order: planted("plain", order, bug) for order in emulator.ORDERS}
    assert any(status == 1 and "wrong" in words for status, words in results.values()), results


@pytest.mark.parametrize(
    ("how", "bug", "words"),
    [
        ("plain", "early exit", "a warp operation waits for threads that have ended"),
        ("plain", "divergent", "a warp operation waits for threads that wait at a barrier of the block"),
        ("plain", "too little shared", "a block wrote beyond the shared memory that its launch asked for"),
        ("plain", "too many threads", "invalid configuration argument"),
        ("sanitized", "out of bounds", "heap-buffer-overflow"),
        ("sanitized", "misaligned", "misaligned address"),
        ("sanitized", "too little shared", "AddressSanitizer"),
    ],
)
def test_bugs_that_end_the_process_in_words(how, bug, words, planted):
    status, said = planted(how, "forward", bug)
    assert status != 0
    assert words in said


def suite(order, *arguments, tests="test", **environment):
    """The emulated part of the numerics suite, as far as it fits `tests`, in a process of its own: how many passed."""
    env = {**os.environ, "FASTNORM_BACKEND": "", "FASTNORM_EMULATOR_ORDER": order, **environment}
    command = [sys.executable, "-m", "pytest", "-k", f"emulated and {tests}", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command += [*arguments, *(str(HERE / f"test_{name}.py") for name in NUMERICS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.mark.parametrize("order", emulator.ORDERS[1:])
def test_the_numerics_in_another_order(order):
    assert suite(order) > 700


def test_the_numerics_under_the_sanitizers():
    """Every case of a plain norm once; `make sanitize` runs all tests. The sanitizers come before Python, which leaks by
    intent."""
    find = lambda name: subprocess.check_output([build.compiler(), f"-print-file-name={name}"], text=True).strip()
    runtimes = " ".join(map(find, ("libasan.so", "libubsan.so")))
    passed = suite("forward", "--capture=sys", tests="test_forward_and_gradients", FASTNORM_EMULATOR_SANITIZE="plain",
                   LD_PRELOAD=runtimes, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")  # fmt: skip
    assert passed > 200


def test_gradients_of_the_emulated_kernels_are_those_of_the_graph():
    """The whole calls of the extension, with autograd in C++, run on the kernels of the device."""
    x = torch.randn(6, 40, requires_grad=True)
    with fastnorm.use_backend("native"), emulator.kernels():
        fastnorm.layer_norm(x, (40,))  # chooses the backend
        y = fastnorm.layer_norm(x, (40,))
        y.square().sum().backward()
    assert y.grad_fn.name().startswith("torch::autograd::CppNode")
    expected = x.detach().clone().requires_grad_()
    torch.nn.functional.layer_norm(expected, (40,)).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
