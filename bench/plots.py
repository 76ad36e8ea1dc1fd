"""Every picture of the benchmarks, as PNG and as SVG; the only place that imports matplotlib.

Pictures have no background, and colours that stand out from a white one and from a dark one by a contrast of at least 3. The
same data give the same bytes. A path that ends in .svg has the SVG alone.
"""

from __future__ import annotations

import io
import re
from itertools import product
from math import inf, log10
from pathlib import Path

GREY = "#7a7a7a"
BLUE, VERMILION, GREEN, PURPLE, OCHRE, SKY, OLIVE, RED = (
    "#1f77c4", "#d55e00", "#0a9a6c", "#b86fa0", "#b07d00", "#2f8fd0", "#808000", "#c44e52"
)  # fmt: skip
COLORS = {"none": GREY, "batch": BLUE, "layer": VERMILION, "both": GREEN}
# By whom: colour and marker, so that none is known by its colour alone.
PROVIDERS = {
    "fastnorm": (BLUE, "o"),
    "torch": (GREY, "s"),
    "in place": (OLIVE, "v"),
    "compile": (VERMILION, "^"),
    "max-autotune": (RED, "D"),
    "keras": (PURPLE, "P"),
    "triton": (SKY, "*"),
    "native": (GREEN, "X"),
    "reference": (OCHRE, "p"),
    "liger_kernel": (PURPLE, ">"),
    "flag_gems": (OCHRE, "<"),
    "quack": (OLIVE, "h"),
    "apex": (RED, "d"),
    "flash_attn": (SKY, "H"),
    "inplace_abn": (GREEN, "8"),
}
# Of bars and of pairs of lines: dtypes, and the norms of a block.
SERIES = {"fp32": BLUE, "bf16": VERMILION, "fp16": GREEN, "fp64": PURPLE}
SERIES |= {"torch.nn": GREY, "convert": BLUE, "fused": VERMILION, "recompute": GREEN}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "grid.color": GREY,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # of the same width: the room for words is that of the first
    "font.size": 9,
    "svg.fonttype": "none",  # words stay words: small, to be searched, and in a font that is there
    "svg.hashsalt": "fastnorm",
}


class _Picture:
    """A grid of panels, which is written where the `with` ends."""

    def __init__(self, path: Path, title: str, rows: int, columns: int, size: tuple[float, float]):
        import matplotlib

        self._context = matplotlib.rc_context(STYLE)
        self.path, self.title, self.grid, self.size = path, title, (rows, columns), size

    def __enter__(self):
        from matplotlib.figure import Figure

        self._context.__enter__()
        rows, columns = self.grid
        width, height = self.size[0] * columns, self.size[1] * rows + 0.7
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.figure.suptitle(self.title, fontsize=11)
        self.axes = self.figure.subplots(rows, columns, squeeze=False)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._write()
        finally:
            self._context.__exit__(None, None, None)

    def _write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = io.StringIO()
        undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(written, format="svg", metadata=undated)
        self.path.with_suffix(".svg").write_text(_small(written.getvalue()), encoding="utf-8")
        if self.path.suffix != ".svg":
            self.figure.savefig(self.path.with_suffix(".png"), dpi=130, metadata={"Software": None})

    def cells(self, panels: dict[str, dict[str, dict]]):
        """(axes, row, column, what is drawn there) of panels by row and column."""
        columns = _columns(panels)
        for axes_of_row, (row, by) in zip(self.axes, panels.items(), strict=True):
            for axes, column in zip(axes_of_row, columns, strict=True):
                yield axes, row, column, by.get(column, {})

    def legend(self, columns: int = 8):
        """One for all panels, each name once."""
        every = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in self.axes.flat]
        named = {name: handle for pairs in every for handle, name in pairs}
        if named:
            options = {"ncols": columns, "fontsize": 8, "handlelength": 3}
            self.figure.legend(named.values(), named, loc="outside lower center", **options)


