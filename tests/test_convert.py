"""fastnorm.convert and revert: whole models before and after, and everything that holds on to their modules."""

import copy
import importlib
import io
import pickle
import sys
import types

import libraries
import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import known
from fastnorm.convert import CLASSES, OURS


def model():
    """A norm of each kind, one of them shared, one tied, one in evaluation."""
    torch.manual_seed(1)
    shared, tied = nn.LayerNorm(6), nn.LayerNorm(6)
    tied.weight = shared.weight
    net = nn.Sequential(nn.Linear(6, 6), shared, nn.BatchNorm1d(6), shared, tied, nn.BatchNorm1d(6))
    net[5].eval()
    return net


def step(net, *args, seed=0, **kwargs):
    """Output, gradients and buffers of one forward and backward."""
    torch.manual_seed(seed)
    net.zero_grad()
    y = net(*args, **kwargs)
    y = y if isinstance(y, torch.Tensor) else next(t for t in y.values() if t.dtype.is_floating_point and t.dim())
    y.square().sum().backward()
    results = {"output": y.detach()} | {name: b.clone() for name, b in net.named_buffers()}
    return results | {f"{name}.grad": p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same_results(net, *args, changed, **kwargs):
    """The converted copy of `net` does what `net` does, in training and in evaluation; `changed` of its modules are ours."""
    mine = copy.deepcopy(net)
    report = fastnorm.convert(mine)
    assert sum(report.counts.values()) == changed
    assert sum(isinstance(m, CLASSES) for m in mine.modules()) == changed
    for training in (True, False):
        ours, theirs = (step(m.train(training), *args, **kwargs) for m in (mine, net))
        assert len(ours) > 1
        torch.testing.assert_close(ours, theirs)
    types_before = [type(m) for m in net.modules()]
    fastnorm.revert(mine)
    assert [type(m) for m in mine.modules()] == types_before
    return report


def transformer(name):
    """(model from a config, its arguments, how many norms it has)"""
    import transformers as hf

    tokens, pixels = {"input_ids": torch.arange(20).view(2, 10)}, lambda n: {"pixel_values": torch.randn(2, 3, n, n).double()}
    width = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    if name == "BERT":
        return hf.BertForMaskedLM(hf.BertConfig(vocab_size=20, max_position_embeddings=12, **width)), tokens, 6
    if name == "GPT-2":
        config = hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return hf.GPT2LMHeadModel(config), tokens, 5
    if name == "ViT":
        return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, **width)), pixels(16), 5
    if name == "ConvNext":
        config = hf.ConvNextConfig(hidden_sizes=[6, 8, 10, 12], depths=[1, 1, 1, 1], image_size=32)
        return hf.ConvNextForImageClassification(config), pixels(32), 9
    if name == "ResNet":
        config = hf.ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        return hf.ResNetForImageClassification(config), pixels(32), 7
    if name == "LeViT":
        three = dict(hidden_sizes=[8] * 3, num_attention_heads=[2] * 3, depths=[1] * 3, key_dim=[4] * 3)
        return hf.LevitForImageClassification(hf.LevitConfig(image_size=64, **three)), pixels(64), 27
    assert name == "Emu3"
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAETemporalResnetBlock as Block

    return Block(6, 8), {"hidden_states": torch.randn(2, 6, 3, 4, 4).double()}, 2


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT", "ConvNext", "ResNet", "LeViT", "Emu3"])
def test_transformers_models(name):
    net, inputs, norms = transformer(name)
    report = assert_same_results(net.double(), changed=norms, **inputs)
    assert not report.skipped


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_blocks_of_timm_and_torchvision(layout, backend, device):
    x = torch.randn(2, 3, 6, 6, device=device, dtype=torch.float64).contiguous(memory_format=layout)
    blocks = [
        (libraries.ConvNextBlock(8, libraries.TimmLayerNorm2d, libraries.TimmLayerNorm), 3),
        (libraries.ConvNextBlock(8, libraries.TorchvisionLayerNorm2d, nn.LayerNorm), 3),
        (libraries.ResNetBlock(8, nn.BatchNorm2d), 3),
    ]
    for block, norms in blocks:
        assert_same_results(block.to(device).double(), x, changed=norms)


def test_forwards_of_other_libraries_are_left_alone():
    net = nn.Sequential(libraries.BatchNormAct2d(3), libraries.LayerNormAct(5), libraries.FrozenBatchNorm2d(3))
    report = assert_same_results(net, torch.randn(2, 3, 4, 5), changed=0)
    assert [(s.name, s.cls, s.reason) for s in report.skipped] == [
        ("0", libraries.BatchNormAct2d, "has a forward of its own"),
        ("1", libraries.LayerNormAct, "has a forward of its own"),
    ]


