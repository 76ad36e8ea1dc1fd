"""Section `plots`: table, summary and pictures of what the other sections have written into the JSON so far."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import geometric_mean

from gpu_state import Section, script
from shapes import label
from table import aligned

OPS = {"layer_norm": "rows", "batch_norm": "channels"}
MODES = ("forward", "backward")
STATES = ("cold", "warm", "host")
COMPILED = ("compile", "max-autotune")
# Bytes of the ideal traffic over those of a copy: forward reads x and writes y, backward reads x and dy and writes dx.
IDEAL = {"forward": 1.0, "backward": 1.5}
BIG = 4096  # rows from which on a layer norm is held to a share of a copy: shorter than that, launches are what is measured


@dataclass(frozen=True)
class Target:
    """At most `copies` times a copy of x, from a cold L2."""

    what: str
    mode: str
    copies: float
    holds: Callable  # of the model and the dtype

    @classmethod
    def share(cls, share: float, mode: str, first: int, last: int) -> Target:
        """Layer norms with N from first to last reach this share of a copy's bandwidth."""
        holds = lambda m, dtype: m["kind"] == "rows" and m["shape"][0] >= BIG and first <= m["shape"][1] <= last
        return cls(f"LN {mode}, N {first} to {last}: {share:.0%} of a copy", mode, IDEAL[mode] / share, holds)

    @classmethod
    def stage_1(cls, copies: float, mode: str) -> Target:
        shape = [64, 256, 56, 56]
        holds = lambda m, dtype: m["kind"] == "channels" and list(m["shape"]) == shape and dtype == "bf16"
        return cls(f"BN {'x'.join(map(str, shape))} bf16 {mode}: {copies} copies", mode, copies, holds)


TARGETS = (
    Target.share(0.97, "forward", 1024, 16384),
    Target.share(0.92, "forward", 64, 512),
    Target.share(0.90, "backward", 1024, 8192),
    Target.share(0.75, "backward", 16384, 16384),
    Target.stage_1(1.1, "forward"),
    Target.stage_1(1.67, "backward"),
)


def name_of(row: dict) -> str:
    return label(*(row["model"][key] for key in ("kind", "shape", "layout"))) + f" {row['dtype']}"


def timed(rows: list[dict], peer: str | None = None):
    """(row, mode, its figures) of everything that has been timed."""
    for row, mode in product(rows, MODES):
        if mode in row and peer in (None, row["peer"]):
            yield row, mode, row[mode]


HEAD = ["norm", "mode", "by", "cold us", "x torch", "copies", "warm us", "x torch", "copies", "host us", "x torch", "+-"]


def table(rows: list[dict]) -> str:
    lines = [HEAD]
    for row, mode, f in timed(rows):
        us = lambda state: f"{f['us'][state][row['peer']]:.1f}"
        line = [name_of(row), mode, row["peer"]]
        for state in ("cold", "warm"):
            line += [us(state), f"{f['x torch'][state]:.2f}", f"{f['copies'][state]:.2f}"]
        lines.append([*line, us("host"), f"{f['x torch']['host']:.2f}", f"{f['spread']['cold']:.0%}"])
    left = [f"{name_of(row)}, {row['peer']}: {row.get('failed') or row['not timed']}" for row in rows
            if "failed" in row or "not timed" in row]  # fmt: skip
    return "\n".join([aligned(lines), *left])


def means(rows: list[dict]) -> list[str]:
    """How many times as fast as torch.nn, geometric means over the shapes."""
    lines = [["op", "dtype", "mode", "by", "norms", *STATES]]
    groups = {}
    for row, mode, f in timed(rows):
        op = "LN" if row["model"]["kind"] == "rows" else "BN"
        groups.setdefault((op, row["dtype"], mode, row["peer"]), []).append(f["x torch"])
    for key, ratios in groups.items():
        lines.append([*key, str(len(ratios)), *(f"{geometric_mean(r[s] for r in ratios):.2f}" for s in STATES)])
    return ["", "times as fast as torch.nn, geometric means:", aligned(lines)] if groups else []


def slower(rows: list[dict]) -> list[str]:
    """Where fastnorm is behind torch.nn or torch.compile."""
    found = []
    for row, mode, f in timed(rows, "fastnorm"):
        behind = [f"{s} {f['x torch'][s]:.2f}" for s in STATES if f["x torch"][s] < 1]
        found += [f"{name_of(row)} {mode}, x torch: {', '.join(behind)}"] if behind else []
    for row, mode, f in timed(rows):
        if row["peer"] in COMPILED:
            behind = [f"{s} {1 / f['x fastnorm'][s]:.2f}" for s in STATES if f["x fastnorm"][s] > 1]
            found += [f"{name_of(row)} {mode}, x {row['peer']}: {', '.join(behind)}"] if behind else []
    return ["", f"slower than torch.nn or torch.compile: {len(found)}", *found]


def against_targets(rows: list[dict]) -> list[str]:
    lines = []
    for target in TARGETS:
        met, missed = 0, []
        for row, mode, f in timed(rows, "fastnorm"):
            if mode != target.mode or not target.holds(row["model"], row["dtype"]):
                continue
            copies = f["copies"]["cold"]
            met += copies <= target.copies
            reached = f"{copies:.2f} copies, {IDEAL[mode] / copies:.0%}"
            missed += [] if copies <= target.copies else [f"  missed by {name_of(row)}: {reached}"]
        lines += [f"{target.what}: {met} of {met + len(missed)}", *missed]
    return ["", "targets, from a cold L2:", *lines]


def summary(rows: list[dict]) -> str:
    return "\n".join([*means(rows), *slower(rows), *against_targets(rows)])


def curves(rows: list[dict], kind: str) -> dict:
    """dtype -> mode -> by whom -> {norm: copies}, torch.nn's of the rows of fastnorm."""
    found = {}
    for row, mode, f in timed(rows):
        if row["model"]["kind"] != kind:
            continue
        panel = found.setdefault(row["dtype"], {m: {} for m in MODES})[mode]
        norm = name_of(row).rsplit(" ", 1)[0]
        panel.setdefault(row["peer"], {})[norm] = f["copies"]["cold"]
        if row["peer"] == "fastnorm":
            panel.setdefault("torch", {})[norm] = f["copies"]["cold"] * f["x torch"]["cold"]
    return found


def report(section: Section, device: str) -> None:
    bench = section.document["sections"].get("bench", {"rows": []})["rows"]
    base = section.path.with_suffix("")

    def measure(name):
        if name == "table":
            text = f"{table(bench)}\n{summary(bench)}"
            print(text, flush=True)
            section.path.with_suffix(".txt").write_text(text + "\n")
            return {}
        panels = curves(bench, OPS[name])
        if importlib.util.find_spec("matplotlib") is None or not panels:
            return {"not there": "matplotlib" if panels else "a row of the section bench"}
        import plots

        plots.copies(base.with_name(f"{base.name}-{name}.png"), f"{name} on {section.document['machine']['gpu']}", panels)
        return {}

    section.each(("table", *OPS), measure, least=lambda name: 0.0)


if __name__ == "__main__":
    sys.exit(script(report, __doc__))
