"""The sections of `make gpu`, tried out on the CPU: what they count, what they refuse to time, and what they say of it."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import CHANNELS, ROWS
from test_dispatch import ROOT

import fastnorm
from fastnorm import native

sys.path.append(str(ROOT / "bench"))
import errors
import gpu_bench
import gpu_compile
import gpu_errors
import gpu_graphs
import gpu_report
import gpu_state
import gpu_tests
import measure
import providers
import timing
from norms import Norm


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "out.json"
    gpu_state.write(path, {"machine": {"gpu": "none"}, "sections": {}})
    return lambda name, seconds=600.0: gpu_state.Section(path, name, seconds)


SMALL = (Norm("LN", (8, 24)), Norm("BN", (4, 6, 3, 3), "channels_last"))


def off(function):
    return lambda x, *rest: function(x, *rest) * 1.01


def test_bench_times_what_matches(section, monkeypatch, capsys):
    wrong = SimpleNamespace(layer_norm=off(F.layer_norm))
    half = SimpleNamespace(layer_norm=lambda x, *rest: F.layer_norm(x, *rest).detach())
    planted = {
        "missing": providers.Provider(lambda: __import__("there_is_no_such_module"), ""),
        "wrong": providers.Provider(lambda: wrong, "", ("LN",)),
        "forward alone": providers.Provider(lambda: half, "", ("LN",), ("forward",)),
        "broken": providers.Provider(lambda: half, "", ("LN",)),
    }
    for module in (providers, measure, gpu_bench):
        monkeypatch.setattr(module, "PROVIDERS", {**providers.PROVIDERS, **planted})
    gpu_bench.bench(section("bench"), "cpu", SMALL, ("bf16", "fp32"), ("fastnorm", "reference", *planted))
    data = section("bench").data
    assert data["complete"]
    assert "there_is_no_such_module" in data["providers"]["missing"]
    rows = {row["row"]: row for row in data["rows"]}
    assert len(rows) == 2 * 2 * 2 + 3 * 2
    ours = ("fastnorm, LN 8x24, bf16", SMALL[0]), ("reference, BN 4x6x3x3 channels_last, fp32", SMALL[1])
    for name, norm in ours:
        forward, backward = rows[name]["rows"]
        assert (forward["mode"], backward["mode"]) == ("forward", "backward")
        for row in (forward, backward):
            assert row["shape"] == list(norm.shape)
            for state in ("cold", "warm", "host"):
                assert all(row["us"][state][by] > 0 for by in (rows[name]["provider"], "fastnorm", "torch", "copy"))
                assert gpu_bench.torch_over(row, state, rows[name]["provider"]) > 0
    assert rows["wrong, LN 8x24, fp32"]["not timed"].startswith("wrong: y is off by")
    assert rows["wrong, LN 8x24, fp32"]["rows"] == []
    assert "RuntimeError" in rows["broken, LN 8x24, bf16"]["not timed"]
    (row,) = rows["forward alone, LN 8x24, fp32"]["rows"]
    assert row["speedup"]["cold"]["forward alone"] > 0
    assert gpu_state.failures(data) == [], "that another is wrong is no failure of ours"
    assert "fastnorm: LN 8x24 bf16 backward: cold" in capsys.readouterr().out


def test_what_bench_runs_is_compiled_before_it_in_other_processes(section, capsys):
    one_value = Norm("BN", (1, 6))
    gpu_compile.compile_all(section("compile"), "cpu", (*SMALL, one_value), ("fp32", "bf16"), ("fastnorm", "flag_gems"))
    data = section("compile").data
    assert data["complete"]
    (row,) = data["rows"]
    assert (row["row"], row["norms"]) == ("fastnorm", 6)
    assert sorted(row["refused"]) == ["BN 1x6 bf16", "BN 1x6 fp32"]
    assert "ValueError" in row["refused"]["BN 1x6 fp32"]
    assert "fastnorm: 6 norms in" in capsys.readouterr().out


def test_compiling_ends_with_its_time(section):
    late = section("compile", 21.0)
    late.left = lambda: 21.0 if late.data.get("running") is None else 0.01
    gpu_compile.compile_all(late, "cpu", SMALL, ("fp32",), ("fastnorm",))
    assert not section("compile").data["complete"]
    assert section("compile").data["partial"]["norms"] == 0


def dies(*norm):
    os._exit(1)


def test_a_process_that_dies_while_it_compiles_is_a_failure(section, monkeypatch):
    monkeypatch.setattr(gpu_compile, "first_call", dies)
    gpu_compile.compile_all(section("compile"), "cpu", SMALL, ("fp32",), ("fastnorm",))
    assert gpu_state.failures(section("compile").data) == ["fastnorm: a process died while it compiled"]


def test_bench_of_a_wrong_norm_fails(section, monkeypatch):
    monkeypatch.setattr(fastnorm, "layer_norm", off(fastnorm.layer_norm))
    gpu_bench.bench(section("bench"), "cpu", SMALL[:1], ("fp32",), ("fastnorm",))
    data = section("bench").data
    assert "wrong: y is off by" in gpu_state.failures(data)[0]
    assert "forward" not in data["rows"][0]


def test_bench_stops_in_time(section):
    gpu_bench.bench(section("bench", 5.0), "cpu", SMALL[:1], ("fp32",), ("fastnorm",))
    assert section("bench").data["rows"] == []
    assert not section("bench").data["complete"]


class Recorder:
    """As much of torch.cuda as GraphClock takes: a call costs 7 us, emptying L2 100; `log` is what the device is told to do."""

    def __init__(self):
        self.now, self.log, self.capturing, self.synchronize = 0.0, [], None, lambda: None
        recorder = self

        class Graph:
            def __init__(self):
                self.calls = 0

            def replay(self):
                recorder.now += 7.0 * self.calls
                recorder.log.append(f"replay {self.calls}")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = recorder.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3  # milliseconds

        self.CUDAGraph, self.Event = Graph, Event
        self.Stream = lambda: SimpleNamespace(device=torch.device("cpu"))
        self.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=1 << 10)

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = graph
        yield
        self.capturing = None

    def call(self):
        if self.capturing:
            self.capturing.calls += 1
        else:
            self.now += 7.0


def test_device_times_are_of_replays(monkeypatch):
    """A call of 7 us: several of them in one graph when warm, one of them after each emptying of L2 when cold."""
    cuda = Recorder()
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing.GraphClock, "FILL", 1 << 10)
    clock = timing.clock_of("cuda")
    clock._other = SimpleNamespace(zero_=lambda: cuda.log.append("empty L2"))
    with clock.stream():
        times = timing.device_in_turn({"a": cuda.call, "b": cuda.call}, 2, clock)
    assert times == {state: {"a": [7.0, 7.0], "b": [7.0, 7.0]} for state in ("cold", "warm")}
    calls = int(clock.LONG / (7 * clock.REPLAYS))
    assert cuda.log[-9:] == [f"replay {calls}"] * 3 + ["empty L2", "replay 1"] * 3


def test_host_times_do_not_wait_for_the_device():
    clock = SimpleNamespace(waits=0)
    clock.synchronize = lambda: setattr(clock, "waits", clock.waits + 1)
    called = []
    times = timing.host_in_turn({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, 5, clock)
    assert "".join(called) == "aaaaabbbbb" * 3
    assert clock.waits == 3 * 2 + 1, "before each figure and at the end"
    assert all(len(values) == 3 and min(values) > 0 for values in times.values())


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda device_type: "no nvcc was found")
    assert providers.absent("native") == "RuntimeError: no nvcc was found"
    monkeypatch.setattr(native, "unavailable", lambda device_type: None)
    assert providers.absent("native") is None


def test_every_shape_of_the_benchmark_has_a_name_of_its_own():
    assert len(set(map(str, gpu_bench.SHAPES))) == len(gpu_bench.SHAPES) == 27


NORM = "layer_norm 64 x 96"


def test_graphs(section, monkeypatch):
    gpu_graphs.graphs(section("graphs"), "cpu", (NORM,), capture=lambda function: function)
    data = section("graphs").data
    assert len(data["rows"]) == 7 * 3
    expected = [f"{way}, {d}, {NORM}" for way in ("graph", "native graph", "native agreement") for d in gpu_graphs.DTYPES]
    assert [row["row"] for row in data["rows"] if "not there" not in row] == expected
    assert gpu_state.failures(data) == []


def test_graphs_that_are_not_replayed_or_cannot_be_captured_fail(section):
    def stale(function):
        results = [t.clone() for t in function()]
        return lambda: results

    gpu_graphs.graphs(section("stale"), "cpu", (NORM,), capture=stale)
    assert f"graph, bf16, {NORM}: other bits in y, dx, dweight, dbias" in gpu_state.failures(section("stale").data)[1]

    def refuses(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    gpu_graphs.graphs(section("refused"), "cpu", (NORM,), capture=refuses)
    assert gpu_state.failures(section("refused").data)[0].endswith("operation not permitted when stream is capturing")


def test_graphs_compare_bits():
    nan, x = torch.tensor([float("nan")]), torch.ones(6)
    assert gpu_graphs.difference([nan] * 6, [nan] * 6) is None
    assert gpu_graphs.difference([x] * 6, [x] * 5 + [x + 1e-7]) == "other bits in running_var"
    half = x.bfloat16()
    assert gpu_graphs.difference([half] * 6, [half, -half, *[half] * 4]) == "other bits in dx"


def test_backends_agree_within_roundings():
    x = torch.ones(6)
    assert gpu_graphs.apart([x] * 6, [x + 3e-7] * 6) is None
    assert gpu_graphs.apart([x] * 6, [x] * 5 + [x + 1e-6]) == "apart: running_var"
    assert gpu_graphs.apart([x] * 6, [x * float("nan"), *[x] * 5]) == "apart: y"


def test_graphs_cover_running_statistics():
    name = "batch_norm 256 x 48"
    inputs = gpu_graphs.make(name, "fp32", "cpu", 1)
    before = inputs[-1].clone()
    assert len(gpu_graphs.compute(name, *inputs)) == len(gpu_graphs.RESULTS)
    assert not torch.equal(inputs[-1], before)


def test_errors(section, monkeypatch):
    jobs = errors.jobs_of(errors.parser().parse_args(["--filter", "8x64", "--dtype", "fp32"]))
    gpu_errors.measure_errors(section("errors"), "cpu", jobs)
    data = section("errors").data
    assert [len(row["results"]) for row in data["rows"]] == [4, 4]
    assert gpu_state.failures(data) == []
    monkeypatch.setattr(fastnorm, "batch_norm", off(fastnorm.batch_norm))
    gpu_errors.measure_errors(section("again"), "cpu", jobs)
    assert len(gpu_state.failures(section("again").data)) == 1


BAD = """
import time, pytest
slow = False
@pytest.mark.parametrize("backend", ["triton-cpu", "reference-cpu", "native-cpu"])
@pytest.mark.parametrize("case", ["good", "bad", "skipped", "slow"])
def test_it(case, backend):
    if case == "skipped":
        pytest.skip()
    if case == "slow" and slow:
        time.sleep(60)
    assert case != "bad"
