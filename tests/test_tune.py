"""bench/tune.py without a GPU: the kernels run in Triton's interpreter, and the times are made up."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from cases import MODELS  # noqa: F401 (puts bench/ on the path)
from test_dispatch import ROOT

import fastnorm
from fastnorm import dispatch, heuristics

sys.path.append(str(ROOT / "bench"))
import gpu
import gpu_state
import tune
from norms import Norm

triton = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a CUDA device takes other launch choices")
ROWS, CHANNELS = Norm("LN", (12, 24)), Norm("BN", (4, 3, 3, 3))
FORWARD = {"LN 12x24 fp32 forward": (ROWS, "fp32", "forward")}


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "tune.json"
    gpu_state.write(path, {"machine": {}, "sections": {}})
    return lambda seconds=600.0: gpu_state.Section(path, "tune", seconds)


def made_up(us):
    """A timer that knows each table's time; it runs what it times once, as a real one would."""

    def timer(calls, table):
        for call in calls.values():
            call()
        time = us(table)
        return {"present": [1.0, 1.01, 0.99], "candidate": [time, time * 1.01, time * 0.99]}

    return timer


def only(table, kind):
    (config,) = (config for config in table.values() if isinstance(config, kind))
    return config


def planted(number):
    """A first and a second step from a present number, whatever the ladders say today, in the direction that has room."""
    return (number // 2, number // 4) if number >= 4 else (2 * number, 4 * number)


@triton
def test_a_planted_better_choice_is_proposed(section):
    warps = heuristics.row_forward(24, 4, 8).warps
    best, _ = planted(warps)
    before = vars(heuristics).copy()
    tune.tune(
        section(), "cpu", FORWARD, made_up(lambda table: 0.5 if only(table, heuristics.RowForward).warps == best else 1.0)
    )
    (row,) = section().data["rows"]
    (change,) = row["changes"]
    assert (change["present"], change["best"]) == (warps, best)
    assert row["gain"] == pytest.approx(1.0)
    line = " ".join(tune.proposal([row]).splitlines()[1].split())
    assert line == f"LN 12x24 fp32 forward {' '.join(change['number'].split())} {warps} {best} 100.0% {row['spread']:.1%}"
    assert vars(heuristics) == before


@triton
def test_it_climbs_on_and_combines(section):
    """Two steps with the rows, and other warps that are better only there."""
    present = heuristics.row_forward(24, 4, 8)
    (half, quarter), (warps, _) = planted(present.rows), planted(present.warps)

    def us(table):
        config = only(table, heuristics.RowForward)
        combined = (config.rows, config.warps) == (quarter, warps)
        return {present.rows: 1.0, half: 0.8, quarter: 0.6}.get(config.rows, 0.9) * (0.5 if combined else 1.0)

    tune.tune(section(), "cpu", FORWARD, made_up(us))
    (row,) = section().data["rows"]
    changes = {(change["present"], change["best"]) for change in row["changes"]}
    assert changes == {(present.rows, quarter), (present.warps, warps)}
    assert row["gain"] == pytest.approx(1 / 0.3 - 1)


@triton
def test_a_wrong_candidate_is_not_timed(section):
    """A block that is too short for the row gives wrong results; here everything that is timed is fast."""
    timed = []
    tune.tune(section(), "cpu", FORWARD, made_up(lambda table: timed.append(only(table, heuristics.RowForward)) or 0.1))
    (row,) = section().data["rows"]
    assert any(".block = 16: wrong: y is off by" in line for line in row["refused"])
    assert timed
    assert all(config.block >= 24 or config.chunked for config in timed)


@triton
def test_gains_within_the_spread_are_not_kept(section):
    def timer(calls, table):
        return {"present": [1.0, 1.2, 0.8], "candidate": [0.95, 1.15, 0.75]}

    tune.tune(section(), "cpu", FORWARD, timer)
    (row,) = section().data["rows"]
    assert row["tried"] > 5
    assert row["gain"] == 0
    assert tune.proposal([row]) == "no change gains more than the spread"


@triton
def test_a_gain_has_to_be_seen_twice(section):
    figures = iter([0.5] + [2.0] * 1000)
    tune.tune(section(), "cpu", FORWARD, made_up(lambda table: next(figures)))
    (row,) = section().data["rows"]
    assert "changes" not in row
    assert "did not gain again" in row["refused"][-1]


@triton
def test_budget(section, monkeypatch):
    left = iter([100.0, 100.0] + [0.0] * 10)  # at the start, for one candidate, and no more
    run = section()
    monkeypatch.setattr(run, "left", lambda: next(left))
    tried = []
    tune.tune(run, "cpu", FORWARD, made_up(lambda table: tried.append(table) or 1.0))
    assert len(tried) == 1
    assert section().data["rows"] == []
    assert section().data["partial"]["tried"] == 1
    tune.tune(section(1.0), "cpu", FORWARD, made_up(lambda table: pytest.fail("there is no time")))


@triton
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("norm", [ROWS, CHANNELS, Norm("LN", (2, 9001))], ids=str)
def test_every_choice_of_a_call_is_varied(norm, mode, section):
    """By the fields of whatever configurations it is given."""
    with fastnorm.use_backend("triton"):
        present, judge = tune.judge_of(norm, "fp32", mode, "cpu", made_up(lambda table: 1.0))
        assert present
        for key, config in present.items():
            assert heuristics.__dict__[key[0]](*key[1], **dict(key[2])) == config
        names = {tune.name_of(knob) for knob in tune.knobs(present)}
        for key, config in present.items():
            said = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is not None]
            assert {f"{tune.name_of((key,))}.{name}" for name in said} <= names
        assert judge(present, "as it is") == (1.0, pytest.approx(0.01))


