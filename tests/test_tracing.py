"""torch.fx and torch.jit see of our modules what they see of torch.nn's."""

import copy

import libraries
import pytest
import torch
from test_modules import learning_pairs, pairs, twins
from torch import fx, nn
from torch.fx.experimental import optimization
from torch.fx.proxy import TraceError

import fastnorm
from fastnorm import known

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.last = nn.Linear(norm.weight.shape[-1], 2) if isinstance(norm, nn.LayerNorm) else nn.Flatten()

    def forward(self, x):
        return self.last(self.norm(torch.sin(x))) * 2


def nets(ours, theirs, args):
    torch.manual_seed(0)
    mine, torchs = (Net(m).double() for m in twins(ours, theirs, args))
    mine.load_state_dict(torchs.state_dict())
    return mine, torchs


def nodes(graph):
    return [(node.op, node.target, node.name) for node in graph.graph.nodes]


@learning_pairs
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(ours, theirs, args, shape, training):
    """One call_module node; the traced module follows train() and eval(), and nothing happens while it is traced."""
    mine, torchs = nets(ours, theirs, args)
    graph = fx.symbolic_trace(mine.train(training))
    assert nodes(graph) == nodes(fx.symbolic_trace(torchs))
    assert ("call_module", "norm", "norm") in nodes(graph)
    torch.testing.assert_close(mine.state_dict(), torchs.state_dict())
    x = torch.randn(shape).double()
    for mode in (training, not training):
        results = []
        for net in (graph, torchs):
            net.train(mode)
            y = net(x)
            net.zero_grad()
            y.square().sum().backward()
            results.append({"y": y.detach()} | {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
        torch.testing.assert_close(*results)


@pairs
def test_a_tracer_that_looks_into_norms(ours, theirs, args, shape):
    """It may say of torch.nn's norms that they are no leaves: then ours are none."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return not isinstance(module, nn.LayerNorm) and super().is_leaf_module(module, name)

    mine, torchs = nets(ours, theirs, args)
    graphs = [Tracer().trace(net) for net in (mine, torchs)]
    ops = [[node.op for node in graph.nodes if node.op != "get_attr"] for graph in graphs]
    assert ops[0] == ops[1]
    assert ops[0][2] == ("call_function" if isinstance(mine.norm, nn.LayerNorm) else "call_module")
    x = torch.randn(shape).double()
    torch.testing.assert_close(fx.GraphModule(mine, graphs[0])(x), torchs(x))


def test_a_norm_that_is_the_root():
    """torch traces a root through, which works for a layer norm and not for a batch norm."""
    norm, x = fastnorm.LayerNorm(6), torch.randn(4, 6)
    graph = fx.symbolic_trace(norm)
    assert torch.equal(graph(x), norm(x))
    with pytest.raises(AssertionError, match="traced without a residual"):
        graph(x, x)
    for cls in (nn.BatchNorm1d, fastnorm.BatchNorm1d):
        with pytest.raises(TraceError, match="control flow"):
            fx.symbolic_trace(cls(6))


class Twice(fastnorm.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def test_subclasses_are_traced_through():
    converted = libraries.TimmLayerNorm(6)
    fastnorm.convert(converted)
    for norm in (Twice(6), converted):
        net, x = nn.Sequential(norm), torch.randn(4, 6)
        torch.testing.assert_close(fx.symbolic_trace(net)(x), net(x))
        assert "call_function" in [node.op for node in fx.symbolic_trace(net).graph.nodes]


class Around(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_known_forward_around_ours_is_no_leaf(monkeypatch):
    """What its own forward does around ours would be done twice."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) is Around

    monkeypatch.setitem(known.FORWARDS, known.name_of(Around), None)
    net, x = nn.Sequential(Around(6)), torch.randn(4, 6)
    want = net(x)
    assert len(fastnorm.convert(net).changed) == 1
    torch.testing.assert_close(fx.GraphModule(net, Tracer().trace(net))(x), want)


def test_hooks_would_run_twice():
    net = nn.Sequential(fastnorm.LayerNorm(6))
    net[0].register_forward_hook(lambda m, a, y: 2 * y)
    with pytest.raises(TraceError, match=r"fastnorm\.revert"):
        fx.symbolic_trace(net)
    fastnorm.revert(net)
    x = torch.randn(4, 6)
    torch.testing.assert_close(fx.symbolic_trace(net)(x), net(x))


def test_passes_that_know_exact_types():
    """torch's own folding of batch norms into convolutions, after revert."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), fastnorm.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    net(x)
    want = net.eval()(x)
    fused = optimization.fuse(copy.deepcopy(net))
    torch.testing.assert_close(fused(x), want)
    fastnorm.revert(net)
    fused = optimization.fuse(net)
    assert [type(m) for m in fused.children()] == [nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(fused(x), want)


@learning_pairs
def test_script(ours, theirs, args, shape):
    mine, torchs = nets(ours, theirs, args)
    original = copy.deepcopy(mine)
    x = torch.randn(shape).double()
    scripted = torch.jit.script(mine)
    for mode in (True, False):
        torch.testing.assert_close(scripted.train(mode)(x), torchs.train(mode)(x))
        torch.testing.assert_close(scripted.state_dict(), torchs.state_dict())
    assert type(mine.norm) is theirs  # torch puts what it scripts into the model
    assert len(fastnorm.convert(mine).changed) == 1
    torch.jit.script(original.norm)
    assert type(original.norm) is ours


def test_script_of_a_converted_subclass():
    class Named(nn.LayerNorm):
        pass

    net = nn.Sequential(Named(6))
    fastnorm.convert(net)
    x = torch.randn(4, 6)
    want = net(x)
    torch.testing.assert_close(torch.jit.script(net)(x), want)


@learning_pairs
def test_trace(ours, theirs, args, shape):
    mine, torchs = (net.eval() for net in nets(ours, theirs, args))
    x = torch.randn(shape).double()
    torch.testing.assert_close(torch.jit.trace(mine, x)(x), torchs(x))
