"""What happens to a norm outside of its forward: checkpoints, casts, parametrizations, hooks, folding into the layer before."""

import copy
import io

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.prune as prune
from test_modules import PAIRS, assert_same_state, batch_pairs, pairs, twins
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.ao.quantization.fuser_method_mappings import fuse_conv_bn

import fastnorm

assert len({p.values[0] for p in PAIRS}) == 4  # LayerNorm and the three batch norms


def trained(ours, theirs, args, shape, **kwargs):
    """The two modules with the same random parameters and statistics."""
    mine, torchs = twins(ours, theirs, args, **kwargs)
    torchs(3 * torch.randn(shape) + 1)
    mine.load_state_dict(torchs.state_dict(), strict=True)
    return mine, torchs


def assert_same_step(mine, torchs, x):
    """Output, gradients and state after one forward and backward."""
    results = []
    for module in (mine, torchs):
        module.zero_grad()
        xi = x.clone().requires_grad_()
        y = module(xi)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "dx": xi.grad} | grads)
    torch.testing.assert_close(*results)
    assert_same_state(mine, torchs)


@pairs
def test_checkpoints_go_both_ways(ours, theirs, args, shape):
    """Strictly, by way of a file that is read with weights_only."""
    mine, torchs = trained(ours, theirs, args, shape)
    for source, target in ((mine, theirs(*args)), (torchs, ours(*args))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        keys = target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert not keys.missing_keys
        assert not keys.unexpected_keys
        assert_same_state(target, source, rtol=0, atol=0)
        assert source.state_dict()._metadata == target.state_dict()._metadata


@batch_pairs
@pytest.mark.parametrize("version", [None, 1, 2])
def test_checkpoints_without_num_batches_tracked(ours, theirs, args, shape, version):
    """Old ones load strictly and keep the counter; a new one without it is refused, in torch's words."""
    mine, torchs = trained(ours, theirs, args, shape)
    outcomes = []
    for module in (mine, torchs):
        state = copy.deepcopy(theirs(*args).state_dict())
        del state["num_batches_tracked"]
        state._metadata = {} if version is None else {"": {"version": version}}
        try:
            outcomes.append(str(module.load_state_dict(state, strict=True)))
        except RuntimeError as error:
            outcomes.append(str(error).replace(ours.__name__, ""))
    assert outcomes[0] == outcomes[1]
    assert ("Missing" in outcomes[0]) == (version == 2)
    assert mine.num_batches_tracked == 1
    assert_same_state(mine, torchs)


@batch_pairs
def test_checkpoints_without_statistics(ours, theirs, args, shape):
    without = theirs(*args, track_running_stats=False).state_dict()
    ours(*args, track_running_stats=False).load_state_dict(without, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours(*args).load_state_dict(without, strict=True)
    missing = ours(*args).load_state_dict(without, strict=False).missing_keys
    assert missing == ["running_mean", "running_var", "num_batches_tracked"]


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float64),
    "to meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "twice": lambda m: m.half().float(),
    "apply": lambda m: m.apply(lambda module: module.register_buffer("mark", torch.ones(1))),
    "share_memory": lambda m: m.share_memory(),
}


@pairs
@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_torchs(ours, theirs, args, shape, cast):
    mine, torchs = (CASTS[cast](m) for m in trained(ours, theirs, args, shape))
    if "meta" in cast:
        mine.reset_parameters(), torchs.reset_parameters()
        torchs.load_state_dict(theirs(*args).state_dict())
    assert_same_state(mine, torchs, rtol=0, atol=0)
    assert all(t.is_shared() for t in mine.state_dict().values()) == (cast == "share_memory")
    dtype = mine.weight.dtype
    x = torch.randn(shape).to(dtype)
    truth = copy.deepcopy(torchs).double()(x.double())
    y = mine(x)
    assert y.dtype == torchs(x).dtype
    unit = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=unit, atol=unit * truth.abs().max().item())
    y.sum().backward()
    assert all(p.grad.dtype == dtype for p in mine.parameters())


@pairs
@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_shares_what_torchs_shares(ours, theirs, args, shape, make):
    for module in (ours(*args), theirs(*args)):
        clone = make(module)
        assert type(clone) is type(module)
        assert (clone.weight is module.weight) == (make is copy.copy)


