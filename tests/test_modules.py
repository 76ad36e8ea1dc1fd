"""Drop-in: the same constructor, repr, state_dict, options, layouts and exceptions as torch.nn's."""

import inspect

import pytest
import torch
from cases import BF16, F16, F32, F64

import fastnorm

PAIRS = [
    pytest.param(fastnorm.LayerNorm, torch.nn.LayerNorm, (6,), (4, 6), id="LayerNorm"),
    pytest.param(fastnorm.LayerNorm, torch.nn.LayerNorm, ([3, 6],), (4, 3, 6), id="LayerNorm-2"),
    pytest.param(fastnorm.BatchNorm1d, torch.nn.BatchNorm1d, (6,), (8, 6), id="BatchNorm1d"),
    pytest.param(fastnorm.BatchNorm1d, torch.nn.BatchNorm1d, (6,), (8, 6, 5), id="BatchNorm1d-L"),
    pytest.param(fastnorm.BatchNorm2d, torch.nn.BatchNorm2d, (6,), (4, 6, 3, 5), id="BatchNorm2d"),
    pytest.param(fastnorm.BatchNorm3d, torch.nn.BatchNorm3d, (6,), (2, 6, 3, 2, 4), id="BatchNorm3d"),
]
pairs = pytest.mark.parametrize(("ours", "theirs", "args", "shape"), PAIRS)
MORE = [
    pytest.param(fastnorm.RMSNorm, torch.nn.RMSNorm, (6,), (4, 6), id="RMSNorm"),
    pytest.param(fastnorm.GroupNorm, torch.nn.GroupNorm, (3, 6), (4, 6, 5), id="GroupNorm"),
    pytest.param(fastnorm.InstanceNorm1d, torch.nn.InstanceNorm1d, (6,), (4, 6, 5), id="InstanceNorm1d"),
    pytest.param(fastnorm.InstanceNorm2d, torch.nn.InstanceNorm2d, (6,), (4, 6, 3, 5), id="InstanceNorm2d"),
    pytest.param(fastnorm.InstanceNorm3d, torch.nn.InstanceNorm3d, (6,), (2, 6, 3, 2, 4), id="InstanceNorm3d"),
]
learning_pairs = pytest.mark.parametrize(("ours", "theirs", "args", "shape"), PAIRS + MORE[:2])
batch_pairs = pytest.mark.parametrize(("ours", "theirs", "args", "shape"), PAIRS[2:])


def options(cls):
    if issubclass(cls, torch.nn.LayerNorm):
        return [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}]
    if issubclass(cls, torch.nn.RMSNorm):
        return [{}, {"elementwise_affine": False}, {"eps": 0.1}]
    if issubclass(cls, torch.nn.GroupNorm):
        return [{}, {"affine": False}, {"eps": 0.1}]
    return [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}]


def twins(ours, theirs, args, seed=0, **kwargs):
    """The two modules with the same random parameters."""
    ours, theirs = ours(*args, **kwargs), theirs(*args, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for p in theirs.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_same_state(ours, theirs, **tolerance):
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, t in ours.state_dict().items():
        assert t.dtype == state[name].dtype
        torch.testing.assert_close(t, state[name], **tolerance)


@pytest.mark.parametrize(("ours", "theirs", "args", "shape"), PAIRS + MORE)
def test_is_a_torch_module_with_its_signature(ours, theirs, args, shape):
    assert issubclass(ours, theirs)
    for method, extra in (("__init__", "keyword-only"), ("forward", "positional or keyword")):
        parameters, torchs = (list(inspect.signature(getattr(cls, method)).parameters.values()) for cls in (ours, theirs))
        more = parameters[len(torchs) :]
        assert [p.name for p in parameters[: len(torchs)]] == [p.name for p in torchs]
        assert method == "forward" or parameters[: len(torchs)] == torchs
        assert all(p.default is not p.empty and p.kind.description == extra for p in more)
    for kwargs in options(ours):
        assert repr(ours(*args, **kwargs)) == repr(theirs(*args, **kwargs))
        assert_same_state(ours(*args, **kwargs), theirs(*args, **kwargs))


@pairs
def test_options_over_several_steps(ours, theirs, args, shape, backend, device):
    """Three training steps and one in evaluation, for every option: outputs, gradients and statistics stay together."""
    for kwargs in options(ours):
        mine, torchs = (m.to(device) for m in twins(ours, theirs, args, **kwargs))
        for step in range(4):
            if step == 3:
                mine.eval(), torchs.eval()
            x = torch.randn(shape, device=device) * (step + 1) + step
            results = []
            for module in (mine, torchs):
                xi = x.clone().requires_grad_()
                y = module(xi)
                results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [xi, *module.parameters()])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert_same_state(mine, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counter", [torch.tensor(3), torch.tensor(3, dtype=torch.int32), torch.tensor([3]), torch.tensor(3.0)])
def test_counters_of_every_kind(counter, backend, device):
    module = fastnorm.BatchNorm1d(6, device=device)
    module.num_batches_tracked = counter.clone().to(device)
    for count in (4, 5):
        module(torch.randn(8, 6, device=device))
        assert module.num_batches_tracked == count
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.randn(1, 6, device=device))
    module.eval()(torch.randn(1, 6, device=device))
    assert module.num_batches_tracked == 5


def test_a_call_that_cannot_be_saved_for_backward_changes_nothing(backend, device):
    module = fastnorm.BatchNorm1d(6, device=device)
    module(torch.randn(8, 6, device=device))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.inference_mode():
        batch = torch.randn(8, 6, device=device)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(batch)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        fastnorm.LayerNorm(6, device=device)(batch)


