"""Trains small networks with fastnorm beside their torch.nn twins: which norm, for which batch size, and where.

A run is an ordinary training loop. Its twin has torch.nn's norms, starts from the same weights, sees the same batches in the
same order and has its own optimizer. The table shows the largest relative difference of the two loss curves, over all steps.

Where that is above the limit, two more figures say why. `same weights` repeats the run and sets the twin back to the
network's weights before every second step, so that nothing but a forward, a backward and an update lies between. `nudged` is
torch.nn against torch.nn with every initial weight moved by one unit in the last place: what rounding alone does to such a run.
A batch norm of two samples, say, gives +1 and -1 whatever their distance: its gradient is all but zero, and rounding decides
which sign a sample gets.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
import train_report
from tasks import ACTIVATIONS, NORMS, PLACEMENTS, TASKS, Choice, Split

import fastnorm

LIMIT = 1e-4  # on the relative difference of two loss curves in float32
NUDGES = 8  # attempts to find out whether rounding alone moves a run beyond LIMIT
BATCH_SIZES = (2, 8, 32, 256)
AXES = {
    "task": tuple(TASKS),
    "norm": NORMS,
    "batch_size": BATCH_SIZES,
    "placement": PLACEMENTS,
    "activation": tuple(ACTIVATIONS),
}
USUAL = {"task": ("diabetes",), "norm": NORMS, "batch_size": (32,), "placement": ("before",), "activation": ("relu",)}
# The default: each axis by itself. The digits go with tanh: they have many more activations than a table, some of which lie so
# close to relu's kink that rounding decides the side, and then hardly a run is reproducible to the last digits.
SAMPLE = (
    {"batch_size": BATCH_SIZES},
    {"placement": PLACEMENTS},
    {"activation": AXES["activation"]},
    {"task": ("cancer",)},
    {"task": ("images", "sequences"), "activation": ("tanh",)},
)
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    task: str
    norm: str
    batch_size: int
    placement: str
    activation: str

    def but(self, **changed) -> Cell:
        """The cell with some axes changed; without a norm there is nothing to place, so both placements are one cell."""
        values = {**asdict(self), **changed}
        return Cell(**values | {"placement": "-"} if values["norm"] == "none" else values)


@dataclass(frozen=True)
class Run:
    cell: Cell
    seed: int
    epochs: int
    lr: float
    device: str


@dataclass
class Result:
    """Losses of every step; what concerns the twin is None where there is no norm, and no twin."""

    run: Run
    losses: list[float]
    accuracy: float
    twin_losses: list[float] | None = None
    twin_accuracy: float | None = None
    difference: float | None = None
    same_weights: float | None = None  # these two only where the difference is above LIMIT
    nudged: float | None = None


# ---------------------------------------------------------------- training


def train_step(network, optimizer, task, x, y):
    loss = task.loss(network(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches(split, batch_size, epochs, seed):
    """Shuffled anew each epoch; the last batch of an epoch is dropped if it is not full."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(split.train_x), generator=generator).to(split.train_x.device)
        for i in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[i : i + batch_size]
            yield split.train_x[rows], split.train_y[rows]


@lru_cache(maxsize=8)
def load(task_name, seed, device):
    return Split(*(t.to(device) for t in TASKS[task_name].load(seed)))


def build(run: Run, norms):
    """The network and its optimizer; Adam's learning rate grows with the square root of the batch size, as is usual."""
    cell = run.cell
    torch.manual_seed(run.seed)
    network = TASKS[cell.task].network(norms, Choice(cell.norm, cell.placement, cell.activation)).to(run.device)
    lr = run.lr * math.sqrt(cell.batch_size / 32)
    return network, torch.optim.Adam(network.parameters(), lr=lr, fused=True)


def train(run: Run, networks: list, restart: bool = False):
    """Trains (network, optimizer) pairs side by side on the same batches; returns the losses (networks, steps), float64.

    With `restart`, the others take over the weights and the optimizer of the first before every second step.
    """
    task, split = TASKS[run.cell.task], load(run.cell.task, run.seed, run.device)
    losses = []
    for step, (x, y) in enumerate(batches(split, run.cell.batch_size, run.epochs, run.seed)):
        if restart and step % 2 == 0:
            restart_from(networks[0], networks[1:])
        losses.append(torch.stack([train_step(network, optimizer, task, x, y) for network, optimizer in networks]))
    return torch.stack(losses, 1).double().cpu()


