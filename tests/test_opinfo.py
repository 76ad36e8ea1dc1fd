"""torch's own samples for these operators and modules (torch.testing._internal), run against fastnorm.

They are imported at the first test that needs them, which takes seconds; nothing else in the suite sees them.
"""

import copy
import inspect
import pickle
import re
import sys
from functools import cache

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, SHORT
from compare import scale
from conftest import SERVED
from torch.testing import assert_close

import fastnorm


def _identity(*args, **kwargs):
    return args, kwargs


def _of_native_layer_norm(x, shape, weight, bias, eps):
    return (x, shape, weight, bias, eps), {}


def _of_native_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    return (x, mean, var, weight, bias, training, momentum, eps), {}


def _of_native_batch_norm_legit(x, weight, bias, *others):
    """The overload without statistics has two arguments less."""
    statistics = others[:2] if len(others) == 5 else (None, None)
    return _of_native_batch_norm(x, weight, bias, *statistics, *others[-3:])


def _of_native_group_norm(x, weight, bias, B, C, S, groups, eps):
    return (x, groups, weight, bias, eps), {}


# OpInfo entry: what fastnorm and torch.nn.functional call it, and its arguments in their order.
OPS = {
    "nn.functional.layer_norm": ("layer_norm", _identity),
    "native_layer_norm": ("layer_norm", _of_native_layer_norm),
    "nn.functional.batch_norm": ("batch_norm", _identity),
    "nn.functional.batch_norm without_cudnn": ("batch_norm", _identity),
    "native_batch_norm": ("batch_norm", _of_native_batch_norm),
    "_native_batch_norm_legit": ("batch_norm", _of_native_batch_norm_legit),
    "nn.functional.rms_norm": ("rms_norm", _identity),
    "nn.functional.group_norm": ("group_norm", _identity),
    "native_group_norm": ("group_norm", _of_native_group_norm),
    "nn.functional.instance_norm": ("instance_norm", _identity),
}
ORACLES = ("layer_norm", "batch_norm", "LayerNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
WITH_ERRORS = ("native_layer_norm", "nn.functional.rms_norm", "nn.functional.group_norm")
EMULATED_MODULES = ("LayerNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
MODULES = (*EMULATED_MODULES, "RMSNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")

DTYPES = {False: (F64, F32, BF16, F16), True: (F32,)}  # less in the interpreter of Triton


def grid(names, usual):
    """(served, name, dtype) for each backend; `usual` are the names that the interpreter runs."""
    for backend, device in SERVED:
        emulated = (backend.name, device) == ("triton", "cpu")
        for name in usual if emulated else names:
            for dtype in DTYPES[emulated]:
                yield pytest.param((backend, device), name, dtype, id=f"{backend.name}-{device}-{name}-{SHORT[dtype]}")


def gridded(names, usual):
    return pytest.mark.parametrize(("served", "name", "dtype"), list(grid(names, usual)), indirect=["served"])


@pytest.fixture(autouse=True)
def _groups_of_any_size(monkeypatch):
    """The samples are small, and small groups are left to torch."""
    for name in ("LEAST", "LEAST_POSITIONS", "LEAST_PLAIN_POSITIONS"):
        monkeypatch.setattr(fastnorm.group, name, 1)


@cache
def internals():
    """torch's two tables, without what importing them does to the process: it reads our arguments and locks backend flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv[:1])
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    return {f"{op.name} {op.variant_test_name}".strip(): op for op in op_db}, {info.module_cls: info for info in module_db}


def entry(name):
    if name not in internals()[0]:
        pytest.skip(f"torch {torch.__version__} has no samples for it")
    return internals()[0][name]


def module_info(name):
    return internals()[1][getattr(torch.nn, name)]


def own(t):
    """A copy of a tensor, of the same strides; anything else as it is."""
    if not isinstance(t, torch.Tensor):
        return t
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)


def named(function, args, kwargs):
    """The arguments by torch.nn.functional's names for them."""
    bound = inspect.signature(getattr(F, function)).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def run(call, arguments, modules=(), dtype=None):
    """The result y, the gradients and the running statistics by name; or the exception. y's gradient is one of this dtype."""
    arguments = {name: own(value) for name, value in arguments.items()}
    try:
        y = call(**arguments)
    except Exception as e:
        return type(e), str(e)
    parameters = {name: p for m in modules for name, p in m.named_parameters()}
    inputs = {name: t for name, t in (arguments | parameters).items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(y, list(inputs.values()), cotangent(y, dtype)) if y.requires_grad else ()
    results = {"y": y.detach(), **{f"d{name}": g for name, g in zip(inputs, grads, strict=True)}}
    buffers = {name: b for m in modules for name, b in m.named_buffers()}
    return results | {name: t for name, t in (*arguments.items(), *buffers.items()) if t is not None and "running" in name}


def cotangent(y, dtype=None):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype or y.dtype).to(y)


def truth_of(input, weight, bias, eps, normalized_shape=None, running_mean=None, running_var=None, training=True, **_):
    """By name: the truth, and how large its terms are (dx is a difference of large terms where a row is short)."""
    if input.numel() == 0:
        return {}
    dy = cotangent(input)
    if normalized_shape is not None:
        truth = oracle.layer_norm(input, normalized_shape, weight, bias, eps, dy)
    else:
        statistics = (None, None) if training else (running_mean, running_var)
        truth = oracle.batch_norm(input, weight, bias, eps, dy, *statistics)
    names = {"y": "y", "dinput": "dx", "dweight": "dweight", "dbias": "dbias"}
    found = {name: (getattr(truth, of), max(scale(truth, of), 1.0)) for name, of in names.items()}
    x_hat = float(input.detach().abs().max()) * truth.rstd.max()  # before the mean is taken away
    found["dweight"] = (truth.dweight, max(found["dweight"][1], float(dy.abs().max()) * x_hat))
    return found


def widened(call, arguments, modules=()):
    """The truth for norms that the oracle does not have: torch's own results in float64."""
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) if is_real(t) else t for name, t in arguments.items()}
    return {name: oracle.wide(t) for name, t in run(call, wide, modules, arguments["input"].dtype).items()}


