"""What `train.py` prints and draws: a table of rows, and the answers that their figures give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

from table import aligned


@dataclass(frozen=True)
class Row:
    """One cell's results over its seeds. What concerns the twin is None where there is no norm, and no twin."""

    cell: object
    accuracies: list[float]
    twin_accuracies: list[float] | None
    difference: float | None  # of the two loss curves: the largest of all steps and seeds
    same_weights: float | None  # the largest, and
    nudged: float | None  # the smallest of the seeds whose difference is above the limit
    verdict: str  # same, chaotic or different

    @property
    def different(self) -> bool:
        return self.verdict == "different"

    def as_dict(self) -> dict:
        """Flat, for JSON."""
        figures = {k: v for k, v in asdict(self).items() if k != "cell"}
        return {**asdict(self.cell), "accuracy": mean(self.accuracies), "spread": spread(self.accuracies), **figures}


def spread(values) -> float:
    """The standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def largest(values: Iterable[float | None]) -> float | None:
    """A NaN counts as larger than any number; None where there is no value."""
    values = [v for v in values if v is not None]
    return max(values, key=lambda v: (v != v, v)) if values else None


def judge(difference, same_weights, nudged, limit) -> str:
    """chaotic: the curves part, yet every step from the same weights agrees, and torch.nn parts from itself as well."""
    if difference is None or difference <= limit:
        return "same"
    return "chaotic" if same_weights <= limit < nudged else "different"


def tabulate(grid, results, limit: float) -> list[Row]:
    rows = []
    for cell in grid:
        mine = sorted((r for r in results if r.run.cell == cell), key=lambda r: r.run.seed)
        twin = None if cell.norm == "none" else [r.twin_accuracy for r in mine]
        nudged = [r.nudged for r in mine if r.nudged is not None]
        figures = largest(r.difference for r in mine), largest(r.same_weights for r in mine), min(nudged, default=None)
        rows.append(Row(cell, [r.accuracy for r in mine], twin, *figures, judge(*figures, limit)))
    return rows


def print_table(rows: list[Row]):
    plus_minus = lambda values: "-" if values is None else f"{mean(values):.3f} +- {spread(values):.3f}"
    figure = lambda value: "-" if value is None else f"{value:.1e}"
    lines = [["task", "norm", "batch", "placement", "activation", "accuracy", "torch.nn's", "curves", "same weights", "nudged"]]
    for r in rows:
        c = r.cell
        lines.append([c.task, c.norm, str(c.batch_size), c.placement, c.activation, plus_minus(r.accuracies)])
        lines[-1] += [plus_minus(r.twin_accuracies), figure(r.difference), figure(r.same_weights), figure(r.nudged)]
    print(aligned(lines))


# ---------------------------------------------------------------- answers


def print_findings(rows: list[Row], limit: float):
    seeds = len(rows[0].accuracies)
    print(f"\nWhat the figures say: validation accuracy, mean +- spread, {seeds} seed{'s' * (seeds > 1)} per row.")
    print("Differences are between runs of the same seed; one is clear where its mean is larger than its spread.")
    sections = (
        ("Does fastnorm train as torch.nn does?", agreement(rows, limit)),
        ("Which norm for which batch size?", best_norms(rows)),
        ("Is a norm before the activation worse than after it?", placements(rows)),
        ("Do tiny batches hurt?", tiny_batches(rows)),
        ("Does mixing both norms hurt?", mixing(rows)),
        ("Other activations?", activations(rows)),
    )
    for question, answers in sections:
        if answers:
            print(f"\n{question}")
            print("\n".join(f"  {answer}" for answer in answers))


def agreement(rows, limit) -> list[str]:
    twins = [r for r in rows if r.difference is not None]
    same, chaotic, different = ([r for r in twins if r.verdict == v] for v in ("same", "chaotic", "different"))
    lines = []
    if same:
        lines.append(f"{len(same)} of {len(twins)} rows have their twin's loss curve: at every step within")
        lines.append(f"{max(r.difference for r in same):.1e} relative, where {limit:.0e} is allowed")
    if chaotic:
        lines.append(f"{len(chaotic)} of {len(twins)} rows part by rounding alone: torch.nn parts from itself, by at least")
        lines.append(
            f"{min(r.nudged for r in chaotic):.1e}, once its initial weights move by one unit in the last place; from the same"
        )
        lines.append(f"weights fastnorm stays within {max(r.same_weights for r in chaotic):.1e} there:")
        lines += [f"  {name(r.cell)}" for r in chaotic]
    return lines + [f"DIFFERENT, and rounding does not explain it: {name(r.cell)}" for r in different]


def best_norms(rows) -> list[str]:
    lines = []
    for (task, size), pools in pooled(rows).items():
        if len(pools) < 2:
            continue
        best, second = sorted(pools, key=lambda norm: -mean(pools[norm]))[:2]
        ahead = [a - b for a, b in zip(pools[best], pools[second], strict=True)]
        lines.append(
            f"{task}, {size}: {best} {mean(pools[best]):.3f} +- {spread(pools[best]):.3f}, before {second} by {verdict(ahead)}"
        )
    return lines


def placements(rows) -> list[str]:
    compared = {norm: differences(rows, "placement", "before", "after", norm=norm) for norm in ("batch", "layer", "both")}
    return [f"{norm}: before - after {verdict(d)}" for norm, d in compared.items() if d]


def tiny_batches(rows) -> list[str]:
    lines = []
    for task in dict.fromkeys(r.cell.task for r in rows):
        sizes = sorted({r.cell.batch_size for r in rows if r.cell.task == task})[:2]
        if len(sizes) == 2:
            norms = dict.fromkeys(r.cell.norm for r in rows)
            compared = {norm: differences(rows, "batch_size", *sizes, task=task, norm=norm) for norm in norms}
            lines += [f"{task}, {norm}: batch size {sizes[0]} - {sizes[1]} {verdict(d)}" for norm, d in compared.items() if d]
    return lines


def mixing(rows) -> list[str]:
    compared = {norm: differences(rows, "norm", "both", norm) for norm in ("batch", "layer")}
    return [f"both - {norm} alone {verdict(d)}" for norm, d in compared.items() if d]


def activations(rows) -> list[str]:
    found, names = {r.cell for r in rows}, list(dict.fromkeys(r.cell.activation for r in rows))
    comparable = [r for r in rows if all(r.cell.but(activation=a) in found for a in names)]
    lines = []
    for activation in names if len(names) > 1 else ():
        compared = {n: differences(comparable, "norm", n, "none", activation=activation) for n in ("batch", "layer", "both")}
        lines += [f"{activation}: {norm} - none {verdict(d)}" for norm, d in compared.items() if d]
    return lines


def name(cell) -> str:
    return ", ".join(map(str, asdict(cell).values()))


def verdict(differences) -> str:
    m, s = mean(differences), spread(differences)
    if len(differences) == 1:
        return f"{m:+.3f} (one run: no spread)"
    return f"{m:+.3f} +- {s:.3f} ({'clear' if abs(m) > s else 'within the spread'})"


def differences(rows, axis, a, b, **fixed) -> list[float]:
    """Accuracy with `a` minus accuracy with `b` on `axis`, seed by seed, over all pairs of rows that are else the same."""
    found, result = {r.cell: r for r in rows}, []
    for r in rows:
        wanted = {**fixed, axis: a}
        other = found.get(r.cell.but(**{axis: b}))
        if other is not None and all(getattr(r.cell, k) == v for k, v in wanted.items()):
            result += [x - y for x, y in zip(r.accuracies, other.accuracies, strict=True)]
    return result


def pooled(rows) -> dict[tuple, dict[str, list[float]]]:
    """(task, batch size) -> norm -> accuracies, over the placements and activations that are there for all of a task's rows."""
    found, result = {r.cell: r for r in rows}, {}
    for task, group in groupby(sorted(rows, key=lambda r: r.cell.task), key=lambda r: r.cell.task):
        cells = [r.cell for r in group]
        norms, sizes = dict.fromkeys(c.norm for c in cells), sorted({c.batch_size for c in cells})
        combinations = dict.fromkeys((c.placement, c.activation) for c in cells if c.norm != "none" or len(norms) == 1)
        at = lambda c, n, size, pa: c.but(norm=n, batch_size=size, placement=pa[0], activation=pa[1])
        whole = [pa for pa in combinations if all(at(cells[0], n, size, pa) in found for n in norms for size in sizes)]
        for size in sizes if whole else ():
            result[task, size] = {n: [a for pa in whole for a in found[at(cells[0], n, size, pa)].accuracies] for n in norms}
    return result