def test_counting_is_a_change_in_place(backend, device):
    module = fastnorm.BatchNorm1d(6, affine=False, device=device)
    batch, counter = torch.randn(8, 6, device=device), module.num_batches_tracked
    for _ in range(3):
        version = counter._version
        module(batch)
        assert counter._version > version
    with torch.inference_mode():
        module = fastnorm.BatchNorm1d(6, affine=False, device=device)
        module(batch)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        module(batch)


def test_counting_is_no_operator_of_its_own(backend, device):
    module, batch = fastnorm.BatchNorm1d(6, device=device), torch.randn(8, 6, device=device)
    module(batch)
    with torch.profiler.profile() as profile:
        module(batch)
    counted = "aten::add_" in {event.key for event in profile.key_averages()}
    assert not counted or not hasattr(backend, "whole_calls") or isinstance(fastnorm.extension.load(), str)
    assert module.num_batches_tracked == 2


@pairs
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_factories_and_casts(ours, theirs, args, shape, dtype, backend, device):
    module = ours(*args, device=device, dtype=dtype)
    assert all(p.dtype == dtype and p.device.type == device for p in module.parameters())
    assert module(torch.randn(shape, device=device, dtype=dtype)).dtype == dtype
    assert_same_state(ours(*args).to(device).to(dtype), theirs(*args).to(device).to(dtype))
    meta = ours(*args, device="meta").to_empty(device=device)
    meta.reset_parameters()
    assert_same_state(meta, theirs(*args).to(device))


def calls(functional, dtype=F32):
    """Every kind of bad call, as functions of (layer_norm, batch_norm)."""
    layer_norm, batch_norm = functional.layer_norm, functional.batch_norm
    x, ones = torch.randn(4, 6), torch.ones
    return {
        "normalized_shape is an int": lambda: layer_norm(x, 6),
        "normalized_shape is empty": lambda: layer_norm(x, ()),
        "normalized_shape does not fit": lambda: layer_norm(x, (5,)),
        "normalized_shape is longer than x": lambda: layer_norm(x, (2, 4, 6)),
        "normalized_shape holds no ints": lambda: layer_norm(x, ("a",)),
        "layer_norm weight does not fit": lambda: layer_norm(x, (6,), ones(5)),
        "layer_norm bias does not fit": lambda: layer_norm(x, (6,), None, ones(7)),
        "layer_norm eps is a string": lambda: layer_norm(x, (6,), eps="a"),
        "layer_norm of integers": lambda: layer_norm(torch.ones(4, 6, dtype=torch.int64), (6,)),
        "layer_norm of no tensor": lambda: layer_norm([1.0, 2.0], (2,)),
        "layer_norm of None": lambda: layer_norm(None, (2,)),
        "weight on another device": lambda: layer_norm(x, (6,), ones(6, device="meta")),
        "batch_norm of one dimension": lambda: batch_norm(torch.randn(6), None, None, training=True),
        "batch_norm of no dimension": lambda: batch_norm(torch.tensor(1.0), ones(1), ones(1)),
        "one value per channel": lambda: batch_norm(torch.randn(1, 6), None, None, training=True),
        "one value per channel, 2d": lambda: batch_norm(torch.randn(1, 6, 1, 1), ones(6), ones(6), training=True),
        "no statistics in evaluation": lambda: batch_norm(x, None, None),
        "only one running statistic": lambda: batch_norm(x, None, ones(6), training=True),
        "only the other in evaluation": lambda: batch_norm(x, ones(6), None),
        "running_mean does not fit": lambda: batch_norm(x, ones(5), ones(5), training=True),
        "running_var does not fit": lambda: batch_norm(x, ones(6), ones(5)),
        "batch_norm weight does not fit": lambda: batch_norm(x, ones(6), ones(6), ones(5)),
        "batch_norm bias does not fit": lambda: batch_norm(x, ones(6), ones(6), None, ones(5)),
        "eps = 0 in training": lambda: batch_norm(x, None, None, training=True, eps=0.0),
        "negative eps": lambda: batch_norm(x, ones(6), ones(6), eps=-1.0),
        "momentum is None": lambda: batch_norm(x, ones(6), ones(6), training=True, momentum=None),
        "batch_norm of integers": lambda: batch_norm(torch.ones(4, 6, dtype=torch.int64), ones(6), ones(6)),
        "batch_norm of a list": lambda: batch_norm([[1.0, 2.0]], ones(2), ones(2)),
    }


@pytest.mark.parametrize("what", list(calls(fastnorm.functional)))
def test_bad_calls_raise_what_torch_raises(what, backend):
    raised = []
    for functional in (fastnorm.functional, torch.nn.functional):
        with pytest.raises(Exception) as info:  # noqa: PT011 (the type and the words are compared with torch's below)
            calls(functional)[what]()
        raised.append((type(info.value), str(info.value)))
    assert raised[0] == raised[1]


def test_public_names():
    assert set(fastnorm.__all__) == {
        "AddLayerNorm",
        "AddRMSNorm",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "GroupNorm",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
        "LayerNorm",
        "LayerNorm2d",
        "ModulatedLayerNorm",
        "RMSNorm",
        "SyncBatchNorm",
        "__version__",
        "add_layer_norm",
        "add_rms_norm",
        "batch_norm",
        "channels_first_layer_norm",
        "config",
        "convert",
        "fold",
        "from_keras",
        "functional",
        "ghost_batch_norm",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "lint",
        "modulated_layer_norm",
        "revert",
        "rms_norm",
        "use_backend",
    }
    assert all(getattr(fastnorm, name).__doc__ for name in fastnorm.__all__ if name != "__version__")
