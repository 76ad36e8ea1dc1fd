"""fastnorm.lint: every rule with a model that breaks it and one that does not, and a model that nothing happens to."""

import copy
import random
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_convert import transformer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastnorm
from fastnorm import rules

NAMES = {rule.partition(":")[0] for rule in rules.TEXTS}


def found(*args, **kwargs):
    """rule -> the names of all its modules"""
    names = {}
    for finding in fastnorm.lint(*args, **kwargs):
        names.setdefault(finding.rule, []).extend(finding.modules)
    return names


class Function(nn.Module):
    """As a module of a user's own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """After the norm `inner` the input is added."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Sequences(nn.Module):
    """A recurrent net, and a batch norm over all steps or over the last one."""

    def __init__(self, every):
        super().__init__()
        self.net, self.norm, self.every = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4), every

    def forward(self, x):
        y, _ = self.net(x)
        return self.norm(torch.relu(y.mT) if self.every else y[:, -1])


class Packed(Sequences):
    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.net(packed)[0], batch_first=True)
        return self.norm(y.transpose(1, 2))


def twice(norm):
    return nn.Sequential(norm, nn.Linear(4, 4), norm)


def dense(norm, *more):
    return nn.Sequential(nn.Linear(3, 4, bias=False), norm, *more)


def convolution(norm, *more):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, *more)


nns = pytest.mark.parametrize("provider", [nn, fastnorm], ids=["torch.nn", "fastnorm"])