def is_real(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


TOLERANCE = {F64: 1e-7, F32: 1.3e-6, BF16: 1.6e-2, F16: 1e-3}  # torch.testing's relative tolerances


def assert_same(ours, theirs, truth, asked=None):
    """The same exception; else within torch.testing's tolerance, with respect to the largest term, or nearer to the truth.

    A truth that takes long is one that is `asked` for where it is needed.
    """
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert [(name, t.dtype, t.shape) for name, t in ours.items()] == [(name, t.dtype, t.shape) for name, t in theirs.items()]
    for name, b in theirs.items():
        right, size = truth.get(name, (None, 1.0))
        tolerance = TOLERANCE[b.dtype]
        if torch.allclose(ours[name], b, rtol=tolerance, atol=tolerance * float(size)):
            continue
        right = right if asked is None else asked()[name]
        assert right is not None, f"{name}: {ours[name]} instead of {b}"
        errors = [oracle.error(t[name].view(right.shape), right) for t in (ours, theirs)]
        assert errors[0] <= errors[1], f"{name}: error {errors[0]:.3g}, torch's {errors[1]:.3g}"


def samples(op, device, dtype):
    """torch's samples; its reference samples are the same ones where an entry has no function for them."""
    yield from op.sample_inputs(device, dtype, requires_grad=True)
    yield from op.sample_inputs(device, dtype, requires_grad=False)
    if op.reference_inputs_func is not None:
        yield from op.reference_inputs(device, dtype, requires_grad=True)


@gridded(OPS, ("nn.functional.layer_norm", "nn.functional.batch_norm"))
def test_operator(served, name, dtype):
    """Every sample, as it is and with non-contiguous tensors: outputs, gradients, running statistics."""
    op, (function, reorder) = entry(name), OPS[name]
    count = 0
    for sample in samples(op, served[1], dtype):
        for s in (sample, sample.noncontiguous()):
            arguments = named(function, *reorder(s.input, *s.args, **s.kwargs))
            ours, theirs = (run(getattr(of, function), arguments) for of in (fastnorm, F))
            known = function in ORACLES
            truth = truth_of(**arguments) if known and isinstance(theirs, dict) else {}
            assert_same(ours, theirs, truth, None if known else lambda: widened(getattr(F, function), arguments))
            count += isinstance(theirs, dict)
    assert count >= 10


@pytest.mark.parametrize("name", [name for name in OPS if "layer" in name or name.endswith((".rms_norm", ".group_norm"))])
def test_numpy_reference(name, served):
    """OpInfo's own reference, where it has one."""
    op, (function, reorder) = entry(name), OPS[name]
    array = lambda v: v.cpu().numpy() if isinstance(v, torch.Tensor) else v
    for sample in op.reference_inputs(served[1], F64):
        args, kwargs = reorder(sample.input, *sample.args, **sample.kwargs)
        expected = op.ref(*map(array, (sample.input, *sample.args)), **{key: array(v) for key, v in sample.kwargs.items()})
        expected = expected[0] if isinstance(expected, tuple) else expected
        y = getattr(fastnorm, function)(*args, **kwargs)
        assert_close(y.cpu(), torch.as_tensor(expected), check_dtype=False)


@pytest.mark.parametrize("name", OPS)
def test_operator_errors(name, served):
    op, (function, reorder) = entry(name), OPS[name]
    errors = list(op.error_inputs(served[1])) if op.error_inputs_func else []
    assert bool(errors) == (name in WITH_ERRORS) or torch.__version__ < (2, 13), "OpInfo has other error inputs by now"
    for error in errors:
        s = error.sample_input
        arguments = named(function, *reorder(s.input, *s.args, **s.kwargs))
        ours, theirs = (run(getattr(of, function), arguments) for of in (fastnorm, F))
        assert ours == theirs
        assert issubclass(ours[0], error.error_type)
        assert re.search(error.error_regex, ours[1])


def module_inputs(name, device, dtype, training):
    info = module_info(name)
    return info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)