def _columns(panels: dict[str, dict[str, dict]]) -> list[str]:
    return list(dict.fromkeys(column for by in panels.values() for column in by))


def _small(svg: str) -> str:
    """Half of it: hundredths of a point are enough, the marks of a line share its style, and nobody reads the indentation."""
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"\n\s*", "\n", svg)
    rounded = lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip(".")
    svg = re.sub("<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", rounded, tag[0]), svg)  # the words between them stay
    group = r'<g clip-path="([^"]*)">\n((?:<use [^>]* (style="[^"]*")/>\n)(?:<use [^>]* \3/>\n)*)</g>'
    shared = lambda m: f'<g clip-path="{m[1]}" {m[3]}>\n{m[2].replace(" " + m[3], "")}</g>'
    return re.sub(group, shared, svg)


def _provider(name: str) -> dict:
    color, marker = PROVIDERS.get(name, (GREY, "+"))
    first = name == "fastnorm"
    return {"color": color, "marker": marker, "label": name, "markersize": 6 if first else 5, "zorder": 3 if first else 2}


def _finish(axes, title, xlabel, ylabel):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _line_at(axes, x: float | None = None, y: float | None = None):
    draw, at = (axes.axvline, x) if y is None else (axes.axhline, y)
    draw(at, color=GREY, linewidth=1, zorder=1)


