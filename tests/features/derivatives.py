"""Reverse mode: first and higher derivatives, subsets, gradients of any form, what is saved, hooks, checkpoints, threads."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import F64, always, beyond, cotangent, emulated, feature, gradients, leaves, updates


@feature()
def backward(m, x):
    y = m(x)
    return y, y.requires_grad, y.is_leaf, y._is_view(), gradients(m, x, y)


def _subset(subset, m, x):
    """Which of input, weight and bias want a gradient."""
    for i, t in enumerate(leaves(m, x)):
        t.requires_grad_(bool(subset >> i & 1))
    y = m(x)
    if y.requires_grad:
        y.backward(cotangent(y))
    return y, y.requires_grad, [t.grad for t in leaves(m, x)]


for _i in range(8):
    feature(name="gradients of " + ("".join(n for i, n in enumerate("xwb") if _i >> i & 1) or "nothing"))(partial(_subset, _i))


def _pure(m):
    """The module as a function of its leaves alone, for gradcheck: it forgets the running statistics of a training step."""

    def function(x, *parameters):
        buffers = {name: b.clone() for name, b in m.named_buffers()}
        named = dict(zip(dict(m.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(m, {**named, **buffers}, (x,))

    return function


def _effort(x):
    """Every element where calls are cheap and few, else a random projection."""
    return {"fast_mode": emulated(x) or x.numel() > 24, "check_undefined_grad": not emulated(x)}


@feature(F64, heavy=True)
def first_derivative(m, x):
    return gradcheck(_pure(m), leaves(m, x), **_effort(x))


@feature(F64, heavy=True)
def double_backward(m, x):
    return gradgradcheck(_pure(m), leaves(m, x), **_effort(x))


@beyond(heavy=True)
def third_derivative(column, device):
    """torch.nn's is silently wrong: its second backward takes the saved statistics as constants."""
    m, _ = column.twins(device, F64)
    x = column.input(device, F64)[:3].detach().requires_grad_()
    _, *parameters = leaves(m, x)

    def gradient(x):
        return torch.autograd.grad(_pure(m)(x, *parameters).exp().sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, x, fast_mode=True)


@feature()
def gradient_penalty(m, x):
    """As WGAN-GP trains, in float32."""
    (dx,) = torch.autograd.grad(m(x).tanh().sum(), x, create_graph=True)
    (dx.norm() - 1).square().backward()
    return x.grad, m.weight.grad


@feature()
def expanded_gradient(m, x):
    y = m(x)
    return gradients(m, x, y, cotangent(y)[:1, :1].expand(y.shape), retain_graph=True), gradients(m, x, y.sum(), torch.ones(()))


@feature()
def strided_gradient(m, x):
    y = m(x)
    dy = cotangent(y)
    transposed = dy.transpose(0, 1).contiguous().transpose(0, 1)
    second = torch.stack((dy, dy + 1), -1)[..., 0]
    return [gradients(m, x, y, d, retain_graph=True) for d in (transposed, second, dy.flip(0).flip(0))]


@feature()
def negated_and_zero_gradient(m, x):
    """Tensors whose memory does not hold their values: a negative view, and zeros that have no memory at all."""
    y = m(x)
    negated, zero = torch._neg_view(cotangent(y)), torch._efficientzerotensor(y.shape, device=y.device)
    return [gradients(m, x, y, dy, retain_graph=True) for dy in (negated, zero)]


@feature()
def wrong_gradient_shape(m, x):
    results = []
    y = m(x)
    for dy in (torch.ones(2, 2), torch.ones(y.shape, dtype=torch.complex64)):
        try:
            gradients(m, x, y, dy)
        except RuntimeError as e:
            results.append(str(e))
    return results, len(results) == 2


