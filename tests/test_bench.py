"""The benchmark script: it runs, it refuses to time what is wrong, and it says what is wrong with its options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import MODELS

import fastnorm

pytest.importorskip("tqdm", reason="the bench extra is not installed")
import run  # bench/run.py, on the path through cases

SCRIPT = Path(run.__file__)
QUICK = ["--quiet", "--rounds", "2", "--seconds", "0.001", "--threads", "1"]


def script(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False)


FAULTS = """
import resource, sys
import torch, timing
torch.set_num_threads(1)
print(timing.keep_freed_memory() if sys.argv[1] == "keep" else "")
def touch():
    for t in [torch.empty(2 << 20) for _ in range(8)]: t.fill_(0)
for _ in range(3): touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_while_measuring():
    """64 MB in pieces of 8: the fourth time no page of them is new, even where the allocator begins by giving all back."""
    bench = Path(run.__file__).parent
    giving = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}

    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        said, number = subprocess.run(
            command, cwd=bench, env=giving, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        return said, int(number)

    said, number = faults("keep")
    if said != "kept to 32 MB":
        pytest.skip(f"no mallopt of glibc's: {said}")
    assert 4 * number < faults("not")[1]


def test_figures_of_every_op_and_mode(tmp_path):
    path = tmp_path / "new" / "out.json"
    result = script(*QUICK, "--filter", "tutorial 8 x 64", "--dtype", "fp32", "bf16", "fp16", "fp64", "--json", str(path))
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert len(report["rows"]) == 2 * 2 * 4
    for row in report["rows"]:
        assert row["us"] > 0
        assert row["speedup"] > 0
        moved = {"forward": 2, "backward": 3}[row["mode"]] * 8 * 64 * {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}[row["dtype"]]
        assert row["gb_per_s"] == pytest.approx(moved / row["us"] / 1e3)
    assert len(result.stdout.splitlines()) == 2 + 1 + 16


@pytest.mark.parametrize("wrong", ["y", "dx", "dweight"])
def test_a_wrong_result_is_not_timed(wrong, monkeypatch, capsys):
    """A norm that is off by one part in a thousand, forward or backward alone."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.001 if wrong == "y" else x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001 if wrong != "y" else dy

    real = fastnorm.layer_norm
    spoil = {
        "y": lambda x, shape, w, b, eps: Off.apply(real(x, shape, w, b, eps)),
        "dx": lambda x, shape, w, b, eps: real(Off.apply(x), shape, w, b, eps),
        "dweight": lambda x, shape, w, b, eps: real(x, shape, Off.apply(w), b, eps),
    }
    monkeypatch.setattr(fastnorm, "layer_norm", spoil[wrong])
    assert run.main([*QUICK, "--op", "layer_norm", "--filter", "512 x 768", "--dtype", "fp32", "--mode", "forward"]) == 1
    out = capsys.readouterr().out
    assert f"refused: {wrong} is off by" in out
    assert "GB/s" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--filter", "nothing"], "no row has 'nothing' in its description; --list shows them all"),
        (["--rounds", "0"], "invalid positive number value: '0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--backend", "triton", "--device", "cpu", "--filter", "8 x 64"], "the backend 'triton' was asked for, but"),
    ],
)
def test_wrong_options(args, words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = script(*args)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_list_names_every_model_in_both_modes():
    lines = script("--list", "--dtype", "fp32").stdout.splitlines()
    assert len(lines) == len(set(lines)) == 2 * len(MODELS)


def test_overhead_of_small_modules(tmp_path):
    path = tmp_path / "overhead.json"
    args = ["--device", "cpu", "--rounds", "2", "--seconds", "0.001", "--json", str(path)]
    command = [sys.executable, str(SCRIPT.with_name("overhead.py")), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * (3 + 4)
    assert all(row["us"] > 0 and row["torch_us"] > 0 and row["ratio"] > 0 for row in rows)


def test_a_wrong_module_is_not_timed(monkeypatch, capsys):
    import overhead

    class Off(torch.nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) * 1.001

    monkeypatch.setattr(fastnorm, "LayerNorm", Off)
    assert overhead.main(["--device", "cpu", "--rounds", "1", "--seconds", "0.0001"]) == 1
    assert capsys.readouterr().out.count("refused: y is off by") == 2 * 3


def test_errors_beside_torch_s(monkeypatch, capsys):
    import errors

    args = ["--device", "cpu", "--filter", "8 x 64", "--dtype", "fp32", "bf16"]
    assert errors.main(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 2 * 2 * 4
    real = fastnorm.layer_norm
    monkeypatch.setattr(fastnorm, "layer_norm", lambda *a: real(*a) * 1.001)
    assert errors.main(args) == 1
    assert "LARGER" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        errors.main(["--filter", "nothing"])
    assert "no norm has 'nothing' in its description" in capsys.readouterr().err
