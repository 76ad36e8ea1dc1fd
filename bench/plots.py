"""Every picture of the benchmarks; the only place that imports matplotlib."""

from __future__ import annotations

from pathlib import Path

COLORS = {"none": "0.45", "batch": "tab:blue", "layer": "tab:orange", "both": "tab:green"}


PEERS = {"fastnorm": "tab:blue", "torch": "black", "compile": "tab:orange", "max-autotune": "tab:red"}


def _figure(panels: int, rows: int = 1, height: float = 4.8):
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no display
    from matplotlib import pyplot

    return pyplot.subplots(rows, panels, figsize=(5.2 * panels, height * rows), layout="constrained", squeeze=False)


def _save(figure, path: Path):
    figure.savefig(path, dpi=130)
    figure.clear()


def training(path: Path, title: str, curves: list[dict], accuracy: dict[str, list[tuple]], limit: float):
    """Loss curves of fastnorm over those of its twin, their difference, and accuracy against batch size.

    Args:
        curves: one per network: norm, batch_size, epoch_loss and twin_epoch_loss (mean training loss of each epoch),
            difference (relative, of each step); the twin's and the difference are None where there is no norm.
        accuracy: norm -> (batch_size, mean, std), by growing batch size.
        limit: the largest difference that is allowed, drawn as a line.
    """
    figure, ((losses, differences, accuracies),) = _figure(3)
    figure.suptitle(title)
    smallest = min(c["batch_size"] for c in curves)
    largest = max(c["batch_size"] for c in curves)
    for c in curves:
        mixed = smallest != largest
        dash = "--" if mixed and c["batch_size"] == smallest else "-"
        label = f"{c['norm']}, batch of {c['batch_size']}" if mixed else c["norm"]
        color, epochs = COLORS[c["norm"]], range(1, len(c["epoch_loss"]) + 1)
        losses.plot(epochs, c["epoch_loss"], dash, color=color, label=label, alpha=0.4, linewidth=4)
        if c["difference"] is None:
            continue
        losses.plot(epochs, c["twin_epoch_loss"], ":", color="black", linewidth=1.2)
        share = [(i + 1) / len(c["difference"]) * len(epochs) for i in range(len(c["difference"]))]
        differences.plot(share, _largest_so_far(c["difference"]), dash, color=color)
    losses.plot([], [], ":", color="black", linewidth=1.2, label="its torch.nn twin")
    _finish(losses, "training loss, mean of an epoch", "epoch", "loss")
    differences.axhline(limit, color="tab:red", linewidth=1)
    above = {"transform": differences.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    differences.text(0.99, limit * 1.2, f"allowed: {limit:.0e}", color="tab:red", fontsize=9, **above)
    differences.set_yscale("log")
    _finish(differences, "relative difference to the twin, largest so far", "epoch", "|loss - twin's| / twin's")
    _accuracy_panel(accuracies, accuracy)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8, handlelength=5)
    for axes in (losses, differences):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def copies(path: Path, title: str, panels: dict[str, dict[str, dict[str, dict[str, float]]]]):
    """Device time in copies of x, one line of points for each norm; a row of panels for each dtype, a panel for each mode.

    Args:
        panels: dtype -> mode -> by whom -> norm -> copies.
    """
    every = [points for modes in panels.values() for by in modes.values() for points in by.values()]
    norms = list(dict.fromkeys(norm for points in every for norm in points))
    figure, grid = _figure(2, len(panels), height=1.2 + 0.22 * len(norms))
    figure.suptitle(title)
    for row, (dtype, modes) in zip(grid, panels.items(), strict=True):
        for axes, (mode, by) in zip(row, modes.items(), strict=True):
            for name, points in by.items():
                at = [norms.index(norm) for norm in points]
                axes.plot(list(points.values()), at, "o", color=PEERS.get(name), label=name, markersize=4)
            axes.set_xscale("log", subs=())
            axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_yticks(range(len(norms)), norms, fontsize=7)
            axes.invert_yaxis()
            _finish(axes, f"{dtype} {mode}", "device time from a cold L2, in copies of x", "")
    named = {name: handle for axes in grid.flat for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower left", ncols=8, fontsize=8)
    _save(figure, path)


def _accuracy_panel(axes, accuracy):
    sizes = sorted({point[0] for points in accuracy.values() for point in points})
    for i, (norm, points) in enumerate(accuracy.items()):
        shift = 0.07 * (i - (len(accuracy) - 1) / 2)  # so that the bars of the spread do not hide each other
        x = [sizes.index(size) + shift for size, _, _ in points]
        means, stds = [p[1] for p in points], [p[2] for p in points]
        axes.errorbar(x, means, stds, fmt="o-", color=COLORS[norm], label=norm, capsize=3)
    axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    axes.legend(fontsize=8)
    _finish(axes, "validation accuracy, mean and spread over seeds", "batch size", "accuracy")


def _largest_so_far(values):
    """A running maximum; nothing is drawn before the first value above 0, which a logarithmic axis cannot show."""
    result, largest = [], 0.0
    for v in values:
        largest = max(largest, v)
        result.append(largest or float("nan"))
    return result


def _finish(axes, title, xlabel, ylabel):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