def _logarithmic(axes):
    """The x axis: figures as they are, not as powers of ten, and as many as there is room for."""
    axes.set_xscale("log", subs=())
    low, high = axes.get_xlim()
    decades = log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axes.xaxis.get_major_locator().set_params(subs=steps, numticks=12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")


def lines(path: Path, title: str, panels: dict[str, dict[str, dict[str, list[tuple]]]], xlabel: str, ylabel: str):
    """A line for each provider; a row of panels for each key, a panel for each key of that.

    Args:
        panels: row -> column -> provider -> (x, y) by growing x, where x doubles from tick to tick and 1 is the y to reach.
    """
    columns = _columns(panels)
    with _Picture(path, title, len(panels), len(columns), (3.9, 2.9)) as picture:
        for axes, row, column, by in picture.cells(panels):
            for name, points in by.items():
                axes.plot(*zip(*points, strict=True), linewidth=1.4, **_provider(name))
            _line_at(axes, y=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(*_ticks(by))
            axes.tick_params(axis="x", rotation=45)
            axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
            _finish(axes, f"{column} {row}", xlabel, ylabel if column == columns[0] else "")
        picture.legend()


def _ticks(by: dict[str, list[tuple]]) -> tuple[list, list[str]]:
    every = sorted({x for points in by.values() for x, _ in points})
    return every, [f"{x:g}" for x in every]


def dots(path: Path, title: str, panels: dict[str, dict[str, dict[str, dict[str, float]]]], xlabel: str,
         line: float | None = None, log: bool = True):  # fmt: skip
    """A point for each provider and norm, a line of points for each norm; a row of panels for each key, a panel for each
    key of that.

    Args:
        panels: row -> column -> provider -> norm -> x.
        line: an x to compare with.
    """
    columns, norms = _columns(panels), {row: _norms(by) for row, by in panels.items()}
    size = 5.2 if len(columns) < 3 else 10.4 / len(columns), 1.0 + 0.21 * max(map(len, norms.values()))
    with _Picture(path, title, len(panels), len(columns), size) as picture:
        for axes, row, column, by in picture.cells(panels):
            names = norms[row]
            for name, points in by.items():
                axes.plot(list(points.values()), [names.index(norm) for norm in points], linestyle="", **_provider(name))
            if line is not None:
                _line_at(axes, x=line)
            if log:
                _logarithmic(axes)
            else:
                axes.set_xlim(left=0)
            _named(axes, names, column == columns[0], fontsize=7)
            _finish(axes, f"{row} {column}".strip(), xlabel, "")
        picture.legend()


def _named(axes, names: list[str], shown: bool, fontsize: int):
    """The y axis: a name for each place, the first one on top."""
    axes.set_yticks(range(len(names)), names if shown else [""] * len(names), fontsize=fontsize)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _norms(by: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return list(dict.fromkeys(norm for column in by.values() for points in column.values() for norm in points))


def copies(path: Path, title: str, panels: dict[str, dict[str, dict[str, dict[str, float]]]]):
    """Device time in copies of x, one line of points for each norm; a row of panels for each dtype, a panel for each mode.

    Args:
        panels: dtype -> mode -> by whom -> norm -> copies.
    """
    dots(path, title, panels, "device time from a cold L2, in copies of x")


def bars(path: Path, title: str, panels: dict[str, dict[str, dict[str, tuple]]], xlabel: str, log: bool = True):
    """A bar of each series for each name, beside a line at 1, where logarithmic ones begin; one panel for each key.

    Args:
        panels: panel -> name -> series -> (value, least, most); a whisker goes from the least to the most. A series is a
            name of SERIES, and is hatched where a word follows that.
    """
    names = list(dict.fromkeys(name for by in panels.values() for name in by))
    series = list(dict.fromkeys(s for by in panels.values() for row in by.values() for s in row))
    height = 0.9 + len(names) * (0.1 + 0.11 * len(series))
    with _Picture(path, title, 1, len(panels), (5.2, height)) as picture:
        for axes, (panel, by) in zip(picture.axes[0], panels.items(), strict=True):
            for one in series:
                _bars_of(axes, one, _places(names, by, one, 0.8 / len(series)), 0.72 / len(series), 1 if log else 0)
            _line_at(axes, x=1)
            if log:
                _logarithmic(axes)
            _named(axes, names, panel == next(iter(panels)), fontsize=8)
            _finish(axes, panel, xlabel, "")
        picture.legend()


def _places(names, by, series: str, step: float) -> dict[float, tuple]:
    """Where the bars of a series are: those of a name lie round its tick, however many it has."""
    found = {}
    for name, row in by.items():
        if series in row:
            found[names.index(name) + (list(row).index(series) - (len(row) - 1) / 2) * step] = row[series]
    return found


def _bars_of(axes, series: str, values: dict[float, tuple], thickness: float, base: float):
    middle, least, most = zip(*values.values(), strict=True) if values else ((), (), ())
    # A mean of one figure may be off that by a rounding.
    whiskers = [[max(m - a, 0) for m, a in zip(middle, least, strict=True)]]
    whiskers += [[max(b - m, 0) for m, b in zip(middle, most, strict=True)]]
    first, plain = _known(series)
    look = {"edgecolor": SERIES.get(first, GREY), "linewidth": 0.8}
    look |= {"facecolor": SERIES.get(first, GREY)} if plain else {"facecolor": "none", "hatch": "/////"}
    axes.barh(list(values), [m - base for m in middle], thickness, left=base, label=series, **look)
    if any(map(any, whiskers)):
        axes.errorbar(middle, list(values), xerr=whiskers, fmt="none", ecolor=GREY, elinewidth=1, capsize=1.5)


def _known(series: str) -> tuple[str, bool]:
    """The name of SERIES that it begins with, and whether that is all of it."""
    first = next((known for known in SERIES if series == known or series.startswith(f"{known} ")), series)
    return first, first == series


def errors(path: Path, title: str, panels: dict[str, dict[str, dict[str, list[tuple]]]], xlabel: str, ylabel: str):
    """Errors on logarithmic axes: ours drawn through, torch's dashed. What is 0 or not finite has no place there.

    Args:
        panels: panel -> dtype -> "fastnorm" or "torch" -> (x, y).
    """
    with _Picture(path, title, 1, len(panels), (3.9, 3.4)) as picture:
        for axes, (panel, by) in zip(picture.axes[0], panels.items(), strict=True):
            for dtype, name in product(by, ("fastnorm", "torch")):
                shown = [(x, y) for x, y in by[dtype][name] if x > 0 and 0 < y < inf]
                color, ours = SERIES.get(dtype, GREY), name == "fastnorm"
                look = {"linestyle": "-", "marker": "o"} if ours else {"linestyle": "--", "marker": "s"}
                look |= {"color": color, "markerfacecolor": color if ours else "none", "markersize": 4}
                axes.plot([x for x, _ in shown], [y for _, y in shown], label=f"{dtype} {name}", **look)
            axes.set_xscale("log")
            axes.set_yscale("log")
            _finish(axes, panel, xlabel, ylabel if axes is picture.axes[0][0] else "")
        picture.legend(columns=4)


def curves(path: Path, title: str, panels: dict[str, dict[str, list[float]]]):
    """Losses of every step, a small panel for each block; those of torch.nn as a wide line beneath the others.

    Args:
        panels: block -> series, as in `bars` -> losses.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _Picture(path, title, rows, columns, (3.6, 2.4)) as picture:
        for axes, (block, by) in zip(picture.axes.flat, panels.items(), strict=False):
            for i, (series, losses) in enumerate(by.items()):
                plain = {"linewidth": 5} if series == "torch.nn" else {"linewidth": 1.6, "dashes": (3, 1 + i)}
                axes.plot(range(1, len(losses) + 1), losses, color=SERIES.get(_known(series)[0], GREY), label=series, **plain)
            axes.xaxis.get_major_locator().set_params(integer=True)
            _finish(axes, block, "step", "loss")
        for axes in list(picture.axes.flat)[len(panels) :]:
            axes.set_axis_off()
        picture.legend()


def training(path: Path, title: str, curves: list[dict], accuracy: dict[str, list[tuple]], limit: float):
    """Loss curves of fastnorm over those of its twin, their difference, and accuracy against batch size.

    Args:
        curves: one per network: norm, batch_size, epoch_loss and twin_epoch_loss (mean training loss of each epoch),
            difference (relative, of each step); the twin's and the difference are None where there is no norm.
        accuracy: norm -> (batch_size, mean, std), by growing batch size.
        limit: the largest difference that is allowed, drawn as a line.
    """
    with _Picture(path, title, 1, 3, (5.2, 4.3)) as picture:
        losses, differences, accuracies = picture.axes[0]
        smallest = min(c["batch_size"] for c in curves)
        largest = max(c["batch_size"] for c in curves)
        for c in curves:
            mixed = smallest != largest
            dash = "--" if mixed and c["batch_size"] == smallest else "-"
            label = f"{c['norm']}, batch of {c['batch_size']}" if mixed else c["norm"]
            color, epochs = COLORS[c["norm"]], range(1, len(c["epoch_loss"]) + 1)
            losses.plot(epochs, c["epoch_loss"], dash, color=color, label=label, alpha=0.5, linewidth=4)
            if c["difference"] is None:
                continue
            losses.plot(epochs, c["twin_epoch_loss"], ":", color=GREY, linewidth=1.4)
            share = [(i + 1) / len(c["difference"]) * len(epochs) for i in range(len(c["difference"]))]
            differences.plot(share, _largest_so_far(c["difference"]), dash, color=color)
        losses.plot([], [], ":", color=GREY, linewidth=1.4, label="its torch.nn twin")
        _finish(losses, "training loss, mean of an epoch", "epoch", "loss")
        differences.axhline(limit, color=RED, linewidth=1)
        above = {"transform": differences.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        differences.text(0.99, limit * 1.2, f"allowed: {limit:.0e}", color=RED, fontsize=9, **above)
        differences.set_yscale("log")
        _finish(differences, "relative difference to the twin, largest so far", "epoch", "|loss - twin's| / twin's")
        _accuracy_panel(accuracies, accuracy)
        handles = losses.get_legend_handles_labels()
        picture.figure.legend(*handles, loc="outside lower left", ncols=4, fontsize=8, handlelength=5)
        for axes in (losses, differences):
            axes.xaxis.get_major_locator().set_params(integer=True)


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
