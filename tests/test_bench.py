"""The benchmark script: it runs, refuses to time what is wrong, says what is wrong with its options, goes on where it was, and
finds what has become slower."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cases  # puts bench on the path
import pytest
import torch

import fastnorm

pytest.importorskip("tqdm", reason="the bench extra is not installed")
import measure
import norms
import operators
import providers
import run
import slowdown
import timing

assert cases
SCRIPT = Path(run.__file__)
QUICK = ["--quiet", "--rounds", "2", "--seconds", "0.001", "--threads", "1", "--device", "cpu"]


def script(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False)


@pytest.fixture
def quick(tmp_path):
    """main() with few figures, and its JSON; another number of rounds, say, comes after."""
    path = tmp_path / "out.json"
    go = lambda *args: run.main([*QUICK, "--json", str(path), *args])
    return SimpleNamespace(run=go, path=path, rows=lambda: json.loads(path.read_text())["rows"])


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
    giving = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}

    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        said, number = subprocess.run(
            command, cwd=SCRIPT.parent, env=giving, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        return said, int(number)

    said, number = faults("keep")
    if said != "kept to 32 MB":
        pytest.skip(f"no mallopt of glibc's: {said}")
    assert 4 * number < faults("not")[1]


def test_figures_of_every_mode_and_dtype(tmp_path):
    path = tmp_path / "new" / "out.json"
    result = script(
        *QUICK, "--filter", "tutorial 8 x 64", "--dtype", *norms.DTYPES, "--mode", *norms.MODES, "--json", str(path)
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["providers"] == ["fastnorm", "torch", "in place"]
    assert len(report["rows"]) == 2 * 4 * 4
    for row in report["rows"]:
        times = row["us"]["wall"]
        assert all(times[name] > 0 for name in ("fastnorm", "torch", "copy"))
        assert row["speedup"]["wall"]["torch"] > 0
        assert row["copies"]["wall"]["fastnorm"] > 0
        assert row["bytes"] == 8 * 64 * norms.DTYPES[row["dtype"]].itemsize
        assert row["moved"] == {"forward": 2, "backward": 3, "both": 5, "eval": 2}[row["mode"]]
        assert row["peak"]["fastnorm"] >= row["bytes"]
        assert ("saved" in row) == (row["mode"] != "eval")
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 1 + len(report["rows"])
    row = report["rows"][0]
    speed = f"{2 * row['bytes'] / row['us']['wall']['fastnorm'] / 1e3:.1f}"
    assert lines[3].split()[6:8] == [f"{row['us']['wall']['copy']:.1f}", speed]
    assert result.stderr == ""


SMALL = {"GN": (2, 64, 9, 9), "GN+silu": (2, 64, 9, 9), "LN2d": (2, 8, 5, 7), "IN": (2, 6, 5, 7), "BN ghost": (48, 6, 5),
         "LN*(1+s)+t": (3, 5, 40), "BN masked": (4, 6, 20), "LN masked": (4, 6, 20)}  # fmt: skip


@pytest.mark.parametrize("op", norms.OPS)
def test_every_op_agrees_in_every_mode(op, monkeypatch):
    """torch's operators with the oracle as well: both are written in this benchmark."""
    monkeypatch.setattr(fastnorm.channels_first, "LEAST", 1)
    norm = norms.Norm(op, SMALL.get(op, (16, 6, 5, 5) if norms.OPS[op].channels else (6, 40)))
    who = [name for name in ("fastnorm", "torch", "in place", "reference") if op in providers.PROVIDERS[name].ops]
    for row in measure.measure(norm, "fp32", norms.MODES, who, measure.How(rounds=1, seconds=1e-5)):
        assert "refused" not in row, row["refused"]
        assert set(row["us"]["wall"]) == {*who, "copy"}
    subject = measure.Subject(norm, "fp32", "cpu")
    _, truth = subject.expected("backward", True)
    assert len(truth) == len(norm.how.names)
    assert not any(t.isnan().any() for t in truth)


def test_the_oracle_drops_what_fastnorm_drops():
    norm = norms.Norm("drop+add+LN", (64, 32))
    subject = measure.Subject(norm, "fp32", "cpu")
    call = subject.calls("fastnorm", ("backward",))["backward"]
    assert subject.wrong("fastnorm", "backward", call) is None
    ours = norms.results(call, subject.inputs, "backward")
    others = norms.results(norms.bound(norm, operators.Sequences(), subject.inputs, True), subject.inputs, "backward")
    _, truth = subject.expected("backward", True)
    assert norms.disagreement(norm.how.names, ours, others, truth) is None
    assert "is off by" in norms.disagreement(norm.how.names, others, ours, truth), "torch drops others"