def twins(name, sample, training, **kwargs):
    made = []
    for cls in (getattr(fastnorm, name), getattr(torch.nn, name)):
        torch.manual_seed(0)
        constructor = sample.constructor_input
        made.append(cls(*constructor.args, **constructor.kwargs, **kwargs).train(training))
    for p in made[1].parameters():
        p.data.uniform_(0.5, 1.5)
    made[0].load_state_dict(made[1].state_dict())
    return made


@gridded(MODULES, EMULATED_MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_module(name, training, served, dtype):
    """Forward and gradients; repr, factory arguments, copies, state; torch's reference function where it has one."""
    inputs = module_inputs(name, served[1], dtype, training)
    assert inputs
    for sample in inputs:
        ours, theirs = twins(name, sample, training, device=served[1], dtype=dtype)
        assert repr(ours) == repr(theirs)
        assert all(t.dtype == dtype for t in ours.parameters())
        (x,), kwargs = sample.forward_input.args, sample.forward_input.kwargs
        assert not kwargs
        for t in (x, noncontiguous(x)):
            own_statistics = training or getattr(theirs, "running_mean", None) is None
            truth, wide = {}, copy.deepcopy(theirs).double()
            if name in ORACLES:
                truth = truth_of(t, **{**vars(theirs), **theirs._parameters, **theirs._buffers, "training": own_statistics})
            results = [run(lambda input: m(input), {"input": t}, [m]) for m in (ours, theirs)]  # an RMSNorm calls it x
            asked = None if name in ORACLES else lambda: widened(lambda input: wide(input), {"input": t}, [wide])
            assert_same(*results, truth, asked)
        if sample.reference_fn is not None:
            computed = max(TOLERANCE[dtype], TOLERANCE[F32])  # RMSNorm's is of float32
            assert_close(ours(x), sample.reference_fn(theirs, x), rtol=computed, atol=computed)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_close(dict(clone.state_dict()), dict(ours.state_dict()))
            assert_close(clone(x), copy.deepcopy(ours)(x), rtol=0, atol=0)


def noncontiguous(t):
    return torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_(t.requires_grad)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_module_memory_format(name, training, served):
    """As torch's test_memory_format: the output's format follows the input's."""
    for sample in module_inputs(name, served[1], F32, training):
        ours, theirs = twins(name, sample, training, device=served[1])
        (x,) = sample.forward_input.args
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for memory_format in (torch.contiguous_format, formats.get(x.dim())):
            if memory_format is not None:
                y, expected = (m(x.contiguous(memory_format=memory_format)) for m in (ours, theirs))
                assert_close(y, expected, check_stride=name != "RMSNorm")
                assert y.is_contiguous() or name != "RMSNorm"  # torch's is what its operators make of it, one by one


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_module_errors(name, training, served):
    """Those of our own are in features/modules.py."""
    info = module_info(name)
    errors = []
    if info.module_error_inputs_func is not None:
        errors = info.module_error_inputs_func(info, device=served[1], dtype=F32, requires_grad=True, training=training)
    assert bool(errors) == name.startswith(("Batch", "Group")) or torch.__version__ < (2, 13), (
        "ModuleInfo has other error inputs by now"
    )
    for error in errors:
        sample = error.module_error_input
        if error.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(error.error_type, match=error.error_regex):
                getattr(fastnorm, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            continue
        ours, theirs = twins(name, sample, training, device=served[1])
        (x,) = sample.forward_input.args
        results = [run(m, {"input": x}) for m in (ours, theirs)]
        if ours.eps == 0 and not training and torch.__version__ < (2, 13) and isinstance(results[1], tuple):
            # A later torch takes it in evaluation, and so do ours.
            shape = (1, -1, *[1] * (x.dim() - 2))
            mean, std, weight, bias = (
                t.view(shape) for t in (ours.running_mean, ours.running_var.sqrt(), ours.weight, ours.bias)
            )
            assert_close(results[0]["y"], (x - mean) / std * weight + bias)
            continue
        assert type(results[0]) is type(results[1])
        if isinstance(results[1], tuple):
            assert results[0] == results[1]
            assert issubclass(results[0][0], error.error_type)
            assert not training or re.search(error.error_regex, results[0][1])  # torch has other words in evaluation
        else:
            assert not training
            assert_close(results[0], results[1])


def test_importing_them_leaves_the_process_alone():
    internals()
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark
    assert torch.get_default_dtype() == F32
