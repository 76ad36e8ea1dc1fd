"""Times fused norms, forward and backward, beside torch's sequence of operators, the same compiled, and a copy, in turn.

Nothing is timed before its results match the sequence in float64: at most twice the error of torch's own sequence in this
dtype, and one unit in the last place. `x torch` is the time of the sequence over ours; `x in place` is that of the sequence as
models write it, with its sums and relus in place; `saved` is what autograd keeps between the passes, beside parameters, in
copies of x. Device times on a GPU are of replayed CUDA graphs with a cold L2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from run import DTYPES, MODES, machine, number, publish
from timing import GraphClock, device_in_turn, in_turn, keep_freed_memory, ratio, spread

import fastnorm
from fastnorm import reference

EPS = 1e-5


@dataclass(frozen=True)
class Fused:
    """`ours`, `torchs` and `in_place` take x, the tensors of x's shape in `beside`, weight and bias."""

    name: str
    shape: tuple[int, ...]
    ours: Callable
    torchs: Callable
    in_place: Callable | None = None
    beside: int = 0
    parameter: tuple[int, ...] | None = None  # the shape of weight and of bias, where it is another than (N,) or (C,)
    layout: str = "dense"
    truth: Callable | None = None  # `torchs` where that draws random numbers: with what ours draws

    def __str__(self):
        return f"{self.name} {'x'.join(map(str, self.shape))}{'' if self.layout == 'dense' else f' {self.layout}'}"

    @property
    def rows(self) -> bool:
        return "LN" in self.name.removesuffix("LN2d") or "RMS" in self.name

    @property
    def parameters(self) -> tuple[int, ...]:
        return self.parameter or ((self.shape[-1],) if self.rows else (self.shape[1],))


def _layer_norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def _batch_norm(x, w, b):
    return F.batch_norm(x, None, None, w, b, True, 0.1, EPS)


def _sum_and_layer_norm(x, r, w, b):
    h = x + r
    return _layer_norm(h, w, b), h


def _sum_and_rms_norm(x, r, w, b):
    h = x + r
    return F.rms_norm(h, x.shape[-1:], w, EPS), h


def _ours(activation, x, *rest):
    residual, w, b = (None, *rest) if len(rest) == 2 else rest
    extras = {"activation": activation, "residual": residual}
    if w.numel() == x.shape[-1] and x.dim() < 4:
        return fastnorm.layer_norm(x, x.shape[-1:], w, b, EPS, **extras)
    return fastnorm.batch_norm(x, None, None, w, b, True, 0.1, EPS, **extras)


def _rows(shape):
    yield Fused("LN+gelu", shape, partial(_ours, "gelu"), lambda x, w, b: F.gelu(_layer_norm(x, w, b)))
    yield Fused(
        "add+LN",
        shape,
        lambda x, r, w, b: fastnorm.add_layer_norm(x, r, x.shape[-1:], w, b, EPS),
        _sum_and_layer_norm,
        beside=1,
    )
    yield Fused(
        "RMS",
        shape,
        lambda x, w, b: fastnorm.rms_norm(x, x.shape[-1:], w, EPS),
        lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, EPS),
    )
    yield Fused(
        "add+RMS", shape, lambda x, r, w, b: fastnorm.add_rms_norm(x, r, x.shape[-1:], w, EPS), _sum_and_rms_norm, beside=1
    )


def _channels(shape, layout="dense"):
    relu = partial(F.relu, inplace=True)
    yield Fused(
        "BN+relu",
        shape,
        partial(_ours, "relu"),
        lambda x, w, b: F.relu(_batch_norm(x, w, b)),
        lambda x, w, b: relu(_batch_norm(x, w, b)),
        layout=layout,
    )
    yield Fused(
        "BN+add+relu",
        shape,
        partial(_ours, "relu"),
        lambda x, r, w, b: F.relu(_batch_norm(x, w, b) + r),
        lambda x, r, w, b: relu(_batch_norm(x, w, b).add_(r)),
        beside=1,
        layout=layout,
    )
    yield Fused("BN+silu", shape, partial(_ours, "silu"), lambda x, w, b: F.silu(_batch_norm(x, w, b)), layout=layout)


def _modulated(shape):
    yield Fused(
        "LN*(1+s)+t",
        shape,
        lambda x, s, t: fastnorm.modulated_layer_norm(x, x.shape[-1:], s, t, eps=EPS),
        lambda x, s, t: _layer_norm(x, None, None) * (1 + s) + t,
        parameter=(shape[0], 1, shape[-1]),
    )


def _groups(shape):
    yield Fused(
        "GN",
        shape,
        lambda x, w, b: fastnorm.group_norm(x, 32, w, b, EPS),
        lambda x, w, b: F.group_norm(x, 32, w, b, EPS),
    )
    yield Fused(
        "GN+silu",
        shape,
        lambda x, w, b: fastnorm.group_norm(x, 32, w, b, EPS, activation="silu"),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, EPS)),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, EPS), inplace=True),
    )