def test_timms_fast_norm_is_left_alone():
    norm = libraries.TimmLayerNorm(6)
    norm._fast_norm = True
    assert [s.reason for s in fastnorm.convert(norm).skipped] == ["timm's fast norm is on"]
    assert type(norm) is libraries.TimmLayerNorm


@pytest.mark.parametrize("name", [name for name in known.FORWARDS if name.startswith("transformers.")])
def test_known_norms_of_transformers_reach_ours(name, monkeypatch):
    """Every entry of the table, with the library's own class."""
    file, _, cls = name.rpartition(".")
    cls = getattr(importlib.import_module(file), cls)
    calls, forward = [], fastnorm.LayerNorm.forward
    monkeypatch.setattr(fastnorm.LayerNorm, "forward", lambda self, x: calls.append(self) or forward(self, x))
    formats = ({},) if "Esmc" in name else ({"data_format": "channels_first"}, {"data_format": "channels_last"})
    for kwargs in formats:
        assert_same_results(cls(6, **kwargs).double(), torch.randn(2, 6, 4, 6).double(), changed=1)
    assert len(calls) == 2 * len(formats)


def test_everything_that_holds_on_to_a_module_stays():
    net = model().to(torch.float64)
    fired = []
    for kind in ("forward_pre", "forward", "full_backward"):
        getattr(net[1], f"register_{kind}_hook")(lambda *_, kind=kind: fired.append(kind))
    modules = [(id(m), m.training, dict(vars(m))) for m in net.modules()]
    tensors = [id(t) for t in net.state_dict(keep_vars=True).values()]
    fastnorm.convert(net)
    assert [(id(m), m.training, vars(m)) for m in net.modules()] == modules
    assert [id(t) for t in net.state_dict(keep_vars=True).values()] == tensors
    assert net[1] is net[3]
    assert net[4].weight is net[1].weight
    net(torch.randn(4, 6).double()).sum().backward()
    assert sorted(fired) == sorted(2 * ["forward_pre", "forward", "full_backward"])
    assert all(t.dtype == torch.float64 for t in net.parameters())


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3)],  # eps: gradients that are 0
    ids=["SGD", "AdamW"],
)
def test_an_optimizer_built_before_trains_the_same(optimizer):
    nets = [model().double(), model().double()]
    optimizers = [optimizer(net.parameters()) for net in nets]
    averages = [torch.optim.swa_utils.AveragedModel(net) for net in nets]
    fastnorm.convert(nets[0])
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(5, 6).double()
        for net, opt, average in zip(nets, optimizers, averages, strict=True):
            step(net, x)
            opt.step()
            average.update_parameters(net)
    for mine, torchs in (nets, averages):
        torch.testing.assert_close(mine.state_dict(), torchs.state_dict())


def test_twice_is_once_and_back_is_back():
    net = model()
    original = [type(m) for m in net.modules()]
    first, second = fastnorm.convert(net), fastnorm.convert(net)
    assert (len(first.changed), first.unchanged) == (4, 0)
    assert (len(second.changed), second.unchanged) == (0, 4)
    assert [type(m) for m in net.modules()] != original
    back, again = fastnorm.revert(net), fastnorm.revert(net)
    assert (len(back.changed), back.unchanged) == (4, 0)
    assert (len(again.changed), again.unchanged) == (0, 4)
    assert [type(m) for m in net.modules()] == original


@pytest.mark.parametrize("cls", list(OURS), ids=lambda cls: cls.__name__)
def test_the_model_may_be_a_norm(cls):
    norm = cls(3, 6) if cls is nn.GroupNorm else cls(6)
    assert fastnorm.convert(norm).changed == {"": cls}
    assert type(norm) is OURS[cls]
    assert fastnorm.revert(norm).changed == {"": cls}
    assert type(norm) is cls


def test_attributes_that_would_become_options():
    """A subclass with torch's forward that keeps something of its own under a name of ours."""

    class Named(nn.BatchNorm1d):
        activation = "relu"

    plain = nn.LayerNorm(6)
    plain.frozen = True
    x = torch.randn(4, 6)
    for norm in (Named(6), plain):
        expected = norm.eval()(x)
        report = fastnorm.convert(norm)
        assert "would take for an option" in str(report)
        assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("what", [None, nn.LayerNorm, [nn.LayerNorm(6)], "model"])
def test_only_modules(what):
    for function in (fastnorm.convert, fastnorm.revert):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function(what)


