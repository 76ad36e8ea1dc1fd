"""Compiles fastnorm._C and the library of CUDA kernels: one recipe each, used by setup.py ahead of time and at first use.

A compiled library fits one torch version, one Python and one instruction set, so it carries a key made of these and of the
sources; a library whose key does not fit is never loaded. The CUDA kernels know neither torch nor Python: theirs is made of
the sources and the architectures. setup.py reads this file before torch is known to be there: only the standard library at the
top.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_X86 = platform.machine() in ("x86_64", "AMD64")
# Instruction sets from the plainest to the widest, with the compiler's flags; a machine runs its own and those before it.
ISAS = {
    # Where the compiler vectorises by itself it fuses products into sums here and not there, and a row's bits would depend on
    # its batch: seen on aarch64.
    "default": ["-ffp-contract=off"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
}
ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]  # rounds to bfloat16 in one instruction instead of eight
RELEASE = ["-O3", "-g0"]
# Not linked with the sanitizers' runtime: it has to be preloaded (make sanitize), and where it is not, loading names a symbol
# that is missing instead of ending the process. A float divided by zero is not undefined here, but the infinity of IEEE.
SANITIZE = [
    "-O1",  # -O2 takes ten minutes
    "-fexpensive-optimizations",  # products are fused into sums, as in a release: the same roundings
    "-g1",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-D_GLIBCXX_ASSERTIONS",
]

# nvcc's own runtime, linked in: torch's may be of another version, and its streams are the driver's.
CUDA_FLAGS = ["-O3", "-std=c++17", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class BuildError(RuntimeError):
    """Why there is no compiled library, in one sentence."""


def csrc() -> Path:
    """The C++ sources: inside an installed package, beside it in a checkout."""
    inside = _HERE / "csrc"
    return inside if inside.is_dir() else _HERE.parent / "csrc"


def sources() -> list[Path]:
    return sorted([*csrc().glob("*.cpp"), *csrc().glob("cpu/*.cpp")])


def machine_isa() -> str:
    """The widest instruction set of this machine that torch itself would use (ATEN_CPU_CAPABILITY lowers it)."""
    import torch

    name = torch.backends.cpu.get_cpu_capability().lower()
    if name == "avx512" and torch.cpu._is_avx512_bf16_supported():
        name = "avx512_bf16"
    return name if _X86 and name in ISAS else "default"


def target_isa() -> str:
    """What is compiled for: this machine, or FASTNORM_ISA where a binary is to run on older ones."""
    isa = os.environ.get("FASTNORM_ISA") or machine_isa()
    if isa not in ISAS:
        raise BuildError(f"FASTNORM_ISA is {isa!r}; it should be one of {', '.join(ISAS)}")
    if ISAS[isa] and not _X86:
        raise BuildError(f"FASTNORM_ISA is {isa!r}, which a {platform.machine()} does not have")
    return isa


def sanitized() -> bool:
    """FASTNORM_SANITIZE=1: what is compiled and loaded stops at reads and writes out of bounds and at undefined behaviour."""
    return os.environ.get("FASTNORM_SANITIZE") == "1"


def flags(isa: str) -> list[str]:
    """The compiler's; a library of other flags has another key."""
    capability = isa.upper().removesuffix("_BF16")  # what at::vec has vectors for
    return [
        *(SANITIZE if sanitized() else RELEASE),
        "-fno-math-errno",  # a square root is an instruction, not a call
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",
        *ISAS[isa],
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
    ]


def key(isa: str) -> str:
    """What a library must have been built from and for, to be loaded here."""
    version = importlib.metadata.version("torch")
    about = f"{version} {sysconfig.get_config_var('SOABI')} {platform.machine()} {flags(isa)}"
    return f"fastnorm-{isa}-{digest([csrc(), csrc() / 'cpu'], about)}"


