"""Reverse mode with others at work in it: hooks, checkpoints, threads, the compiled engine."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import cotangent, emulated, every, feature, gradients, leaves, updates, without


@feature(others=every)
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


@feature(others=every)
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


@feature(others=every)
def checkpoint_reentrant(m, x):
    y = checkpoint(m, x, use_reentrant=True)
    y.backward(cotangent(y))
    return y, [t.grad for t in leaves(m, x)]


@feature(others=every)
def checkpoint_not_reentrant(m, x):
    y = checkpoint(lambda x: m(x.sigmoid()).sin(), x, use_reentrant=False)
    return y, gradients(m, x, y)


@feature(others=without("BatchNorm1d-ghosts"))
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


@feature(others=every)
def backward_on_another_thread(m, x):
    y = m(x)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(gradients, m, x, y).result()


@feature(others=every)
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
