"""torch.func, forward mode and torch.autograd.functional."""

from functools import partial

import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from . import EMULATED_HEAVY, F32, F64, cotangent, every, feature, gradients, updates, without


def tangent(t):
    return cotangent(t).flip(0)


def values(m):
    """Parameters and buffers without a graph."""
    return {name: p.detach() for name, p in m.named_parameters()}, {name: b.clone() for name, b in m.named_buffers()}


def pure(m):
    """x, parameters -> y, with copies of the buffers: the running statistics of a training step are forgotten."""

    def function(x, parameters):
        return functional_call(m, (parameters, {name: b.clone() for name, b in m.named_buffers()}), (x,))

    return function


def without_statistics(m):
    return torch.func.replace_all_batch_norm_modules_(m) if m.training else m


# ---------------------------------------------------------------- forward mode


@feature(others=every)
def dual_numbers(m, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), tangent(x))
        m.weight.requires_grad_(False)
        y = forward_ad.unpack_dual(m(dual))
        return y.primal.detach(), y.tangent.detach(), y.tangent.requires_grad


@feature(others=every)
def dual_parameters(m, x):
    parameters, _ = values(m)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangent(p)) for name, p in parameters.items()}
        return forward_ad.unpack_dual(pure(m)(x.detach(), duals)).tangent


@feature(others=every)
def jvp_of_all(m, x):
    parameters, _ = values(m)
    tangents = {name: tangent(p) for name, p in parameters.items()}
    return jvp(pure(m), (x.detach(), parameters), (tangent(x), tangents))


@feature(F64, heavy=True, others=every)
def forward_over_reverse(m, x):
    parameters, _ = values(m)
    value = lambda x: pure(m)(x, parameters).exp().sum()
    return jvp(grad(value), (x.detach(),), (tangent(x),))


@feature(F64, heavy=True, others=every)
def reverse_over_forward(m, x):
    parameters, _ = values(m)
    return grad(lambda x: jvp(lambda x: pure(m)(x, parameters).exp().sum(), (x,), (tangent(x),))[1])(x.detach())


@feature(heavy=True, columns=lambda column: column.name in EMULATED_HEAVY)
def linearized(m, x):
    y, push = linearize(lambda x: pure(m)(x, values(m)[0]), x.detach())
    return y, push(tangent(x))


# ---------------------------------------------------------------- reverse mode


@feature(others=every)
def functional_call_with_others(m, x):
    """Other parameters and buffers than the module's own; the buffers given are the ones updated."""
    parameters, buffers = values(m)
    y = functional_call(m, ({name: p * 2 for name, p in parameters.items()}, buffers), (x,))
    return y, torch.autograd.grad(y, x, cotangent(y)), buffers


@feature(others=every)
def grad_of_parameters(m, x):
    return grad(lambda parameters: pure(m)(x.detach(), parameters).square().sum())(values(m)[0])


@feature(others=every)
def vjp_of_all(m, x):
    y, pull = vjp(pure(m), x.detach(), values(m)[0])
    return y, pull(cotangent(y))


@feature(F64, heavy=True, others=every)
def jacobians(m, x):
    parameters, _ = values(m)
    return [of(pure(m), argnums=(0, 1))(x.detach(), parameters) for of in (jacrev, jacfwd)]


@feature(F64, heavy=True, others=every)
def hessians(m, x):
    parameters, _ = values(m)
    return hessian(lambda x, p: pure(m)(x, p).exp().sum(), argnums=(0, 1))(x.detach()[:2], parameters)


@feature(F64, others=every)
def grad_beside_autograd(m, x):
    """A functorch gradient that ordinary autograd differentiates again."""
    dx = grad(lambda x: pure(m)(x, dict(m.named_parameters())).exp().sum())(x)
    return dx, gradients(m, x, dx, allow_unused=True)[:2]


# ---------------------------------------------------------------- vmap


def batch(x, n=2):
    return torch.stack([x.detach() * (i + 1) + i for i in range(n)])


@feature(refused=updates, others=without("InstanceNorm2d", "BatchNorm1d-masked", "BatchNorm1d-ghosts"))
def vmap_over_inputs(m, x):
    """Training with running statistics that are not batched raises."""
    return vmap(m)(batch(x)), vmap(m, in_dims=1, out_dims=1)(batch(x).movedim(0, 1))


@feature(others=without("InstanceNorm2d"))
def vmap_without_statistics(m, x):
    return vmap(without_statistics(m))(batch(x))


@feature(others=without("InstanceNorm2d"))
def vmap_of_the_module_under_grad(m, x):
    y = vmap(without_statistics(m))(batch(x).requires_grad_())
    return torch.autograd.grad(y, list(m.parameters()), cotangent(y))


@feature()
def ensemble(m, x):
    """Two modules as one, with a batch of parameters and, in training, a batch of running statistics."""
    other, _ = values(m)
    second = type(m)(*_arguments(m), device=x.device).train(m.training)
    second.load_state_dict({**m.state_dict(), **{name: p * 3 for name, p in other.items()}})
    parameters, buffers = stack_module_state([m, second])
    call = lambda parameters, buffers, x: functional_call(m, (parameters, buffers), (x,))
    y = vmap(call)(parameters, buffers, batch(x))
    return y, torch.autograd.grad(y, list(parameters.values()), cotangent(y)), buffers


def _arguments(m):
    return (m.normalized_shape if isinstance(m, torch.nn.LayerNorm) else m.num_features,)


def _per_sample(strip, m, x):
    m, parameters = (without_statistics(m) if strip else m), values(m)[0]
    loss = lambda parameters, x: functional_call(m, parameters, (x,)).square().sum()
    return vmap(grad(loss), in_dims=(None, 0))(parameters, batch(x, 3))


feature(name="per-sample gradients", refused=updates)(partial(_per_sample, False))
feature(name="per-sample gradients without statistics")(partial(_per_sample, True))


@feature(others=every)
def vmap_of_a_backward(m, x):
    y = m(x)
    pull = lambda dy: gradients(m, x, y, dy, retain_graph=True)
    return [g.contiguous() for g in vmap(pull)(batch(cotangent(y)))]  # how vmap lays out a batch is its own affair


@feature(others=every)
def batched_gradients(m, x):
    y = m(x)
    return gradients(m, x, y, batch(cotangent(y)), is_grads_batched=True)


# ---------------------------------------------------------------- torch.autograd.functional


@feature(F64, heavy=True)
def autograd_functional(m, x):
    of, small = torch.autograd.functional, x.detach()[:2]
    function = lambda x: pure(m)(x, values(m)[0]).exp()
    value = lambda x: function(x).sum()
    return [
        of.jacobian(function, small),
        of.jacobian(function, small, vectorize=True),
        of.jacobian(function, small, vectorize=True, strategy="forward-mode"),
        of.hessian(value, small, vectorize=True),
        of.hessian(value, small, vectorize=True, outer_jacobian_strategy="forward-mode"),
        of.vhp(value, small, tangent(small)),
        of.hvp(value, small, tangent(small)),
        of.jvp(function, small, tangent(small)),
    ]


@feature(F32, heavy=True)
def jacobian_in_float32(m, x):
    return torch.autograd.functional.jacobian(lambda x: pure(m)(x, values(m)[0]), x.detach(), vectorize=True)
