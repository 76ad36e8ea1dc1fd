"""What is drawn of a machine's records: which figures go into which picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import geometric_mean

import plots
from record import Record, primary, providers, share, speedup
from shapes import label

BOTH = ("forward", "backward")
MODES = (*BOTH, "both", "eval")
DTYPES = ("fp64", "fp32", "bf16", "fp16")
PLAIN = ("LN", "BN", "RMS", "GN", "IN", "LN2d")  # come first, the others follow by name
SWEEP = "sweep over N"
LEAST = 3  # lengths of a row that make a curve
OURS = ("fastnorm", "triton", "native", "reference")  # all of them fastnorm, whichever backend is forced


@dataclass(frozen=True)
class Drawing:
    name: str
    what: str  # for those who do not see it, too
    draw: Callable[[Path], None]


def own(rows: list[dict]) -> list[dict]:
    """The timed rows that are fastnorm's: a GPU measures it once more beside each peer, which counts once."""
    return [row for row in rows if "us" in row and row.get("provider", "fastnorm") == "fastnorm"]


def norm_of(row: dict) -> str:
    return label(row["op"], row["shape"], row["layout"])


def _first(rows):
    """A provider's figures come from its own row, all others' from fastnorm's."""
    return sorted((row for row in rows if "us" in row), key=lambda row: row.get("provider", "fastnorm") != "fastnorm")


def panels_of(rows: list[dict], key: Callable, figure: Callable, state: Callable = primary) -> dict:
    """dtype -> mode -> provider -> {key of the row: figure}"""
    found: dict = {}
    for row in _first(rows):
        at = state(row)
        panel = found.setdefault(row["dtype"], {}).setdefault(row["mode"], {})
        for name in providers(row, at):
            value = figure(row, at, name)
            if value is not None:
                panel.setdefault(name, {}).setdefault(key(row), value)
    return {dtype: _in_order(found[dtype], MODES) for dtype in DTYPES if dtype in found}


def _in_order(found: dict, keys) -> dict:
    return {key: found[key] for key in keys if key in found}


def over_n(rows: list[dict]) -> dict:
    """mode -> dtype -> provider -> (N, share of a copy's speed), for `plots.lines`."""
    found: dict = {}
    for dtype, modes in panels_of(rows, lambda row: row["shape"][-1], share).items():
        for mode, by in modes.items():
            found.setdefault(mode, {})[dtype] = {name: sorted(points.items()) for name, points in by.items()}
    return _in_order(found, BOTH)


def means(rows: list[dict]) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(op, dtype, mode) -> how many times as fast as torch: the geometric mean over shapes, the least and the most."""
    found: dict = {}
    for row in own(rows):
        ratio = speedup(row, primary(row), "torch")
        if ratio:
            found.setdefault((row["op"], row["dtype"], row["mode"]), []).append(ratio)
    return {key: (geometric_mean(ratios), min(ratios), max(ratios)) for key, ratios in found.items()}


def over_torch(rows: list[dict]) -> dict:
    """mode -> op -> dtype -> mean, least and most, for `plots.bars`."""
    found: dict = {}
    place = lambda op: PLAIN.index(op) if op in PLAIN else len(PLAIN)
    for (op, dtype, mode), figures in sorted(means(rows).items(), key=lambda pair: (place(pair[0][0]), pair[0])):
        found.setdefault(mode, {}).setdefault(op, {})[dtype] = figures
    return {mode: {op: _in_order(by, DTYPES) for op, by in ops.items()} for mode, ops in _in_order(found, BOTH).items()}


def calls(rows: list[dict]) -> dict:
    """ "" -> mode -> provider -> norm and dtype -> microseconds of a call, the host's where a device has its own."""
    host = lambda row: "host" if "host" in row["us"] else primary(row)
    tiny = [row for row in rows if row["tiny"]]
    found: dict = {}
    every = panels_of(tiny, lambda row: f"{norm_of(row)} {row['dtype']}", lambda row, at, name: row["us"][at][name], host)
    for modes in every.values():
        for mode, by in modes.items():
            for name, points in by.items():
                found.setdefault(mode, {}).setdefault(name, {}).update(points)
    return {"": _in_order(found, MODES)} if found else {}


def over_ratio(rows: list[dict]) -> dict:
    """op and layout -> dtype -> who -> (mean / std, error), for `plots.errors`."""
    found: dict = {}
    for row in sorted((row for row in rows if "ratio" in row and row["result"] == "y"), key=lambda row: row["ratio"]):
        panel = row["op"] + ("" if row.get("layout", "dense") == "dense" else f" {row['layout']}")
        by = found.setdefault(panel, {}).setdefault(row["dtype"], {"fastnorm": [], "torch": []})
        by["fastnorm"].append((row["ratio"], row["error"]))
        by["torch"].append((row["ratio"], row["torch_error"]))
    return {panel: _in_order(by, DTYPES) for panel, by in found.items()}


