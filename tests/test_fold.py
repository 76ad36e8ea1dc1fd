"""fastnorm.fold: whole models compute what they did, and folded weights are what float64 rounds to."""

import copy

import pytest
import torch
from oracle import wide
from test_lint import Flow, resnet
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrizations, prune, weight_norm

import fastnorm
from fastnorm.activations import ACTIVATIONS
from fastnorm.fold import _rounded

NORMS = {1: "BatchNorm1d", 2: "BatchNorm2d", 3: "BatchNorm3d"}
SIZES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
KINDS = ["Linear", *(f"Conv{transpose}{n}d" for transpose in ("", "Transpose") for n in NORMS)]
nns = pytest.mark.parametrize("provider", [nn, fastnorm], ids=["torch.nn", "fastnorm"])


def randomised(net, spread=2.0):
    """In evaluation, with the running statistics and parameters of a norm that has learnt."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
            nn.init.normal_(m.running_mean, std=spread)
            nn.init.uniform_(m.running_var, 0.1, spread)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net.eval()


def layer(kind, groups=1, bias=True):
    return nn.Linear(4, 6, bias) if kind == "Linear" else getattr(nn, kind)(4, 6, 3, groups=groups, bias=bias, stride=2)


def pair(kind, provider=fastnorm, groups=1, bias=True, affine=True):
    norm = getattr(provider, NORMS[1 if kind == "Linear" else int(kind[-2])])
    return randomised(nn.Sequential(layer(kind, groups, bias), norm(6, eps=1e-3, affine=affine)))


def inputs(kind, dtype=torch.float64):
    return torch.randn(3, 4, *([] if kind == "Linear" else [7] * int(kind[-2])), dtype=dtype)


def norms(net):
    return [name for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_folded(net, x, left=(), **tolerance):
    """All but the norms of the names `left` are folded, and nothing else is another."""
    before, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    folded = fastnorm.fold(net)
    assert norms(folded) == list(left)
    torch.testing.assert_close(folded(x), net(x), **tolerance)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [type(m) for m in net.modules()] == kinds
    assert [n for n, _ in folded.named_modules()] == [n for n, m in net.named_modules()]
    gone = tuple(f"{name}." for name in norms(net) if name not in left)
    keys = {key for key in before if not key.startswith(gone)} if gone else set(before)
    assert keys <= set(folded.state_dict())
    assert all(key.endswith(".bias") for key in set(folded.state_dict()) - keys)
    mine = {t.data_ptr() for t in net.state_dict().values() if t.numel()}
    assert not mine & {t.data_ptr() for t in folded.state_dict().values() if t.numel()}
    return folded


@nns
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("kind", "groups"), [(k, g) for k in KINDS for g in (1, 2) if g == 1 or k != "Linear"])
def test_every_layer(kind, groups, bias, affine, provider):
    net = pair(kind, provider, groups, bias, affine).double()
    net[0].weight.requires_grad_(False)
    folded = assert_folded(net, inputs(kind))
    assert [type(m) for m in folded] == [type(net[0]), nn.Identity]
    assert [p.requires_grad for p in folded.parameters()] == [False, bias]
    assert not any(m.training for m in folded.modules())
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]


def neighbours(t):
    bits = t.contiguous().view(SIZES[t.dtype])
    return (bits + 1).view(t.dtype), (bits - 1).view(t.dtype)


def assert_nearest(t, truth):
    """No other value of the dtype is nearer to the truth, but by float64's own rounding."""
    error = abs(wide(t) - truth)
    for other in neighbours(t):
        assert (error <= abs(wide(other) - truth) + 1e-15 * abs(truth)).all()


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "float32 norm"])
def test_folded_weights_are_the_nearest_and_never_worse_than_torchs(kind, dtype, mixed):
    net = pair(kind, nn)
    net[0] = (nn.Linear(40, 6) if kind == "Linear" else getattr(nn, kind)(40, 6, 5)).eval().to(dtype)
    if not mixed:
        net[1].to(dtype)
    folded = fastnorm.fold(net)[0]
    mean, var, weight, bias = (wide(t) for t in (net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias))
    scale = weight / (var + net[1].eps) ** 0.5
    shape = {"Linear": (-1, 1), "Conv2d": (-1, 1, 1, 1), "ConvTranspose2d": (1, -1, 1, 1)}[kind]
    truth = wide(net[0].weight) * scale.reshape(shape), (wide(net[0].bias) - mean) * scale + bias
    transpose = {"transpose": True} if kind == "ConvTranspose2d" else {}
    peer = fuse_linear_bn_eval(*net) if kind == "Linear" else fuse_conv_bn_eval(*net, **transpose)
    worse = 0
    for name, exact in zip(("weight", "bias"), truth, strict=True):
        ours, theirs = getattr(folded, name), getattr(peer, name)
        assert ours.dtype == dtype
        assert_nearest(ours, exact)
        assert (abs(wide(ours) - exact) <= abs(wide(theirs) - exact) + 1e-15 * abs(exact)).all()
        worse += (abs(wide(theirs) - exact) > abs(wide(ours) - exact)).sum()
    assert worse > 0 or (mixed and dtype != torch.float32)  # where its float32 is wider than the result, torch rounds well, too


