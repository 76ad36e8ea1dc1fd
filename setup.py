"""Compiles fastnorm._C where torch and a compiler are there (pip install --no-build-isolation -e .); otherwise the install is
pure Python and the same recipe, fastnorm/build.py, runs at first use."""

import importlib.util
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # which would not say what it does not know in pyproject.toml
    sys.exit(f"fastnorm is installed by setuptools 77 or newer, not {setuptools.__version__}: pip install -U setuptools")

HERE = Path(__file__).resolve().parent
# PyPI has a package `kernels` as well, and setuptools loads a hook of it by name: it must not find our folder of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

spec = importlib.util.spec_from_file_location("build", HERE / "fastnorm" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def command_class():
    class build_ext(build.build_ext_class()):
        def run(self):
            super().run()
            if build.cuda_wanted():
                package = Path(self.get_ext_fullpath("fastnorm._C")).parent
                build.compile_cuda_into(str(package), build.cuda_architectures())

    return build_ext


compiled = {}
try:
    build.check_requirements()
    compiled = {"ext_modules": [build.extension()], "cmdclass": {"build_ext": command_class()}}
except build.BuildError as e:
    print(f"fastnorm: installing pure Python, the C++ kernels are compiled at first use: {e}", flush=True)

sources = ["fastnorm.csrc", "fastnorm.csrc.cpu", "fastnorm.csrc.cuda"]
setuptools.setup(
    packages=["fastnorm", "fastnorm.kernels", *sources],
    package_dir={
        "fastnorm.kernels": "kernels",
        "fastnorm.csrc": "csrc",
        "fastnorm.csrc.cpu": "csrc/cpu",
        "fastnorm.csrc.cuda": "csrc/cuda",
    },
    package_data={"fastnorm": ["py.typed"], **{package: ["*.h", "*.cpp", "*.cuh", "*.cu"] for package in sources}},
    **compiled,
)