def variant(row: dict) -> str:
    return f"{row['norms']}{' compiled' if row.get('compiled') else ''}"


def beside_torch(rows: list[dict]) -> dict:
    """ "step time" or "peak memory" -> block -> variant -> times torch.nn's, for `plots.bars`."""
    found: dict = {}
    for what, key in (("step time", "step_us"), ("peak memory", "peak")):
        torchs = {block_of(row): row[key] for row in rows if variant(row) == "torch.nn" and row.get(key)}
        for row in rows:
            if row.get(key) and block_of(row) in torchs and variant(row) != "torch.nn":
                ratio = row[key] / torchs[block_of(row)]
                found.setdefault(what, {}).setdefault(block_of(row), {})[variant(row)] = (ratio, ratio, ratio)
    return found


def block_of(row: dict) -> str:
    return f"{row['block']} {row['dtype']}"


def losses(rows: list[dict]) -> dict:
    """block -> variant -> losses, torch.nn's first"""
    found: dict = {}
    for row in sorted((row for row in rows if row.get("loss")), key=lambda row: variant(row) != "torch.nn"):
        found.setdefault(block_of(row), {})[variant(row)] = [v if isfinite(v) else float("nan") for v in row["loss"]]
    return found


def drawings(records: list[Record]) -> list[Drawing]:
    """All that the records of one machine, one of each kind, have figures for."""
    by_kind = {record.kind: record for record in records}
    rows = {kind: by_kind[kind].rows if kind in by_kind else [] for kind in ("norms", "errors", "models")}
    where = records[0].name
    norms = [row for row in rows["norms"] if row["mode"] in BOTH and not row["tiny"]]
    found = [_layer_norm(where, [row for row in norms if row["op"] == "LN"])]
    found.append(_shares("batch-norm", "Batch norm", where, [row for row in norms if row["op"] == "BN"]))
    if panels := over_torch(rows["norms"]):
        title = f"Times as fast as torch on {where}: geometric means over shapes"
        what = f"{title}, a bar for each norm and dtype, with whiskers from the least to the largest"
        found.append(Drawing("speedup", what, partial(plots.bars, title=title, panels=panels, xlabel="torch's time over ours")))
    if panels := calls(rows["norms"]):
        title = f"Calls of microseconds on {where}"
        what = f"{title}: the time of one call by each provider"
        found.append(Drawing("calls", what, partial(plots.dots, title=title, panels=panels, xlabel="us of a call")))
    if panels := over_ratio(rows["errors"]):
        title = f"Error of y against float64 on {where}"
        what = f"{title}, over the mean of the input in standard deviations, fastnorm's and torch's"
        axes = {"xlabel": "|mean| / std of the input", "ylabel": "largest error / largest value"}
        found.append(Drawing("errors", what, partial(plots.errors, title=title, panels=panels, **axes)))
    return [drawing for drawing in [*found, *_models(where, rows["models"])] if drawing]


def _layer_norm(where, rows) -> Drawing | None:
    sweep = [row for row in rows if row["model"] == SWEEP]
    if len({row["shape"][-1] for row in sweep}) < LEAST:
        return _shares("layer-norm", "Layer norm", where, rows)
    title = f"Layer norm on {where}: share of a copy's speed"
    draw = partial(plots.lines, title=title, panels=over_n(sweep), xlabel="N", ylabel="of a copy's speed")
    return Drawing("layer-norm", f"{title}, over the length N of a row; 1 is as fast as a copy moves its bytes", draw)


def _shares(name: str, norm: str, where: str, rows) -> Drawing | None:
    panels = panels_of(rows, lambda row: norm_of(row).split(" ", 1)[1], share)
    if not any(by for modes in panels.values() for by in modes.values()):
        return None
    title = f"{norm} on {where}: share of a copy's speed"
    draw = partial(plots.dots, title=title, panels=panels, xlabel="of a copy's speed", line=1, log=False)
    return Drawing(name, f"{title}, by shape; 1 is as fast as a copy moves its bytes", draw)


def _models(where, rows) -> list[Drawing]:
    found = []
    if panels := beside_torch(rows):
        title = f"Training steps on {where}, as parts of torch.nn's"
        what = f"{title}: time and peak memory of each block with converted, fused and recomputed norms"
        draw = partial(plots.bars, title=title, panels=panels, xlabel="x torch.nn's, less is better", log=False)
        found.append(Drawing("steps", what, draw))
    if panels := losses(rows):
        title = f"Loss curves on {where}"
        what = f"{title}: each block's with torch.nn, beside those with converted, fused and recomputed norms"
        found.append(Drawing("losses", what, partial(plots.curves, title=title, panels=panels)))
    return found