# rule, the modules that it names, a model with the mistake, one without, options of lint; `p` is torch.nn or fastnorm.
CASES = [
    ("one-value", ["1"], lambda p: dense(p.BatchNorm1d(4)), lambda p: dense(p.LayerNorm(4)), {"batch_size": 1}),
    ("small-batch", ["1"], lambda p: dense(p.BatchNorm1d(4)), lambda p: convolution(p.BatchNorm2d(4)), {"batch_size": 15}),
    (
        "small-batch",
        ["1"],
        lambda p: convolution(p.BatchNorm2d(4)),
        lambda p: convolution(nn.GroupNorm(2, 4)),
        {"batch_size": 7},
    ),
    (
        "small-batch",
        ["3"],
        lambda p: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.ReLU(), p.BatchNorm1d(16)),
        lambda p: nn.Sequential(nn.Conv1d(3, 4, 1), p.BatchNorm1d(4)),
        {"batch_size": 15},
    ),
    (
        "small-batch",
        ["1", "4"],
        lambda p: dense(p.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), p.BatchNorm1d(4)),
        lambda p: dense(p.BatchNorm1d(4).eval()),
        {"batch_size": 15},
    ),
    ("momentum", ["1"], lambda p: dense(p.BatchNorm1d(4, momentum=0.99)), lambda p: dense(p.BatchNorm1d(4, momentum=None)), {}),
    ("momentum", ["1"], lambda p: dense(p.BatchNorm1d(4, momentum=0.0)), lambda p: dense(p.BatchNorm1d(4, momentum=0.01)), {}),
    (
        "dropout-before-batch-norm",
        ["0", "1"],
        lambda p: nn.Sequential(nn.Dropout(), p.BatchNorm1d(4)),
        lambda p: nn.Sequential(nn.Dropout(0.0), p.BatchNorm1d(4), nn.Dropout(), p.LayerNorm(4)),
        {},
    ),
    (
        "dropout-before-batch-norm",
        ["1"],
        lambda p: nn.Sequential(Function(lambda x: F.dropout(x).relu()), p.BatchNorm1d(4)),
        lambda p: nn.Sequential(Function(lambda x: F.dropout(x).sin()), p.BatchNorm1d(4)),
        {},
    ),
    (
        "norm-after-norm",
        ["1", "2"],
        lambda p: dense(p.BatchNorm1d(4), p.LayerNorm(4)),
        lambda p: dense(p.BatchNorm1d(4), nn.ReLU(), p.LayerNorm(4)),
        {},
    ),
    (
        "norm-after-norm",
        ["0", "2"],
        lambda p: nn.Sequential(p.LayerNorm(4), Function(lambda x: x.unsqueeze(0).transpose(0, 1)), p.LayerNorm(4)),
        lambda p: nn.Sequential(p.LayerNorm(4), Residual(p.LayerNorm(4))),
        {},
    ),
    (
        "mixed-norms",
        ["1", "4"],
        lambda p: dense(p.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), p.LayerNorm(4)),
        lambda p: dense(p.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), p.LayerNorm(4)),
        {},
    ),
    (
        "mixed-norms",
        ["0", "2"],
        lambda p: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), p.BatchNorm2d(4)),
        lambda p: nn.Sequential(p.BatchNorm2d(4), nn.Conv2d(4, 4, 1), p.BatchNorm2d(4)),
        {},
    ),
    (
        "norm-before-activation",
        ["1"],
        lambda p: dense(p.BatchNorm1d(4), nn.ReLU()),
        lambda p: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), p.BatchNorm1d(4)),
        {},
    ),
    (
        "norm-before-activation",
        ["1"],
        lambda p: convolution(p.BatchNorm2d(4), Function(F.leaky_relu_)),
        lambda p: convolution(p.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()),
        {},
    ),
    (
        "norm-before-activation",
        ["1"],
        lambda p: dense(p.LayerNorm(4), Function(lambda x: x.view(-1, 2, 2).tanh())),
        lambda p: dense(p.LayerNorm(4), nn.Softmax(1)),
        {},
    ),
    (
        "bias-before-batch-norm",
        ["0"],
        lambda p: nn.Sequential(nn.Linear(3, 4), nn.Identity(), p.BatchNorm1d(4)),
        lambda p: nn.Sequential(nn.Linear(3, 4), p.LayerNorm(4), nn.Linear(4, 4, bias=False), p.BatchNorm1d(4)),
        {},
    ),
    (
        "bias-before-batch-norm",
        ["0"],
        lambda p: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), p.BatchNorm2d(4)),
        lambda p: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), p.BatchNorm2d(4)),
        {},
    ),
    (
        "bias-before-batch-norm",
        ["0"],
        lambda p: nn.Sequential(nn.Conv1d(3, 4, 3), p.BatchNorm1d(4)),
        lambda p: nn.Sequential(nn.Linear(3, 8), p.BatchNorm1d(5)),  # (B, 5, 3): the channels are not the Linear's
        {},
    ),
    ("batch-norm-after-recurrent", ["net", "norm"], lambda p: Sequences(True), lambda p: Sequences(False), {}),
    ("shared-batch-norm", ["0"], lambda p: twice(p.BatchNorm1d(4)), lambda p: twice(p.LayerNorm(4)), {}),
    (
        "no-running-statistics",
        ["1"],
        lambda p: dense(p.BatchNorm1d(4, track_running_stats=False)),
        lambda p: dense(nn.InstanceNorm1d(4)),
        {},
    ),
]


@nns
@pytest.mark.parametrize(("rule", "names", "bad", "good", "options"), CASES, ids=[case[0] for case in CASES])
def test_rule(rule, names, bad, good, options, provider):
    assert found(bad(provider), **options)[rule] == names
    assert rule not in found(good(provider), **options)


def test_every_rule_has_a_case_and_a_line_in_the_docstring():
    assert {case[0] for case in CASES} | {"unsynchronised"} == NAMES
    lines = [line.split() for line in fastnorm.lint.__doc__.splitlines()]
    described = {line[0]: line[1] for line in lines if line and line[0] in NAMES}
    assert described == {rule.partition(":")[0]: text[0] for rule, text in rules.TEXTS.items()}


