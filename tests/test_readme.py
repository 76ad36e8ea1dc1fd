"""Every block of code in README is run as it stands, and what it names is there."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_dispatch import ROOT

import fastnorm

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(README)]
FORMULAS = next(code for language, code in BLOCKS if code.startswith("x_hat = "))


def of(language):
    return [code for found, code in BLOCKS if found == language and code is not FORMULAS]


def test_every_block_is_run_by_a_test_here():
    assert len(of("python")) >= 4
    assert len(of("sh")) >= 2
    assert len(of("")) == 1, "what python -m fastnorm prints"
    assert README.count("```") == 2 * len(BLOCKS) == 2 * (len(of("python")) + len(of("sh")) + len(of("")) + 1)


def test_python(capsys):
    """One after the other, as a reader would."""
    surroundings = {}
    for code in of("python"):
        exec(compile(code, "README.md", "exec"), surroundings)
    out = capsys.readouterr().out
    assert "BatchNorm1d" in out, "convert says what changed"
    assert "batch" in out, "lint says what is wrong with two samples"
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in surroundings["folded"].modules())


def commands():
    return [line.split("  #")[0].strip() for code in of("sh") for line in code.splitlines()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_targets_of_make(command):
    result = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ")])
def test_scripts(command):
    """Those of bench/ list what they would measure, which takes their options."""
    _, *args = shlex.split(command)
    args += ["--list"] if args[0].startswith("bench/") else []
    result = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_other_commands_are_installs():
    """test_packaging.py installs; here no torch is fetched."""
    others = [c for c in commands() if c and not c.startswith(("make ", "python "))]
    assert all(c.startswith("pip install ") for c in others)
    assert others[-1] == "pip install --no-build-isolation -e ."
    assert (ROOT / "pyproject.toml").exists()


def test_what_runs_where():
    """The same lines for the same machine: without a GPU, whatever the processor and the versions."""
    if torch.cuda.is_available() or os.environ.get("FASTNORM_BACKEND"):
        pytest.skip("README shows a machine without a GPU, and no backend that is forced")
    command = [sys.executable, "-m", "fastnorm"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    shown = of("")[0]
    versions_of = lambda text: re.findall(r"(\w+) \d", text.splitlines()[0])
    assert versions_of(shown) == versions_of(printed) == ["fastnorm", "torch", "Python"]
    assert shown.splitlines()[1:] == printed.splitlines()[1:]


def test_formulas():
    """The block of math gives what torch does, with the names that it uses."""
    x, dy = torch.randn(2, 6, 40, dtype=torch.float64)
    weight, bias = torch.randn(2, 40, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(leaves[0], (40,), *leaves[1:])
    dx, dweight, dbias = torch.autograd.grad(expected, leaves, dy)
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    over = {"sum": lambda t: t.sum(0), "mean": lambda t: t.mean(-1, keepdim=True)}
    found = {"x": x, "dy": dy, "weight": weight, "bias": bias, "rstd": torch.rsqrt(var + 1e-5), **over}
    for statement in re.split(r"\s{3,}|\n", FORMULAS.strip()):
        name, formula = statement.split(" = ")
        # mean is a statistic as well as a function.
        value = eval(formula, {**found, "mean": mean if name == "x_hat" else over["mean"]})
        found[name] = value
    for name, truth in (("y", expected), ("dx", dx), ("dweight", dweight), ("dbias", dbias)):
        torch.testing.assert_close(found[name], truth)


def test_links_and_paths_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'(?:src|srcset)="(?!http)([^"]+)"', README)
    assert links
    named = [path for path in re.findall(r"`((?:bench|tests|csrc|kernels|fastnorm|bench/results)/[\w./*-]+)`", README)]
    missing = [path for path in (*links, *named) if not (list(ROOT.glob(path)) or (ROOT / path).exists())]
    assert missing == []


def test_public_names_are_there():
    named = set(re.findall(r"\bfastnorm\.([A-Za-z]\w*)", README)) - {"py"}
    modules = {path.stem for path in Path(fastnorm.__file__).parent.glob("*.py")}
    with contextlib.redirect_stdout(io.StringIO()):
        assert {name for name in named if not hasattr(fastnorm, name)} <= modules