def test_float64_is_as_near_as_torchs():
    net = pair("Conv2d", nn).double()
    truth = wide(net[0].weight) * (wide(net[1].weight) / (wide(net[1].running_var) + net[1].eps) ** 0.5)[:, None, None, None]
    ours, theirs = (abs(wide(m.weight) - truth).max() for m in (fastnorm.fold(net)[0], fuse_conv_bn_eval(*net)))
    assert ours <= theirs + 2.2e-16 * abs(truth).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_next_to_a_tie_are_rounded_once(dtype):
    low = torch.cat([torch.randn(2000).to(dtype), torch.tensor([1.0, -1.0, 2.0**-14], dtype=dtype)])
    ties = (low.double() + neighbours(low)[0].double()) / 2
    for off in (0.0, 2.0**-35, -(2.0**-35)):
        values = ties * (1 + off)
        assert_nearest(_rounded(values, dtype), values.numpy())
        if off:  # there torch's own way is not the nearest, or this would test nothing
            assert not torch.equal(_rounded(values, dtype), values.to(dtype))
        else:
            assert torch.equal(_rounded(values, dtype), values.to(dtype))
    odd = torch.tensor([float("inf"), -float("inf"), 1e300, -1e39], dtype=torch.float64)
    assert torch.equal(_rounded(odd, dtype), odd.to(dtype))
    assert _rounded(torch.tensor([float("nan")], dtype=torch.float64), dtype).isnan()


@nns
def test_a_resnet(provider):
    net = randomised(resnet(provider)).double()
    folded = assert_folded(net, torch.randn(2, 3, 9, 9).double())
    assert len(norms(net)) == 6
    assert type(folded[1].bn1) is nn.Identity
    assert "1.conv1.bias" in folded.state_dict()


def test_a_converted_model_and_subclasses():
    class Norm(nn.BatchNorm2d):
        pass

    class Layer(nn.Conv2d):
        pass

    net = randomised(nn.Sequential(Layer(3, 4, 3), Norm(4), nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4))).double()
    for how in (net, fastnorm.convert(net) and net):
        assert_folded(how, torch.randn(2, 3, 9, 9).double())