@pytest.mark.parametrize("batch_size", [1, 15, 16])
def test_the_smallest_batches(batch_size):
    """What lint says of one value per channel is what torch does."""
    net = dense(nn.BatchNorm1d(4))
    got = found(net, batch_size=batch_size)
    assert found(copy.deepcopy(net).eval(), batch_size=batch_size) == got
    assert ("one-value" in got, "small-batch" in got) == (batch_size == 1, batch_size == 15)
    if batch_size == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            net(torch.randn(1, 3))


def test_shapes_are_known_of_a_run():
    """(B, C, 1, 1) has one value per sample, whatever the module is called; and the rows of (B * T, C) are counted."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    steps = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3))
    x, sequences = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3)
    assert "one-value" not in found(pooled, batch_size=1)
    assert "one-value" in found(pooled, batch_size=1, input=x)
    assert "one-value" in found(steps, batch_size=1)
    assert "one-value" not in found(steps, batch_size=1, input=sequences)
    made = nn.Sequential(Function(lambda n: torch.ones(n, 3)), nn.BatchNorm1d(3))
    assert found(made, batch_size=1, input=2) == {"small-batch": ["1"]}
    assert "bias-before-batch-norm" in found(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert "bias-before-batch-norm" not in found(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), input=torch.randn(2, 3, 3))


def test_a_run_with_one_value_per_channel_is_reported_rather_than_raised():
    for track in (True, False):
        net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False, track_running_stats=track))
        assert found(net, batch_size=1, input=torch.randn(1, 3))["one-value"] == ["1"]


def test_padded_sequences():
    x, lengths = torch.randn(2, 5, 3), torch.tensor([5, 3])
    assert found(Packed(True), input=(x, lengths))["batch-norm-after-recurrent"] == ["net", "norm"]


def test_options_of_our_norms():
    for activation, expected in ((None, False), ("identity", False), ("relu", True), (("elu", 0.5), True)):
        norm = fastnorm.BatchNorm1d(4, activation=activation)
        assert ("norm-before-activation" in found(dense(norm))) is expected
    assert "small-batch" not in found(dense(fastnorm.BatchNorm1d(4, frozen=True)), batch_size=2)
    last = nn.Sequential(nn.Linear(3, 4), fastnorm.BatchNorm1d(4, channel_axis=-1))
    for x in (None, torch.ones(2, 5, 3)):
        assert found(last, input=x) == {"bias-before-batch-norm": ["0"]}
    assert "one-value" not in found(last, batch_size=1, input=torch.ones(2, 5, 3))
    for shape in ((2, 3), (2, 1, 3)):
        assert "one-value" in found(last, batch_size=1, input=torch.ones(shape))
    assert found(nn.Sequential(nn.Conv2d(3, 4, 1), fastnorm.BatchNorm2d(4, channel_axis=-1))) == {}


def test_what_is_added_in_a_norm():
    """After it, a batch norm's input is still the layer's output; before it, the sum of two is normalised."""

    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Conv2d(4, 4, 1), fastnorm.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.layer(x), x)

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = fastnorm.LayerNorm(4), fastnorm.AddLayerNorm(4)

        def forward(self, x):
            return self.norm(self.first(x), x)

    assert found(After()) == found(After(), input=torch.ones(2, 4, 3, 3)) == {"bias-before-batch-norm": ["layer"]}
    assert found(Before()) == found(Before(), input=torch.ones(2, 4)) == {}


def test_parameters_are_no_inputs():
    """prelu has two arguments, and comes after one result."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Dropout(), Function(lambda x: F.prelu(x, self.slope)), nn.BatchNorm1d(4))
            self.slope = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self[2](F.prelu(self[0](x), self.slope))

    assert found(Net()) == found(Net(), input=torch.ones(2, 4)) == {"dropout-before-batch-norm": ["0", "2"]}


def test_a_bias_that_something_else_reads_is_not_in_vain():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.layer(x)
            return y + self.norm(y)

    assert found(Net()) == found(Net(), input=torch.ones(2, 3)) == {}


