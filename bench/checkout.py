"""Runs a script of this checkout with a Python that has torch, without an install: python bench/checkout.py SCRIPT [OPTION ...]

The folder kernels/ has to be importable as fastnorm.kernels, which an install maps. Here a temporary folder of links does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As package_dir of setup.py has it.
PACKAGES = {"kernels": "kernels", "csrc": "csrc"}
SOURCES = ("fastnorm/*.py", "kernels/*.py", "csrc/**/*.*", "tests/**/*.py", "bench/*.py")


def sources() -> str:
    """A digest of everything that figures depend on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def importable():
    """The folder to work in and the environment for child processes, in which `import fastnorm` finds this checkout."""
    with tempfile.TemporaryDirectory(prefix="fastnorm-") as folder:
        package = Path(folder, "fastnorm")
        package.mkdir()
        links = {path.name: path for path in (ROOT / "fastnorm").iterdir() if path.name != "__pycache__"}
        links |= {name: ROOT / source for name, source in PACKAGES.items()}
        for name, path in links.items():
            (package / name).symlink_to(path)
        before = os.environ.get("PYTHONPATH")
        yield folder, {**os.environ, "PYTHONPATH": folder + (os.pathsep + before if before else "")}


def without_torch() -> str | None:
    """What to say, in one line, where this Python has no torch."""
    if importlib.util.find_spec("torch"):
        return None
    return f"{sys.executable} has no torch: install it first, or give another Python (make ... PYTHON=/path/to/python)"


def main(argv) -> int:
    if reason := without_torch():
        print(reason, file=sys.stderr)
        return 2
    with importable() as (_, environment):
        return subprocess.run([sys.executable, *argv], env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