def digest(folders: list[Path], about: str) -> str:
    """Of the files of some folders under csrc, and of what else decides what is made of them."""
    digest = hashlib.sha256(about.encode())
    for path in sorted(path for folder in folders for path in folder.glob("*.*")):
        digest.update(path.relative_to(csrc()).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def accepted_keys() -> list[str]:
    """Keys of the libraries that this machine can run, the best first."""
    widest = list(ISAS).index(machine_isa())
    return [key(isa) for isa in reversed(list(ISAS)[: widest + 1])]


def compiler() -> str:
    name = os.environ.get("CXX")
    path = shutil.which(name.split()[0]) if name else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if path is None:
        found = f"CXX={name} was not found" if name else "no C++ compiler was found"
        raise BuildError(f"{found} (install g++ 11 or newer, or set CXX)")
    return path


def check_requirements() -> None:
    """Raises BuildError where the library cannot be compiled, and says what is missing."""
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise BuildError(f"{module} is not installed in this environment")
    compiler()


def extension(name: str = "fastnorm._C"):
    """The one recipe: a torch.utils.cpp_extension.CppExtension."""
    from torch.utils.cpp_extension import CppExtension

    isa = target_isa()
    root = csrc().parent
    return CppExtension(
        name,
        [os.path.relpath(p, root) if root == Path.cwd() else str(p) for p in sources()],
        extra_compile_args=[*flags(isa), f"-DFASTNORM_BUILD_KEY={key(isa)}"],
        optional=True,  # an install goes on without it, and first use tries again and says what went wrong
    )


def describe() -> str:
    import torch

    return f"fastnorm: compiling {len(sources())} files for {target_isa()} with {compiler()} against torch {torch.__version__}"


@contextlib.contextmanager
def _ninja_on_path():
    """A virtual environment's ninja is found even if the environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def build_ext_class():
    """setuptools' build_ext through torch and ninja."""
    from setuptools.errors import CompileError, LinkError
    from torch.utils.cpp_extension import BuildExtension

    class build_ext(BuildExtension):
        def run(self):
            print(describe(), flush=True)
            with _ninja_on_path():
                super().run()

        def build_extensions(self):
            try:
                super().build_extensions()
            except (RuntimeError, OSError, subprocess.CalledProcessError, CompileError, LinkError) as e:
                print(f"{e}\nfastnorm: the C++ kernels did not compile; first use tries again and says why", flush=True)

    return build_ext


def compile_into(directory: str) -> None:
    """Compile the module _C into `directory`."""
    from setuptools import Distribution

    with tempfile.TemporaryDirectory() as temporary:
        distribution = Distribution({"name": "fastnorm", "ext_modules": [extension("_C")]})
        command = build_ext_class()(distribution)
        command.build_lib, command.build_temp = directory, temporary
        command.ensure_finalized()
        command.run()


def cache_directory() -> Path:
    base = os.environ.get("FASTNORM_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnorm"
    return Path(base)


def library() -> Path:
    """A compiled library that fits: the installed one, the cached one, or one compiled now (seconds, once).

    Processes that start at once wait for the one that compiles; the lock goes with its holder, so that a killed process blocks
    nobody, and the library appears under its name only when it is whole.
    """
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    keys = accepted_keys()
    installed = _HERE / f"_C{suffix}"
    if installed.is_file():
        content = installed.read_bytes()
        if any(k.encode() in content for k in keys):
            return installed
    cached = cache_directory() / key(target_isa()) / f"_C{suffix}"
    if cached.is_file():
        return cached
    check_requirements()
    return compile_once(cached, [sys.executable, __file__], describe())


def compile_once(target: Path, command: list[str], what: str) -> Path:
    """`target`, which the command leaves under its name in the folder that it is given as its last argument.

    Args:
        what: is being done, for the user: "fastnorm: compiling ..."

    Raises:
        BuildError: it did not; the compiler's words are in a file.
    """
    import fcntl  # not on Windows, where setup.py still has to be able to read this file

    target.parent.mkdir(parents=True, exist_ok=True)
    log, arrival = target.parent / "build.log", time.time()
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed_while_waiting = log.is_file() and log.stat().st_mtime >= arrival
        if not target.is_file() and not failed_while_waiting:
            _compile_in_subprocess(target, log, command, what)
    if not target.is_file():
        raise BuildError(f"{what.removeprefix('fastnorm: ')} failed; the compiler's words are in {log}")
    return target


def _compile_in_subprocess(target: Path, log: Path, command: list[str], what: str) -> None:
    print(what, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        result = subprocess.run([*command, temporary], capture_output=True, text=True, check=False)
        built = Path(temporary) / target.name
        if result.returncode == 0 and built.is_file():
            os.replace(built, target)
        else:
            log.write_text(result.stdout + result.stderr)


# ---------------------------------------------------------------- CUDA kernels

CUDA_LIBRARY = "_cuda.so"


def nvcc() -> str:
    """The compiler of CUDA: of CUDA_HOME, on the path, of the system's toolkit or of NVIDIA's packages on PyPI."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    places += [Path("/usr/local/cuda/bin/nvcc"), *Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc")]
    path = next((place for place in places if os.access(place, os.X_OK)), None)
    if path is None:
        raise BuildError("no nvcc was found (install NVIDIA's CUDA toolkit, or set CUDA_HOME)")
    return str(path)


def cuda_wanted() -> bool | None:
    """FASTNORM_CUDA: 0 for no CUDA kernels, 1 to have setup.py compile them, nothing to compile them at first use."""
    value = os.environ.get("FASTNORM_CUDA") or None
    if value not in (None, "0", "1"):
        raise BuildError(f"FASTNORM_CUDA is {value!r}; it should be 0 or 1")
    return None if value is None else value == "1"


def cuda_architectures() -> list[str]:
    """What is compiled ahead of time: TORCH_CUDA_ARCH_LIST, as "9.0" or "9.0+PTX", else what this machine's GPUs are."""
    named = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if named != [""]:
        for name in named:
            if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST has {name!r}; it should be a list like 8.0;9.0+PTX")
        return named
    if not (present := gpu_architectures()):
        raise BuildError("there is no GPU to compile for (set TORCH_CUDA_ARCH_LIST, for example to 9.0)")
    return present


def gpu_architectures() -> list[str]:
    """What this machine's GPUs are."""
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in gpus})


def cuda_key(architectures: list[str]) -> str:
    shared = [(csrc() / name).read_text() for name in ("kernels.h", "activations.h", "norm_math.h", "philox.h")]
    return f"fastnorm-cuda-{digest([csrc() / 'cuda'], f'{CUDA_FLAGS} {shared}')}-{'-'.join(architectures)}-"


def _generated_code(architecture: str) -> list[str]:
    number, _, ptx = architecture.replace(".", "").partition("+")
    codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def compile_cuda_into(directory: str, architectures: list[str]) -> None:
    """Compile the library of CUDA kernels into `directory`; its files side by side."""
    flags = [*CUDA_FLAGS, "-ccbin", compiler(), f"-DFASTNORM_BUILD_KEY={cuda_key(architectures)}"]
    flags += [flag for architecture in architectures for flag in _generated_code(architecture)]
    with tempfile.TemporaryDirectory() as temporary:
        objects = {path: str(Path(temporary) / f"{path.stem}.o") for path in sorted((csrc() / "cuda").glob("*.cu"))}
        run = lambda *arguments: subprocess.run([nvcc(), *flags, *arguments], check=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda path: run("-c", str(path), "-o", objects[path]), objects))
        run("-shared", *objects.values(), "-o", str(Path(directory) / CUDA_LIBRARY))


