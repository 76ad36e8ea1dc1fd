"""bench/models.py and bench/allocated.py: it runs, it refuses what is wrong, and what it calls the most is the most."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import cases  # puts bench on the path
import pytest
import torch

import fastnorm

pytest.importorskip("tqdm", reason="the bench extra is not installed")
import allocated
import models

assert cases
QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "2", "--seconds", "0.001", "--steps", "6", "--quiet"]
SHAPES = {
    "GPT block": (2, 8, 64),
    "RMSNorm block": (2, 8, 64),
    "ViT block": (2, 9, 64),
    "ResNet-50 stage": (4, 8, 14, 14),
    "leaky bottleneck": (4, 32, 14, 14),
    "diffusion GroupNorm": (2, 64, 8, 8),
}
SMALL = {block.name: replace(block, shape=SHAPES.get(block.name, block.shape)) for block in models.BLOCKS}
CHANNEL = 4 * 14 * 14 * 4  # bytes of one


def measured(name, dtype="fp32", **options):
    args = SimpleNamespace(device="cpu", threads=1, rounds=2, seconds=0.001, steps=6, compile=False)
    vars(args).update(options)
    return {(row["norms"], row["compiled"]): row for row in models.measure(SMALL[name], dtype, args)}


def refusals(name):
    return {norms for (norms, _), row in measured(name).items() if "is off by" in row.get("refused", "")}


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "BLOCKS", tuple(SMALL.values()))
    path = tmp_path / "new" / "out.json"
    assert models.main([*QUICK, "--filter", "GPT", "--dtype", "fp32", "bf16", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__
    rows = report["rows"]
    assert [(row["dtype"], row["norms"]) for row in rows] == [
        (dtype, norms) for dtype in ("fp32", "bf16") for norms in ("torch.nn", "convert", "fused")
    ]
    for row in rows:
        assert (row["block"], row["shape"], row["compiled"]) == ("GPT block", [2, 8, 64], False)
        assert row["step_us"] > 0 <= row["spread"]
        assert row["x torch"] > 0
        assert row["peak"] > row["saved"] > 0
        assert len(row["loss"]) == 6
        assert row["nudged"] > 0
    assert [row["difference"] for row in rows if row["norms"] == "torch.nn"] == [0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", SMALL.values(), ids=SMALL)
def test_every_block_is_torchs(block, dtype):
    batch = models.batches(block, block.shape[0], dtype, "cpu")[0]
    every = models.variants(block, dtype, "cpu")
    assert [v.norms for v in every] == ["torch.nn", "convert", "fused"] + ["recompute"] * block.invertible
    truth = models.truth_of(block, every[0].network, *batch)
    torchs, *others = (models.errors(block, v.network, *batch, truth) for v in every)
    assert max(torchs) > 0
    assert [models.disagreement(ours, torchs) for ours in others] == [None] * len(others)


@pytest.mark.parametrize("block", SMALL.values(), ids=SMALL)
def test_the_norms_of_a_variant_are_what_it_is_named_after(block):
    torchs, converted, *ours = (v.network for v in models.variants(block, torch.float32, "cpu"))
    norms = lambda network: [m for m in network.modules() if isinstance(m, block.norms[0])]
    assert {type(m) for m in norms(torchs)} == {block.norms[0]}
    assert all(type(m) is getattr(fastnorm, block.norms[0].__name__) for m in norms(converted))
    for network in ours:
        assert {type(m) for m in norms(network)} == {block.norms[1]}
        assert any(m.activation or getattr(m, "addend", False) for m in norms(network))
    if block.invertible:
        assert [m.recompute for m in norms(ours[1])] == ["output", "output", None]


def test_curves_agree():
    """They begin with the same loss, come down, and stay beside each other."""
    for name in ("tutorial BatchNorm", "tutorial LayerNorm", "leaky bottleneck"):
        rows = measured(name, steps=20)
        assert len({round(row["loss"][0], 4) for row in rows.values()}) == 1
        assert all(row["difference"] < 1e-4 for row in rows.values())
        assert all(row["loss"][-1] < row["loss"][0] for row in rows.values())


def test_the_difference_is_the_largest_of_all_steps():
    assert models.off(torch.tensor([1.0, 2.2, 4.0]), torch.tensor([1.0, 2.0, 4.2])) == pytest.approx(0.1)


def test_curves_start_anew_and_learn(monkeypatch):
    """After timing and counting, whose running statistics are not those that a curve begins with."""
    seen, real = [], models.curve

    def watched(block, network, data, steps):
        seen.append({name: t.clone() for name, t in network.state_dict().items()})
        return real(block, network, data, steps)

    monkeypatch.setattr(models, "curve", watched)
    measured("tutorial BatchNorm")
    *same, nudged = seen
    assert len(same) == 3
    for a, b in pairwise(same):
        assert all(torch.equal(a[name], b[name]) for name in a)
    moved = [name for name in nudged if not torch.equal(nudged[name], same[0][name])]
    assert moved == [
        name for name, _ in models.variants(SMALL["tutorial BatchNorm"], torch.float32, "cpu")[0].network.named_parameters()
    ]


def test_what_is_saved_and_what_recomputing_saves():
    """The last activation keeps what it gives, 32 channels, if it is torch's; recomputed norms do without their inputs, 8 each.

    What the others give the convolutions keep in any case.
    """
    rows = {norms: row for (norms, _), row in measured("leaky bottleneck").items()}
    assert rows["torch.nn"]["saved"] - rows["fused"]["saved"] == pytest.approx(32 * CHANNEL, rel=0.02)
    assert rows["fused"]["saved"] - rows["recompute"]["saved"] == 2 * 8 * CHANNEL
    assert rows["recompute"]["peak"] < rows["fused"]["peak"] <= rows["torch.nn"]["peak"] * 1.01
    assert all(row["peak"] > row["saved"] > 48 * CHANNEL for row in rows.values())


def test_a_relu_keeps_a_bit():
    """For each element of three sums, of 32 channels each; torch's keeps the last output, the others are kept in any case."""
    rows = {norms: row for (norms, _), row in measured("ResNet-50 stage").items()}
    assert rows["torch.nn"]["saved"] - rows["fused"]["saved"] == pytest.approx(32 * CHANNEL - 3 * CHANNEL, rel=0.02)


