"""The compiled library: keys, the cache, processes that start at once, and machines where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_dispatch import python

from fastnorm import build

COMPUTE = """
import warnings, torch, fastnorm
x = torch.arange(12.).reshape(3, 4).requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = fastnorm.LayerNorm(4)(x)
    y = fastnorm.BatchNorm1d(4)(y)
    y.square().sum().backward()
assert torch.allclose(y, torch.nn.BatchNorm1d(4)(torch.nn.LayerNorm(4)(x)), atol=1e-3)
messages = [str(w.message) for w in caught if "fastnorm" in str(w.message)]
print(len(messages), *messages)
print(getattr(fastnorm.dispatch.select("cpu"), "__name__", None))
"""


def _compiler_missing():
    try:
        build.compiler()
    except build.BuildError:
        return True
    return False


needs_compiler = pytest.mark.skipif(_compiler_missing(), reason="there is no C++ compiler on this machine")


def as_pure_python(code):
    """As in a pure Python install: the library beside the package is not seen, the sources are."""
    nowhere = str(build.csrc().parent / "no-library-here")
    return f"import fastnorm.build, pathlib; fastnorm.build._HERE = pathlib.Path({nowhere!r})\n{code}"


def test_keys_tell_apart_what_must_not_be_mixed(monkeypatch):
    keys = {isa: build.key(isa) for isa in build.ISAS}
    assert len(set(keys.values())) == len(keys)
    with monkeypatch.context() as m:
        m.setenv("FASTNORM_SANITIZE", "" if build.sanitized() else "1")
        assert not set(keys.values()) & set(build.accepted_keys())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.99.0")
    assert not set(keys.values()) & {build.key(isa) for isa in build.ISAS}


def test_a_machine_accepts_its_own_and_plainer_instruction_sets(monkeypatch):
    monkeypatch.setattr(build, "machine_isa", lambda: "avx2")
    assert build.accepted_keys() == [build.key("avx2"), build.key("default")]


def test_a_wrong_isa_is_refused(monkeypatch):
    monkeypatch.setenv("FASTNORM_ISA", "avx9")
    with pytest.raises(build.BuildError, match="FASTNORM_ISA is 'avx9'; it should be one of default, avx2, avx512"):
        build.target_isa()


def test_no_compiler_is_one_warning_and_right_results(tmp_path):
    code = as_pure_python(COMPUTE)
    run = python(code, PATH="/nonexistent", CXX=None, FASTNORM_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    count, message = run.stdout.split("\n")[0].split(" ", 1)
    assert count == "1", run.stdout
    assert "leaves norms of cpu tensors to torch itself" in message
    assert "no C++ compiler was found" in message
    assert run.stdout.split("\n")[1] == "None"


def test_no_triton_is_no_matter_on_a_cpu(tmp_path):
    """A folder that shadows triton with one that cannot be imported."""
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    run = python(COMPUTE, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("0\n")
    reason = "import fastnorm.dispatch as d; print(d.BACKENDS[0].why_not('cuda'))"
    assert "No module named 'triton'" in python(reason, PYTHONPATH=str(tmp_path)).stdout


@needs_compiler
def test_sources_that_do_not_compile_are_reported(tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "broken.cpp").write_text("this is no C++\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "build.py").write_text(Path(build.__file__).read_text())
    code = "import build\ntry:\n    build.library()\nexcept build.BuildError as e:\n    print(e)"
    run = python(code, PYTHONPATH=str(tmp_path / "package"), FASTNORM_CACHE_DIR=str(tmp_path / "cache"))
    assert run.stdout.startswith("compiling 1 files for "), run.stdout + run.stderr
    assert "failed; the compiler's words are in" in run.stdout
    log = next((tmp_path / "cache").rglob("build.log"))
    assert "broken.cpp" in log.read_text()
    assert not list((tmp_path / "cache").rglob("_C*"))


@needs_compiler
def test_an_install_goes_on_where_the_sources_do_not_compile(tmp_path):
    """Pure Python then, as where there is no compiler."""
    root = Path(build.__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        pytest.skip("only a checkout has setup.py")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        (tmp_path / name).write_text((root / name).read_text())
    for folder in ("fastnorm", "kernels", "csrc"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for source in (tmp_path / "csrc").rglob("*.cpp"):  # each of them: one beside it that compiles takes half a minute
        source.write_text("this is no C++\n")
    for compiler in (None, "/bin/false"):
        env = {name: value for name, value in os.environ.items() if name != "CXX"} | ({"CXX": compiler} if compiler else {})
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", f"out-{compiler is None}"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("fastnorm: compiling") == 1
        assert "fastnorm: the C++ kernels did not compile; first use tries again and says why" in run.stdout
    assert not list(tmp_path.rglob("*.so"))
    assert len(list(tmp_path.glob("out-*/lib*/fastnorm/kernels/row.py"))) == 2


PLAINER = list(build.ISAS)[: list(build.ISAS).index(build.machine_isa())]
OLDEST = "-std=c++17"  # torch 2.11 compiles extensions as C++17, later ones as C++20
# Beside the kernels there is nothing for one instruction set, so what is compiled for a plainer one says it of the others.
OF_THIS_MACHINE = [s for s in build.sources() if s.parent.name == "cpu" or not PLAINER]


@needs_compiler
@pytest.mark.parametrize("source", OF_THIS_MACHINE, ids=lambda source: source.name)
def test_sources_are_of_the_oldest_standard(source):
    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_path("include")]
    names = ["-DFASTNORM_BUILD_KEY=x", "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    command = [build.compiler(), OLDEST, "-fsyntax-only", *build.flags(build.target_isa()), *names]
    command += [option for folder in folders for option in ("-isystem", folder)]
    run = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_compiler
@pytest.mark.parametrize("isa", PLAINER)
def test_processes_that_start_at_once_compile_once(isa, tmp_path):
    """For a plainer instruction set, as on a machine of another kind, and as of the oldest standard, as with another torch; the
    numerics suite then runs on that library. Not optimised: that takes eleven minutes of a processor, this three."""
    compiler, own = tmp_path / "c++", os.environ.get("CXX") or build.compiler()
    compiler.write_text(f'#!/bin/sh\nexec {own} "$@" {OLDEST} -O0\n')  # the last option counts
    compiler.chmod(0o755)
    names = {"CXX": str(compiler), "FASTNORM_CACHE_DIR": str(tmp_path), "FASTNORM_ISA": isa, "ATEN_CPU_CAPABILITY": isa}
    env = {**os.environ, **names, "FASTNORM_BACKEND": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", as_pure_python(COMPUTE)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/", "env": env}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    outputs = [p.communicate() for p in processes]
    assert [out.split("\n")[:2] for out, _ in outputs] == [["0", "fastnorm.native"]] * 3, outputs
    assert sum(f"compiling {len(build.sources())} files for {isa}" in err for _, err in outputs) == 1
    assert len(list(tmp_path.rglob("_C*"))) == 1
    files = [str(Path(__file__).parent / name) for name in ("test_rows.py", "test_channels.py")]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, capture_output=True, text=True, env=env | {"FASTNORM_BACKEND": "native"}, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