class Positive(nn.Module):
    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.abs().log()


WEIGHTS = {
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Positive()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, dim=None),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m) if m.weight.dim() > 1 else None,
    "old weight_norm": lambda m: nn.utils.weight_norm(m, dim=None),
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "prune twice": lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", 1), "bias", 2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pairs
@pytest.mark.parametrize("how", WEIGHTS)
def test_weights_that_are_computed(ours, theirs, args, shape, how):
    """Two steps, so that what is computed anew at each forward is seen to be; and with what can be undone, a third."""
    mine, torchs = (m.double() for m in trained(ours, theirs, args, shape))
    for module in (mine, torchs):
        torch.manual_seed(3)
        WEIGHTS[how](module)
    x = torch.randn(shape).double()
    for _ in range(2):
        assert_same_step(mine, torchs, x)
        with torch.no_grad():
            for p in (*mine.parameters(), *torchs.parameters()):
                p.mul_(1.5)
    undo = {"parametrize": lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")}
    undo |= {"old weight_norm": nn.utils.remove_weight_norm, "prune": lambda m: prune.remove(m, "weight")}
    if how in undo:
        undo[how](mine), undo[how](torchs)
        assert type(mine) is ours
        assert_same_step(mine, torchs, x)


@pairs
def test_functional_call(ours, theirs, args, shape):
    mine, torchs = (m.double() for m in trained(ours, theirs, args, shape))
    x = torch.randn(shape).double()
    state = {name: 2 * t for name, t in torchs.state_dict().items()}
    kept = copy.deepcopy(mine.state_dict())
    results = []
    for module in (mine, torchs):
        replaced = copy.deepcopy(state)
        results.append([torch.func.functional_call(module, replaced, (x,)), *replaced.values()])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(mine.state_dict(), kept, rtol=0, atol=0)


@batch_pairs
def test_per_sample_gradients_without_statistics(ours, theirs, args, shape):
    """replace_all_batch_norm_modules_, which is there for vmap."""
    results = []
    for module in (m.double() for m in trained(ours, theirs, args, shape)):
        torch.manual_seed(0)
        net = torch.func.replace_all_batch_norm_modules_(nn.Sequential(module))
        assert module.running_mean is None
        assert not module.track_running_stats
        loss = lambda p, x: torch.func.functional_call(net, p, (x,)).square().sum()
        x = torch.randn(3, *shape).double()
        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x))
    torch.testing.assert_close(*results)


@pairs
def test_hooks_see_what_they_see_on_torchs(ours, theirs, args, shape):
    mine, torchs = (m.double() for m in trained(ours, theirs, args, shape))
    seen = {}
    for module in (mine, torchs):
        log = seen[module] = []
        module.register_forward_pre_hook(lambda m, a, log=log: log.append(("pre", *a)) or (a[0] * 2,))
        module.register_forward_hook(lambda m, a, y, log=log: log.append(("post", *a, y)) or y + 1)
        module.register_full_backward_pre_hook(lambda m, g, log=log: log.append(("backward pre", *g)))
        module.register_full_backward_hook(lambda m, dx, dy, log=log: log.append(("backward", *dx, *dy)))
    assert_same_step(mine, torchs, torch.randn(shape).double())
    assert [event for event, *_ in seen[mine]] == ["pre", "post", "backward pre", "backward"]
    for (_, *tensors), (_, *expected) in zip(seen[mine], seen[torchs], strict=True):
        torch.testing.assert_close(tensors, expected)


@pairs
def test_frozen_and_thawed(ours, theirs, args, shape):
    mine, torchs = (m.double() for m in trained(ours, theirs, args, shape))
    x = torch.randn(shape).double()
    for names in ((), ("weight",), ("bias",), ("weight", "bias")):
        for module in (mine, torchs):
            module.requires_grad_(False)
            for name in names:
                getattr(module, name).requires_grad_(True)
        assert_same_step(mine, torchs, x)
        assert {name for name, p in mine.named_parameters() if p.grad is not None} == set(names)