def test_rules_that_exclude_each_other():
    assert found(dense(nn.BatchNorm1d(4), nn.LayerNorm(4))) == {"norm-after-norm": ["1", "2"]}
    without = nn.BatchNorm1d(4, momentum=0.99, track_running_stats=False)
    assert found(dense(without)) == {"no-running-statistics": ["1"]}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_layers_of_other_kinds():
    """Parametrized and scripted ones, lazy ones, which cannot be copied, and a Sequential with nothing in it."""
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Sequential(), nn.BatchNorm1d(4))
    assert found(net) == found(net, input=torch.ones(2, 3)) == {"bias-before-batch-norm": ["0"]}
    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4))), *dense(nn.BatchNorm1d(4), nn.ReLU()))
    scripted[1] = nn.Linear(4, 4)
    wanted = {"norm-before-activation": ["2"], "bias-before-batch-norm": ["1"]}
    assert found(scripted) == found(scripted, input=torch.ones(2, 3)) == wanted
    assert found(scripted[0]) == {}
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU())
    kinds = [type(m) for m in lazy]
    for input in (None, torch.ones(2, 3)):
        assert fastnorm.lint(lazy, input=input).order.startswith("neighbours")
        assert found(lazy, input=input) == {"norm-before-activation": ["1"]}  # how many channels it has is not known yet
    assert [type(m) for m in lazy] == kinds


def test_a_name_alone_makes_no_norm_of_a_block():
    class PreLayerNorm(nn.Sequential):
        pass

    assert found(PreLayerNorm(nn.Linear(3, 4), nn.BatchNorm1d(4))) == {"bias-before-batch-norm": ["0"]}


@nns
def test_subclasses_and_converted_models(provider):
    class Norm(provider.BatchNorm1d):
        def forward(self, x):
            return super().forward(x * 1)

    class RMSNorm(nn.Module):  # as transformers has them
        def forward(self, x):
            return x / x.square().mean(-1, keepdim=True).sqrt()

    net = nn.Sequential(nn.Linear(3, 4), Norm(4), nn.Linear(4, 4), RMSNorm())
    wanted = {"bias-before-batch-norm": ["0"], "mixed-norms": ["1", "3"]}
    assert found(net) == found(net, input=torch.randn(5, 3)) == wanted
    fastnorm.convert(net)
    assert found(net) == wanted


def test_the_model_may_be_a_norm():
    assert found(nn.BatchNorm1d(4, momentum=0.9)) == {"momentum": [""]}
    assert "the model itself" in str(fastnorm.lint(fastnorm.BatchNorm1d(4, momentum=0.9)))


# Wholes


class Block(nn.Module):
    """ResNet's."""

    def __init__(self, p, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), p.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1), p.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), p.BatchNorm2d(after))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(p):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), p.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(stem, Block(p, 8, 8, 1), Block(p, 8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2))


@nns
@pytest.mark.parametrize("input", [None, torch.randn(2, 3, 8, 8)], ids=["traced", "run"])
def test_a_resnet(provider, input):
    report = fastnorm.lint(resnet(provider), batch_size=32, input=input)
    assert [(f.rule, f.severity, f.modules) for f in report] == [
        ("norm-before-activation", "note", ("0.1", "1.bn1", "2.bn1")),
        ("bias-before-batch-norm", "note", ("1.conv2", "2.conv2")),
    ]
    assert "20 parameters" in report[1].wrong
    small = found(resnet(provider), batch_size=2, input=input)["small-batch"]
    assert sorted(small) == ["0.1", "1.bn1", "1.bn2", "2.bn1", "2.bn2", "2.shortcut.1"]