def test_a_wrong_output_is_refused(monkeypatch, capsys):
    real = fastnorm.AddLayerNorm.forward
    monkeypatch.setattr(fastnorm.AddLayerNorm, "forward", lambda self, x, r: real(self, x * 1.1, r))
    monkeypatch.setattr(models, "BLOCKS", tuple(SMALL.values()))
    assert models.main([*QUICK, "--filter", "ViT"]) == 1
    assert "fused     refused: the output is off by" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ResNet-50 stage", "tutorial LayerNorm"])
def test_a_wrong_gradient_is_refused(name, monkeypatch):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.1

    cls = SMALL[name].norms[1]
    real = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x, *rest: real(self, Off.apply(x), *rest))
    assert refusals(name) == {"convert", "fused"}


def test_compiled_variants(monkeypatch):
    """Traced and not compiled, which takes longer; the recomputed one is not asked to be."""
    real, asked = torch.nn.Module.compile, []

    def trace(self, **options):
        asked.append(options)
        real(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    rows = measured("leaky bottleneck", compile=True)
    assert list(rows) == [
        *((norms, False) for norms in ("torch.nn", "convert", "fused", "recompute")),
        *((norms, True) for norms in ("torch.nn", "convert", "fused")),
    ]
    assert asked == [{"dynamic": False, "fullgraph": True}] * 3
    assert rows["fused", True]["job"] == "leaky bottleneck 4x32x14x14 fp32 fused compiled"
    assert models.line(rows["fused", True])[3] == "fused compiled"
    assert all(row["step_us"] > 0 and row["saved"] > 0 and row["difference"] < 1e-4 for row in rows.values())


def test_the_most_at_once():
    def run():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        return b, torch.empty(1 << 19)

    assert allocated.peak(run, "cpu") == 8 << 20


def test_each_storage_is_counted_once():
    x, w = (torch.randn(100, requires_grad=True) for _ in range(2))

    def function():
        y = x.exp()  # kept by itself, by what it is multiplied with, and through a view
        return y * w + y[:50].sin().sum()

    assert allocated.saved(function, (x, w)) == 400
    assert allocated.saved(function, (x,)) == 800


def test_list_and_wrong_options(capsys):
    assert models.main(["--list", "--dtype", "fp32", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * len(models.BLOCKS)
    assert "ResNet-50 stage 8x64x56x56 bf16" in lines
    wrong = {
        ("--filter", "nothing"): "no block has 'nothing' in its description; --list shows them all",
        ("--rounds", "0"): "invalid positive number value: '0'",
        ("--steps", "-1"): "invalid positive number value: '-1'",
        ("--dtype", "fp16"): "invalid choice: 'fp16'",
    }
    if not torch.cuda.is_available():
        wrong["--device", "cuda"] = ": error: "
    for args, words in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            models.main(["--filter", "tutorial", *args])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_as_a_script():
    """With its progress bar."""
    options = ["--filter", "tutorial LayerNorm", "--device", "cpu", "--threads", "1", "--rounds", "1", "--steps", "1"]
    command = [sys.executable, models.__file__, *options, "--seconds", "0.0001"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr
    assert len(done.stdout.splitlines()) == 2 + 1 + 3
