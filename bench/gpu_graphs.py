"""Section `graphs`: norms in CUDA graphs, on a second stream and on a second device give the bits that a plain call gives.

So do those of the backend `native`, which also agree with the other kernels within rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import torch
from gpu_state import Section, script

import fastnorm
from fastnorm import dispatch

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Each kernel once: several rows a program, one row, chunked or split; dense, channels_last, (B, C).
NORMS = {
    "layer_norm 64 x 96": ((64, 96), "layer_norm"),
    "layer_norm 512 x 1024": ((512, 1024), "layer_norm"),
    "layer_norm 16 x 40000": ((16, 40000), "layer_norm"),
    "batch_norm 8 x 24 x 14 x 14": ((8, 24, 14, 14), "batch_norm"),
    "batch_norm 8 x 24 x 14 x 14 channels_last": ((8, 24, 14, 14), "batch_norm"),
    "batch_norm 256 x 48": ((256, 48), "batch_norm"),
}
WAYS = ("graph", "second stream", "second device")
BACKENDS = ("", "native ")  # whichever is chosen, and the CUDA kernels
AGREEMENT = 4  # units in the last place of a result's largest value
RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
BUSY = 50_000_000  # cycles that keep the first stream busy: a kernel that waits for it by mistake, or does not, shows


def make(name: str, dtype: str, device: str, seed: int) -> list[torch.Tensor]:
    """x, dy, weight, bias, running_mean, running_var"""
    shape, op = NORMS[name]
    generator = torch.Generator().manual_seed(seed)
    random = lambda *s: torch.randn(s, generator=generator)
    size = shape[-1] if op == "layer_norm" else shape[1]
    x, dy = (random(*shape).to(device, DTYPES[dtype]) for _ in range(2))
    if "channels_last" in name:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    running = random(size).to(device), random(size).abs().to(device)
    return [x, dy, random(size).to(device), random(size).to(device), *running]


def compute(name: str, x, dy, weight, bias, running_mean, running_var) -> list[torch.Tensor]:
    """Everything a training step gets of a norm; the running statistics are updated in place."""
    shape, op = NORMS[name]
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    if op == "layer_norm":
        y = fastnorm.layer_norm(x, shape[-1:], weight, bias, EPS)
    else:
        y = fastnorm.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy), running_mean, running_var]


def difference(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    """Which results have other bits; NaN is no excuse."""
    bits = lambda t: t.detach().contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32).cpu()
    wrong = [name for name, a, b in zip(RESULTS, ours, expected, strict=True) if not torch.equal(bits(a), bits(b))]
    return f"other bits in {', '.join(wrong)}" if wrong else None


def captured(function: Callable[[], list]) -> Callable[[], list]:
    """A CUDA graph of the function: replays it, and returns the results, which stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def in_a_graph(name, dtype, device, capture) -> str | None:
    """Captured with one input, replayed with another one that is copied into its place."""
    static = make(name, dtype, device, seed=1)
    replay = capture(lambda: compute(name, *static))
    for seed in (2, 3):
        for place, t in zip(static, make(name, dtype, device, seed), strict=True):
            place.copy_(t)
        if wrong := difference(replay(), compute(name, *make(name, dtype, device, seed))):
            return wrong
    return None


def on_a_second_stream(name, dtype, device) -> str | None:
    """The input is written late on that stream: a kernel on another one would read what was there before."""
    real = make(name, dtype, device, seed=2)
    late = [torch.full_like(t, float("nan")) for t in real]
    expected = compute(name, *(t.clone() for t in real))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        for place, t in zip(late, real, strict=True):
            place.copy_(t)
        ours = compute(name, *late)
    stream.synchronize()
    return difference(ours, expected)


def on_a_second_device(name, dtype) -> str | None:
    """Tensors of cuda:1 while cuda:0 is the current device."""
    ours, expected = (compute(name, *make(name, dtype, device, seed=2)) for device in ("cuda:1", "cuda:0"))
    return difference(ours, expected)


def apart(ours: list[torch.Tensor], others: list[torch.Tensor]) -> str | None:
    """Which results of two backends are further from each other than roundings explain."""
    wrong = []
    for name, a, b in zip(RESULTS, ours, others, strict=True):
        ulp = torch.finfo(a.dtype).eps * b.double().abs().max()
        if not (a.double() - b.double()).abs().max() <= AGREEMENT * ulp:
            wrong.append(name)
    return f"apart: {', '.join(wrong)}" if wrong else None


def beside_the_chosen_backend(name, dtype, device) -> str | None:
    ours = compute(name, *make(name, dtype, device, seed=2))
    with fastnorm.use_backend(None):
        return apart(ours, compute(name, *make(name, dtype, device, seed=2)))


def graphs(section: Section, device: str, norms=tuple(NORMS), capture=captured) -> None:
    on_cuda = device == "cuda"
    native = dispatch.BACKENDS[dispatch.NAMES.index("native")].why_not(device)
    absent = {
        "graph": None if on_cuda or capture is not captured else "a CUDA device",
        "second stream": None if on_cuda else "a CUDA device",
        "second device": None if on_cuda and torch.cuda.device_count() > 1 else "a second device",
        "agreement": None,
    }
    run = {
        "graph": lambda name, dtype: in_a_graph(name, dtype, device, capture),
        "second stream": lambda name, dtype: on_a_second_stream(name, dtype, device),
        "second device": on_a_second_device,
        "agreement": lambda name, dtype: beside_the_chosen_backend(name, dtype, device),
    }
    ways = [(backend, way) for backend in BACKENDS for way in (WAYS if not backend else (*WAYS, "agreement"))]
    cells = {f"{b}{way}, {dtype}, {name}": (b, way, name, dtype) for (b, way), dtype, name in product(ways, DTYPES, norms)}

    def measure(row):
        backend, way, name, dtype = cells[row]
        if reason := absent[way] or (backend and native):
            return {"not there": reason}
        try:
            with fastnorm.use_backend(backend.strip() or None):
                wrong = run[way](name, dtype)
        except RuntimeError as e:  # capture refuses what cannot be in a graph
            wrong = str(e).splitlines()[0]
        print(f"{row}: {wrong or 'as it should be'}", flush=True)
        return {"failed": wrong} if wrong else {}

    section.each(cells, measure, least=lambda name: 5.0)


if __name__ == "__main__":
    sys.exit(script(graphs, __doc__))
