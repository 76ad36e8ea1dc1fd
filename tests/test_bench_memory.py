"""bench/memory.py: it runs, it refuses blocks that are wrong, and what it calls the most is the most."""

import json

import cases  # puts bench on the path
import pytest
import torch

import fastnorm

pytest.importorskip("tqdm", reason="the bench extra is not installed")
import memory

assert cases


def test_figures(tmp_path, monkeypatch):
    small = memory.Block("bottleneck", (4, 32, 14, 14), lambda *args: memory.Bottleneck(8, *args), memory.NORMS["batch"])
    monkeypatch.setattr(memory, "BLOCKS", (small,))
    path = tmp_path / "out.json"
    assert memory.main(["--device", "cpu", "--threads", "1", "--json", str(path)]) == 0
    rows = {row["norms"]: row for row in json.loads(path.read_text())["rows"]}
    one = 4 * 14 * 14 * 4  # bytes of a channel
    # The last relu keeps what it gives, 32 channels, or a bit for each; what the others give the convolutions keep in any case.
    assert rows["torch.nn"]["saved"] - rows["fused"]["saved"] == pytest.approx(32 * one * 31 / 32, rel=0.02)
    assert all(row["peak"] > row["saved"] > 48 * one for row in rows.values())


def test_what_recomputing_saves():
    """The inputs of the two norms that are recomputed, 8 channels each; their outputs are kept by convolutions in any case."""
    make = lambda *args: memory.Bottleneck(8, *args, end="leaky_relu")
    block = memory.Block("small", (4, 32, 14, 14), make, memory.NORMS["batch"], invertible=True)
    rows = {row["norms"]: row for row in memory.measure(block, "fp32", "cpu")}
    one = 4 * 14 * 14 * 4
    assert rows["fused"]["saved"] - rows["recompute"]["saved"] == 2 * 8 * one
    assert rows["recompute"]["peak"] < rows["fused"]["peak"] < rows["torch.nn"]["peak"]


@pytest.mark.parametrize("block", memory.BLOCKS, ids=lambda b: b.name)
def test_every_block_is_torchs(block):
    """On smaller inputs."""
    _, C, *rest = block.shape
    x = torch.randn(2, C, 8, 8) if len(rest) == 2 else torch.randn(2, 8, *rest)
    torchs, *others = (memory.step(module, x) for module in memory.variants(block, torch.float32, "cpu").values())
    assert all(memory.matches(other, torchs) for other in others)


def test_a_wrong_block_is_refused(monkeypatch):
    real = fastnorm.AddLayerNorm.forward
    monkeypatch.setattr(fastnorm.AddLayerNorm, "forward", lambda self, x, r: real(self, x * 1.1, r))
    block = memory.Block("small", (2, 8, 768), memory.BLOCKS[1].make, memory.NORMS["layer"])
    *_, fused = memory.measure(block, "fp32", "cpu")
    assert "not those of torch.nn" in fused["refused"]


def test_the_most_at_once():
    def run():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        return b, torch.empty(1 << 19)

    assert memory.peak(run, "cpu") == 8 << 20
