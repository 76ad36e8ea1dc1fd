"""`make gpu` without a GPU: what it keeps, what it does not run twice, what stops it, and what it refuses to time."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_dispatch import ROOT, python

sys.path.append(str(ROOT / "bench"))
import checkout
import gpu
import gpu_state

# A section with three rows. Its argument says what goes wrong; it counts its starts, and the rows that it measures, in a file.
TOY = """
import os, sys, time
sys.path.insert(0, {bench!r})
from gpu_state import OutOfTime, script

def measure(section, device):
    def row(name):
        open({log!r}, "a").write(section.name + " " + name + "\\n")
        trouble = open({log!r} + "." + section.name).read() if os.path.exists({log!r} + "." + section.name) else ""
        if name == "two" and trouble == "fails":
            return {{"failed": "it is wrong"}}
        if name == "two" and trouble == "dies":
            os._exit(9)
        if name == "two" and trouble == "hangs":
            time.sleep(600)
        if name == "two" and trouble == "late":
            raise OutOfTime({{"counted": 1}})
        return {{"value": 1}}
    section.each(("one", "two", "three"), row, least=lambda name: 0.0)

sys.exit(script(measure, None))
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Two sections in place of the real ones: `run` runs them, `trouble` makes one go wrong, `log` is what was measured."""
    log, path = tmp_path / "log", tmp_path / "out" / "out.json"
    toy = tmp_path / "toy.py"
    toy.write_text(TOY.format(bench=str(ROOT / "bench"), log=str(log)))
    sections = {"first": gpu.Spec(toy, limit=1.0, least=0.0), "second": gpu.Spec(toy, limit=60.0, least=5.0)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "sources", lambda: "these sources")

    def trouble(section, what):
        Path(f"{log}.{section}").write_text(what)

    def measured():
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        log.write_text("")
        return lines

    run = lambda *options: gpu.main(["--device", "cpu", "--out", str(path), *options])
    read = lambda: json.loads(path.read_text())["sections"]
    return SimpleNamespace(run=run, trouble=trouble, measured=measured, read=read, path=path, toy=toy, sections=sections)


EVERY = [f"{section} {row}" for section in ("first", "second") for row in ("one", "two", "three")]


def test_what_is_there_is_not_run_again(toys, capsys):
    assert toys.run() == 0
    assert toys.measured() == EVERY
    assert all(section["complete"] for section in toys.read().values())
    assert toys.run() == 0
    assert toys.measured() == []
    assert capsys.readouterr().out.count("is there already") == 2
    assert toys.run("--again", "--sections", "second") == 0
    assert toys.measured() == EVERY[3:]


def test_other_sources_are_measured_anew(toys, monkeypatch):
    assert toys.run() == 0
    monkeypatch.setattr(gpu, "sources", lambda: "other sources")
    toys.measured()
    assert toys.run() == 0
    assert toys.measured() == EVERY


def test_a_failure_does_not_stop_the_others(toys, capsys):
    toys.trouble("first", "fails")
    assert toys.run() == 1
    assert toys.measured() == EVERY
    assert "FAILED first: two: it is wrong" in capsys.readouterr().out
    assert toys.run() == 1, "a failure that is there already is still one"
    assert toys.measured() == []


def test_a_section_that_dies_goes_on_later_and_is_given_up_where_it_dies_again(toys, capsys):
    toys.trouble("first", "dies")
    assert toys.run() == 1
    assert toys.measured() == ["first one", "first two", *EVERY[3:]]
    assert "the process ended with status 9" in capsys.readouterr().out
    assert toys.run() == 1
    assert toys.measured() == ["first two"]
    assert toys.run() == 1
    assert toys.measured() == ["first three"]
    assert "FAILED first: two: the process died here 2 times" in capsys.readouterr().out
    assert toys.read()["first"]["complete"]


def test_a_section_that_died_and_then_works_is_whole(toys):
    toys.trouble("first", "dies")
    assert toys.run() == 1
    toys.trouble("first", "")
    assert toys.run() == 0
    assert "ended" not in toys.read()["first"]


def test_a_section_that_hangs_is_killed_and_given_up(toys, capsys):
    toys.trouble("first", "hangs")
    assert toys.run() == 3
    assert "first: killed after 2 s" in capsys.readouterr().out
    assert toys.read()["second"]["complete"]
    assert toys.run() == 3
    assert toys.run() == 1, "it has hung twice"
    assert "FAILED first: two: the process died here 2 times" in capsys.readouterr().out


def test_a_row_that_is_cut_short_is_kept_and_measured_anew(toys, capsys):
    toys.trouble("first", "late")
    assert toys.run() == 3
    assert "not complete yet: first" in capsys.readouterr().out
    assert toys.read()["first"]["partial"] == {"row": "two", "counted": 1}
    toys.trouble("first", "")
    toys.measured()
    assert toys.run() == 0
    assert toys.measured() == ["first two", "first three"]
    assert "partial" not in toys.read()["first"]


def test_budget(toys, capsys):
    assert toys.run("--budget", "4") == 3
    assert toys.measured() == EVERY[:3]
    assert "second: not started" in capsys.readouterr().out


@pytest.fixture
def hanging(toys):
    """The command as a process, and the process of its section, which hangs in the second row."""
    toys.trouble("first", "hangs")
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background is started to ignore
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu
gpu.SECTIONS = {{"first": gpu.Spec(gpu.Path({str(toys.toy)!r}), limit=60.0, least=0.0)}}
gpu.sources = lambda: "these sources"
sys.argv[1:] = ["--device", "cpu", "--out", {str(toys.path)!r}]
sys.exit(gpu.command())
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    running = lambda: toys.path.exists() and toys.read().get("first", {}).get("running", {}).get("row") == "two"
    while time.monotonic() < end and not running():
        time.sleep(0.05)
    section = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    yield child, section
    for pid in (child.pid, section):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def test_what_is_made_of_the_others_is_made_each_time(toys):
    """Without any time left as well: the table of what there is."""
    toys.sections["second"] = gpu.Spec(toys.toy, anew=True)
    assert toys.run("--budget", "0") == 3
    assert toys.measured() == EVERY[3:]
    assert toys.run() == 0
    assert toys.measured() == EVERY


def test_killed_at_any_time_it_goes_on(toys, hanging):
    """SIGKILL in the middle of a row: the JSON is whole, and the rows that are there stay."""
    for pid in (hanging[0].pid, hanging[1]):
        os.kill(pid, signal.SIGKILL)
    hanging[0].wait()
    assert [row["row"] for row in toys.read()["first"]["rows"]] == ["one"]
    toys.trouble("first", "")
    toys.measured()
    assert toys.run() == 0
    assert toys.measured() == EVERY[1:]


def test_a_section_without_its_command_ends_before_its_next_row(toys, monkeypatch):
    assert toys.run() == 0
    section = gpu_state.Section(toys.path, "first")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    section.each(["four"], lambda name: {}, least=lambda name: 0.0)
    assert len(section.data["rows"]) == 3


def test_a_section_that_loses_its_command_leaves_the_file_to_the_next(toys, monkeypatch):
    assert toys.run() == 0
    section = gpu_state.Section(toys.path, "first")

    def measure(name):
        monkeypatch.setattr(os, "getppid", lambda: 1)
        gpu_state.write(toys.path, {"sections": {"first": "of the next command"}})
        return {}

    section.each(["four"], measure, least=lambda name: 0.0)
    assert toys.read() == {"first": "of the next command"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_section_as_well(hanging, number, status):
    child, section = hanging
    child.send_signal(number)
    assert child.wait(20) == status
    with pytest.raises(ProcessLookupError):
        os.kill(section, 0)


def test_a_document_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    gpu_state.write(path, {"old": 1})

    def power_cut(*args):
        raise OSError

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError):  # noqa: PT011
        gpu_state.write(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}


def test_default_path_leaves_other_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    about = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2", "triton": "3", "sources": "a"}
    first = gpu.default_path(about)
    assert first.parent.name == "nvidia-h100-80gb-hbm3"
    gpu_state.write(first, {"machine": about})
    assert gpu.default_path(about) == first
    assert gpu.default_path({**about, "sources": "b"}).name == first.stem + "-2.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(tmp_path / "out.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "finds no CUDA device here" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [gpu.main, checkout.main], ids=["gpu", "checkout"])
def test_without_torch_it_says_so_in_one_line(main, monkeypatch, capsys):
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    assert main(["--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has no torch" in err


def test_this_checkout_is_importable_without_an_install(tmp_path):
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (mapped,) = (ast.literal_eval(k.value) for call in calls for k in call.keywords if k.arg == "package_dir")
    assert {n.removeprefix("fastnorm."): folder for n, folder in mapped.items() if n.count(".") == 1} == checkout.PACKAGES
    script = tmp_path / "script.py"
    script.write_text("import sys, fastnorm.kernels.row\nprint(fastnorm.kernels.row.__file__)\nsys.exit(len(sys.argv))")
    command = [sys.executable, str(ROOT / "bench" / "checkout.py"), str(script), "argument"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 2, result.stderr
    assert "fastnorm-" in result.stdout
    assert not Path(result.stdout.strip()).exists(), "the folder of links is gone again"


def test_nothing_of_cuda_is_imported_where_it_is_absent():
    """Nor anything slow or optional: each is imported by the section that needs it."""
    names = [*(path.stem for path in (ROOT / "bench").glob("gpu*.py")), "providers", "timing", "plots", "tune"]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\nfor name in {names}: __import__(name)\n"
    code += "print([m for m in ('triton', 'matplotlib', 'torch._inductor', 'liger_kernel') if m in sys.modules])"
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr
