"""What is packed, and an install of it: sdist, the wheel made of it, a clean environment, and nothing left of it afterwards."""

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from test_dispatch import ROOT

from fastnorm import build
from fastnorm.version import __version__

if not (ROOT / "setup.py").is_file():
    pytest.skip("only a checkout can be packed", allow_module_level=True)

FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
FOLDERS = ("fastnorm", "kernels", "csrc", "tests", "bench")
# What lies in a checkout after a while, and is nobody's to install.
LITTER = (
    "fastnorm/_C.cpython-311-x86_64-linux-gnu.so",
    "fastnorm/_cuda.so",
    "fastnorm/__pycache__/nn.cpython-311.pyc",
    "build/lib/fastnorm/nn.py",
    "dist/fastnorm-0.0.1.tar.gz",
    "bench/results/a-machine.json",
    "bench/out/report.html",
    "tests/__pycache__/cases.cpython-311.pyc",
    ".hypothesis/unicode_data",
    ".mypy_cache/3.10/cache.json",
    ".venv/lib/site.py",
)
COMPUTE = """
import pathlib, sys, warnings, torch
warnings.simplefilter("ignore")
import fastnorm, fastnorm.kernels
assert pathlib.Path(fastnorm.__file__).is_relative_to(sys.prefix), fastnorm.__file__
assert pathlib.Path(fastnorm.kernels.__file__).parts[-3:-1] == ("fastnorm", "kernels")
x = torch.arange(12.).reshape(3, 4).square().requires_grad_()
norm, twin = fastnorm.LayerNorm(4, activation="relu"), torch.nn.LayerNorm(4)
for y in (norm(x), twin(x).relu()):
    y.square().sum().backward()
torch.testing.assert_close(norm.weight.grad, twin.weight.grad)
served = fastnorm.dispatch.select("cpu")
print(fastnorm.__version__, served and served.__name__)
"""


def run(*command, cwd, **environment):
    """What the command prints; without a compiler, so that nothing is compiled for minutes."""
    names = {"PATH": "/nonexistent", "FASTNORM_BACKEND": "", "TRITON_INTERPRET": "0", **environment}
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")} | names
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def files_of(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(the unpacked sdist, the names of the files that were there to be packed)"""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", "results", "out")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    names = files_of(tree)
    for name in LITTER:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("litter")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), cwd=tree)
    (packed,) = out.iterdir()
    assert packed.name == f"fastnorm-{__version__}.tar.gz"
    with tarfile.open(packed) as archive:
        archive.extractall(out, filter="data")
    return out / f"fastnorm-{__version__}", names


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), cwd=sdist[0])
    (packed,) = out.iterdir()
    return packed


def test_an_sdist_has_the_sources_and_no_litter(sdist):
    unpacked, names = sdist
    made = {name for name in files_of(unpacked) if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert files_of(unpacked) - made == names
    assert {"csrc/kernels.h", "csrc/cpu/row.h", "csrc/cuda/launch.cu", "kernels/row.py", "fastnorm/py.typed"} <= names


def test_a_wheel_has_the_package_and_nothing_else(sdist, wheel):
    assert wheel.name == f"fastnorm-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"fastnorm-{__version__}.dist-info/"
    expected = {name for name in sdist[1] if name.startswith("fastnorm/")}
    expected |= {f"fastnorm/{name}" for name in sdist[1] if name.startswith(("csrc/", "kernels/"))}
    expected |= {about + name for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
    assert names == expected


def test_the_metadata_is_that_of_the_project(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"fastnorm-{__version__}.dist-info/METADATA").decode()
    about = HeaderParser().parsestr(text)
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("fastnorm", __version__, ">=3.10")
    assert (about["License-Expression"], about.get_all("License-File")) == ("BSD-3-Clause", ["LICENSE"])
    classifiers = about.get_all("Classifier")
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(classifiers)
    assert not any(classifier.startswith("License ::") for classifier in classifiers)  # the expression says it
    assert about.get_all("Project-URL") is about["Home-page"] is None  # there is no address
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0] for line in needed] == ["torch", "triton", "setuptools", "ninja"]
    assert about.get_payload().startswith("# fastnorm")


def test_an_install_works_and_leaves_nothing(wheel, tmp_path):
    """Everything but fastnorm is the running environment's."""
    env, others, cwd, cache = (tmp_path / name for name in ("env", "others", "cwd", "cache"))
    others.mkdir(), cwd.mkdir()
    for folder in {*site.getsitepackages(), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))}:
        for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if "fastnorm" not in path.name and not (others / path.name).exists():
                (others / path.name).symlink_to(path)
    run(sys.executable, "-m", "venv", "--without-pip", str(env), cwd=cwd)
    python = env / "bin" / "python"
    folder = Path(sysconfig.get_path("purelib", "venv", {"base": str(env), "platbase": str(env)}))
    (folder / "others.pth").write_text(f"{others}\n")
    before = files_of(env)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
    run(*pip, "install", "--no-deps", "--no-index", "--no-cache-dir", str(wheel), cwd=cwd)
    served, backend = "torch itself", "None"
    try:  # the library of this environment, which fits only if the wheel has all its sources
        library = build.library()
        (cache / build.key(build.target_isa())).mkdir(parents=True)
        shutil.copy(library, cache / build.key(build.target_isa()))
        served, backend = "native", "fastnorm.native"
    except build.BuildError:
        pass
    about = run(str(python), "-m", "fastnorm", cwd=cwd, FASTNORM_CACHE_DIR=str(cache))
    assert about.startswith(f"fastnorm {__version__}, torch {importlib.metadata.version('torch')}")
    assert about.splitlines()[-1].split(maxsplit=1)[1].startswith(served)
    assert run(str(python), "-c", COMPUTE, cwd=cwd, FASTNORM_CACHE_DIR=str(cache)) == f"{__version__} {backend}\n"
    run(*pip, "uninstall", "-y", "fastnorm", cwd=cwd)
    assert files_of(env) == before
    gone = "import importlib.util as u; print(u.find_spec('fastnorm'), u.find_spec('torch') is not None)"
    assert run(str(python), "-c", gone, cwd=cwd) == "None True\n"
    assert not list(cwd.iterdir())


def test_an_older_setuptools_is_named(tmp_path):
    """It would say that project.license must be valid exactly by one definition."""
    code = "import setuptools; setuptools.__version__ = '76.1'; exec(open('setup.py').read())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 1
    assert run.stderr == "fastnorm is installed by setuptools 77 or newer, not 76.1: pip install -U setuptools\n"
