"""The module as such: dtypes, layouts, copies, state, errors, and what PyTorch's own tools do to it."""

import copy
import io
import pickle
from functools import partial

import torch
from torch._prims_common import suggest_memory_format
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import (
    BF16,
    F16,
    F32,
    F64,
    always,
    any_column,
    batch_norm,
    beyond,
    by_cudnn,
    cotangent,
    every,
    feature,
    gradients,
    updates,
    with_a_twin,
)

# ---------------------------------------------------------------- dtypes


def assert_rounded(actual, expected, computed):
    """The float64 truth, computed in `computed` (a few roundings of the largest value) and rounded once."""
    ulps = torch.finfo(actual.dtype).eps + 16 * torch.finfo(computed).eps
    assert (actual.double() - expected).abs().max() <= ulps * max(expected.abs().max(), 1)


def _dtypes(dtype, parameters, column, device):
    """The result has the input's dtype, a gradient the dtype of what it belongs to; torch.nn refuses most of these."""
    ours, theirs = column.twins(device, F64)
    ours, theirs = ours.to(parameters), theirs.to(parameters).to(F64)
    x = column.input(device, dtype)
    wide = x.detach().double().requires_grad_()
    y, truth = ours(x), theirs(wide)
    dy = cotangent(y)
    grads, expected = gradients(ours, x, y, dy), gradients(theirs, wide, truth, dy.double())
    assert [t.dtype for t in (y, *grads)] == [dtype, dtype, parameters, parameters]
    pairs = [*zip((y, *grads), (truth, *expected), strict=True), *zip(ours.buffers(), theirs.buffers(), strict=True)]
    for actual, right in pairs:
        if actual.is_floating_point():
            assert_rounded(actual, right, F64 if dtype == F64 else F32)


for _dtype in (F64, F32, BF16, F16):
    for _parameters in (F64, F32, BF16, F16):
        _name = f"input {_dtype} beside {_parameters} parameters".replace("torch.", "")
        beyond(name=_name, heavy=(_dtype, _parameters) not in ((BF16, F32), (F32, BF16)))(partial(_dtypes, _dtype, _parameters))


@feature(heavy=True, others=every)
def casts(m, x):
    """half(), bfloat16(), double(), to(): the dtypes of all that a module holds and returns."""
    results = []
    for cast in (m.half, m.bfloat16, m.double, partial(m.to, F32)):
        cast()
        y = m(x.to(m.weight.dtype))
        results.append([t.dtype for t in (y, *gradients(m, x, y), *m.buffers())])
    m.load_state_dict({name: torch.zeros_like(t) for name, t in m.state_dict().items()})
    return results


@feature(others=every)
def default_dtype(m, x):
    torch.set_default_dtype(F64)
    try:
        y = m(x)
        return y, gradients(m, x, y)
    finally:
        torch.set_default_dtype(F32)


# ---------------------------------------------------------------- shapes and layouts


@feature()
def empty_batch(m, x):
    """An empty result, zero gradients, statistics unchanged."""
    x = x.detach()[:0].requires_grad_()
    y = m(x)
    return y, gradients(m, x, y, allow_unused=True)


@feature(refused=updates)
def one_value_a_channel(m, x):
    one = x.detach()[:1]
    return m(one if one.dim() <= 2 or not batch_norm(m) else one[(..., *[slice(1)] * (x.dim() - 2))])


def layouts(x):
    x = x.detach()
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack((x, x + 1), -1)[..., 0]
    yield torch.cat((x, x + 1), -1)[..., : x.shape[-1]]
    yield torch.cat((x, x + 1))[::2]
    yield x.mT.contiguous().mT
    yield torch._neg_view(x)
    if x.dim() >= 4:
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        yield x.contiguous(memory_format=memory_format)
        yield x.contiguous(memory_format=memory_format)[1:]


def formatted(m, t, x):
    """torch.nn's t in the strides that ours has on every device, and torch.nn's on the CPU; ours as it is."""
    if type(m).__module__.startswith("torch."):
        return torch.empty_like(x, memory_format=suggest_memory_format(x)).copy_(t)
    return t


