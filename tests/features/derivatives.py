"""Reverse mode: first and higher derivatives, subsets, gradients of any form, what is saved, autograd's modes."""

import weakref
from functools import partial

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import get_gradient_edge

from . import F64, always, beyond, cotangent, emulated, every, feature, gradients, leaves, no_column, without


@feature(others=every)
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
    _name = "gradients of " + ("".join(n for i, n in enumerate("xwb") if _i >> i & 1) or "nothing")
    feature(name=_name, others=every if _i in (0, 1, 6) else no_column)(partial(_subset, _i))


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


@feature(F64, heavy=True, others=every)
def first_derivative(m, x):
    return gradcheck(_pure(m), leaves(m, x), **_effort(x))


@feature(F64, heavy=True, others=every)
def double_backward(m, x):
    return gradgradcheck(_pure(m), leaves(m, x), **_effort(x))


@beyond(heavy=True, others=every)
def third_derivative(column, device):
    """torch.nn's is silently wrong: its second backward takes the saved statistics as constants."""
    m, _ = column.twins(device, F64)
    x = column.input(device, F64)[:3].detach().requires_grad_()
    _, *parameters = leaves(m, x)

    def gradient(x):
        return torch.autograd.grad(_pure(m)(x, *parameters).exp().sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, x, fast_mode=True)


@feature(others=every)
def gradient_penalty(m, x):
    """As WGAN-GP trains, in float32."""
    (dx,) = torch.autograd.grad(m(x).tanh().sum(), x, create_graph=True)
    (dx.norm() - 1).square().backward()
    return x.grad, m.weight.grad


@feature(others=every)
def expanded_gradient(m, x):
    y = m(x)
    return gradients(m, x, y, cotangent(y)[:1, :1].expand(y.shape), retain_graph=True), gradients(m, x, y.sum(), torch.ones(()))


@feature(others=every)
def strided_gradient(m, x):
    y = m(x)
    dy = cotangent(y)
    transposed = dy.transpose(0, 1).contiguous().transpose(0, 1)
    second = torch.stack((dy, dy + 1), -1)[..., 0]
    return [gradients(m, x, y, d, retain_graph=True) for d in (transposed, second, dy.flip(0).flip(0))]


@feature(others=without("GroupNorm"))
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


@feature(others=every)
def retained_graph(m, x):
    y = m(x)
    first, second = gradients(m, x, y, retain_graph=True), gradients(m, x, y)
    return first, [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@feature(refused=always, others=every)
def backward_twice(m, x):
    y = m(x)
    gradients(m, x, y), gradients(m, x, y)


@feature(others=every)
def accumulated_gradients(m, x):
    for scale in (1, 2):
        y = m(x * scale)
        y.backward(cotangent(y), inputs=leaves(m, x))
    return [t.grad for t in leaves(m, x)]


@feature(others=every)
def gradient_edge(m, x):
    y = m(x)
    dy, edge = cotangent(y), get_gradient_edge(y)
    return torch.autograd.grad(edge, leaves(m, x), dy)


@feature(heavy=True, others=every)
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


@beyond(others=every)
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


@feature(others=without("BatchNorm1d-ghosts"))
def mutation_of_saved_allowed(m, x):
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        inner = x * 1
        y = m(inner)
        inner.add_(1)
        return gradients(m, x, y)


@feature(others=without("BatchNorm1d-masked", "BatchNorm1d-ghosts"))
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


@feature(others=every)
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


@feature(others=every)
def no_grad(m, x):
    with torch.no_grad():
        y = m(x)
    return y, y.requires_grad


@feature(others=every)
def inference_mode(m, x):
    with torch.inference_mode():
        y = m(x)
    return y.is_inference(), y.clone()


@feature(others=every)
def frozen_parameters(m, x):
    m.requires_grad_(False)
    y = m(x)
    constant = m(x.detach())
    return constant, constant.requires_grad, torch.autograd.grad(y, x, cotangent(y))


@feature(others=every)
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


@feature(others=every)
def not_a_number(m, x):
    with torch.no_grad():
        x.view(-1)[0] = torch.nan
        x.view(-1)[-1] = torch.inf
    y = m(x)
    return y, gradients(m, x, y)
