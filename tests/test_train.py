"""bench/train.py, the training example: end to end in its own process, its wrong options, and its networks."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnorm

BENCH = Path(__file__).parent.parent / "bench"
EXTRAS = ("sklearn", "matplotlib", "tqdm")
missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"the bench extra is not installed: no {', '.join(missing)}")


@pytest.fixture(scope="module")
def bench_on_path():
    """Scripts in bench/ import their siblings by name, because Python puts a script's folder first on its path."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def tasks(bench_on_path):
    import tasks

    return tasks


@pytest.fixture(scope="module")
def train(bench_on_path):
    import train

    return train


def run(*arguments, **environment):
    command = [sys.executable, str(BENCH / "train.py"), "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False)


def test_a_short_run_end_to_end(tmp_path):
    picture, table = tmp_path / "new" / "curves.png", tmp_path / "rows.json"
    options = ("--batch-size", 32, 256, "--epochs", 2, "--seeds", 2, "--plot", picture, "--json", table)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "16/16" in done.stderr  # the progress bar
    assert "What the figures say" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(table.read_text())["rows"]
    expected = [(norm, size) for norm in ("none", "batch", "layer", "both") for size in (32, 256)]
    assert [(r["norm"], r["batch_size"]) for r in rows] == expected
    for row in rows:
        assert len(row["accuracies"]) == 2
        assert 0.3 < row["accuracy"] <= 1
        assert row["verdict"] == "same"
        assert row["difference"] is None if row["norm"] == "none" else row["difference"] <= 1e-4
        assert row["twin_accuracies"] == (None if row["norm"] == "none" else row["accuracies"])


WRONG = {
    "unknown option": ("--frobnicate",),
    "unknown task": ("--task", "mnist"),
    "unknown norm": ("--norm", "group"),
    "not a number": ("--batch-size", "many"),
    "batch of zero": ("--batch-size", "0"),
    "negative batch": ("--batch-size", "-4"),
    "batch larger than the data": ("--batch-size", "332"),
    "batch norm of one sample": ("--batch-size", "1", "--norm", "batch"),
    "no seeds": ("--seeds", "0"),
    "learning rate": ("--lr", "nan"),
    "unknown backend": ("--backend", "cudnn"),
    "unknown device": ("--device", "abacus"),
    "picture is a folder": ("--plot", "."),
}


@pytest.mark.parametrize("options", WRONG.values(), ids=[name.replace(" ", "-") for name in WRONG])
def test_what_cannot_be_done_is_one_sentence(train, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(list(options))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_wrong_option_of_the_script_itself():
    done = run("--batch-size", 100000)
    assert done.returncode == 2
    assert done.stderr == "train.py: a batch size of 100000 is more than the 331 training samples of diabetes\n"


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_is_named(train, module, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(SystemExit) as stopped:
        train.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"train.py: {train.EXTRAS[module]} not installed: pip install {train.EXTRAS[module]}\n"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_ends_quietly(tmp_path):
    command = [sys.executable, str(BENCH / "train.py"), "--jobs", "2", "--epochs", "1000", "--plot", str(tmp_path / "p.png")]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored where the tests run in a shell's background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    process.stderr.read(1)  # the progress bar is there, so the runs have begun
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it would train on beside the tests that follow
        raise
    assert process.returncode == 130
    assert "Traceback" not in err


# ---------------------------------------------------------------- networks and runs


@pytest.mark.parametrize("name", ["diabetes", "cancer", "images", "sequences"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer", "both"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_networks_have_their_norms_where_asked(tasks, name, norm, placement):
    task = tasks.TASKS[name]
    network = task.network(fastnorm, tasks.Choice(norm, placement, "tanh"))
    short = {torch.nn.Tanh: "activation", fastnorm.LayerNorm: "layer"}
    short |= {fastnorm.BatchNorm1d: "batch", fastnorm.BatchNorm2d: "batch"}
    order = [short[type(m)] for m in network.modules() if type(m) in short]
    norms = {"none": [], "batch": ["batch"], "layer": ["layer"], "both": ["batch", "layer"]}[norm]
    block = [*norms, "activation"] if placement == "before" else ["activation", *norms]
    assert order == block * 2
    logits = network(torch.randn(4, *task.sample_shape))
    assert logits.shape == ((4,) if task.classes == 2 else (4, task.classes))


@pytest.mark.parametrize("name", ["diabetes", "cancer", "images", "sequences"])
def test_data_is_standardised_by_its_training_part(tasks, name):
    task = tasks.TASKS[name]
    split = task.load(seed=1)
    assert split.train_x.shape[1:] == split.val_x.shape[1:] == task.sample_shape
    over = 0 if task.one_value_per_sample else None
    std, mean = torch.std_mean(split.train_x.double(), over)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-6, rtol=0)
    assert set(split.train_y.tolist()) == set(range(task.classes))
    again = task.load(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))


@pytest.mark.parametrize("name", ["diabetes", "cancer", "images", "sequences"])
def test_twins_start_from_the_same_weights(train, name):
    cell = train.Cell(name, "both", 32, "before", "tanh")
    (network, _), (twin, _) = train.twins(train.Run(cell, 0, 1, 1e-3, "cpu"), fastnorm, torch.nn)
    assert any(isinstance(m, fastnorm.LayerNorm) for m in network.modules())
    assert not any(type(m).__module__.startswith("fastnorm") for m in twin.modules())
    ours, theirs = network.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["images", "sequences"])
def test_digits_train_as_with_torch(train, name):
    run = train.Run(train.Cell(name, "both", 64, "before", "tanh"), 0, 1, 1e-3, "cpu")
    assert train.execute(run).difference <= 1e-4


def test_a_batch_of_two_is_told_apart_from_a_difference(train):
    """Batch norm of two samples: rounding parts the curves of torch.nn itself, and each step from the same weights agrees."""
    result = train.execute(train.Run(train.Cell("diabetes", "batch", 2, "before", "relu"), 0, 1, 1e-3, "cpu"))
    assert result.same_weights <= 1e-4 < result.nudged
    assert train.train_report.judge(result.difference, result.same_weights, result.nudged, 1e-4) == "chaotic"


def test_a_wrong_norm_is_found(train, monkeypatch):
    class Wrong(fastnorm.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setattr(fastnorm, "LayerNorm", Wrong)
    result = train.execute(train.Run(train.Cell("diabetes", "layer", 32, "before", "relu"), 0, 1, 1e-3, "cpu"))
    assert result.difference > 1e-4
    assert train.train_report.judge(result.difference, result.same_weights, result.nudged, 1e-4) == "different"
