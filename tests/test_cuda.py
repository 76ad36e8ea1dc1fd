"""The library of CUDA kernels where there is no GPU: how it is built, found and loaded, what it says; and its machine code."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulator
import pytest
import torch
from test_dispatch import python

import fastnorm
from fastnorm import build, dispatch, extension, native

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ARCHITECTURE = "9.0"


def _missing():
    try:
        build.nvcc()
        build.compiler()
        return None
    except build.BuildError as e:
        return str(e)


needs_nvcc = pytest.mark.skipif(_missing() is not None, reason=f"{_missing()}")


# ---------------------------------------------------------------- finding


def test_nvcc_is_found_where_toolkits_are(tmp_path, monkeypatch):
    tool = tmp_path / "toolkit" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    tool.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        with monkeypatch.context() as m:
            m.delenv("CUDA_HOME", raising=False)
            m.setenv(name, str(tmp_path / "toolkit"))
            assert build.nvcc() == str(tool)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    assert build.nvcc() == str(tool)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(build.BuildError, match="no nvcc was found"):
        build.nvcc()


def test_architectures_ahead_of_time(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert build.cuda_architectures() == ["8.0", "9.0a", "12.0+PTX"]
    assert build._generated_code("9.0a") == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert build._generated_code("12.0+PTX") == [f"-gencode=arch=compute_120,code={c}" for c in ("sm_120", "compute_120")]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; it should be a list like"):
        build.cuda_architectures()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(build.BuildError, match="there is no GPU to compile for"):
        build.cuda_architectures()


@pytest.mark.parametrize(
    ("compiled", "present", "runs"),
    [
        ("8.0", "8.6", True),
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("8.0+PTX", "9.0", True),
        ("9.0+PTX", "8.0", False),
        ("9.0a", "9.0", True),
        ("10.0a", "10.3", False),
        ("12.0", "12.1", True),
    ],
)
def test_which_code_runs_on_which_gpu(compiled, present, runs):
    assert build._runs_on(compiled, present) == runs


def test_an_installed_library_is_taken_where_it_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_HERE", tmp_path)
    monkeypatch.setattr(build, "csrc", lambda: ROOT / "csrc")
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile_once", lambda target, command, what: target)
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    installed = tmp_path / build.CUDA_LIBRARY
    installed.write_bytes(b"..." + build.cuda_key(["8.0", "9.0+PTX"]).encode() + b"\0...")
    assert build.cuda_library(["8.6"]) == installed
    assert build.cuda_library(["8.6", "12.0"]) == installed
    mixed = tmp_path / "cache" / build.cuda_key(["7.5", "8.6"]) / build.CUDA_LIBRARY
    assert build.cuda_library(["7.5", "8.6"]) == mixed, "one GPU of two would have no code"
    assert build.cuda_library(["7.5"]) == tmp_path / "cache" / build.cuda_key(["7.5"]) / build.CUDA_LIBRARY
    installed.write_bytes(b"fastnorm-cuda-0123456789abcdef-8.0-")
    assert build.cuda_library(["8.6"]) != installed


def test_the_environment_can_refuse(monkeypatch):
    monkeypatch.setenv("FASTNORM_CUDA", "0")
    with pytest.raises(build.BuildError, match="FASTNORM_CUDA=0 asks for no CUDA kernels"):
        build.cuda_library([ARCHITECTURE])
    monkeypatch.setenv("FASTNORM_CUDA", "yes")
    with pytest.raises(build.BuildError, match="FASTNORM_CUDA is 'yes'; it should be 0 or 1"):
        build.cuda_wanted()


def test_sources_that_do_not_compile_are_reported(tmp_path, monkeypatch):
    """Once for both compilers: a log, and a sentence that says where it is."""
    for name in ("kernels.h", "activations.h", "norm_math.h", "philox.h"):
        (tmp_path / name).write_text("")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "broken.cu").write_text("this is no CUDA\n")
    code = "import fastnorm.build as b, pathlib\n"
    code += f"b.csrc = lambda: pathlib.Path({str(tmp_path)!r})\nb.compile_cuda_into({str(tmp_path)!r}, ['9.0'])"
    run = python(code)
    assert run.returncode != 0
    assert "broken.cu" in run.stderr or "no nvcc was found" in run.stderr


# ---------------------------------------------------------------- choosing


@pytest.fixture
def cuda_torch(monkeypatch):
    """As on a machine with a GPU, a torch for CUDA, and no Triton."""
    monkeypatch.delenv("FASTNORM_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 0), (9, 0)][device])
    monkeypatch.setattr(native, "_open_cuda", native._open_cuda.__wrapped__)
    yield
    dispatch._choose_anew()
    extension.load().set_kernels("cuda", 0, 0)


needs_compiler = pytest.mark.skipif(native.unavailable("cpu") is not None, reason="the extension cannot be compiled here")


def without_triton(monkeypatch):
    row = dispatch.Backend("triton", "fastnorm.no_such_module", "nothing", ("cuda",))
    monkeypatch.setattr(dispatch, "BACKENDS", (row, *dispatch.BACKENDS[1:]))


@needs_compiler
def test_without_triton_and_without_nvcc_torch_itself_serves(cuda_torch, monkeypatch):
    without_triton(monkeypatch)
    monkeypatch.setattr(build, "nvcc", lambda: (_ for _ in ()).throw(build.BuildError("no nvcc was found (install it)")))
    monkeypatch.setenv("FASTNORM_CACHE_DIR", "/nonexistent")
    with pytest.warns(RuntimeWarning, match=r"to torch itself: .*no_such_module.*'native' is not used, .*no nvcc was"):
        assert dispatch._choose("cuda") is None


@needs_compiler
def test_without_triton_the_cuda_kernels_serve(cuda_torch, monkeypatch):
    without_triton(monkeypatch)
    monkeypatch.setattr(native, "_open_cuda", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"fused C\+\+ and CUDA kernels: the backend 'triton' is not used"):
        assert dispatch._choose("cuda").__name__ == "fastnorm.native"


@needs_compiler
def test_a_torch_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native._open_cuda.__wrapped__() == f"torch {torch.__version__} is not built for CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native._open_cuda.__wrapped__() == "the CUDA kernels need a CUDA device, and there is none"
    assert native.unavailable("mps") == "it serves cpu and cuda tensors, not mps"


@needs_compiler
@needs_nvcc
def test_a_driver_that_is_missing_is_told(cuda_torch, monkeypatch):
    """torch's own words for it, or the kernel's: whatever comes first, and on one line."""
    monkeypatch.setattr(build, "cuda_library", lambda architectures: ROOT / "no-such-library.so")
    reason = native.unavailable("cuda")
    assert reason.startswith("its first kernel did not run (")
    assert "\n" not in reason


@pytest.mark.skipif(emulator.unavailable() is not None, reason="there is no C++ compiler")
def test_the_first_kernel_is_held_to_torch(cuda_torch, monkeypatch):
    """Opened with stand-ins for what a GPU's machine has; the tensor is one of the CPU."""
    stream = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)(lambda device, stream: 0)
    torch_cuda, emulated, arange = SimpleNamespace(aoti_torch_get_current_cuda_stream=stream), emulator.load(), torch.arange
    monkeypatch.setattr(build, "cuda_library", lambda architectures: f"kernels for {' and '.join(architectures)}")
    libraries = {"libtorch_cuda.so": torch_cuda, "kernels for 8.0 and 9.0": emulated}
    monkeypatch.setattr(ctypes, "CDLL", libraries.__getitem__)
    monkeypatch.setattr(torch, "arange", lambda n, device: arange(n))
    assert native.unavailable("cuda") is None
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, shape: x)
    assert native.unavailable("cuda") == "its first kernel gave a wrong result"


