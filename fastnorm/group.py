"""group_norm: one call of a backend, or torch's own function and then the activation."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import activations, autograd
from .activations import Activation
from .autograd import traced
from .dispatch import DTYPES, select
from .gate import autocasts, covers, needs_grad, savable

# Fewer elements in all, and fewer positions of a channel, are left to torch: its call costs less. Without an activation there
# is less to gain: with 256 and 1024 positions torch's backward was faster on a CPU (Zen 3, one thread), with 3136 ours.
LEAST, LEAST_POSITIONS, LEAST_PLAIN_POSITIONS = 1 << 14, 16, 2048


def _is_small(input: Tensor, plain: bool) -> bool:
    return input.numel() < LEAST or input.shape[2:].numel() < (LEAST_PLAIN_POSITIONS if plain else LEAST_POSITIONS)


def _backend(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, plain: bool
) -> ModuleType | None:
    """The backend that serves the call; None where torch has to."""
    if torch.compiler.is_compiling() or has_torch_function_variadic(input, weight, bias) or traced():
        return None
    if not covers(input, weight, bias) or input.dim() < 3 or not input.is_contiguous() or not savable(input, weight, bias):
        return None
    if type(num_groups) is not int or num_groups < 1 or input.shape[1] % num_groups or type(eps) not in (float, int) or eps < 0:
        return None
    if any(p is not None and p.shape != input.shape[1:2] for p in (weight, bias)) or autocasts(input):
        return None
    if bias is not None and needs_grad(input, weight, bias) and bias.is_inference():
        return None
    return None if _is_small(input, plain) else select(input.device.type)


def _in_torch(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Torch's own function; what it refuses for its dtypes in the widest of them, rounded once."""
    try:
        return F.group_norm(input, num_groups, weight, bias, eps)
    except RuntimeError:
        given = [t for t in (input, weight, bias) if isinstance(t, Tensor)]
        dtypes = {t.dtype for t in given}
        if len(dtypes) == 1 or not dtypes.issubset(DTYPES):
            raise
        wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
        w, b = (t.to(wide) if isinstance(t, Tensor) else t for t in (weight, bias))
        return F.group_norm(input.to(wide), num_groups, w, b, eps).to(input.dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
) -> Tensor:
    r"""Group normalization (Wu and He, 2018): statistics over the positions of neighbouring channels of a sample.

    Equivalent to: ``activation(torch.nn.functional.group_norm(input, num_groups, weight, bias, eps))``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    with the mean and the biased variance of each group.

    Args:
        input: ``(B, C, *)``, float64, float32, bfloat16 or float16. What is not contiguous, is small, or has few positions
            (fewer than 2048 without an activation) goes to torch.
        num_groups: C is a multiple of it.
        weight, bias: ``(C,)`` or None; their dtypes may differ from input's.
        eps: added to the variance.
        activation: as `functional.layer_norm`'s. Backward computes it anew: only x and the statistics are saved.

    Returns:
        A tensor of input's shape, dtype and, where torch gives it that, memory format.

    Raises:
        ValueError, RuntimeError, TypeError: torch's own, with torch's message; ValueError where there is no such activation.

    >>> group_norm(torch.tensor([[[1.0], [3.0], [5.0], [5.5]]]), 2)
    tensor([[[-1.0000],
             [ 1.0000],
             [-0.9999],
             [ 0.9999]]])
    """
    if activation is None and type(input) is torch.Tensor and not torch.compiler.is_compiling() and _is_small(input, True):
        return _in_torch(input, num_groups, weight, bias, eps)  # which asks everything else by itself
    named, alpha = activations.parse(activation)
    backend = _backend(input, num_groups, weight, bias, eps, named == "identity")
    if backend is None:
        return activations.ACTIVATIONS[named].value(_in_torch(input, num_groups, weight, bias, eps), alpha)
    if needs_grad(input, weight, bias):
        options = autograd.Ended("group", named, alpha, eps, backend, (num_groups,))
        return autograd.ended_norm(input, weight, bias, options)
    return backend.group_fwd(input, weight, bias, named, alpha, eps, num_groups)[0]