def test_the_report_in_words():
    net = model()
    net.append(libraries.LayerNormAct(6))
    net.append(fastnorm.LayerNorm(6))
    assert str(fastnorm.convert(net)).splitlines() == [
        "4 converted (2 torch.nn.LayerNorm, 2 torch.nn.BatchNorm1d), 1 already converted, 1 left alone:",
        "  6 (libraries.LayerNormAct): has a forward of its own",
    ]
    assert str(fastnorm.revert(nn.LayerNorm(6))) == "0 reverted, 1 already reverted"
    assert repr(fastnorm.convert(nn.Linear(2, 2))) == "0 converted"
    assert "the model itself" in str(fastnorm.convert(libraries.LayerNormAct(6)))


# Subclasses: their own forward stays or they get ours, everything else of theirs stays.


class Named(nn.LayerNorm):
    """A subclass with torch's forward, and with more state."""

    def __init__(self, n, tag):
        super().__init__(n)
        self.tag = tag

    def extra_repr(self):
        return f"{self.tag}, {super().extra_repr()}"


class Mixin:
    def twice(self):
        return 2 * self.eps


class Deeper(Mixin, Named):
    def __getstate__(self):
        return vars(self) | {"pickled": True}


class Anywhere(nn.BatchNorm2d, Mixin):
    """timm and others relax the check of the dimensions like this."""

    def _check_input_dim(self, input):
        if input.dim() < 3:
            raise ValueError(f"Anywhere wants 3 dimensions or more, not {input.dim()}")


SUBCLASSES = [(lambda: Named(6, "a"), (4, 6)), (lambda: Deeper(6, "b"), (4, 6)), (lambda: Anywhere(6), (4, 6, 5))]


@pytest.mark.parametrize(("make", "shape"), SUBCLASSES, ids=["Named", "Deeper", "Anywhere"])
def test_a_subclass_with_torchs_forward(make, shape):
    norm = make().double()
    cls, words = type(norm), repr(norm)
    assert_same_results(norm, torch.randn(shape).double(), changed=1)
    fastnorm.convert(norm)
    assert isinstance(norm, cls)
    assert isinstance(norm, CLASSES)
    assert type(norm).forward is next(c for c in CLASSES if isinstance(norm, c)).forward
    assert (type(norm).__name__, type(norm).__module__, repr(norm)) == (cls.__name__, cls.__module__, words)
    other = make()
    fastnorm.convert(other)
    assert type(other) is type(norm)
    assert not hasattr(norm, "twice") or norm.twice() == 2 * norm.eps
    clones = [copy.deepcopy(norm), copy.copy(norm)]
    clones += [pickle.loads(pickle.dumps(norm, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    clones.append(torch.load(file, weights_only=False))
    for clone in clones:
        assert type(clone) is type(norm)
        torch.testing.assert_close(clone.state_dict(), norm.state_dict(), rtol=0, atol=0)
        fastnorm.revert(clone)
        assert type(clone) is cls
    cls_again = pickle.loads(pickle.dumps(cls))
    assert cls_again is cls


def test_a_check_of_the_subclass_is_still_made():
    norm = Anywhere(6)
    fastnorm.convert(norm)
    with pytest.raises(ValueError, match="Anywhere wants"):
        norm(torch.randn(4, 6))


def test_a_known_forward_is_known_when_it_is_inherited_and_only_while_it_is_there(monkeypatch):
    class Inherits(libraries.TimmLayerNorm):
        pass

    calls, layer_norm = [], fastnorm.functional.layer_norm
    monkeypatch.setattr(fastnorm.functional, "layer_norm", lambda *a, **extras: calls.append(a) or layer_norm(*a, **extras))
    for cls, shape in ((Inherits, (4, 6)), (libraries.TorchvisionLayerNorm2d, (2, 6, 3, 4))):
        assert_same_results(cls(6).double(), torch.randn(shape).double(), changed=1)
    assert len(calls) == 4
    monkeypatch.setattr(libraries.TimmLayerNorm, "forward", lambda self, x: x)
    assert [s.reason for s in fastnorm.convert(libraries.TimmLayerNorm(6)).skipped] == ["has a forward of its own"]


def test_a_converted_model_pickles(monkeypatch):
    for name in ("timm", "timm.layers", "timm.layers.norm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for cls in (libraries.TimmLayerNorm, libraries.TimmLayerNorm2d):
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
    block = libraries.ConvNextBlock(8, libraries.TimmLayerNorm2d, libraries.TimmLayerNorm)
    fastnorm.convert(block)
    x = torch.randn(2, 3, 6, 6)
    clone = pickle.loads(pickle.dumps(block))
    assert [type(m) for m in clone.modules()] == [type(m) for m in block.modules()]
    assert torch.equal(clone(x), block(x))