class Off(torch.autograd.Function):
    """Wrong by one part in a thousand, forward or backward."""

    @staticmethod
    def forward(ctx, x, y_too):
        return x * (1.001 if y_too else 1)

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001, None


@pytest.mark.parametrize("wrong", ["y", "dx", "dweight"])
def test_a_wrong_result_is_not_timed(wrong, monkeypatch, capsys, quick):
    real = fastnorm.layer_norm
    spoil = {
        "y": lambda x, shape, w, b, eps: Off.apply(real(x, shape, w, b, eps), True),
        "dx": lambda x, shape, w, b, eps: real(Off.apply(x, False), shape, w, b, eps),
        "dweight": lambda x, shape, w, b, eps: real(x, shape, Off.apply(w, False), b, eps),
    }
    monkeypatch.setattr(fastnorm, "layer_norm", spoil[wrong])
    mode = "forward" if wrong == "y" else "backward"
    assert quick.run("--op", "LN", "--filter", "LN 512x768", "--dtype", "fp32", "--mode", mode) == 1
    out = capsys.readouterr().out
    assert f"refused: {wrong} is off by" in out
    assert "GB/s" in out
    assert "us" not in quick.rows()[0]


def test_others_that_are_wrong_or_break_are_named_and_not_timed(monkeypatch, capsys, quick):
    def broken(*args):
        raise ValueError("not this shape\nmore")

    off = SimpleNamespace(layer_norm=lambda *args: operators.Sequences().layer_norm(*args) * 1.01)
    planted = {
        **{name: providers.PROVIDERS[name] for name in ("fastnorm", "torch")},
        "wrong": providers.Provider(lambda: off, "a wrong one", ("LN",)),
        "broken": providers.Provider(lambda: SimpleNamespace(layer_norm=broken), "one that raises", ("LN",)),
        "missing": providers.Provider(lambda: __import__("there_is_no_such_module"), "one that is not there"),
        "forward alone": providers.Provider(operators.Sequences, "one without a backward", ("LN",), ("forward",)),
    }
    for module in (providers, measure, run):
        monkeypatch.setattr(module, "PROVIDERS", planted)
    assert quick.run("--filter", "LN 32x10 fp32", "--provider", *planted) == 0, "that another is wrong is no failure of ours"
    forward, backward = quick.rows()
    assert set(forward["us"]["wall"]) == {"fastnorm", "torch", "forward alone", "copy"}
    assert set(backward["us"]["wall"]) == {"fastnorm", "torch", "copy"}
    assert forward["refused"]["wrong"].startswith("y is off by")
    assert backward["refused"]["broken"] == "ValueError: not this shape"
    document = json.loads(quick.path.read_text())
    assert "there_is_no_such_module" in document["machine"]["absent"]["missing"]
    assert "LN 32x10 fp32 forward: broken is not timed: ValueError" in capsys.readouterr().out


def test_others_may_be_less_exact_but_not_wrong():
    truth = [torch.tensor([1.0, -4.0], dtype=torch.float64)]
    torchs, eps = [truth[0].float()], torch.finfo(torch.float32).eps
    found = lambda off, *another: norms.disagreement(("y",), [torchs[0] + 4 * off * eps], torchs, truth, *another)
    assert found(0.9) is None
    assert "y is off by" in found(2)
    assert found(17, torch.float32) is None
    assert "y is off by" in found(20, torch.float32)
    assert found(1e5, torch.bfloat16) is None
    assert "y is off by" in found(3e5, torch.bfloat16)


def test_a_compiled_provider_is_compiled_once_for_training(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, dynamic, mode: compiled.append(mode) or call)
    norm = norms.Norm("add+LN", (16, 32))
    rows = measure.measure(norm, "fp32", norms.MODES, ("fastnorm", "torch", "compile"), measure.How(rounds=1, seconds=1e-5))
    assert compiled == ["default", "default"], "one for training, one for evaluation"
    assert all("compile" in row["speedup"]["wall"] for row in rows)