@feature()
def retained_graph(m, x):
    y = m(x)
    first, second = gradients(m, x, y, retain_graph=True), gradients(m, x, y)
    return first, [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@feature(refused=always)
def backward_twice(m, x):
    y = m(x)
    gradients(m, x, y), gradients(m, x, y)


@feature()
def accumulated_gradients(m, x):
    for scale in (1, 2):
        y = m(x * scale)
        y.backward(cotangent(y), inputs=leaves(m, x))
    return [t.grad for t in leaves(m, x)]


@feature()
def gradient_edge(m, x):
    y = m(x)
    dy, edge = cotangent(y), get_gradient_edge(y)
    return torch.autograd.grad(edge, leaves(m, x), dy)


@feature(heavy=True)
def same_bits_twice(m, x):
    m.eval()  # the second forward of a training step would see other statistics in its state, not in its result
    for _ in range(2):
        first, second = ((y := m(x), *gradients(m, x, y)) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return False
        m.train()
    return True


# ---------------------------------------------------------------- what is saved for backward


@feature()
def relu_in_place_after(m, x):
    """nn.ReLU(inplace=True) follows a batch norm in most conv nets: y is not saved for backward."""
    y = m(x)
    z = torch.nn.functional.relu(y, inplace=True)
    return z, gradients(m, x, z)


@feature()
def output_changed_in_place(m, x):
    y = m(x)
    dy = cotangent(y)
    y.mul_(2).add_(1)
    y[0].zero_()
    return y, gradients(m, x, y, dy)


@feature(refused=always)
def saved_input_changed(m, x):
    inner = x * 1
    y = m(inner)
    inner.add_(1)
    gradients(m, x, y)


@feature(refused=always)
def saved_weight_changed(m, x):
    y = m(x)
    with torch.no_grad():
        m.weight.add_(1)
    gradients(m, x, y)


@beyond()
def bias_changed(column, device):
    """torch's layer norm saves the bias for nothing, and then refuses."""
    m, _ = column.twins(device)
    x = column.input(device)
    y = m(x)
    expected = gradients(m, x, y, retain_graph=True)
    with torch.no_grad():
        m.bias.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(m, x, y), expected, strict=True))


@beyond()
def buffers_changed_in_place(column, device):
    """DistributedDataParallel broadcasts buffers between forward and backward; torch.nn then refuses."""
    m, _ = column.twins(device)
    x = column.input(device)
    y = m(x)
    expected = gradients(m, x, y, retain_graph=True), gradients(m, x, y, create_graph=True)
    for buffer in m.buffers():
        buffer.add_(1)
    again = gradients(m, x, y, retain_graph=True), gradients(m, x, y, create_graph=True)
    for ours, before in zip(again, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@feature()
def mutation_of_saved_allowed(m, x):
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        inner = x * 1
        y = m(inner)
        inner.add_(1)
        return gradients(m, x, y)


@feature()
def saved_tensors_hooks(m, x):
    """Every saved tensor goes through the hooks: none of them keeps the input alive once it is packed away."""
    packed, unpacked = [], []

    def pack(t):
        packed.append(t.detach().clone())
        return len(packed) - 1

    def unpack(i):
        unpacked.append(i)
        return packed[i]

    inner = x * 1
    alive = weakref.ref(inner)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = m(inner)
    del inner
    gone = alive() is None
    return gone, gradients(m, x, y), bool(packed), sorted(unpacked) == list(range(len(packed)))


@feature()
def saved_tensors_are_what_backward_reads(m, x):
    """Unpacked as zeros, every gradient that depends on a saved tensor is zero or comes from dy alone."""
    with torch.autograd.graph.saved_tensors_hooks(torch.zeros_like, lambda t: t):
        y = m(x)
    dx, dweight, dbias = gradients(m, x, y)
    return dx.any(), dweight.any(), dbias


@feature()
def save_on_cpu(m, x):
    with torch.autograd.graph.save_on_cpu():
        y = m(x)
    return gradients(m, x, y)


@feature()
def saved_tensors_hooks_disabled(m, x):
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        y = m(x)
    return gradients(m, x, y)


@feature(refused=always)
def inference_tensor_saved(m, x):
    with torch.inference_mode():
        constant = x * 1
    m(constant)


# ---------------------------------------------------------------- modes of autograd


@feature()
def no_grad(m, x):
    with torch.no_grad():
        y = m(x)
    return y, y.requires_grad


@feature()
def inference_mode(m, x):
    with torch.inference_mode():
        y = m(x)
    return y.is_inference(), y.clone()


@feature()
def frozen_parameters(m, x):
    m.requires_grad_(False)
    y = m(x)
    constant = m(x.detach())
    return constant, constant.requires_grad, torch.autograd.grad(y, x, cotangent(y))


@feature()
def anomaly_mode(m, x):
    results = []
    with torch.autograd.detect_anomaly(check_nan=True):
        y = m(x)
        results.append(gradients(m, x, y, retain_graph=True))
        try:
            gradients(m, x, y, torch.full_like(y, torch.nan))
        except RuntimeError as e:
            results.append("returned nan values in its 0th output" in str(e))
    return results


@feature()
def not_a_number(m, x):
    with torch.no_grad():
        x.view(-1)[0] = torch.nan
        x.view(-1)[-1] = torch.inf
    y = m(x)
    return y, gradients(m, x, y)


# ---------------------------------------------------------------- hooks


@feature()
def tensor_hooks(m, x):
    seen = []
    inner = x * 1
    inner.register_hook(lambda g: g * 2)
    m.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    y = m(inner)
    y.retain_grad()
    y.register_hook(lambda g: g + 1)
    y.grad_fn.register_prehook(lambda grads: seen.append(grads[0].clone()))
    y.grad_fn.register_hook(lambda dx, dy: seen.append(dy[0].clone()))
    y.backward(cotangent(y))
    return seen, x.grad, y.grad


@feature()
def module_hooks(m, x):
    seen = []
    m.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    m.register_forward_hook(lambda _, args, y: y + 1)
    m.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 2,))
    m.register_full_backward_hook(lambda _, dx, dy: seen.append((dx, dy)))
    y = m(x)
    return seen, y, gradients(m, x, y)