def cuda_library(architectures: list[str]) -> Path:
    """A library of CUDA kernels for all of ["9.0"] or the like: the installed one, the cached one, or one compiled now."""
    if cuda_wanted() is False:
        raise BuildError("FASTNORM_CUDA=0 asks for no CUDA kernels")
    installed = _HERE / CUDA_LIBRARY
    if installed.is_file():
        found = re.search(cuda_key([]).removesuffix("-").encode() + rb"([\w.+-]+)-", installed.read_bytes())
        names = found[1].decode().split("-") if found else []
        if all(any(_runs_on(name, architecture) for name in names) for architecture in architectures):
            return installed
    cached = cache_directory() / cuda_key(architectures) / CUDA_LIBRARY
    if cached.is_file():
        return cached
    what = f"fastnorm: compiling the CUDA kernels for {' and '.join(architectures)} with {nvcc()}"
    return compile_once(cached, [sys.executable, __file__, *architectures], what)


def _runs_on(name: str, architecture: str) -> bool:
    """Machine code runs on later GPUs of its generation, PTX on all that are later; "9.0a" on that one alone."""
    compiled, present = (tuple(map(int, re.findall(r"\d+", text))) for text in (name, architecture))
    if name[-1].isalpha() and not name.endswith("+PTX"):
        return name[:-1] == architecture
    return compiled <= present and (compiled[0] == present[0] or name.endswith("+PTX"))


if __name__ == "__main__":
    *named, into = sys.argv[1:]
    if named:
        compile_cuda_into(into, named)
    else:
        compile_into(into)