def _channels_first(shape):
    yield Fused(
        "LN2d",
        shape,
        lambda x, w, b: fastnorm.channels_first_layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w, b, EPS).permute(0, 3, 1, 2).contiguous(),
        lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w, b, EPS).permute(0, 3, 1, 2),
    )


def _counting(x):
    """Padding: of the samples the first L / B positions, 2 L / B, and so on."""
    B, _, L = x.shape
    return torch.arange(L, device=x.device) * B < torch.arange(1, B + 1, device=x.device).unsqueeze(1) * L


def _masked_in_operators(x, w, b):
    counts, xf = _counting(x).unsqueeze(1), x.float() if x.element_size() == 2 else x
    n = counts.sum()
    mean = (xf * counts).sum((0, 2), keepdim=True) / n
    var = ((xf - mean) * counts).square().sum((0, 2), keepdim=True) / n
    return ((xf - mean) * torch.rsqrt(var + EPS) * w.view(-1, 1) + b.view(-1, 1)).to(x.dtype)


def _masked_rows_in_operators(x, w, b):
    """Each row (b, c) of a (B, C, L) by itself."""
    counts, xf = _counting(x).unsqueeze(1), x.float() if x.element_size() == 2 else x
    n = counts.sum(-1, keepdim=True)
    mean = (xf * counts).sum(-1, keepdim=True) / n
    var = ((xf - mean) * counts).square().sum(-1, keepdim=True) / n
    return ((xf - mean) * torch.rsqrt(var + EPS) * w + b).to(x.dtype)


def _masked(shape):
    yield Fused(
        "BN masked",
        shape,
        lambda x, w, b: fastnorm.batch_norm(x, None, None, w, b, True, 0.1, EPS, mask=_counting(x)),
        _masked_in_operators,
    )
    yield Fused(
        "LN masked",
        shape,
        lambda x, w, b: fastnorm.layer_norm(x, x.shape[-1:], w, b, EPS, mask=_counting(x).unsqueeze(1)),
        _masked_rows_in_operators,
    )


DROPPED = 0.1


def _dropped_as_ours(x, r, w, b):
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=x.device)
    return _sum_and_layer_norm(x * reference.kept(x.numel(), DROPPED, seed).view(x.shape) / (1 - DROPPED), r, w, b)


def _branches(shape):
    norm = lambda x, r, w, b, **extras: fastnorm.add_layer_norm(x, r, x.shape[-1:], w, b, EPS, **extras)
    yield Fused(
        "drop+add+LN",
        shape,
        lambda *tensors: norm(*tensors, dropout=DROPPED),
        lambda x, *others: _sum_and_layer_norm(F.dropout(x, DROPPED), *others),
        beside=1,
        truth=_dropped_as_ours,
    )
    yield Fused(
        "scale+add+LN",
        shape,
        lambda x, r, w, b: norm(x, r, w, b, layer_scale=w),
        lambda x, r, w, b: _sum_and_layer_norm(x * w, r, w, b),
        beside=1,
    )


def _reshaped(shape):
    yield Fused(
        "IN",
        shape,
        lambda x, w, b: fastnorm.instance_norm(x, None, None, w, b, True, 0.1, EPS),
        lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.1, EPS),
    )


FUSED = (
    *(row for shape in ((1024, 768), (8192, 1024), (4096, 4096)) for row in _rows(shape)),
    *(row for shape in ((16, 64, 56, 56), (64, 256, 14, 14), (64, 512, 7, 7)) for row in _channels(shape)),
    *_channels((16, 64, 56, 56), "channels_last"),
    *_reshaped((8, 128, 32, 32)),
    *(row for shape in ((8, 256, 1152), (2, 1024, 3072)) for row in _modulated(shape)),
    *(row for shape in ((4, 320, 64, 64), (4, 1280, 16, 16)) for row in _groups(shape)),
    *(row for shape in ((8, 96, 56, 56), (8, 384, 14, 14), (8, 768, 7, 7)) for row in _channels_first(shape)),
    *(row for shape in ((32, 256, 512), (16, 64, 3136)) for row in _masked(shape)),
    *(row for shape in ((8192, 1024),) for row in _branches(shape)),
)


