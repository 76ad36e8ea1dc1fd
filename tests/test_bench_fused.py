"""bench/fused.py: it runs, it refuses to time what is wrong, and what autograd saves is counted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases  # puts bench on the path
import pytest
import torch

import fastnorm

pytest.importorskip("tqdm", reason="the bench extra is not installed")
import fused

assert cases
SCRIPT = Path(fused.__file__)
QUICK = ["--rounds", "2", "--seconds", "0.001", "--threads", "1", "--device", "cpu"]


def test_figures(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), *QUICK, "--filter", "1024x768 fp32", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = {(row["op"], row["mode"]): row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 8
    assert all(row["us"] > 0 and row["x torch"] > 0 for row in rows.values())
    ours, torchs = rows["LN+gelu", "forward"]["saved"]
    assert ours == pytest.approx(1, abs=0.01)  # x
    assert torchs == pytest.approx(2, abs=0.01)  # x and what gelu is of


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    real = fastnorm.layer_norm
    monkeypatch.setattr(fastnorm, "layer_norm", lambda *args, **extras: real(*args, **extras) * 1.001)
    assert fused.main([*QUICK, "--filter", "LN+gelu 1024x768 fp32 forward"]) == 1
    assert "refused: result 0 is off by" in capsys.readouterr().out


def test_a_compiled_peer_and_rows_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    assert fused.main([*QUICK, "--filter", "add+LN 1024x768 fp32 backward", "--compile"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        fused.main([*QUICK, "--filter", "nothing"])
    assert "--list shows them all" in capsys.readouterr().err


def test_what_is_dropped_is_dropped_in_the_truth(monkeypatch):
    """Every row of the new norms agrees at a small size; dropout only with the elements that ours keeps."""
    monkeypatch.setattr(fastnorm.channels_first, "LEAST", 1)
    small = [*fused._branches((64, 32)), *fused._channels_first((2, 8, 5, 7)), *fused._masked((4, 6, 20))]
    for row in small:
        inputs = fused.make(row, torch.float32, "cpu")
        gradients = [torch.randn_like(inputs[0]) for _ in range(2)]
        assert fused.disagreement(row, inputs, gradients) is None, row
        if row.truth:
            assert "is off by" in fused.disagreement(replace(row, truth=None), inputs, gradients)
    assert [row.name for row in small if row.truth] == ["drop+add+LN"]
