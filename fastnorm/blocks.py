"""Norms of a transformer's block: of the sum of a branch and the stream, and with a scale and a shift for each sample.

`fastnorm.functional` has them as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import branch, fused
from .activations import Activation


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    dropout: float = 0.0,
    row_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The pre-norm of a transformer's block: the branch's output is added to the stream, and the sum is normalised.

    Equivalent to: ``h = dropout(input) * row_scale * layer_scale + residual; y = activation(layer_norm(h, normalized_shape,
    weight, bias, eps)); return y, h``

    .. math:: h = \mathrm{dropout}(x) \cdot \mathrm{row\_scale} \cdot \mathrm{layer\_scale} + \mathrm{residual},
              \quad y = \mathrm{activation}((h - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias})

    The gradient of h is added in the kernel of the backward pass. Only h is saved for it; with a layer_scale input as well.
    What dropout keeps is not saved, but computed again from a seed, which torch's generator of input's device gives.

    Args:
        input: the branch's output, ``(*, *normalized_shape)``, float64, float32, bfloat16 or float16.
        residual: the stream, of input's shape and dtype, or float32 beside a half input with ``residual_in_fp32``.
        normalized_shape, weight, bias, eps, activation: as `functional.layer_norm`'s.
        dropout: the probability with which an element of input is zeroed; the others are divided by ``1 - dropout``.
        row_scale: one factor for each sample or row (drop path), of the shape of input's first dimensions, with or without
            ones after them.
        layer_scale: one factor for each column, ``normalized_shape`` (Touvron et al., 2021).
        residual_in_fp32: h is float32 where input is a half type, and y has input's dtype.

    Returns:
        ``(y, h)``, contiguous, of input's shape and dtype, or h in float32.

    Raises:
        RuntimeError, TypeError: torch's own, with torch's message, for shapes, devices and types that do not fit.
        ValueError: there is no such activation; `dropout` is no probability; `row_scale` does not fit.

    >>> add_layer_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 5.0]]), (2,))
    (tensor([[-1.0000,  1.0000]]), tensor([[3., 7.]]))
    """
    if dropout or residual_in_fp32 or row_scale is not None or layer_scale is not None:
        options = (True, dropout, row_scale, layer_scale, residual_in_fp32)
        return branch.rows(input, residual, normalized_shape, weight, bias, eps, activation, *options)
    return fused.rows(input, residual, normalized_shape, weight, bias, eps, activation, None)


def modulated_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
) -> Tensor:
    r"""Adaptive layer normalization (Peebles and Xie, 2022, "Scalable Diffusion Models with Transformers"): a scale and a shift
    for each sample, made by the condition.

    Equivalent to: ``activation(layer_norm(input, normalized_shape, weight, bias, eps) * (1 + scale) + shift)``

    .. math:: y = ((x - \mathrm{mean}) \cdot \mathrm{rstd} \cdot \mathrm{weight} + \mathrm{bias})
              \cdot (1 + \mathrm{scale}) + \mathrm{shift}, \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{var} + \mathrm{eps}}

    One pass over input, forward and backward; the gradients of scale and shift are sums over a sample's rows. ``1 + scale`` is
    not rounded to a half type on the way, as torch's sequence does.

    Args:
        input: ``(B, *, *normalized_shape)``, float64, float32, bfloat16 or float16.
        normalized_shape, weight, bias, eps, activation: as `functional.layer_norm`'s.
        scale, shift: ``(B, 1, ..., 1, *normalized_shape)``, of as many dimensions as input. Shapes that broadcast otherwise are
            left to torch.

    Returns:
        A contiguous tensor of input's shape and dtype; what torch's operators make of it where they serve.

    Raises:
        RuntimeError, TypeError: torch's own, with torch's message, for shapes, devices and types that do not fit.
        ValueError: there is no such activation.

    >>> scale, shift = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 10.0]])
    >>> modulated_layer_norm(torch.tensor([[3.0, 7.0]]), (2,), scale, shift)
    tensor([[-2.0000, 12.0000]])
    """
    return fused.modulated_rows(input, normalized_shape, scale, shift, weight, bias, eps, activation)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation | None = None,
    dropout: float = 0.0,
    row_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""`add_layer_norm` with RMSNorm, whose arguments, results and errors it has, but for the bias.

    Equivalent to: ``h = dropout(input) * row_scale * layer_scale + residual; y = activation(rms_norm(h, normalized_shape,
    weight, eps)); return y, h``

    .. math:: y = \mathrm{activation}(h \cdot \mathrm{rstd} \cdot \mathrm{weight}),
              \quad \mathrm{rstd} = 1 / \sqrt{\mathrm{mean}(h^2) + \mathrm{eps}}

    >>> add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), (2,))
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    eps = fused.rms_eps(input, eps)
    if dropout or residual_in_fp32 or row_scale is not None or layer_scale is not None:
        options = (False, dropout, row_scale, layer_scale, residual_in_fp32)
        return branch.rows(input, residual, normalized_shape, weight, None, eps, activation, *options)
    return fused.rows(input, residual, normalized_shape, weight, None, eps, activation, None, centre=False)