@feature()
def multi_grad_hook(m, x):
    seen = []
    torch.autograd.graph.register_multi_grad_hook(leaves(m, x), lambda grads: seen.append([g.clone() for g in grads]))
    y = m(x)
    y.backward(cotangent(y))
    return seen


# ---------------------------------------------------------------- checkpoints


@feature()
def checkpoint_reentrant(m, x):
    y = checkpoint(m, x, use_reentrant=True)
    y.backward(cotangent(y))
    return y, [t.grad for t in leaves(m, x)]


@feature()
def checkpoint_not_reentrant(m, x):
    y = checkpoint(lambda x: m(x.sigmoid()).sin(), x, use_reentrant=False)
    return y, gradients(m, x, y)


@feature()
def checkpoint_twice_differentiated(m, x):
    y = checkpoint(m, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    return gradients(m, x, dx)[:2] if not updates(m) else torch.autograd.grad(dx, x, cotangent(dx))


def _selective(saved, m, x):
    """`saved`: which operators are not run again."""
    policy = lambda _, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if saved in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
    )
    y = checkpoint(m, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))
    return y, gradients(m, x, y)


feature(name="selective checkpoint of the norm")(partial(_selective, "norm"))
feature(name="selective checkpoint of nothing")(partial(_selective, "nothing"))
feature(name="selective checkpoint of all", refused=updates)(partial(_selective, ""))  # the counter is cached, and counts on


# ---------------------------------------------------------------- threads and the compiled engine


@feature()
def backward_on_another_thread(m, x):
    y = m(x)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(gradients, m, x, y).result()


@feature()
def one_graph_many_threads(m, x):
    """Two backwards of one graph at once."""
    y = m(x)
    with ThreadPoolExecutor(1 if emulated(x) else 2) as pool:  # the interpreter runs one kernel at a time
        return [f.result() for f in [pool.submit(gradients, m, x, y, None, retain_graph=True) for _ in range(4)]]


@feature(heavy=True)
def compiled_autograd(m, x):
    """The captured graph as it is; that Dynamo can trace it too is a test of its own, which takes a second a cell."""
    y = m(x)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        y.backward(cotangent(y))
    return [t.grad for t in leaves(m, x)]
