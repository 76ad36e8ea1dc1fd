"""Which backend serves what: the table, forcing one, and what is said when it cannot serve."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnorm
from fastnorm import dispatch

ROOT = Path(fastnorm.__file__).resolve().parents[1]


def python(code, **environment):
    """Run code in a fresh interpreter outside the checkout; the environment gets `environment`, None removes a variable."""
    env = {**os.environ, "FASTNORM_BACKEND": "", "TRITON_INTERPRET": "0", **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=False)


def test_names_and_order():
    assert dispatch.NAMES == ("triton", "native", "reference")


def test_every_backend_has_the_contract(served):
    module, _ = served
    functions = ["row_fwd", "row_bwd", "channel_fwd", "channel_bwd"]
    functions += ["channel_stats", "channel_apply", "channel_sums", "channel_grad"]
    functions += ["row_fused_fwd", "row_fused_bwd", "channel_fused_fwd", "channel_fused_bwd", "group_fwd", "group_bwd"]
    assert all(callable(getattr(module, name)) for name in functions)


def test_use_backend_as_a_call_and_as_a_block():
    with fastnorm.use_backend(None):
        automatic = dispatch.select("cpu")
        with fastnorm.use_backend("reference"):
            assert dispatch.select("cpu").__name__ == "fastnorm.reference"
        assert dispatch.select("cpu") is automatic
        fastnorm.use_backend("reference")
        assert dispatch.select("cpu").__name__ == "fastnorm.reference"


def test_the_choice_is_restored_after_an_error():
    before = dispatch.forced()
    with pytest.raises(KeyError), fastnorm.use_backend("reference"):
        raise KeyError
    assert dispatch.forced() == before


def test_unknown_backend():
    with pytest.raises(ValueError, match="no backend 'cudnn'; choose one of triton, native, reference"):
        fastnorm.use_backend("cudnn")
    run = python("import torch, fastnorm; fastnorm.layer_norm(torch.ones(2, 3), (3,))", FASTNORM_BACKEND="cudnn")
    assert run.returncode != 0
    assert "no backend 'cudnn'" in run.stderr


def test_environment_chooses():
    code = "import fastnorm.dispatch as d; print(d.select('cpu').__name__)"
    assert python(code, FASTNORM_BACKEND="reference").stdout.strip() == "fastnorm.reference"


def test_a_forced_backend_that_cannot_serve_says_why():
    code = "import torch, fastnorm; fastnorm.layer_norm(torch.ones(2, 3), (3,))"
    run = python(code, FASTNORM_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert run.returncode != 0
    assert "RuntimeError: the backend 'triton' was asked for, but" in run.stderr


def test_backward_runs_on_the_backend_of_its_forward():
    """use_backend around the forward alone."""
    calls = []

    class Spy:
        def __getattr__(self, name):
            def function(*args):
                calls.append(name)
                return getattr(dispatch.BACKENDS[-1].load(), name)(*args)

            return function

    x = torch.randn(4, 6, requires_grad=True)
    with fastnorm.use_backend("reference"):
        dispatch._selected["cpu"] = Spy()
        y = fastnorm.layer_norm(x, (6,))
    y.sum().backward()
    assert calls == ["row_fwd", "row_bwd"]


def test_devices_without_kernels_are_left_to_torch(monkeypatch):
    monkeypatch.delenv("FASTNORM_BACKEND", raising=False)
    assert dispatch.select("xpu") is None


def test_report():
    run = subprocess.run([sys.executable, "-m", "fastnorm"], capture_output=True, text=True, cwd="/", check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"fastnorm {fastnorm.__version__}, torch {torch.__version__}")
    for backend in dispatch.BACKENDS:
        assert f"\n{backend.name} " in run.stdout
    assert "bfloat16" in run.stdout


def test_report_of_a_forced_backend_that_cannot_serve():
    run = python("from fastnorm.__main__ import report; print(report())", FASTNORM_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    assert "forced to 'triton'" in run.stdout
    assert "nothing" in run.stdout


def test_triton_that_cannot_launch_is_not_used(monkeypatch):
    """Say, a machine with a GPU but without the C compiler that Triton needs."""
    kernels = pytest.importorskip("fastnorm.kernels", reason="triton is not installed")

    def broken(*args):
        raise RuntimeError("Failed to find C compiler.\nMore words.")

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: torch.ones(256))
    monkeypatch.setattr(kernels, "check", lambda call: call())
    monkeypatch.setattr(kernels, "row_fwd", broken)
    reason = kernels._without_gpu.__wrapped__()
    assert reason == "its first kernel did not run (RuntimeError: Failed to find C compiler.)"


def test_triton_is_not_used_where_its_launches_would_fail(monkeypatch):
    """An AMD GPU, "cuda" to torch, runs no block of 32 warps."""
    kernels = pytest.importorskip("fastnorm.kernels", reason="triton is not installed")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels._without_gpu.__wrapped__() == "its launch choices are made for NVIDIA GPUs, and this one has other limits"


def test_triton_backend_is_imported_once():
    """From the checkout's root `import kernels` works by accident, and would make a second copy of every kernel."""
    other = sys.modules.get("kernels")  # Hugging Face's package of that name is no copy
    assert other is None or ROOT / "kernels" not in Path(other.__file__).parents


# What a module of the package may import: only what stands below it.
LAYERS = [
    {"activations", "geometry", "heuristics", "settings", "tracing", "version"},
    {"build", "heuristics_positions", "heuristics_branch"},
    {"extension"},
    {"reference", "native", "kernels"},
    {"dispatch"},
    {"autograd", "composite", "ops"},
    {"gate"},
    {"fused", "masked"},
    {"branch", "recompute"},
    {"blocks"},
    {"functional", "collective"},
    {"instance", "group", "channels_first", "ghost"},
    {"options"},
    {"nn", "known"},
    {"sync"},
    {"convert", "hub", "keras"},
    {"order"},
    {"rules", "fold"},
    {"lint"},
    {"__init__", "__main__"},
]


def test_imports_go_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    same_level = {("autograd", "composite"), ("ops", "composite"), ("__main__", "__init__")}
    for path in sorted((ROOT / "fastnorm").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level != 1:
                continue
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for module in (m if m in level else "__init__" for m in modules):
                assert level[module] < level[path.stem] or (path.stem, module) in same_level, f"{path.name} imports {module}"


def test_only_kernels_import_triton():
    for path in sorted((ROOT / "fastnorm").glob("*.py")):
        assert "import triton" not in path.read_text(), path