"""
GOOD = BAD.replace('assert case != "bad"', "")


def files_of(tmp_path, **sources):
    for name, source in sources.items():
        (tmp_path / f"test_{name}.py").write_text(source)
    return {name: [str(tmp_path / f"test_{name}.py")] for name in sources}


def test_tests_are_counted_and_failures_named(section, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "workers", list)
    files = files_of(tmp_path, good=GOOD, bad=BAD, broken="import there_is_no_such_module")
    files = {"good": files["good"], "all": files["broken"] + files["bad"], "none": [str(tmp_path / "nothing.py")]}
    gpu_tests.run_tests(section("tests"), "cpu", files)
    rows = {row["row"]: row for row in section("tests").data["rows"]}
    assert len(rows) == 3 * 3
    assert [rows["triton, good"][k] for k in ("passed", "skipped", "failures")] == [3, 1, 0]
    assert "failed" not in rows["triton, good"]
    row = rows["reference, all"]
    assert [row[k] for k in ("passed", "skipped", "failures", "failed")] == [2, 1, 2, "2 of 4 tests fail"]
    assert any("there_is_no_such_module" in line for line in row["failing"])
    assert any("[bad-reference-cpu]: AssertionError" in line for line in row["failing"])
    assert "pytest ended with status 4" in rows["triton, none"]["failed"]


def test_tests_on_several_workers(section, tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    assert gpu_tests.workers() == ["-n", "auto"]
    monkeypatch.setattr(gpu_tests, "workers", lambda: ["-n", "2"])
    monkeypatch.setattr(gpu_tests, "BACKENDS", ("native",))
    gpu_tests.run_tests(section("tests"), "cpu", files_of(tmp_path, bad=BAD))
    row = section("tests").data["rows"][0]
    assert [row[k] for k in ("passed", "skipped", "failures")] == [2, 1, 1]


def test_tests_that_take_too_long_keep_what_they_have(section, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "workers", list)
    monkeypatch.setattr(gpu_tests, "LEAST", 1.0)
    gpu_tests.run_tests(section("tests", 10.0), "cpu", files_of(tmp_path, slow=BAD.replace("slow = False", "slow = True")))
    data = section("tests").data
    assert not data["complete"]
    assert data["rows"] == []
    assert [data["partial"][k] for k in ("passed", "skipped", "failures")] == [1, 1, 1], "the one that was running is not there"
    assert gpu_state.failures(data) == ["triton, slow: 1 of 2 tests fail"]


def test_tests_without_pytest(section, monkeypatch):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    gpu_tests.run_tests(section("tests"), "cpu", {"good": []})
    assert gpu_state.failures(section("tests").data) == [f"{b}, good: pytest is not installed" for b in gpu_tests.BACKENDS]


def test_every_test_file_is_in_one_group():
    assert all(Path(path).is_file() for path in gpu_tests.numerics())
    assert len(gpu_tests.numerics()) + len(gpu_tests.others()) == len(list((ROOT / "tests").glob("test_*.py")))


def fake_sanitizer(tmp_path, log):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\nprintf "{log}" > "$2"\nexit 0\n')
    tool.chmod(0o755)
    return str(tool)


@pytest.mark.parametrize(
    ("log", "failed"),
    [
        ("========= ERROR SUMMARY: 0 errors", None),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        ("========= Invalid __global__ read\\n========= ERROR SUMMARY: 10 errors", "10 errors"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "1 hazard"),
        ("", "no summary"),
    ],
)
def test_sanitizer(section, tmp_path, log, failed):
    gpu_tests.run_sanitizer(section("sanitizer"), "cpu", fake_sanitizer(tmp_path, log))
    found = gpu_state.failures(section("sanitizer").data)
    assert all(failed in line for line in found) if failed else found == []
    assert bool(found) == bool(failed)


def test_sanitizer_that_is_not_there(section, monkeypatch):
    monkeypatch.setattr(gpu_tests, "tool", lambda: None)
    gpu_tests.run_sanitizer(section("sanitizer"), "cpu")
    assert [row["not there"] for row in section("sanitizer").data["rows"]] == ["compute-sanitizer"] * 4


def test_the_sanitizer_s_tests_are_there():
    """One for each part of the expression, so that none is dropped from the table of cases without a word."""
    names = [str(case) for case in (*ROWS, *CHANNELS)]
    assert all(any(part in name for name in names) for part in gpu_tests.FEW.split(" or "))


def bench_row(by, op, shape, dtype, copies, x_torch, x_fastnorm=1.0):
    """A forward that takes 2 us."""
    each = lambda value: dict.fromkeys(gpu_bench.STATES, value)
    row = {"op": op, "shape": shape, "layout": "dense", "dtype": dtype, "mode": "forward", "moved": 2}
    row["us"] = each({by: 2.0, "torch": 2.0 * x_torch, "fastnorm": 2.0 * x_fastnorm, "copy": 2.0 / copies})
    row |= {"spread": each({by: 0.01}), "copies": each({by: copies, "torch": copies * x_torch})}
    row["speedup"] = each({by: 1 / x_fastnorm, "torch": x_torch / x_fastnorm})
    return {"row": f"{by}, {op} {'x'.join(map(str, shape))}, {dtype}", "provider": by, "rows": [row]}


def test_ids_name_a_backend_beside_its_device():
    """The command picks a backend's tests of a device by that: others would never run on a GPU."""
    tests = sorted(str(path) for path in Path(__file__).parent.glob("test_*.py") if "import SERVED" in path.read_text())
    options = ["-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], capture_output=True, text=True, check=True
    ).stdout
    of_devices = re.findall(r"^(.*::.*[-\[](?:cpu|cuda)[-\]].*)$", listed, re.M)
    assert len(of_devices) > 100
    assert [test for test in of_devices if not re.search("(triton|native|reference)-(cpu|cuda)", test)] == []