# ---------------------------------------------------------------- the library


@pytest.fixture(scope="module")
def library():
    return build.cuda_library([ARCHITECTURE])


@needs_nvcc
def test_the_library_says_what_it_is(library):
    assert build.cuda_key([ARCHITECTURE]).encode() in library.read_bytes()
    assert ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "fastnorm_build_key").value == b"f"
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in exported.splitlines()} == {"fastnorm_build_key", "fastnorm_kernels"}


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels would run, on memory that is not its own")
class TestWithoutGPU:
    """It loads beside any torch, and what a launch returns is raised, in words, before anything has changed."""

    @pytest.fixture(autouse=True)
    def served(self, library):
        with fastnorm.use_backend("native"):
            extension.load().set_kernels("cpu", native.table(ctypes.CDLL(str(library))), 0)
            yield
            extension.load().set_kernels("cpu", 0, 0)

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: fastnorm.layer_norm(x, (6,)),
            lambda x: fastnorm.batch_norm(x, None, None, training=True),
            lambda x: native.row_bwd(x, x, None, torch.zeros(2, 4), torch.ones(4), (True, None, None)),
            lambda x: native.channel_sums(x, x, torch.zeros(2, 6), torch.ones(6)),
        ],
    )
    def test_a_launch_that_fails(self, call):
        with pytest.raises(RuntimeError, match=r"CUDA error: (CUDA driver version|no CUDA-capable device)"):
            call(torch.randn(4, 6))

    def test_running_statistics_are_left_alone(self):
        mean, var, tracked = torch.zeros(6), torch.ones(6), torch.tensor(3)
        with pytest.raises(RuntimeError, match="CUDA error"):
            native.channel_fwd(torch.randn(4, 6), None, None, mean, var, True, 0.1, 1e-5, tracked)
        assert mean.eq(0).all()
        assert var.eq(1).all()
        assert tracked == 3