@batch_pairs
def test_update_bn(ours, theirs, args, shape):
    """swa_utils looks for batch norms with isinstance, and sets momentum to None for a while."""
    batches = [torch.randn(shape).double() for _ in range(3)]
    mine, torchs = (m.double() for m in trained(ours, theirs, args, shape))
    for module in (mine, torchs):
        torch.optim.swa_utils.update_bn(batches, nn.Sequential(module))
    assert mine.num_batches_tracked == 3
    assert mine.momentum == 0.1
    assert_same_state(mine, torchs)


@batch_pairs
def test_is_a_batch_norm(ours, theirs, args, shape):
    norm = ours(*args)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert isinstance(norm, nn.modules.batchnorm._NormBase)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]
    assert isinstance(sync, nn.SyncBatchNorm)
    assert sync.weight is norm.weight
    assert sync.running_mean is norm.running_mean


@batch_pairs
def test_lazy_modules_become_torchs(ours, theirs, args, shape):
    lazy = getattr(nn, f"Lazy{theirs.__name__}")()
    lazy(torch.randn(shape))
    assert type(lazy) is theirs


# Folding into the convolution or the linear layer before.

CONVOLUTIONS = [
    pytest.param(nn.Conv1d, fastnorm.BatchNorm1d, (3, 4, 7), id="1d"),
    pytest.param(nn.Conv2d, fastnorm.BatchNorm2d, (3, 4, 6, 5), id="2d"),
    pytest.param(nn.Conv3d, fastnorm.BatchNorm3d, (2, 4, 4, 3, 5), id="3d"),
]
convolutions = pytest.mark.parametrize(("conv", "norm", "shape"), CONVOLUTIONS)


def pair(layer, norm, x):
    """The two in a row, with statistics of their own, in evaluation."""
    net = nn.Sequential(layer, norm).double()
    nn.init.normal_(norm.weight)
    net(x)
    return net.eval()


@convolutions
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])
def test_fuse_conv_bn_eval(conv, norm, shape, transpose):
    x = torch.randn(shape).double()
    conv = getattr(nn, conv.__name__.replace("Conv", "ConvTranspose")) if transpose else conv
    net = pair(conv(4, 6, 3, padding=1), norm(6), x)
    fused = nn.utils.fuse_conv_bn_eval(*net, transpose=transpose)
    assert type(fused) is conv
    torch.testing.assert_close(fused(x), net(x))
    bn = net[1]
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    weight, bias = nn.utils.fuse_conv_bn_weights(net[0].weight, net[0].bias, *statistics, transpose)
    assert torch.equal(weight, fused.weight)
    assert torch.equal(bias, fused.bias)


def test_fuse_linear_bn_eval():
    x = torch.randn(5, 4).double()
    net = pair(nn.Linear(4, 6), fastnorm.BatchNorm1d(6), x)
    torch.testing.assert_close(nn.utils.fuse_linear_bn_eval(*net)(x), net(x))


@convolutions
def test_fuse_modules(conv, norm, shape):
    """torch.ao.quantization knows exact types: ours by its own argument for that, or after revert."""
    x = torch.randn(shape).double()
    net = pair(conv(4, 6, 3, padding=1), norm(6), x)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(net, ["0", "1"])
    ours = {"additional_fuser_method_mapping": {(conv, norm): fuse_conv_bn}}
    told = fuse_modules(net, ["0", "1"], fuse_custom_config_dict=ours)
    want = net(x)
    fastnorm.revert(net)
    for fused in (told, fuse_modules(net, ["0", "1"])):
        assert [type(m) for m in fused] == [conv, nn.Identity]
        torch.testing.assert_close(fused(x), want)


@convolutions
def test_fuse_modules_qat(conv, norm, shape):
    """The fused module keeps the norm, and trains with ours once it is converted again."""
    x = torch.randn(shape).double()
    net = pair(conv(4, 6, 3, padding=1), norm(6), x).train()
    expected = copy.deepcopy(net)(x)
    fastnorm.revert(net)
    fused = fuse_modules_qat(net, ["0", "1"])
    assert len(fastnorm.convert(fused).changed) == 1
    assert type(fused[0][1]) is norm
    torch.testing.assert_close(fused(x), expected)