@triton
def test_a_choice_that_is_not_asked_for_is_refused(monkeypatch):
    """As when launches are cached and not forgotten: it would be timed as the present choice."""
    with fastnorm.use_backend("triton"):
        present, judge = tune.judge_of(*FORWARD["LN 12x24 fp32 forward"], "cpu", made_up(lambda table: 0.5))
        other = {("row_forward", (1, 4, 8), ()): heuristics.RowForward(1, 16, 1, None)}
        assert present.keys() != other.keys()
        monkeypatch.setattr(tune, "results", lambda *args: ())
        (key,) = present
        changed = {key: dataclasses.replace(present[key], warps=1)}
        assert judge(changed, "a change") == "nothing asks for it: is a launch cached?"


def test_cached_launches_are_forgotten(monkeypatch):
    forgotten = []
    monkeypatch.setattr(dispatch, "forget", lambda: forgotten.append(heuristics.cdiv(7, 2)), raising=False)
    key = ("cdiv", (7, 2), ())
    with tune.substituted({key: "planted"}):
        assert heuristics.cdiv(7, 2) == "planted"
        assert heuristics.cdiv(8, 2) == 4
    assert forgotten == ["planted", 4], "with the new choices in place, and with the old ones again"


def test_the_choices_come_back_after_an_error():
    before = vars(heuristics).copy()
    with pytest.raises(KeyError), tune.substituted({}):
        raise KeyError
    assert vars(heuristics) == before


def test_numbers_of_any_constant():
    @dataclasses.dataclass(frozen=True)
    class Rung:
        rows: int
        flag: bool = False

    constant = {2: {64: (3, Rung(5))}, 4: "text"}
    assert dict(tune.numbers(constant)) == {(2, 64, 0): 3, (2, 64, 1, "rows"): 5, (2, 64, 1, "flag"): False}
    assert tune.with_number(constant, (2, 64, 1, "rows"), 6) == {2: {64: (3, Rung(6))}, 4: "text"}
    assert constant[2][64][1].rows == 5
    assert tune.neighbours(1) == [2]
    assert tune.neighbours(3) == [1, 2, 4, 6]
    assert tune.neighbours(64) == [32, 128]
    assert tune.neighbours(False) == [True]


def test_constants_are_varied_in_their_own_terms():
    """Other numbers that follow from a constant follow it, and a cache does not hide it."""
    key = ("row_backward", (4096, 10000, 4, 132), ())
    state = tune.State().but(("COLUMN_PROGRAMS_PER_SM",), heuristics.COLUMN_PROGRAMS_PER_SM // 2)
    (config,), present = state.table([key]).values(), heuristics.row_backward(*key[1])
    assert config.partial_rows == present.partial_rows // 2
    assert heuristics.row_backward(*key[1]) == present
    assert state.but((key, "warps"), 1).table([key])[key] == dataclasses.replace(config, warps=1)


def test_what_the_process_died_of_is_not_tried_again(section):
    run = section()

    def broken(table, what):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    died = tune.careful(broken, run, "norm")
    with pytest.raises(RuntimeError):
        died({}, "warps = 3")
    judged = tune.careful(lambda table, what: (2.0, 0.0), section(), "norm")
    assert judged({}, "warps = 3") == "the process died of it"
    assert judged({}, "warps = 2") == (2.0, 0.0)

    def interrupted(table, what):
        raise KeyboardInterrupt

    stopped = tune.careful(interrupted, section(), "norm")
    with pytest.raises(KeyboardInterrupt):
        stopped({}, "warps = 2")
    assert "trying" not in section().data
    assert section().data["deadly"] == [["norm", "warps = 3"]]


@triton
def test_the_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(gpu, "sources", lambda: "these sources")
    monkeypatch.setattr(tune, "timed", lambda device: made_up(lambda table: 1.0))
    options = ["--device", "cpu", "--out", str(path), "--ops", "LN", "--shapes", "LN 8x64 fp32 forward"]
    assert tune.main(options) == 0
    assert "no change gains more than the spread" in capsys.readouterr().out
    rows = json.loads(path.read_text())["sections"]["tune"]["rows"]
    assert [row["row"] for row in rows] == ["LN 8x64 fp32 forward"]
    monkeypatch.setattr(tune, "judge_of", lambda *args: pytest.fail("it is there already"))
    assert tune.main(options) == 0
    with pytest.raises(SystemExit):
        tune.main([*options, "--shapes", "nothing"])
    assert "no norm has 'nothing' in its name" in capsys.readouterr().err


def test_the_command_in_the_interpreter_with_real_times(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "checkout.py"), str(ROOT / "bench" / "tune.py"), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out.json"), "--shapes", "LN 8x64 fp32 forward", "--budget", "8"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "out.json").read_text())["sections"]["tune"]
    assert [*data["rows"], data.get("partial")][0]["tried"] > 0


def test_every_norm_has_a_name_of_its_own():
    jobs = tune.jobs_of(SimpleNamespace(ops=["LN", "BN"], shapes=[""]))
    assert len(jobs) == len(tune.SHAPES) * len(tune.DTYPES) * 2


def test_without_cuda_it_says_so_in_one_line():
    if gpu.cannot_run("cuda") is None:
        pytest.skip("there is a CUDA device")
    command = [sys.executable, str(ROOT / "bench" / "checkout.py"), str(ROOT / "bench" / "tune.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "finds no CUDA device here" in result.stderr
