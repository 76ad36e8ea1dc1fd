"""Norms with what surrounds them, as torch's sequence of operators has them: the truth in float64, and torch's own errors."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from cases import F32, F64, LAYOUTS, Case
from compare import accumulate

from fastnorm.activations import ACTIVATIONS

DRAWS = 6


@dataclass(frozen=True)
class Fused:
    """A norm of `case`, and what surrounds it."""

    case: Case
    activation: str = "identity"
    alpha: float = 0.3
    residual: str | None = None  # its layout
    addend: bool = False
    centre: bool = True
    training: bool = True
    parts: int = 1  # of weight and bias, each for as many rows
    groups: int = 0

    def __str__(self):
        names = (f"r_{self.residual}" if self.residual else "", "addend" * self.addend, "rms" * (not self.centre))
        names += (f"parts{self.parts}" * (self.parts > 1), f"groups{self.groups}" * (self.groups > 0))
        return "-".join(filter(None, (str(self.case), self.activation, *names, "" if self.training else "eval")))

    def inputs(self, device, draw, rows):
        """x, dy, weight, bias, addend, residual, dh; None where there is none"""
        x, dy, weight, bias = (self.case.make_rows if rows else self.case.make_channels)(device, draw)
        generator = torch.Generator().manual_seed(1000 + draw)
        more = lambda: torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype).to(device)
        addend, residual, dh = more(), more(), more()
        if self.parts > 1:
            each = lambda p: None if p is None else torch.stack([p * (1 + i / 8) for i in range(self.parts)])
            weight, bias = each(weight), each(bias)
        residual = LAYOUTS[self.residual](residual) if self.residual else None
        return x, dy, weight, bias, addend if self.addend else None, residual, dh if self.addend else None


def sequence(kind, fused, dtype, x, weight, bias, addend, residual, nothing):
    """y and h by torch's operators, one after the other, in this dtype; `nothing` is added to z, so that dz is its gradient."""
    cast = lambda t: None if t is None else t.to(dtype)
    h = cast(x) if addend is None else cast(x) + cast(addend)
    if kind != "rows" and weight is None and bias is not None:
        weight = torch.ones_like(bias)  # see compare.torch_results
    if kind == "channels":
        mean, var = (None, None) if fused.training else map(cast, fused.case.running(x.device))
        z = F.batch_norm(h, mean, var, cast(weight), cast(bias), fused.training, 0.1, fused.case.eps)
    elif kind == "groups":
        z = F.group_norm(h, fused.groups, cast(weight), cast(bias), fused.case.eps)
    elif kind == "positions":
        z = F.layer_norm(h.movedim(1, -1), h.shape[1:2], cast(weight), cast(bias), fused.case.eps).movedim(-1, 1)
    elif fused.parts > 1:
        norm = F.layer_norm if fused.centre else F.rms_norm
        x_hat = norm(h, fused.case.normalized_shape, eps=fused.case.eps).view(fused.parts, -1, *fused.case.normalized_shape)
        z = x_hat * cast(weight).unsqueeze(1)
        z = (z if bias is None else z + cast(bias).unsqueeze(1)).view(h.shape)
    elif fused.centre:
        z = F.layer_norm(h, fused.case.normalized_shape, cast(weight), cast(bias), fused.case.eps)
    else:
        z = F.rms_norm(h, fused.case.normalized_shape, cast(weight), fused.case.eps)
        z = z if bias is None else z + cast(bias)
    z = z + nothing if residual is None else z + cast(residual) + nothing
    return ACTIVATIONS[fused.activation].value(z, fused.alpha), None if addend is None else h


def differentiated(kind, fused, dtype, x, dy, weight, bias, addend, residual, dh):
    """y, h, dx, dweight, dbias, dresidual by autograd, as far as they exist, and dz."""
    leaf = lambda t: None if t is None else t.detach().to(dtype).requires_grad_()
    leaves = {"dx": leaf(x), "dweight": leaf(weight), "dbias": leaf(bias), "daddend": leaf(addend), "dresidual": leaf(residual)}
    leaves["dz"] = torch.zeros_like(x, dtype=dtype).requires_grad_()
    y, h = sequence(kind, fused, dtype, *leaves.values())
    outputs, gradients = ([y, h], [dy.to(dtype), dh.to(dtype)]) if h is not None else ([y], [dy.to(dtype)])
    leaves = {name: t for name, t in leaves.items() if t is not None}
    found = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), gradients), strict=True))
    found.pop("daddend", None)
    return {"y": y.detach(), **({} if h is None else {"h": h.detach()}), **found}


def cancelling(kind, fused, h, weight, dz):
    """The largest of what cancels in dx, and is rounded before it does: dz * weight * rstd, as in oracle.py."""
    h, axes = h.double(), tuple(range(h.dim() - fused.case.dims, h.dim()))
    if kind == "channels":
        axes = (0, *range(2, h.dim()))
    if kind != "rows" and weight is not None:
        weight = weight.view(-1, *[1] * (h.dim() - 2))
    if fused.parts == 1:
        g = dz if weight is None else dz * weight.double()
    else:
        g = (dz.view(fused.parts, -1, *weight.shape[1:]) * weight.double().unsqueeze(1)).view(h.shape)
    if kind == "positions":
        axes = (1,)
    if kind == "groups":
        h, g, axes = h.reshape(len(h), fused.groups, -1), g.reshape(len(h), fused.groups, -1), (2,)
    var = h.var(axes, correction=0, keepdim=True) if fused.centre else h.square().mean(axes, keepdim=True)
    if not fused.training:
        var = fused.case.running(h.device)[1].double().view(1, -1, *[1] * (h.dim() - 2))
    return size(g * torch.rsqrt(var + fused.case.eps))


def size(t):
    return max(t.abs().max().item(), 1e-300)


@cache
def torch_errors(kind, fused, device):
    """The largest error of torch's sequence of several draws, relative to the size of each result.

    In float64 it is the truth, which is as rough as what it is to judge: its error is that of float32, so many times smaller.
    """
    dtype, scale, taken = fused.case.dtype, 1.0, lambda t: t
    if dtype == F64:
        dtype, scale = F32, torch.finfo(F64).eps / torch.finfo(F32).eps
        taken = lambda t: None if t is None else t.to(F32)
    worst = {}
    for draw in range(DRAWS):
        inputs = [taken(t) for t in fused.inputs(device, draw, kind == "rows")]
        truth = differentiated(kind, fused, F64, *inputs)
        for name, t in differentiated(kind, fused, dtype, *inputs).items():
            worst[name] = max(worst.get(name, 0), scale * size(t.double() - truth[name]) / size(truth[name]))
    return worst


def check(kind, fused, results, truth, device, terms):
    """Each result is off by at most what torch's is and one unit in the last place; `terms` are those that cancel in dx."""
    errors = torch_errors(kind, fused, device)
    for name, got in results.items():
        expected = truth[name]
        assert got.shape == expected.shape, name
        summed = 2 * torch.finfo(accumulate(fused.case.dtype)).eps * max(size(expected), terms if name == "dx" else 0)
        one = max(torch.finfo(got.dtype).eps * size(expected), summed)
        error, theirs = size(got.double() - expected), errors[name] * size(expected)
        assert error <= theirs + one, f"{name}: error {error:.3g}, torch's {theirs:.3g} + one ulp {one:.3g}"