# ---------------------------------------------------------------- picture


def draw(path: Path, results, rows: list[Row], limit: float):
    """The first task, placement and activation: loss curves of its first seed, and accuracy of every batch size."""
    import plots

    first = next((r.cell for r in rows if r.cell.norm != "none"), rows[0].cell)
    shown = [r for r in rows if r.cell == first.but(norm=r.cell.norm, batch_size=r.cell.batch_size)]
    sizes = sorted({r.cell.batch_size for r in shown})
    usual = 32 if 32 in sizes else sizes[-1]
    # All norms at the usual batch size, and those with a twin at the smallest one.
    drawn = [r for r in results if r.run.seed == 0 and r.run.cell in {s.cell for s in shown}]
    drawn = [r for r in drawn if r.run.cell.batch_size in ((usual,) if r.difference is None else (usual, sizes[0]))]
    accuracy = {}
    for r in sorted(shown, key=lambda r: r.cell.batch_size):
        accuracy.setdefault(r.cell.norm, []).append((r.cell.batch_size, mean(r.accuracies), spread(r.accuracies)))
    title = f"{first.task}: norm {first.placement} {first.activation}"
    plots.training(path, title, [curve(r) for r in drawn], accuracy, limit)


def curve(result) -> dict:
    ours, theirs = result.losses, result.twin_losses
    return {
        "norm": result.run.cell.norm,
        "batch_size": result.run.cell.batch_size,
        "epoch_loss": epoch_means(ours, result.run.epochs),
        "twin_epoch_loss": theirs and epoch_means(theirs, result.run.epochs),
        "difference": theirs and [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)],
    }


def epoch_means(losses, epochs) -> list[float]:
    steps = len(losses) // epochs
    return [mean(losses[i : i + steps]) for i in range(0, len(losses), steps)]
