"""The bound of every numerics test: torch.nn's own error in the same dtype, and one unit in the last place."""

from functools import cache

import emulator
import torch
import torch.nn.functional as F
from oracle import batch_norm, error, layer_norm, ulp
from torch._prims_common import suggest_memory_format

DRAWS = 8


def emulated(backend, device):
    """Kernels of a GPU are at work on the CPU, in Triton's interpreter or in the emulator."""
    return (backend.__name__ == "fastnorm.kernels" and device == "cpu") or emulator.in_force


def effort(backend, device):
    """gradcheck's: every element where calls are cheap, else a few calls in random directions. The graph is the same one."""
    return {"fast_mode": emulated(backend, device)}


def accumulate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradients(function, x, dy, weight, bias):
    """y and the gradients of whatever is there, by name."""
    inputs = {"dx": x, "dweight": weight, "dbias": bias}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    y = function(*(inputs.get(name) for name in ("dx", "dweight", "dbias")))
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))}


def size(truth, name):
    """The size at which the result called `name` is rounded."""
    largest = abs(getattr(truth, name)).max(initial=0)
    return max(largest, truth.dx_terms) if name == "dx" else largest


def scale(truth, name):
    """What the error of the result called `name` grows with, from draw to draw."""
    return max(size(truth, name), getattr(truth, f"{name}_terms", 0), 1e-300)


class Rows:
    """Layer norm of a case."""

    make = staticmethod(lambda case, device="cpu", draw=0: case.make_rows(device, draw))

    @staticmethod
    def call(function, case):
        return lambda x, w, b: function(x, case.normalized_shape, w, b, case.eps)

    torch = F.layer_norm

    @staticmethod
    def truth(case, x, dy, weight, bias):
        return layer_norm(x, case.normalized_shape, weight, bias, case.eps, dy)


class Training:
    """Batch norm of a case, on its own statistics."""

    make = staticmethod(lambda case, device="cpu", draw=0: case.make_channels(device, draw))
    running = staticmethod(lambda case, device, dtype: (None, None))

    @classmethod
    def call(cls, function, case):
        def run(x, w, b):
            # torch wants the statistics of a float input in the dtype of that input.
            dtype = x.dtype if function is F.batch_norm and x.dtype in (torch.float32, torch.float64) else case.weight
            return function(x, *cls.running(case, x.device, dtype), w, b, cls is Training, 0.1, case.eps)

        return run

    torch = F.batch_norm

    @classmethod
    def truth(cls, case, x, dy, weight, bias):
        return batch_norm(x, weight, bias, case.eps, dy, *cls.running(case, x.device, case.weight))


class Evaluation(Training):
    """Batch norm of a case, on running statistics."""

    running = staticmethod(
        lambda case, device, dtype: (
            case.running(device, case.weight)
            if dtype is case.weight
            else tuple(t.to(dtype) for t in case.running(device, case.weight))
        )
    )


def torch_results(kind, case, x, dy, weight, bias):
    """torch.nn's: in this dtype where torch takes the call, else the float32 (float64) results rounded once.

    torch 2.11 on a GPU does not differentiate a batch norm that has a bias and no weight, in any dtype: a weight of ones is
    the same norm.
    """
    run = kind.call(kind.torch, case)
    try:
        return gradients(run, x, dy, weight, bias)
    except RuntimeError:
        wider = accumulate(case.dtype)
        ones = torch.ones_like(bias) if weight is None and bias is not None else weight
        out = gradients(run, *(None if t is None else t.to(wider) for t in (x, dy, ones, bias)))
        given = {"y": x, "dx": x, "dweight": weight, "dbias": bias}
        return {name: out[name].to(t.dtype) for name, t in given.items() if t is not None}


def laid_out_as(t, peer, x):
    """Whether y or dx of channels has x's memory format, and the strides that torch gives it on the CPU.

    On a GPU each of torch's kernels has layouts of its own, so the peer's are not asked for there.
    """
    formatted = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride() if t.shape == x.shape else (1,)
    return t.stride() == formatted and (t.device.type != "cpu" or t.stride() == peer.stride())


def written_out(kind, case, x, dy, weight, bias):
    """The norm in plain torch operators, in the accumulate dtype, differentiated by autograd."""
    axes = tuple(range(x.dim() - case.dims, x.dim())) if kind is Rows else (0, *range(2, x.dim()))
    shape = case.normalized_shape if kind is Rows else (1, -1, *[1] * (x.dim() - 2))

    def run(x, w, b):
        wide = x.to(accumulate(x.dtype))
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        if kind is Evaluation:
            mean, var = (t.to(wide.dtype).view(shape) for t in case.running(x.device, case.weight))
        y = (wide - mean) * torch.rsqrt(var + case.eps)
        y = y if w is None else y * w.view(shape)
        return (y if b is None else y + b.view(shape)).to(x.dtype)

    return gradients(run, x, dy, weight, bias)


@cache
def torch_errors(kind, case, device, emulated):
    """torch's own error for every result of a case, relative to its scale.

    Over a handful of results the error of one draw is luck, so this is the largest of several draws. A GPU kernel that is
    `emulated` on the CPU adds in float32, as torch's CUDA kernels do, where torch's CPU kernels add in float64: its peer is
    the norm in plain torch operators as well.
    """
    worst = {}
    for draw in range(DRAWS):
        inputs = kind.make(case, device, draw)
        truth = kind.truth(case, *inputs)
        for peer in (torch_results, written_out) if emulated else (torch_results,):
            for name, t in peer(kind, case, *inputs).items():
                relative = error(t, getattr(truth, name)) / scale(truth, name)
                worst[name] = max(worst.get(name, 0), relative)
    return worst


def assert_no_worse(kind, case, name, ours, truth, backend):
    """Our error is at most torch.nn's own error in this dtype and one ulp, of the result's dtype or what it was summed in."""
    expected = getattr(truth, name)
    theirs = torch_errors(kind, case, ours.device.type, emulated(backend, ours.device.type))[name] * scale(truth, name)
    one = max(ulp(ours.dtype, abs(expected).max()), ulp(accumulate(case.dtype), size(truth, name)))
    got = error(ours.view(expected.shape), expected)
    assert got <= theirs + one, f"{name}: error {got:.3g}, torch.nn's {theirs:.3g} + one ulp {one:.3g}"


def assert_same_sums(one, other, x, words):
    """Equal; on a GPU but for the order of sums: each of their x.numel() / one.numel() terms, of a size about 1, is rounded
    elsewhere."""
    unordered = torch.finfo(torch.float32).eps * (x.numel() / one.numel()) ** 0.5 if one.device.type == "cuda" else 0
    message = lambda found: f"{words}: {found}"
    torch.testing.assert_close(one, other, rtol=1e-6, atol=max(1e-6, unordered), msg=message)


def statistics(truth, x):
    """The backend contract's mean (high, low) and rstd, from the truth."""
    mean = torch.from_numpy(truth.mean.astype("float64"))
    high = mean.to(accumulate(x.dtype))
    low = (mean - high.double()).to(high.dtype)
    rstd = torch.from_numpy(truth.rstd.astype("float64")).to(high.dtype)
    return torch.stack((high, low)).to(x.device), rstd.to(x.device)


def parameter_dtypes(*parameters):
    return (None if p is None else p.dtype for p in parameters)
