"""Section `plots`: table, summary and pictures of what the other sections have written into the JSON so far."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean

from gpu_bench import MODES, STATES, torch_over
from gpu_state import Section, script
from measure import US
from norms import Norm
from record import copies
from table import aligned

OPS = {"layer_norm": "LN", "batch_norm": "BN"}
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
    holds: Callable  # of a row

    @classmethod
    def share(cls, share: float, mode: str, first: int, last: int) -> Target:
        """Layer norms with N from first to last reach this share of a copy's bandwidth."""
        holds = lambda row: row["op"] == "LN" and row["shape"][0] >= BIG and first <= row["shape"][1] <= last
        return cls(f"LN {mode}, N {first} to {last}: {share:.0%} of a copy", mode, IDEAL[mode] / share, holds)

    @classmethod
    def stage_1(cls, copies: float, mode: str) -> Target:
        shape = [64, 256, 56, 56]
        holds = lambda row: row["op"] == "BN" and list(row["shape"]) == shape and row["dtype"] == "bf16"
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
    return f"{Norm(row['op'], tuple(row['shape']), row['layout'])} {row['dtype']}"


def timed(found: list[dict], name: str | None = None):
    """(provider, row of a mode) of everything that has been timed."""
    for each in found:
        if name in (None, each["provider"]):
            yield from ((each["provider"], row) for row in each.get("rows", []))


HEAD = ["norm", "mode", "by", "cold us", "x torch", "copies", "warm us", "x torch", "copies", "host us", "x torch", "+-"]


def table(found: list[dict]) -> str:
    lines = [HEAD]
    for by, row in timed(found):
        figures = lambda state, by=by, row=row: [f"{row['us'][state][by]:.1f}", f"{torch_over(row, state, by):.2f}"]
        line = [name_of(row), row["mode"], by]
        for state in ("cold", "warm"):
            line += [*figures(state), f"{copies(row, state, by):.2f}"]
        lines.append([*line, *figures("host"), f"{row['spread']['cold'][by]:.0%}"])
    left = [f"{each['row']}: {each.get('failed') or each['not timed']}" for each in found
            if "failed" in each or "not timed" in each]  # fmt: skip
    return "\n".join([aligned(lines), *left])


def means(found: list[dict]) -> list[str]:
    """How many times as fast as torch.nn, geometric means over the shapes."""
    lines = [["op", "dtype", "mode", "by", "norms", *STATES]]
    groups = {}
    for by, row in timed(found):
        ratios = {state: torch_over(row, state, by) for state in STATES}
        groups.setdefault((row["op"], row["dtype"], row["mode"], by), []).append(ratios)
    for key, ratios in groups.items():
        lines.append([*key, str(len(ratios)), *(f"{geometric_mean(r[s] for r in ratios):.2f}" for s in STATES)])
    return ["", "times as fast as torch.nn, geometric means:", aligned(lines)] if groups else []


def slower(found: list[dict]) -> list[str]:
    """Where fastnorm is behind torch.nn or torch.compile."""
    behind = []
    for other in ("torch", *COMPILED):
        for _, row in timed(found, US if other == "torch" else other):
            less = [f"{s} {row['speedup'][s][other]:.2f}" for s in STATES if row["speedup"][s][other] < 1]
            behind += [f"{name_of(row)} {row['mode']}, x {other}: {', '.join(less)}"] if less else []
    return ["", f"slower than torch.nn or torch.compile: {len(behind)}", *behind]


def against_targets(found: list[dict]) -> list[str]:
    lines = []
    for target in TARGETS:
        met, missed = 0, []
        for _, row in timed(found, US):
            if row["mode"] != target.mode or not target.holds(row):
                continue
            reached = copies(row, "cold", US)
            met += reached <= target.copies
            share = f"{reached:.2f} copies, {IDEAL[row['mode']] / reached:.0%}"
            missed += [] if reached <= target.copies else [f"  missed by {name_of(row)}: {share}"]
        lines += [f"{target.what}: {met} of {met + len(missed)}", *missed]
    return ["", "targets, from a cold L2:", *lines]


def summary(found: list[dict]) -> str:
    return "\n".join([*means(found), *slower(found), *against_targets(found)])


def curves(found: list[dict], op: str) -> dict:
    """dtype -> mode -> by whom -> {norm: copies}, torch.nn's of the rows of fastnorm."""
    panels = {}
    for by, row in timed(found):
        if row["op"] != op:
            continue
        panel = panels.setdefault(row["dtype"], {m: {} for m in MODES})[row["mode"]]
        norm = name_of(row).rsplit(" ", 1)[0]
        for name in (by, "torch") if by == US else (by,):
            panel.setdefault(name, {})[norm] = copies(row, "cold", name)
    return panels


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
