"""Ghost batch norm as a reshape onto channels: a channel of a ghost batch is a channel.

Where no reshape describes that without a copy (channels_last), there is a call for each ghost batch, which reads its samples
where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import activations, functional
from .activations import Activation
from .composite import counted
from .reference import accumulate_dtype, update_running

_is_compiling = torch.compiler.is_compiling


def check(virtual_batch_size: int) -> None:
    """
    Raises:
        ValueError: it is not a positive int.
    """
    if type(virtual_batch_size) is not int or virtual_batch_size < 1:
        raise ValueError(f"virtual_batch_size is a positive int, not {virtual_batch_size!r}")


def shares(B: int, virtual_batch_size: int) -> list[tuple[int, int]]:
    """(q, G) of each share of B samples: G ghost batches of q. There are two shares where sizes differ."""
    if B % virtual_batch_size == 0:
        return [(virtual_batch_size, B // virtual_batch_size)]
    G = max(1, B // virtual_batch_size)
    q, more = divmod(B, G)
    return [(q + 1, more), (q, G - more)] if more else [(q, G)]


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    virtual_batch_size: int,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Ghost batch normalization (Hoffer, Hubara and Soudry, 2017, "Train longer, generalize better"): in training the batch is
    dealt to ghost batches, each of which is normalised with its own statistics.

    Equivalent to: ``torch.nn.functional.batch_norm(input[g::G], ...)`` for each of ``G = B / virtual_batch_size`` ghost
    batches, whose results take the places of its samples; in evaluation to ``torch.nn.functional.batch_norm`` itself

    .. math:: y = (x - \mathrm{mean}_g) \cdot \mathrm{rstd}_g \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd}_g = 1 / \sqrt{\mathrm{var}_g + \mathrm{eps}}

    Sample i belongs to ghost batch ``i % G``, as with TensorFlow's ``virtual_batch_size``, so that a contiguous batch is, as it
    lies, ``virtual_batch_size`` samples of ``G * C`` channels, for one call of the kernels.

    Where B is no multiple, as that of the last batch of an epoch, G is ``B // virtual_batch_size``, at least 1, and the sizes
    of ghost batches differ by at most one: none is smaller than virtual_batch_size, unless the whole batch is. With ``q, more =
    divmod(B, G)``, the first ``more * (q + 1)`` samples are dealt in turn to `more` ghost batches, the others in turn to the
    others.

    The running statistics are updated once, after everything has passed: ``running = (1 - momentum) * running + momentum *
    new`` with the mean over ghost batches of their means, and of their unbiased variances, where each counts by its number of
    samples. So the running mean is that of all samples, and the running variance what a ghost batch has on average. (The paper
    updates once for each ghost batch.)

    Args:
        input: ``(B, C)`` or ``(B, C, *)``, float64, float32, bfloat16 or float16, any strides.
        running_mean, running_var, weight, bias, momentum, eps: as `functional.batch_norm`'s.
        training: False for batch norm with the running statistics.
        virtual_batch_size: samples of a ghost batch; batches of fewer than two times as many are one.
        activation, residual: as `functional.batch_norm`'s.

    Returns:
        A tensor of input's shape, dtype and memory format (contiguous, channels_last or channels_last_3d).

    Raises:
        ValueError: virtual_batch_size is not a positive int, or there is no such activation.
        ValueError, RuntimeError, TypeError: torch's own, with torch's message, also where a ghost batch has one value per
            channel; running statistics are then unchanged.

    >>> x = torch.tensor([[1.0], [10.0], [3.0], [50.0]])  # samples 0 and 2, and samples 1 and 3
    >>> ghost_batch_norm(x, None, None, training=True, virtual_batch_size=2).squeeze(1)
    tensor([-1.0000, -1.0000,  1.0000,  1.0000])
    """
    check(virtual_batch_size)
    tensors, options = (input, running_mean, running_var, weight, bias), (training, momentum, eps)
    extras: dict[str, Any] = {"activation": activation, "residual": residual}
    if not _is_compiling() and has_torch_function_variadic(*tensors, residual):
        extras["virtual_batch_size"] = virtual_batch_size
        return handle_torch_function(ghost_batch_norm, (*tensors, residual), *tensors, *options, **extras)
    if not training:
        return functional.batch_norm(*tensors, *options, **extras)
    return _ghost_batch_norm(*tensors, *options, virtual_batch_size, **extras)


def training_batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    virtual_batch_size: int,
    axis: int,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """A step of a module, whose channels are dimension `axis`: counted, and averaged over all with ``momentum=None``."""
    check(virtual_batch_size)
    x = input
    if axis != 1:
        x = _channels_second(input, axis)
        residual = None if residual is None else _channels_second(residual.reshape(input.shape), axis)
    counter, momentum = (tracked, 0.0) if momentum is None else (None, momentum)
    options = (True, momentum, eps, virtual_batch_size, activation, residual, counter)
    y = counted(tracked, _ghost_batch_norm, x, mean, var, weight, bias, *options)
    return y if axis == 1 else _channels_back(y, axis, input.shape)


def _channels_second(t: Tensor, axis: int) -> Tensor:
    """A view (B, C, *) of t, whose samples are dimension 0, or 1 where the channels are 0."""
    axis = range(t.dim())[axis]
    if axis == 0:
        return t.movedim(1, 0)
    B, C, before, after = t.shape[0], t.shape[axis], prod(t.shape[1:axis]), prod(t.shape[axis + 1 :])
    # Where the channels are last, four dimensions, which can be channels_last.
    return t.reshape(B, before, C).mT.unsqueeze(2) if after == 1 else t.reshape(B, before, C, after).movedim(2, 1)


