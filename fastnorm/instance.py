"""instance_norm as a reshape onto channels: a channel of a sample is a channel.

What a reshape cannot describe without a copy (channels_last), and what the kernels do not cover, goes to torch itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import functional
from .autograd import traced
from .gate import covers
from .reference import accumulate_dtype

# Fewer elements on a CPU are left to torch: its call costs less, up to half as many again (a Zen 4, one thread, both ways
# together). On a GPU the calls have not been timed.
LEAST = 1 << 15


def _is_small(input: Tensor, parameters: Iterable[Tensor | None]) -> bool:
    """And is what torch takes: parameters of its dtype."""
    if type(input) is not torch.Tensor or not input.is_cpu or input.numel() >= LEAST:
        return False
    return all(p is None or (isinstance(p, torch.Tensor) and p.dtype == input.dtype) for p in parameters)


def _serves(input: Tensor, *parameters: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or _is_small(input, parameters):
        return False
    if has_torch_function_variadic(input, *parameters) or traced():
        return False
    fits = covers(input, *parameters) and input.dim() > 2 and input.is_contiguous() and input[0, 0].numel() > 1
    return fits and all(p is None or p.shape == input.shape[1:2] for p in parameters)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Instance normalization (Ulyanov, Vedaldi and Lempitsky, 2016): statistics over the positions of a sample's channel.

    Equivalent to: ``torch.nn.functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats,
    momentum, eps)``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    with the mean and the biased variance of each channel of each sample.

    Args:
        input: ``(B, C, *)``, float64, float32, bfloat16 or float16; one that is not contiguous goes to torch, and so
            does a small one on a CPU with parameters of its dtype.
        running_mean, running_var: ``(C,)`` or None; updated in place with the means over the samples.
        weight, bias: ``(C,)`` or None.
        use_input_stats: False for the running statistics.
        momentum, eps: as `functional.batch_norm`'s.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError, RuntimeError, TypeError: torch's own, with torch's message; running statistics are then unchanged.

    >>> instance_norm(torch.tensor([[[1.0, 3.0], [0.0, 8.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """
    running = (running_mean, running_var)
    fits = _serves(input, *running, weight, bias) and (running_mean is None) == (running_var is None)
    fits = fits and use_input_stats is True and not any(t is not None and t.requires_grad for t in running)
    fits = fits and all(type(number) in (float, int) for number in (momentum, eps)) and eps > 0
    if not fits:
        return F.instance_norm(input, *running, weight, bias, use_input_stats, momentum, eps)
    B, C = input.shape[:2]
    # Wide, because gradients are sums and running statistics means over samples, which are rounded once.
    wide = lambda t: t.to(torch.promote_types(t.dtype, accumulate_dtype(input.dtype)))
    each = lambda t: None if t is None else wide(t).repeat(B)
    mean, var = map(each, running)
    x = input.reshape(1, B * C, *input.shape[2:])
    y = functional.batch_norm(x, mean, var, each(weight), each(bias), True, momentum, eps)
    for t, new in zip(running, (mean, var), strict=True):
        if t is not None and new is not None:
            t.data.copy_(new.view(B, C).mean(0))
    return y.view(input.shape)