@needs_nvcc
def test_setup_compiles_it_where_that_is_asked_for(tmp_path):
    """Ahead of time, beside sources that do not matter here."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("fastnorm", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for folder in ("cpu", "cuda"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc" / "one.cpp").write_text("this is no C++\n")
    for name in ("kernels.h", "activations.h", "norm_math.h", "philox.h", "cpu/one.h"):
        (tmp_path / "csrc" / name).write_text("")
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text('extern "C" __global__ void one_kernel() {}\n')
    env = {**os.environ, "FASTNORM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list((tmp_path / "out").glob(f"lib*/fastnorm/{build.CUDA_LIBRARY}"))) == 1
    assert len(list((tmp_path / "out").glob("lib*/fastnorm/csrc/cuda/one.cu"))) == 1


# ---------------------------------------------------------------- machine code

PLANTED = """
namespace fastnorm::cuda {
template <class T, int V, int K> __global__ void row_fwd_kernel(const T* x, T* y, int n) {
  T v[V * K];
  for (int i = 0; i < V * K; ++i) v[i] = x[threadIdx.x + i * n];
  for (int i = 0; i < V * K; ++i) y[threadIdx.x * V * K + i] = PLANTED_VALUE;
}
template __global__ void row_fwd_kernel<float, 4, PLANTED_K>(const float*, float*, int);
}
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-DPLANTED_K=2", "-DPLANTED_VALUE=v[i]"], ["NARROW"]),
        (["-DPLANTED_K=2", "-DPLANTED_VALUE=v[i]*(1.0/n)"], ["FP64", "NARROW"]),
        (["-DPLANTED_K=16", "-DPLANTED_VALUE=v[i]", "-maxrregcount=32"], ["SPILL", "NARROW"]),
    ],
)
def test_the_audit_finds_planted_violations(flags, expected, tmp_path):
    pytest.importorskip("triton", reason="the tools that read machine code come with Triton")
    from audit import cuda

    (tmp_path / "planted.cu").write_text(PLANTED)
    command = [build.nvcc(), "-cubin", "-O3", "-arch=sm_90", *flags, "planted.cu", "-o", "planted.cubin"]
    subprocess.run(command, check=True, cwd=tmp_path)
    (kernel,) = cuda.read(tmp_path / "planted.cubin")
    assert (kernel.name, kernel.arguments[:2]) == ("row_fwd_kernel", ("float", "4"))
    assert cuda.violations(kernel) == expected


@needs_nvcc
def test_the_machine_code_has_no_violation(library):
    """Of one architecture; `make audit` has four."""
    pytest.importorskip("triton", reason="the tools that read machine code come with Triton")
    from audit import cuda

    kernels = cuda.audit(f"sm_{ARCHITECTURE.replace('.', '')}")
    assert {k.name for k in kernels} >= {"row_fwd_kernel", "row_bwd_kernel", "channel_stats_kernel", "group_bwd_kernel"}
    assert {k.name for k in kernels if k.fused} == set(cuda.FUSED)
    assert [(k.name, k.arguments, cuda.violations(k)) for k in kernels if cuda.violations(k)] == []