def test_a_transformer_after_norm_has_one_norm_too_many():
    """Its layers end in a norm, and torch's documentation gives the encoder another one."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))
    x = torch.randn(2, 3, 8)
    assert found(encoder, input=x) == {"norm-after-norm": ["layers.1.norm2", "norm"]}
    before = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    assert not fastnorm.lint(nn.TransformerEncoder(before, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False), input=x)
    mixed = nn.Sequential(nn.BatchNorm1d(3), encoder)
    assert found(mixed, input=x)["mixed-norms"] == ["0", "1.layers.0.norm1"]


@pytest.mark.parametrize("name", ["ResNet", "LeViT", "GPT-2"])
def test_models_of_transformers(name):
    net, inputs, _ = transformer(name)
    batch_norms = {n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)}
    for how in (net.float(), fastnorm.convert(net) and net):
        inputs = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
        report = fastnorm.lint(how, batch_size=2, input=inputs)
        assert report.order == "a run on the input"
        small = {n for f in report for n in f.modules if f.rule == "small-batch"}
        assert small == batch_norms
        assert not [f for f in report if f.rule in ("norm-after-norm", "mixed-norms", "shared-batch-norm")]


# How the order is found


class Flow(nn.Module):
    """Which way it goes depends on values."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_seen_by_its_parts():
    net = nn.Sequential(nn.Dropout(), Flow(dense(fastnorm.BatchNorm1d(4), nn.ReLU())), nn.BatchNorm1d(4))
    report = fastnorm.lint(net)
    assert report.unseen == ("1",)
    assert found(net) == {"norm-before-activation": ["1.inner.1"]}
    assert "cannot be traced, but for their parts: 1" in str(report)
    run = fastnorm.lint(net.eval(), input=torch.ones(2, 3))  # values are needed
    assert (run.order, run.unseen) == ("a run on the input", ())
    assert [(f.rule, f.modules) for f in run] == [("norm-before-activation", ("1.inner.1",))]
    skipped = fastnorm.lint(net, input=-torch.ones(2, 3))
    assert [(f.rule, f.modules) for f in skipped] == [("dropout-before-batch-norm", ("0", "2"))]


def test_optional_arguments_are_at_their_defaults():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, *, x, mask=None, deep, train=False):
            y = self.layer(x + deep)
            if mask is not None:
                y = y * mask
            return self.norm(y) if not train else y

    report = fastnorm.lint(Net())
    assert (report.order, report.unseen) == ("torch.fx", ())
    assert [f.rule for f in report] == ["bias-before-batch-norm"]
    masked = fastnorm.lint(Net(), input={"x": torch.ones(2, 3), "mask": torch.ones(2, 4), "deep": 1})
    assert not masked


def test_what_one_trace_leaves_behind_does_not_disturb_the_next():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.grid = nn.BatchNorm1d(4, momentum=0.9), None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.zeros_like(x)
            return self.norm(x + self.grid)

    report = fastnorm.lint(nn.Sequential(nn.Sequential(Cached()), nn.ReLU()))
    assert (report.order, report.unseen) == ("torch.fx", ())


def test_a_part_that_has_another_name_first():
    net = Flow(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    net._modules = {"other": net.inner[0], "inner": net.inner}
    assert found(net) == {"bias-before-batch-norm": ["inner.0"]}


def test_a_model_that_cannot_be_copied_is_seen_by_neighbours():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.Dropout(), nn.BatchNorm1d(4))
    net.lock = threading.Lock()
    for input in (None, torch.randn(2, 3)):
        report = fastnorm.lint(net, input=input)
        assert report.order == "neighbours in nn.Sequential: no copy of the model (TypeError)"
        assert {f.rule: f.modules for f in report} == {
            "dropout-before-batch-norm": ("2", "3"),
            "bias-before-batch-norm": ("0",),
            "norm-before-activation": ("1.0",),
        }


# Ranks


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
def test_ranks():
    net = dense(nn.BatchNorm1d(4))
    assert found(net, batch_size=4) == {"unsynchronised": ["1"]}
    assert found(net, batch_size=3) == {"small-batch": ["1"]}
    assert found(net, batch_size=16) == found(net) == {}
    assert found(nn.parallel.DistributedDataParallel(net), batch_size=4) == {"unsynchronised": ["1"]}
    synchronised = dense(fastnorm.SyncBatchNorm(4))
    assert found(synchronised, batch_size=4) == {}
    assert found(synchronised, batch_size=1) == {"small-batch": ["1"]}
    pair = dense(fastnorm.SyncBatchNorm(4, process_group=dist.new_group([0, 1])))
    assert found(pair, batch_size=3) == {"small-batch": ["1"]}
    assert found(pair, batch_size=4) == {}