def restart_from(first, others):
    tensors = lambda network, optimizer: [
        *network.state_dict().values(),
        *(t for state in optimizer.state.values() for t in state.values()),
    ]
    for other in others:
        for mine, theirs in zip(tensors(*other), tensors(*first), strict=True):
            mine.copy_(theirs)


def nudge(network, seed):
    """Moves every weight by one unit in the last place, up or down."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            up = torch.rand(p.shape, generator=generator).to(p.device) < 0.5
            p.copy_(torch.nextafter(p, torch.where(up, math.inf, -math.inf)))


def twins(run: Run, norms, twin_norms):
    network, optimizer = build(run, norms)
    twin, twin_optimizer = build(run, twin_norms)
    twin.load_state_dict(network.state_dict())
    return [(network, optimizer), (twin, twin_optimizer)]


def relative_difference(losses):
    """Of the second curve against the first one's, at every step."""
    return (losses[0] - losses[1]).abs() / losses[1].abs().clamp_min(1e-12)


def nudged_difference(run: Run) -> float:
    """The largest difference of torch.nn against torch.nn with nudged weights; stops at the first one above LIMIT."""
    largest = 0.0
    for seed in range(NUDGES):
        pair = twins(run, torch.nn, torch.nn)
        nudge(pair[0][0], seed)
        largest = max(largest, relative_difference(train(run, pair)).max().item())
        if largest > LIMIT:
            break
    return largest


@torch.no_grad()
def accuracy(run: Run, network) -> float:
    split = load(run.cell.task, run.seed, run.device)
    return TASKS[run.cell.task].accuracy(network.eval()(split.val_x), split.val_y)


def execute(run: Run) -> Result:
    if run.cell.norm == "none":
        pair = [build(run, fastnorm)]
        losses = train(run, pair)
        return Result(run, losses[0].tolist(), accuracy(run, pair[0][0]))
    pair = twins(run, fastnorm, torch.nn)
    losses = train(run, pair)
    ours, theirs = (accuracy(run, network) for network, _ in pair)
    result = Result(run, losses[0].tolist(), ours, losses[1].tolist(), theirs, relative_difference(losses).max().item())
    if not result.difference <= LIMIT:
        restarted = train(run, twins(run, fastnorm, torch.nn), restart=True)
        result.same_weights = relative_difference(restarted).max().item()
        result.nudged = nudged_difference(run)
    return result


# ---------------------------------------------------------------- many runs


def start_worker(backend):
    torch.set_num_threads(1)  # the networks are so small that a second thread costs more than it brings
    if backend is not None:
        fastnorm.use_backend(backend)


def execute_all(runs: list[Run], jobs: int, backend, quiet: bool) -> list[Result]:
    from tqdm import tqdm

    runs = sorted(runs, key=lambda r: r.cell.batch_size)  # the longest first
    bar = lambda results: list(tqdm(results, total=len(runs), unit="run", disable=quiet))
    if jobs == 1:
        start_worker(backend)
        return bar(map(execute, runs))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers: Ctrl-C is for this process alone
    with multiprocessing.get_context("spawn").Pool(jobs, start_worker, (backend,)) as pool:
        signal.signal(signal.SIGINT, handler)
        return bar(pool.imap_unordered(execute, runs))