@feature(heavy=True, others=every)
def layouts_of_the_input(m, x):
    """Results, gradients and their strides: those of x's memory format.

    On a GPU torch.nn's batch norm differs where cudnn does not compute it: y of a transposed (B, C) input is transposed as
    well, and dx of a channels_last input is contiguous in evaluation, which has no backward of cudnn's.
    """
    results = []
    for view in layouts(x):
        view.requires_grad_()
        y = m(view)
        dx, *others = gradients(m, view, y)
        if view.is_cuda and batch_norm(m):
            y = y if by_cudnn(m, view) else formatted(m, y, view)
            dx = dx if m.training else formatted(m, dx, view)
        results.append((y, dx, others))
    return results


@feature(others=every)
def expanded_input(m, x):
    """Samples or positions that share their memory."""
    results = []
    x = x.detach()
    for view in (x[:1].expand(x.shape), *[x[..., :1].expand(x.shape)] * batch_norm(m)):
        view.requires_grad_()
        y = m.eval()(view)
        results.append((y, gradients(m, view, y)))
    return results


@feature()
def channels_last_module(m, x):
    m, x = m.to(memory_format=torch.channels_last), x if x.dim() != 4 else x.to(memory_format=torch.channels_last)
    y = m(x)
    return y, y.is_contiguous(memory_format=torch.channels_last) if y.dim() == 4 else None


@beyond()
def strided_parameters(column, device):
    """Views of something larger, as flat optimizers make them; torch's backward of (B, C) inputs reads past their end."""
    m, theirs = column.twins(device)
    every_second = lambda t: torch.stack((t, t + 1), -1)[..., 0]
    for name, p in list(m.named_parameters()):
        setattr(m, name, torch.nn.Parameter(every_second(p.detach())))
    for name, b in list(m.named_buffers()):
        setattr(m, name, every_second(b))
    results = []
    for module in (m, theirs):
        x = column.input(device)
        y = module(x)
        results.append([y, *gradients(module, x, y), *module.buffers()])
    torch.testing.assert_close(*results)


@feature(others=every)
def negated_parameters(m, x):
    """A negative view: its memory holds the negated values."""
    for name, p in list(m.named_parameters()):
        setattr(m, name, torch.nn.Parameter(torch._neg_view(p.detach())))
    y = m(x)
    return y, gradients(m, x, y)


@feature(refused=by_cudnn)
def zero_tensor(m, x):
    """Zeros that have no memory at all. torch expands one zero for cudnn, which then asks for a contiguous tensor."""
    y = m.eval()(torch._efficientzerotensor(x.shape, device=x.device))
    return y, torch.autograd.grad(y, list(m.parameters()), cotangent(y))


@feature()
def view_of_a_leaf(m, x):
    y = m(x.view(-1).view(x.shape)[:]).view(-1)
    return y, gradients(m, x, y)


# ---------------------------------------------------------------- copies and state


@feature(heavy=True, others=every)
def copies_and_pickles(m, x):
    stream = io.BytesIO()
    torch.save(m, stream)
    stream.seek(0)
    clones = copy.deepcopy(m), copy.copy(m), pickle.loads(pickle.dumps(m)), torch.load(stream, weights_only=False)
    return [(type(clone) is type(m), clone.training, clone(x)) for clone in clones]


@feature()
def state_dicts(m, x):
    """Into torch.nn's module and back, also without num_batches_tracked, and with what does not fit."""
    theirs = next(cls for cls in type(m).__mro__ if cls.__module__.startswith("torch.nn.modules"))
    arguments = (m.normalized_shape if isinstance(m, torch.nn.LayerNorm) else m.num_features,)
    other, results = theirs(*arguments), [list(m.state_dict()), [n for n, _ in m.named_buffers()]]
    other.load_state_dict(m.state_dict(), strict=True)
    old = {name: t + 1 for name, t in other.state_dict().items() if name != "num_batches_tracked"}
    m.load_state_dict(old, strict=not batch_norm(m))
    for bad in ({**old, "else": torch.ones(1)}, {**old, "weight": torch.ones(9)}, {}):
        try:
            m.load_state_dict(bad)
        except RuntimeError as e:
            results.append(str(e).replace(type(m).__name__, "the module"))
    m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}, assign=True)
    return results, m(x)