def _channels_back(y: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """The inverse, dense."""
    axis = range(len(shape))[axis]
    if axis == 0:
        y = y.movedim(0, 1)
    else:
        y = y.squeeze(2).mT if prod(shape[axis + 1 :]) == 1 else y.movedim(1, 2)
    return y.contiguous().view(shape)


def _ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    n: int,
    activation: Activation | None,
    residual: Tensor | None,
    counter: Tensor | None = None,
) -> Tensor:
    """y of a step of training; the momentum is the reciprocal of the counter where there is one."""
    tensors, options = (input, running_mean, running_var, weight, bias), (training, momentum, eps)
    if _is_plain(*tensors, n, counter):
        return functional.batch_norm(*tensors, *options, activation=activation, residual=residual)
    if n == 1 and prod(input.shape[2:]) == 1:
        return functional.batch_norm(input[:1], *tensors[1:], *options)  # torch refuses a batch of one value
    if residual is not None and not _is_like(residual, input):
        end, alpha = activations.parse(activation)
        _ = input + residual  # what the sum refuses it refuses before the running statistics are updated
        z = _ghost_batch_norm(*tensors, *options, n, None, None, counter)
        return activations.ACTIVATIONS[end].value(z + residual, alpha)

    def norm(
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        extras: dict[str, Any] = {"activation": activation, "residual": residual}
        return functional.batch_norm(x, mean, var, weight, bias, training, 1.0, eps, **extras)

    (B, C), acc = input.shape[:2], accumulate_dtype(input.dtype)
    # Wide, because gradients are sums and running statistics means over ghost batches, which are rounded once.
    parameters = [p if p is None else (p if p.dim() == 1 else p.reshape(C)).to(acc) for p in (weight, bias)]
    running = [t for t in (running_mean, running_var) if t is not None]
    sizes = shares(B, n)
    cut = lambda t: [t] * len(sizes) if t is None or len(sizes) == 1 else t.split([q * G for q, G in sizes])
    ys, new = [], []
    for (q, G), x, r in zip(sizes, cut(input), cut(residual), strict=True):
        batch = [t.new_zeros(G, C, dtype=torch.promote_types(acc, t.dtype)) for t in running]
        ys.append(_share(x, r, q, G, batch or (None, None), parameters, norm))
        new.append([b.mean(0) if len(sizes) == 1 else b.mean(0) * (q * G / B) for b in batch])
    for t, *values in zip(running, *new, strict=True):
        wide = accumulate_dtype(t.dtype)
        update_running(t, sum(values[1:], values[0]).to(wide), momentum if counter is None else 1 / counter.to(wide))
    return _laid_out_as(input, ys[0] if len(ys) == 1 else torch.cat(ys))


def _is_plain(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    counter: Tensor | None,
) -> bool:
    """Whether it is batch norm: of one ghost batch, of nothing, or what torch has an exception for."""
    running, given = (running_mean, running_var), [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not all(isinstance(t, torch.Tensor) for t in (x, *given)) or x.dim() < 2 or any(t.numel() != x.shape[1] for t in given):
        return True
    if (running_mean is None) != (running_var is None) or any(t is not None and t.requires_grad for t in running):
        return True
    return x.numel() == 0 or (counter is None and x.shape[0] < 2 * n)


def _is_like(residual: Tensor, x: Tensor) -> bool:
    return isinstance(residual, torch.Tensor) and residual.shape == x.shape and residual.device == x.device


def _is_channels_last(x: Tensor) -> bool:
    return suggest_memory_format(x) is not torch.contiguous_format


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format. vmap does not know `contiguous(memory_format=torch.channels_last)`."""
    if y.stride() == x.stride():
        return y
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if _is_channels_last(x) else y.contiguous()


def _share(
    x: Tensor,
    residual: Tensor | None,
    q: int,
    G: int,
    batch: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    norm: Callable[..., Tensor],
) -> Tensor:
    """y of G ghost batches of q samples; their statistics go to `batch`, (G, C) both or None."""
    C = x.shape[1]
    if G == 1 or C == 1 or x.stride(0) == C * x.stride(1) or _is_compiling():  # a compiler looks after copies by itself
        reshaped = lambda t: None if t is None else t.reshape(q, -1, *t.shape[2:])
        flat = [None if b is None else b.view(-1) for b in batch]
        each = [None if p is None else p.expand(G, C).reshape(-1) for p in parameters]
        return norm(reshaped(x), *flat, *each, reshaped(residual)).reshape(x.shape)
    # Moved before it is cut and joined, so that y and the gradient of x are dense as x is.
    last = _is_channels_last(x)
    moved = lambda t, *to: t.movedim(*to) if last else t
    dealt = lambda t: [moved(s, -1, 1) for s in moved(t, 1, -1).unflatten(0, (q, G)).unbind(1)]
    xs, residuals = ([None] * G if t is None else dealt(t) for t in (x, residual))
    means, variances = ([None] * G if b is None else b.unbind(0) for b in batch)
    calls = zip(xs, means, variances, residuals, strict=True)
    ys = [norm(s, mean, var, *parameters, r) for s, mean, var, r in calls]
    return moved(torch.stack([moved(y, 1, -1) for y in ys], 1).flatten(0, 1), -1, 1)