def make(row: Fused, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, those beside it, weight, bias: leaves, with float32 parameters beside half inputs of channels"""
    torch.manual_seed(0)
    parameter = torch.float32 if row.name.startswith("BN") and dtype != torch.float64 else dtype
    tensors = [torch.randn(row.shape, device=device).to(dtype) for _ in range(1 + row.beside)]
    if row.layout == "channels_last":
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    return [
        t.requires_grad_() for t in (*tensors, *(torch.randn(row.parameters, device=device).to(parameter) for _ in range(2)))
    ]


def results(function, inputs, gradients):
    """Outputs and gradients; random numbers begin anew."""
    torch.manual_seed(0)
    y = function(*inputs)
    y = y if isinstance(y, tuple) else (y,)
    grads = torch.autograd.grad(y, inputs, gradients[: len(y)], allow_unused=True)
    return [t.detach() for t in (*y, *grads) if t is not None]


def disagreement(row, inputs, gradients) -> str | None:
    wide = [t.detach().double().requires_grad_() for t in inputs]
    torchs = row.truth or row.torchs
    truth = results(torchs, wide, [g.double() for g in gradients])
    ours, torchs = (results(f, inputs, gradients) for f in (row.ours, torchs))
    for i, (a, b, t) in enumerate(zip(ours, torchs, truth, strict=True)):
        error, allowed = ((r.double() - t).abs().max().item() for r in (a, b))
        allowed = 2 * allowed + torch.finfo(a.dtype).eps * t.abs().max().item()
        if not error <= allowed:
            return f"result {i} is off by {error:.2g}, {allowed:.2g} is allowed"
    return None


def saved(function, inputs) -> float:
    """Bytes that autograd keeps of a call, in copies of x; the inputs themselves are among them, parameters are not."""
    known, kept = {t.data_ptr() for t in inputs[-2:]}, {}

    def pack(t):
        if t.data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = function(*inputs)
    del alive
    return sum(kept.values()) / inputs[0].untyped_storage().nbytes()


def functions(row, mode, inputs, gradients, peers) -> dict[str, Callable]:
    source = inputs[0].detach()
    if mode == "forward":
        calls = {name: partial(f, *inputs) for name, f in peers.items()}
    else:

        def run(f):
            y = f(*inputs)
            y = y if isinstance(y, tuple) else (y,)
            options = {"retain_graph": True, "allow_unused": True}
            return lambda: torch.autograd.grad(y, inputs, gradients[: len(y)], **options)

        calls = {name: run(f) for name, f in peers.items()}
    return {**calls, "copy": lambda: torch.empty_like(source).copy_(source)}


def measure(row: Fused, dtype: str, mode: str, args) -> dict:
    inputs = make(row, DTYPES[dtype], args.device)
    gradients = [torch.randn_like(inputs[0]) for _ in range(2)]
    about = {
        "job": f"{row} {dtype} {mode}",
        "op": row.name,
        "shape": row.shape,
        "layout": row.layout,
        "dtype": dtype,
        "mode": mode,
    }
    if reason := disagreement(row, inputs, gradients):
        return {**about, "refused": reason}
    peers = {"fastnorm": row.ours, "torch": row.torchs}
    if row.in_place:
        peers["in place"] = row.in_place
    if args.compile:
        torch._dynamo.reset()
        peers["compile"] = torch.compile(row.torchs, dynamic=False)
    clock = GraphClock() if args.device.startswith("cuda") else None
    if clock:
        with clock.stream():
            times = device_in_turn(functions(row, mode, inputs, gradients, peers), args.rounds, clock)["cold"]
    else:
        times = in_turn(functions(row, mode, inputs, gradients, peers), args.rounds, args.seconds, args.threads)
    return {
        **about,
        "us": median(times["fastnorm"]),
        "copies": ratio(times, "fastnorm", "copy"),
        "spread": spread(times["fastnorm"]),
        **{f"x {name}": ratio(times, name, "fastnorm") for name in times if name not in ("fastnorm", "copy")},
        "saved": [saved(f, inputs) for f in (row.ours, row.torchs)],
    }


HEAD = ["fused norm", "dtype", "mode", "us", "copies", "x torch", "x in place", "x compile", "saved", "torch saved", "+-"]


def line(row: dict) -> list[str]:
    head = [str(Fused(row["op"], row["shape"], None, None, layout=row["layout"])), row["dtype"], row["mode"]]
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", *[""] * (len(HEAD) - 4)]
    others = [f"{row[key]:.2f}" if key in row else "" for key in ("x torch", "x in place", "x compile")]
    return [
        *head,
        f"{row['us']:.1f}",
        f"{row['copies']:.2f}",
        *others,
        *(f"{n:.2f}" for n in row["saved"]),
        f"{row['spread']:.0%}",
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    p.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--filter", default="", metavar="TEXT", help="only rows whose description has TEXT in it, see --list")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--compile", action="store_true", help="beside torch.compile of the sequence, too (tens of seconds a row)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=number(int), default=torch.get_num_threads(), help="default: all that torch uses")
    p.add_argument("--rounds", type=number(int), default=9, help="measurements of each in turn (default: 9)")
    p.add_argument("--seconds", type=number(float), default=0.01, help="length of one measurement (default: 0.01)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures and the machine as JSON, too")
    return p


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    jobs = [(row, dtype, mode) for row in FUSED for dtype in args.dtype for mode in args.mode]
    jobs = [job for job in jobs if args.filter in " ".join(map(str, job))]
    if not jobs:
        p.error(f"no row has {args.filter!r} in its description; --list shows them all")
    if args.list:
        print("\n".join(" ".join(map(str, job)) for job in jobs))
        return 0
    torch.set_num_threads(args.threads)
    about = {**machine(args), "freed memory": keep_freed_memory()}
    rows = []
    for job in jobs:
        rows.append(measure(*job, args))
        print(*line(rows[-1]), file=sys.stderr, flush=True)  # what is measured is not lost where the rest is not waited for
    return publish(about, [HEAD, *map(line, rows)], rows, args.json)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