# Nothing is changed


class Busy(nn.Module):
    """A forward that leaves things behind, everywhere."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(3, 4), fastnorm.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("steps", torch.zeros(()))
        self.last, self.seen, self.calls = None, [], 0

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        self.last = self.drop(self.norm(self.layer(x))) + torch.rand(4)
        self.seen.append(self.last)
        return self.last.relu_()


class BusyFlow(Busy):
    def forward(self, x):
        return super().forward(x.add_(1)) if x.sum() > -1e9 else x


@pytest.mark.parametrize("cls", [Busy, BusyFlow])
@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
def test_nothing_is_changed(cls, given):
    net, x, fired = cls(), torch.randn(5, 3), []
    net.norm.eval()
    net.layer.weight.grad = torch.ones(4, 3)
    net.register_forward_hook(lambda *a: fired.append(a))
    net.layer.register_full_backward_hook(lambda *a: fired.append(a))
    before = copy.deepcopy(net.state_dict()), [dict(vars(m)) for m in net.modules()], x.clone()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    versions = [t._version for t in net.state_dict(keep_vars=True).values()]
    states = torch.get_rng_state(), random.getstate()
    assert "bias-before-batch-norm" in found(net, input=x if given else None) or (cls is BusyFlow and not given)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.testing.assert_close(net.state_dict(), before[0], rtol=0, atol=0)
    assert [vars(m) for m in net.modules()] == before[1]
    assert net.seen == fired == []
    assert torch.equal(x, before[2])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert [t._version for t in net.state_dict(keep_vars=True).values()] == versions
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert torch.equal(net.layer.weight.grad, torch.ones(4, 3))


# What comes back


def test_the_report_is_a_sequence_and_a_table():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.99), *(nn.BatchNorm1d(4) for _ in range(4)))
    report = fastnorm.lint(net, batch_size=8)
    assert len(report) == len(list(report)) == 4
    assert [f.severity for f in report] == ["warning"] * 3 + ["note"]
    assert report[1].change.startswith("momentum=0.01, if it is from Keras")
    head, *table = str(report).splitlines()
    assert head == "3 warnings, 1 note; order of the calls: torch.fx"
    starts = [table[0].index(word) for word in ("severity", "rule", "modules", "what is wrong", "what to change")]
    for line in table:
        assert len(line) <= 140
        assert all(line[start - 2 : start].strip() == "" for start in starts[1:])
    assert "1, 2, 3 and 2 more" in "\n".join(table)
    assert table[1].split()[:2] == ["warning", "small-batch"]
    assert repr(report) == str(report)
    with pytest.raises(AttributeError):
        report[0].rule = "another"
    nothing = fastnorm.lint(nn.Linear(3, 4))
    assert not nothing
    assert str(nothing) == "nothing found; order of the calls: torch.fx"


def test_a_compiled_model():
    assert found(torch.compile(dense(nn.BatchNorm1d(4, momentum=0.9)))) == {"momentum": ["1"]}


@pytest.mark.parametrize("what", [None, nn.LayerNorm, [nn.LayerNorm(6)], "model"])
def test_only_modules(what):
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module is checked"):
        fastnorm.lint(what)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "8", True])
def test_only_positive_batch_sizes(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is a positive int, not {batch_size!r}"):
        fastnorm.lint(nn.Linear(3, 4), batch_size=batch_size)


def test_an_input_that_does_not_fit_raises_what_the_model_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fastnorm.lint(nn.Linear(3, 4), input=torch.randn(2, 5))