def test_on_a_device_what_cannot_be_captured_is_left_out(monkeypatch):
    """The others have the device's times, from a cold and a warm L2, and the host's."""
    norm, clock = norms.Norm("LN", (16, 32)), timing.WallClock()
    how = measure.How(rounds=2, clock=clock)
    (row,) = measure.measure(norm, "fp32", ("backward",), ("fastnorm", "torch"), how)
    assert set(row["us"]) == {"cold", "warm", "host"}
    assert all(set(times) == {"fastnorm", "torch", "copy"} for times in row["us"].values())
    prepared = []

    def prepare(function):
        prepared.append(function)
        if len(prepared) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return timing.WallClock.prepare(clock, function)

    monkeypatch.setattr(clock, "prepare", prepare)
    (row,) = measure.measure(norm, "fp32", ("backward",), ("fastnorm", "torch", "keras"), how)
    assert row["refused"] == {"torch": "RuntimeError: operation not permitted when stream is capturing"}
    assert set(row["us"]["cold"]) == set(row["us"]["host"]) == {"fastnorm", "keras", "copy"}


def test_a_backend_serves_its_own_calls_alone():
    seen = []
    spy = lambda *args: seen.append(fastnorm.dispatch.select("cpu").__name__) or fastnorm.layer_norm(*args)
    reference = replace(providers.PROVIDERS["reference"], load=lambda: SimpleNamespace(layer_norm=spy))
    with reference.within():
        norms.bound(norms.Norm("LN", (4, 8)), reference.load(), norms.make(norms.Norm("LN", (4, 8)), "fp32", "cpu"), True)()
    spy(torch.ones(2, 8), (8,))
    assert seen[0] == "fastnorm.reference"
    assert seen[1] == fastnorm.dispatch.select("cpu").__name__ != "fastnorm.reference"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--filter", "nothing"], "no row has 'nothing' in its description; --list shows them all"),
        (["--rounds", "0"], "invalid positive number value: '0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--provider", "nobody"], "invalid choice: 'nobody'"),
        (["--compare", "nothing.json"], "nothing to compare with: nothing.json is no JSON that this script has written"),
        (["--compare", __file__], "is no JSON that this script has written"),
        (["--resume", "--json", __file__, "--filter", "LN 8x64"], "is no JSON that this script has written"),
        (["--backend", "triton", "--device", "cpu", "--filter", "8x64"], "the backend 'triton' was asked for, but"),
    ],
)
def test_wrong_options(args, words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = script(*args)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_the_list_names_every_norm_once_and_who_is_not_here():
    lines = script("--list", "--dtype", "fp32", "--provider", "all", "--device", "cpu").stdout.splitlines()
    rows = [line for line in lines if " fp32 " in line]
    assert len(rows) == len(set(rows)) == 2 * len(norms.NORMS)
    assert len({(n.op, n.shape, n.layout) for n in norms.NORMS}) == len(norms.NORMS)
    assert {norm.op for norm in norms.NORMS} == set(norms.OPS)
    beside = next(line for line in lines if line.startswith("beside: "))
    missing = [line.split(": ")[1] for line in lines if line.startswith("not here: ")]
    assert set(beside.removeprefix("beside: ").split(", ")) | set(missing) == set(providers.PROVIDERS)


def test_every_public_function_is_measured():
    functions = {name for name in fastnorm.__all__ if name.endswith("_norm")}
    assert {op.what for op in norms.OPS.values()} == functions


def test_all_providers_without_a_compiler(monkeypatch):
    """There is no native backend then, neither as fastnorm's nor by itself."""
    reasons = {"native": "no C++ compiler was found"}
    monkeypatch.setattr(run, "absent", lambda name: reasons.get(name))
    names, missing = run.chosen(run.parser().parse_args(["--provider", "all", "--device", "cpu"]))
    assert "native" not in names
    assert missing == reasons


def test_what_autograd_keeps_is_counted():
    """Of layer norm and gelu x, and in torch's operators what gelu is of as well; parameters are not counted."""
    (row,) = measure.measure(
        norms.Norm("LN+gelu", (256, 768)), "fp32", ("backward",), ("fastnorm", "torch"), measure.How(rounds=1)
    )
    ours, torchs = (row["saved"][name] / row["bytes"] for name in ("fastnorm", "torch"))
    assert ours == pytest.approx(1, abs=0.02)
    assert torchs == pytest.approx(2, abs=0.02)


def test_it_goes_on_where_it_was(quick, monkeypatch, capsys):
    """Killed in its third norm: the next one measures the others."""
    real, asked = run.measure, []

    def counting(norm, dtype, modes, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((str(norm), dtype))
        return real(norm, dtype, modes, *rest)

    monkeypatch.setattr(run, "measure", counting)
    options = ("--filter", "tutorial 8 x 64", "--mode", "forward")
    with pytest.raises(KeyboardInterrupt):
        quick.run(*options)
    assert len(quick.rows()) == 2
    first = quick.rows()[0]
    asked.clear()
    monkeypatch.setattr(run, "sources", lambda: "others")
    with pytest.raises(SystemExit):
        quick.run(*options, "--resume")
    assert "sources differ" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(run, "measure", lambda norm, dtype, *rest: asked.append((str(norm), dtype)) or real(norm, dtype, *rest))
    assert quick.run(*options, "--resume") == 0
    assert asked == [("BN 8x64", "fp32"), ("BN 8x64", "bf16")]
    assert len(quick.rows()) == 4
    assert quick.rows()[0] == first
    assert quick.run(*options) == 0
    assert len(asked) == 2 + 4, "without --resume all is measured anew"


def test_a_planted_slow_down_is_found(quick, tmp_path, monkeypatch, capsys):
    old, options = tmp_path / "old.json", ("--filter", "LN 64x768 fp32 forward", "--rounds", "5")
    assert quick.run(*options) == 0
    quick.path.rename(old)
    real = fastnorm.layer_norm

    def slow(*args):
        begin = time.perf_counter()
        y = real(*args)
        while time.perf_counter() - begin < 1e-3:
            pass
        return y

    monkeypatch.setattr(fastnorm, "layer_norm", slow)
    assert quick.run(*options, "--compare", str(old)) == 1
    assert "slower: LN 64x768 fp32 forward: " in capsys.readouterr().out


def test_slow_downs_that_do_not_last_are_no_slow_downs(quick, tmp_path, monkeypatch, capsys):
    old, options = tmp_path / "old.json", ("--filter", "LN 64x768 fp32 forward")
    assert quick.run(*options) == 0
    quick.path.rename(old)
    said = iter(["slower", "slower", None])
    monkeypatch.setattr(run, "slower", lambda row, then: next(said))
    assert quick.run(*options, "--compare", str(old)) == 0
    assert "1 of 1 rows compared" in capsys.readouterr().out
    assert next(said, "all were asked") == "all were asked"
    assert quick.run("--filter", "LN 32x10 fp32 forward", "--compare", str(old)) == 1
    assert "has none of these rows: nothing was compared" in capsys.readouterr().out


def row_of(us, torch_us=200.0, spread=0.01):
    about = {"op": "LN", "shape": [4, 8], "layout": "dense", "dtype": "fp32", "mode": "forward"}
    figures = {"us": {"wall": {"fastnorm": us, "torch": torch_us}}, "spread": {"wall": {"fastnorm": spread, "torch": spread}}}
    return {**about, **figures, "speedup": {"wall": {"torch": torch_us / us}}}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (row_of(100.0), False),
        (row_of(104.0), False),  # within a twentieth
        (row_of(110.0), True),
        (row_of(110.0, spread=0.06), False),  # within the spreads, 2 * 0.06 + 2 * 0.01
        (row_of(110.0, torch_us=220.0), False),  # the machine is slower today
        (row_of(100.0, torch_us=150.0), False),  # torch is faster
        (row_of(50.0), False),
    ],
)
def test_what_is_slower(row, found):
    reason = slowdown.slower(row, row_of(100.0))
    assert bool(reason) == found
    assert not found or reason == "slower: LN 4x8 fp32 forward: 1.10 times (110.0 us, 100.0 before; the spread is 4%)"
    assert slowdown.slower({**row, "us": {"cold": {}}}, row_of(1.0)) is None, "another device"


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

    args = ["--device", "cpu", "--filter", "8x64", "--dtype", "fp32", "bf16"]
    assert errors.main(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 2 * 2 * 4
    real = fastnorm.layer_norm
    monkeypatch.setattr(fastnorm, "layer_norm", lambda *a: real(*a) * 1.001)
    assert errors.main(args) == 1
    assert "LARGER" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        errors.main(["--filter", "nothing"])
    assert "no norm has 'nothing' in its description" in capsys.readouterr().err


def test_errors_over_the_mean():
    """Where torch's batch norm of channels_last is wrong altogether; and the truth is of the rounded input."""
    import errors

    row = errors.shifted(errors.SHIFTED[2], "fp32", 1e5, "cpu")
    assert row["error"] < 1e-6
    assert row["torch_error"] > 1e-2
    assert errors.line(row)[:3] == ["BN 16x64x28x28 channels_last, mean / std 1e+05", "fp32", "y"]