TIMED = [
    bench_row("fastnorm", "LN", [8192, 1024], "bf16", 1.02, 2.0),
    bench_row("fastnorm", "LN", [8192, 4096], "bf16", 1.10, 0.5),
    bench_row("fastnorm", "LN", [8, 64], "bf16", 9.0, 1.0),
    bench_row("fastnorm", "BN", [64, 256, 56, 56], "bf16", 1.11, 4.0),
    bench_row("fastnorm", "BN", [64, 256, 56, 56], "fp32", 5.0, 4.0),
    bench_row("compile", "LN", [8192, 1024], "bf16", 1.0, 2.5, x_fastnorm=1.25),
    bench_row("compile", "LN", [8192, 4096], "bf16", 2.0, 0.3, x_fastnorm=0.6),
]


def test_summary():
    lines = gpu_report.summary(TIMED).splitlines()
    assert "LN  bf16   forward  fastnorm  3      1.00  1.00  1.00" in lines  # of 2, 0.5 and 1
    assert "slower than torch.nn or torch.compile: 2" in lines
    assert "LN 8192x4096 bf16 forward, x torch: cold 0.50, warm 0.50, host 0.50" in lines
    assert "LN 8192x1024 bf16 forward, x compile: cold 0.80, warm 0.80, host 0.80" in lines
    assert "LN forward, N 1024 to 16384: 97% of a copy: 1 of 2" in lines
    assert "  missed by LN 8192x4096 bf16: 1.10 copies, 91%" in lines
    assert "LN forward, N 64 to 512: 92% of a copy: 0 of 0" in lines
    assert "BN 64x256x56x56 bf16 forward: 1.1 copies: 0 of 1" in lines


def test_report(section, tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    document = section("bench")
    left = {"row": "wrong, LN 8192x1024, bf16", "provider": "wrong", "not timed": "wrong: y is off", "rows": []}
    document.data["rows"] = [*TIMED, left]
    document.save()
    gpu_report.report(section("plots"), "cpu")
    assert section("plots").data["complete"]
    assert "wrong, LN 8192x1024, bf16: wrong: y is off" in (tmp_path / "out.txt").read_text()
    for op in ("layer_norm", "batch_norm"):
        assert (tmp_path / f"out-{op}.png").stat().st_size > 10_000
