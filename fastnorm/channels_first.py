"""Layer norm over the channels of (B, C, *): one call of a backend where the channels come first in memory, else rows, which
are a view where the channels come last and a copy where they do not."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import activations, autograd, functional
from .activations import Activation
from .autograd import traced
from .dispatch import select
from .gate import autocasts, covers, needs_grad

# Fewer elements in all, and fewer positions of a channel, are rows of a copy: their calls cost less.
LEAST, LEAST_POSITIONS = 1 << 15, 16


def pays(input: Tensor, backend: ModuleType, differentiable: bool) -> bool:
    """Whether a backend's kernels take less time than rows of a copy: on a GPU where it says so, after it has been timed."""
    if input.device.type == "cpu":
        return True
    of_gpu = getattr(backend, "position_pays", None)
    return of_gpu is not None and of_gpu(input, differentiable)


def _backend(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> ModuleType | None:
    """The backend whose kernels take the call; None where it goes another way."""
    if torch.compiler.is_compiling() or input.numel() < LEAST or input.shape[2:].numel() < LEAST_POSITIONS:
        return None
    if has_torch_function_variadic(input, weight, bias) or traced():
        return None
    if not covers(input, weight, bias) or input.dim() < 3 or not input.is_contiguous() or autocasts(input):
        return None
    if type(eps) not in (float, int) or any(p is not None and p.shape != input.shape[1:2] for p in (weight, bias)):
        return None
    differentiable = needs_grad(input, weight, bias)
    if differentiable and any(p is not None and p.is_inference() for p in (input, weight, bias)):
        return None  # cannot be saved for backward, as torch will say
    backend = select(input.device.type)
    return backend if backend is not None and pays(input, backend, differentiable) else None


def channels_first_layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
) -> Tensor:
    r"""Layer normalization (Ba, Kiros and Hinton, 2016) over dim 1: ConvNeXt's, which others write with two permutes.

    Equivalent to: ``activation(torch.nn.functional.layer_norm(input.movedim(1, -1), input.shape[1:2], weight, bias,
    eps).movedim(-1, 1))``

    .. math:: y = (x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias},
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    with the mean and the biased variance of the channels of each position. Nothing is permuted: contiguous inputs are read and
    written as they lie, and so are those in channels_last. Rows of a permuted copy are small inputs and, on a GPU, those of
    more channels than a program's registers hold: in training 512 of 16 bits or 1024 of float32, else twice as many, and half
    as many where the number of positions is odd.

    Args:
        input: ``(B, C, *)`` or ``(B, C)``, float64, float32, bfloat16 or float16, any strides.
        weight, bias: ``(C,)`` or None; their dtypes may differ from input's.
        eps: added to the variance.
        activation: as `functional.layer_norm`'s. Backward computes it anew: only x and the statistics are saved.

    Returns:
        A tensor of input's shape and dtype, contiguous where nothing is permuted, else with the channels last in memory;
        float32 under CUDA autocast, as `functional.layer_norm`'s.

    Raises:
        RuntimeError, TypeError: torch's own, with torch's message, for shapes, devices and types that do not fit.
        ValueError: there is no such activation, or input has no dim 1.

    >>> channels_first_layer_norm(torch.tensor([[[1.0, 5.0], [3.0, 3.0]]]))
    tensor([[[-1.0000,  1.0000],
             [ 1.0000, -1.0000]]])
    """
    if input.dim() < 2:
        raise ValueError(f"expected an input of two or more dimensions, (B, C, *), got {tuple(input.shape)}")
    named, alpha = activations.parse(activation)
    backend = _backend(input, weight, bias, eps)
    if backend is None:
        rows = input.movedim(1, -1).contiguous()
        return functional.layer_norm(rows, input.shape[1:2], weight, bias, eps, activation=activation).movedim(-1, 1)
    if needs_grad(input, weight, bias):
        return autograd.ended_norm(input, weight, bias, autograd.Ended("position", named, alpha, eps, backend))
    return backend.position_fwd(input, weight, bias, named, alpha, eps)[0]