def cells(chosen: dict, full: bool) -> list[Cell]:
    """The rows: a sample of the grid, or all combinations once an axis is chosen; with `full` an axis not chosen is whole."""
    if full or chosen:
        axes = {**(AXES if full else USUAL), **chosen}
        grid = [Cell(*values) for values in product(*(axes[a] for a in AXES))]
    else:
        each = ({**USUAL, **part} for part in SAMPLE)
        grid = [Cell(*values) for axes in each for values in product(*(axes[a] for a in AXES))]
    return list(dict.fromkeys(c.but() for c in grid))


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence on stderr, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(convert, what):
    """An argparse type that takes positive, finite numbers."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def parser() -> Parser:
    count, rate = number(int, "a whole number above 0"), number(float, "a number above 0")
    p = Parser(
        prog="train.py",
        description="Train small networks with fastnorm beside their torch.nn twins and compare norms.",
        epilog="Without options: a sample of the grid, under two minutes. Once task, norm, batch size, placement or activation "
        "is chosen: all combinations of the choices, with the usual values (diabetes, all norms, 32, before, relu) elsewhere. "
        "The exit status is 1 if a loss curve differs from its twin's and rounding does not explain it.",
    )
    p.add_argument("--full", action="store_true", help="the whole grid (hours): every value of each axis that is not chosen")
    p.add_argument("--task", nargs="+", choices=AXES["task"], help="; ".join(f"{t.name}: {t.what}" for t in TASKS.values()))
    p.add_argument("--norm", nargs="+", choices=NORMS, help="both: a batch norm followed by a layer norm")
    p.add_argument("--batch-size", nargs="+", type=count, metavar="N", help=f"samples per step, the grid has {BATCH_SIZES}")
    p.add_argument("--placement", nargs="+", choices=PLACEMENTS, help="of the norm: before or after the activation")
    p.add_argument("--activation", nargs="+", choices=AXES["activation"], help="of the hidden layers")
    p.add_argument("--seeds", type=count, default=3, metavar="N", help="runs per row, each with its own split (default: 3)")
    usual = ", ".join(f"{t.name} {t.epochs}" for t in TASKS.values())
    p.add_argument("--epochs", type=count, metavar="N", help=f"passes over the training split (default: {usual})")
    p.add_argument("--lr", type=rate, default=1e-3, help="for a batch of 32, else times sqrt(batch size / 32) (default: 1e-3)")
    p.add_argument("--backend", help="fastnorm's backend: triton, native or reference (default: the best one here)")
    p.add_argument("--device", default="cpu", help="where to train, as PyTorch writes it (default: cpu)")
    p.add_argument("--jobs", type=count, metavar="N", help="processes at a time (default: the number of cores)")
    default = Path(__file__).parent / "out" / "train.png"
    p.add_argument("--plot", type=Path, default=default, metavar="PATH", help="the picture (default: bench/out/train.png)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON, too")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def impossible(grid: list[Cell], args) -> str | None:
    """One sentence on what cannot be done, or None."""
    for cell in grid:
        task, samples = TASKS[cell.task], len(load(cell.task, 0, "cpu").train_x)
        if cell.batch_size > samples:
            return f"a batch size of {cell.batch_size} is more than the {samples} training samples of {cell.task}"
        if cell.batch_size == 1 and cell.norm in ("batch", "both") and task.one_value_per_sample:
            return f"batch norm cannot train on {cell.task} with a batch size of 1: it needs more than one value per channel"
    for path in filter(None, (args.plot, args.json)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            return f"cannot create the folder of {path}: {e.strerror}"
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            return f"cannot write to {path}"
    try:
        if args.backend is not None:
            fastnorm.use_backend(args.backend)
        fastnorm.layer_norm(torch.ones(2, 2, device=args.device), (2,))
    except (ValueError, RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        return str(e).splitlines()[0]
    return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv=None) -> int:
    p = parser()
    args = p.parse_args(argv)
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        p.error(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")
    chosen = {axis: tuple(values) for axis in AXES if (values := getattr(args, axis)) is not None}
    grid = cells(chosen, args.full)
    if reason := impossible(grid, args):
        p.error(reason)
    epochs = lambda cell: args.epochs or TASKS[cell.task].epochs
    runs = [Run(c, seed, epochs(c), args.lr, args.device) for c in grid for seed in range(args.seeds)]
    results = execute_all(runs, min(args.jobs or cores(), len(runs)), args.backend, args.quiet)
    rows = train_report.tabulate(grid, results, LIMIT)
    train_report.print_table(rows)
    train_report.print_findings(rows, LIMIT)
    train_report.draw(args.plot, results, rows, LIMIT)
    print(f"\nPicture: {args.plot}")
    if args.json:
        report = {"torch": torch.__version__, "limit": LIMIT, "rows": [r.as_dict() for r in rows]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(r.different for r in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