@pytest.mark.parametrize("alpha", [False, True], ids=["default", "alpha"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_of_a_norm_stays(name, alpha):
    net = pair("Conv2d").double()
    net[1].activation = (name, 0.3) if alpha and ACTIVATIONS[name].alpha else name
    folded = assert_folded(net, 3 * inputs("Conv2d"))
    assert not folded[1].training


def test_an_activation_of_somebody_else_is_not_ours():
    net = pair("Conv2d", nn).double()
    net[1].activation = "relu"  # torch's forward knows nothing of it
    assert_folded(net, inputs("Conv2d"))


def test_the_channel_axis_of_a_norm():
    """Of a Linear the last dimension is folded whatever stands before it; of a convolution it is another one."""
    linear = nn.Sequential(nn.Linear(4, 6), fastnorm.BatchNorm1d(6, channel_axis=-1))
    assert_folded(randomised(linear).double(), torch.randn(3, 5, 4).double())
    middle = nn.Sequential(nn.Linear(4, 6), fastnorm.BatchNorm1d(6, channel_axis=-2))
    assert_folded(randomised(middle).double(), torch.randn(3, 6, 4).double(), left=["1"])
    convolution = nn.Sequential(nn.Conv2d(4, 6, 2), fastnorm.BatchNorm2d(6, channel_axis=-1))
    assert_folded(randomised(convolution).double(), torch.randn(3, 4, 5, 7).double(), left=["1"])


def test_a_frozen_norm_is_in_evaluation():
    net = pair("Conv2d").double()
    net[1].frozen = True
    net[1].train()
    assert_folded(net, inputs("Conv2d"))


# What is left alone


class Net(nn.Module):
    """Layer, norm and whatever forward a test gives it."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(4, 4, 3, padding=1), fastnorm.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


def usual(net, x):
    return net.norm(net.layer(x))


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Padded(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input + 1, weight, bias)


def changed(change, how=usual):
    """Makes a net on which `change` has been made."""

    def make():
        net = randomised(Net(how))
        change(net)
        return net

    return make


def calling(how):
    return changed(lambda net: None, how)


def replaced(name, make):
    return changed(lambda net: randomised(setattr(net, name, make()) or net))


def own_forward(name):
    def change(net):
        module = getattr(net, name)
        forward = type(module).forward
        module.forward = lambda x: forward(module, x) + 1

    return change


def overflowing(net):
    net.half().norm.running_var.fill_(1e-7)
    net.norm.weight.data.fill_(60000)


def no_parameter(name):
    def change(net):
        value = getattr(net.layer, name).data.double()
        delattr(net.layer, name)
        setattr(net.layer, name, value)

    return change


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
LEFT = {
    "norm in training mode": changed(lambda net: net.norm.train()),
    "no running statistics": replaced("norm", lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    "norm twice": calling(lambda net, x: net.norm(net.norm(net.layer(x)))),
    "layer twice": calling(lambda net, x: net.norm(net.layer(net.layer(x)))),
    "layer read twice": calling(lambda net, x: (y := net.layer(x)) + net.norm(y)),
    "layer is a result": calling(lambda net, x: torch.stack([y := net.layer(x), net.norm(y)])),
    "something between": calling(lambda net, x: net.norm(net.layer(x).relu())),
    "norm first": calling(lambda net, x: net.layer(net.norm(x))),
    "norm of two": calling(lambda net, x: net.norm(net.layer(x) + x)),
    "weight of the layer read": calling(lambda net, x: net.norm(net.layer(x)) * net.layer.weight.sum()),
    "bias of the norm read": calling(lambda net, x: net.norm(net.layer(x)) * net.norm.bias.sum()),
    "spectral norm": changed(lambda net: parametrizations.spectral_norm(net.layer)),
    "weight norm": changed(lambda net: parametrizations.weight_norm(net.layer)),
    "old weight norm": changed(lambda net: weight_norm(net.layer)),
    "pruned weight": changed(lambda net: prune.l1_unstructured(net.layer, "weight", 0.5)),
    "pruned bias": changed(lambda net: prune.l1_unstructured(net.layer, "bias", 0.5)),
    "weight that is no parameter": changed(no_parameter("weight")),
    "bias that is no parameter": changed(no_parameter("bias")),
    "parametrized norm": changed(lambda net: parametrizations.weight_norm(net.norm, "weight", dim=None)),
    "norm with a forward": replaced("norm", lambda: OwnForward(4)),
    "norm with a forward of its own": changed(own_forward("norm")),
    "layer with a forward of its own": changed(own_forward("layer")),
    "layer of another kind": replaced("layer", lambda: Padded(4, 4, 3)),
    "overflow": changed(overflowing),
    **{
        f"{hook} of the {name}": changed(lambda net, name=name, hook=hook: getattr(getattr(net, name), hook)(lambda *a: None))
        for hook in HOOKS
        for name in ("layer", "norm")
    },
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    net, x = LEFT[name](), torch.randn(2, 4, 5, 5)
    net, x = (net, x.half()) if name == "overflow" else (net.double(), x.double())
    folded = fastnorm.fold(net)
    assert norms(folded) == ["norm"]
    torch.testing.assert_close(folded.state_dict(), net.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=0)


def test_what_is_left_alone_is_folded_without_the_reason():
    x = torch.randn(2, 4, 5, 5).double()
    assert_folded(randomised(Net(usual)).double(), x)
    assert_folded(randomised(Net(lambda net, x: net.norm(net.layer(x)) + x)).double(), x)
    assert norms(fastnorm.fold(changed(lambda net: net.half())())) == []


def test_a_norm_with_a_residual_is_left_alone():
    for how in (lambda net, x: net.norm(net.layer(x), x), lambda net, x: net.norm(input=net.layer(x), residual=x)):
        assert_folded(randomised(Net(how)).double(), torch.randn(2, 4, 5, 5).double(), left=["norm"])


def test_dimensions_that_do_not_fit_raise_as_before():
    net = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), fastnorm.BatchNorm1d(6)))
    assert norms(fastnorm.fold(net)) == ["1"]
    features = nn.Sequential(nn.Linear(3, 6), fastnorm.BatchNorm1d(5)).eval()
    assert_folded(features, torch.randn(2, 5, 3), left=["1"])


def test_a_norm_that_a_list_holds_as_well_is_folded_there_too():
    net = Net(lambda net, x: [x := m(x) for m in net.both][-1])
    net.both = [net.layer, net.norm]
    assert_folded(randomised(net).double(), torch.randn(2, 4, 5, 5).double())


def test_tied_weights_are_folded_for_one_layer_alone():
    net = Net(lambda net, x: net.other(net.norm(net.layer(x))), other=nn.Conv2d(4, 4, 3, padding=1))
    net.other.weight = net.layer.weight
    assert_folded(randomised(net).double(), torch.randn(2, 4, 5, 5).double())


# Models that cannot be traced as a whole


def test_parts_of_a_model():
    net = randomised(nn.Sequential(Flow(pair("Conv2d")), nn.Conv2d(6, 6, 1), fastnorm.BatchNorm2d(6))).double()
    x = inputs("Conv2d").abs()
    assert_folded(net, x)
    assert_folded(Flow(net).eval(), x)
    flow = Flow(randomised(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))).double())
    twice = nn.Sequential(flow, nn.ReLU(), flow).eval()
    folded = fastnorm.fold(twice)
    assert norms(folded) == []
    torch.testing.assert_close(folded(x), twice(x))


def test_a_part_that_stands_in_two_places_is_left_alone_where_not_all_is_seen():
    inner = pair("Conv2d")
    net = Flow(inner)
    net.other = inner[0]
    assert norms(fastnorm.fold(net.eval())) == ["inner.1"]
    traced = Net(lambda net, x: net.inner(x), inner=inner, other=inner[0])
    assert norms(fastnorm.fold(traced.eval())) == ["norm"]


def test_optional_arguments_are_at_their_defaults():
    class Optional(Net):
        def forward(self, x, skip=None, features=False):
            y = self.layer(x)
            if skip is None:
                y = y + 1
            return y if features else self.norm(y)

    net = randomised(Optional(None))
    assert norms(fastnorm.fold(net)) == ["norm"]


# What comes in and goes out


def test_memory_format_and_device_stay():
    net = pair("Conv2d").to(memory_format=torch.channels_last)
    assert fastnorm.fold(net)[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_folding_twice_changes_nothing_and_a_model_without_norms_is_copied():
    once = fastnorm.fold(pair("Conv2d"))
    twice = fastnorm.fold(once)
    assert twice[0] is not once[0]
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)
    for alone in (fastnorm.BatchNorm1d(3).eval(), nn.Linear(3, 3).eval()):
        assert type(fastnorm.fold(alone)) is type(alone)


def test_training_is_refused():
    for net in (pair("Conv2d").train(), fastnorm.BatchNorm1d(3)):
        with pytest.raises(ValueError, match=r"folded for inference: call model\.eval\(\) first"):
            fastnorm.fold(net)


@pytest.mark.parametrize("what", [None, nn.LayerNorm, [nn.LayerNorm(6)], "model"])
def test_only_modules(what):
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module is folded"):
        fastnorm.fold(what)