@feature(heavy=True)
def several_steps(m, x):
    optimizer, results = torch.optim.SGD(m.parameters(), 0.1), []
    for step in range(3):
        y = m(x + step)
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
        results.append(y)
    return results, m.eval()(x)


@feature()
def without_running_statistics(m, x):
    torch.func.replace_all_batch_norm_modules_(m)
    y = m(x)
    return y, gradients(m, x, y)


@feature(heavy=True)
def cumulative_average(m, x):
    m.momentum = None
    return [m(x * (i + 1)) for i in range(3)]


@feature(heavy=True)
def update_bn(m, x):
    """torch.optim.swa_utils finds batch norms by their class."""
    torch.optim.swa_utils.update_bn([x.detach(), x.detach() + 1], torch.nn.Sequential(m))
    return m(x)


# ---------------------------------------------------------------- PyTorch's tools for modules


@feature(others=every)
def weight_norm(m, x):
    parametrizations.weight_norm(m, "weight")
    y = m(x)
    return y, gradients(m, x, y)


@feature()
def spectral_norm(m, x):
    parametrizations.spectral_norm(m, "weight")
    y = m(x)
    return y, gradients(m, x, y)


@feature()
def pruned(m, x):
    prune.l1_unstructured(m, "weight", amount=0.5)
    y = m(x)
    grads = gradients(m, x, y)
    prune.remove(m, "weight")
    return y, grads, m(x)


@feature()
def shared_parameters(m, x):
    second = copy.deepcopy(m)
    second.weight = m.weight
    y = second(m(x))
    return y, gradients(m, x, y)


@feature(refused=lambda m, x: not batch_norm(m) or m.training)
def fused_with_a_convolution(m, x):
    torch.manual_seed(0)
    conv = (torch.nn.Conv1d, torch.nn.Conv1d, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[x.dim() - 1](3, 3, 1)
    fused = fuse_conv_bn_eval(conv.to(x.device).eval(), m)
    return fused.weight, fused.bias


@feature()
def to_empty_from_meta(m, x):
    m = m.to("meta").to_empty(device=x.device)
    m.reset_parameters()
    return m(x), m.state_dict()


# ---------------------------------------------------------------- errors

BAD_INPUTS = {
    "no dimension": lambda x: torch.tensor(1.0, device=x.device),
    "one dimension": lambda x: torch.ones(5, device=x.device),
    "another size": lambda x: torch.ones(4, 5, 5, 5, 5, 5, device=x.device)[(..., *[0] * (6 - x.dim()))],
    "too many dimensions": lambda x: torch.ones(2, 5, 1, 1, 1, 1, 7, device=x.device),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "a sparse tensor": lambda x: x.detach().to_sparse(),
    "an array": lambda x: x.detach().cpu().numpy(),
}


def _bad_input(what, m, x):
    m(BAD_INPUTS[what](x))


for _what in BAD_INPUTS:
    # torch.nn.SyncBatchNorm has its own words for the number of dimensions: not those of its twin.
    feature(name=f"input is {_what}", refused=always, columns=with_a_twin if "dimension" in _what else any_column)(
        partial(_bad_input, _what)
    )


@beyond()
def statistics_untouched_when_a_call_raises(column, device):
    """torch.nn has counted the batch by then."""
    m, _ = column.twins(device)
    x = column.input(device)
    m(x)
    before = {name: t.clone() for name, t in m.state_dict().items()}
    raised = 0
    for bad in BAD_INPUTS.values():
        try:
            m(bad(x))
        except Exception:
            raised += 1
    assert raised == len(BAD_INPUTS)
    assert all(torch.equal(before[name], t) for name, t in m.state_dict().items())
