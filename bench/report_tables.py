"""The report's tables: which columns each kind of row has, and what comes first of all machines."""

from __future__ import annotations

from html import escape
from math import prod
from statistics import geometric_mean

import record
from gpu_state import failures
from record import Record
from report_figures import BOTH, DTYPES, OURS, norm_of, own, variant
from report_page import EMPTY, Cell, Column, figure, table, text

MIB = 1 << 20
GROUPS = {"LN": "LN", "BN": "BN"}  # of the summary; all other norms are one group
OTHERS = "all others"


def shape(row: dict) -> Cell:
    return Cell("x".join(map(str, row.get("shape", ()))), float(prod(row["shape"])) if row.get("shape") else None)


def ratio(value: float | None) -> Cell:
    """How many times as fast; what is below 1 to two digits is marked."""
    return figure(value, ".2f", "bad" if value is not None and slower(value) else "")


def slower(value: float) -> bool:
    return round(value, 2) < 1


def mebibytes(value: float | None) -> Cell:
    return figure(None if value is None else value / MIB, ".4g")


def reasons(row: dict) -> Cell:
    refused = row.get("refused")
    if not refused:
        return EMPTY
    return Cell(
        refused if isinstance(refused, str) else "; ".join(f"{p}: {why}" for p, why in refused.items()), look="long bad"
    )


# ---------------------------------------------------------------- norms


def norms(found: Record) -> str:
    """A line for each row and state; what was refused altogether has a line, too."""
    lines = [{**row, "state": state} for row in found.rows for state in row.get("us") or [""]]
    lines.sort(key=lambda row: record.PRIMARY.index(row["state"]) if row["state"] else -1)
    return table("Norms: all rows", columns(lines), lines)


def _us(provider: str):
    return lambda row: figure(row.get("us", {}).get(row["state"], {}).get(provider))


def _ratio(provider: str):
    return lambda row: ratio(record.speedup(row, row["state"], provider)) if row["state"] else EMPTY


def _bytes(key: str, provider: str):
    return lambda row: mebibytes(row.get(key, {}).get(provider))


def columns(lines: list[dict]) -> list[Column]:
    others = dict.fromkeys(p for row in lines if row["state"] for p in record.providers(row, row["state"]))
    others.pop("fastnorm", None)
    spread = lambda row: row.get("spread", {}).get(row["state"], {}).get("fastnorm")
    found = [
        Column("norm", text("op")),
        Column("shape", shape),
        Column("layout", text("layout")),
        Column("dtype", text("dtype")),
        Column("mode", text("mode")),
        Column("model", text("model"), "whose shape it is"),
        Column(
            "state", text("state"), "cold: device time, L2 empty; warm: L2 as the call before left it; host, wall: of the call"
        ),
        Column("us", _us("fastnorm"), "fastnorm's time, median"),
        Column("+-", lambda row: figure(spread(row), ".1%"), "half of the middle half of fastnorm's times"),
        Column("copies", lambda row: figure(_of_copy(record.copies, row), ".2f"), "fastnorm's time in copies of x"),
        Column("of a copy", lambda row: figure(_of_copy(record.share, row), ".0%"), "ideal traffic's speed over a copy's"),
    ]
    found += [Column(f"x {p}", _ratio(p), f"{p}'s time over fastnorm's") for p in others]
    found += [Column(f"{p} us", _us(p)) for p in (*others, "copy")]
    for key, what in (("peak", "MiB at once"), ("saved", "MiB kept for backward")):
        found += [Column(f"{p} {key}", _bytes(key, p), f"{p}: {what}") for p in ("fastnorm", *others)]
    found.append(Column("beside", text("provider"), "whose row it is: fastnorm is timed anew beside each peer"))
    return [*found, Column("measured", text("measured")), Column("refused", reasons, "who is not timed, and why")]


def _of_copy(figure_of, row: dict) -> float | None:
    return figure_of(row, row["state"], "fastnorm") if row["state"] else None


# ---------------------------------------------------------------- other kinds


def errors(found: Record) -> str:
    larger = lambda row: Cell("LARGER", look="bad") if "allowed" in row and not row["error"] <= row["allowed"] else EMPTY
    size = lambda key: lambda row: figure(row.get(key), ".2e")
    names = [
        Column("norm", text("op")),
        Column("shape", shape),
        Column("layout", text("layout")),
        Column("dtype", text("dtype")),
        Column("result", text("result")),
        Column("|mean| / std", lambda row: figure(row.get("ratio"), "g"), "of the input"),
        Column("error", size("error"), "largest difference from float64 over the largest value"),
        Column("torch's error", size("torch_error")),
        Column("allowed", size("allowed"), "torch's error and one unit in the last place"),
        Column("verdict", larger),
        Column("measured", text("measured")),
    ]
    return table("Errors against float64: all rows", names, found.rows)


def models(found: Record) -> str:
    step = lambda row: figure(row["step_us"] / 1e3 if "step_us" in row else None)
    loss = lambda i: lambda row: figure(row["loss"][i] if row.get("loss") else None)
    names = [
        Column("block", text("block")),
        Column("shape", shape),
        Column("dtype", text("dtype")),
        Column("norms", lambda row: Cell(variant(row))),
        Column("step ms", step, "forward, loss, backward and optimizer"),
        Column("+-", lambda row: figure(row.get("spread"), ".1%")),
        Column("x torch.nn", lambda row: ratio(row.get("x torch")), "torch.nn's time over this one's"),
        Column("peak MiB", lambda row: mebibytes(row.get("peak")), "at once"),
        Column("saved MiB", lambda row: mebibytes(row.get("saved")), "kept between forward and backward"),
        Column("first loss", loss(0)),
        Column("last loss", loss(-1)),
        Column("difference", lambda row: figure(row.get("difference"), ".1e"), "of the loss curve to torch.nn's, the largest"),
        Column("nudged", lambda row: figure(row.get("nudged"), ".1e"), "torch.nn's to itself, a unit in the last place apart"),
        Column("measured", text("measured")),
        Column("refused", reasons),
    ]
    return table("Blocks from end to end: all rows", names, found.rows)


def overhead(found: Record) -> str:
    names = [
        Column("module", text("module")),
        Column("shape", shape),
        Column("mode", text("mode")),
        Column("us", lambda row: figure(row.get("us"))),
        Column("torch.nn us", lambda row: figure(row.get("torch_us"))),
        Column("x torch.nn", lambda row: ratio(1 / row["ratio"] if row.get("ratio") else None)),
        Column("+-", lambda row: figure(row.get("spread"), ".1%")),
        Column("measured", text("measured")),
        Column("refused", reasons),
    ]
    return table("Calls of small modules: all rows", names, found.rows)


def sections(found: Record) -> str:
    lines = [{**row, "failed": failures(row)} for row in found.rows]
    absent = lambda row: [f"{name}: {reason}" for name, reason in row.get("providers", {}).items() if reason]
    untimed = lambda row: [f"{each['row']}: {each['not timed']}" for each in row["rows"] if "not timed" in each]
    names = [
        Column("section", text("section")),
        Column("complete", lambda row: Cell("yes" if row.get("complete") else "no", look="" if row.get("complete") else "bad")),
        Column("rows", lambda row: figure(len(row["rows"]), "d")),
        Column("seconds", lambda row: figure(row.get("seconds"))),
        Column("failures", lambda row: figure(len(row["failed"]), "d", "bad" if row["failed"] else "")),
        Column("measured", text("measured")),
        Column("what failed", lambda row: Cell("; ".join(row["failed"]), look="long")),
        Column("what is not timed", lambda row: Cell("; ".join(untimed(row)), look="long bad")),
        Column("who was not there", lambda row: Cell("; ".join(absent(row)), look="long")),
    ]
    return table("Sections of the run", names, lines)


TABLES = {"norms": norms, "models": models, "overhead": overhead, "errors": errors, "sections": sections}


# ---------------------------------------------------------------- all machines


def summary(records: list[Record]) -> str:
    """Geometric means by machine and kind of norm, and what is faster than fastnorm."""
    timed = [found for found in records if found.kind == "norms"]
    lines = [line for found in timed for line in _means(found)]
    cells = [(dtype, mode) for dtype in DTYPES for mode in BOTH]
    heads = [Column("machine", text("machine")), Column("norms", text("norms")), Column("state", text("state"))]
    heads += [Column(f"{d} {m}", lambda row, key=(d, m): ratio(row.get(key)), "torch's time over fastnorm's") for d, m in cells]
    behind = [line for found in timed for line in faster(found)]
    names = [
        Column("machine", text("machine")),
        Column("norm", text("norm")),
        Column("dtype", text("dtype")),
        Column("mode", text("mode")),
        Column("state", text("state")),
        Column("faster", text("provider")),
        Column("x", lambda row: ratio(row["x"]), "its time over fastnorm's"),
        Column("+-", lambda row: figure(row["spread"], ".1%"), "half of the middle half of fastnorm's times"),
        Column("measured", text("measured")),
    ]
    said = "".join(f"<li>{escape(_counted(found))}</li>" for found in timed)
    said = f"<ul>{said}</ul>" if said else "<p>No norm has been timed yet.</p>"
    means = table("Times as fast as torch, geometric means over shapes", heads, lines) if lines else ""
    return means + said + (table("Where another is faster than fastnorm", names, behind) if behind else "")


def _means(found: Record):
    groups: dict = {}
    for row in own(found.rows):
        state = record.primary(row)
        if value := record.speedup(row, state, "torch"):
            line = groups.setdefault(GROUPS.get(row["op"], OTHERS), {})
            line.setdefault((row["dtype"], row["mode"]), []).append(value)
            line["state"] = state
    for group in (*GROUPS, OTHERS):
        if group in groups:
            line = groups[group]
            values = {key: geometric_mean(ratios) for key, ratios in line.items() if key != "state"}
            yield {**values, "machine": found.name, "norms": group, "state": line["state"]}


def faster(found: Record) -> list[dict]:
    """A line for every figure of another than fastnorm that is less than fastnorm's, to two digits."""
    lines = []
    for row in found.rows:
        for state in row.get("us", {}):
            values = {p: record.speedup(row, state, p) for p in rivals(row, state)}
            about = {"machine": found.name, "norm": norm_of(row), "dtype": row["dtype"], "mode": row["mode"], "state": state}
            about |= {"measured": row["measured"], "spread": row.get("spread", {}).get(state, {}).get("fastnorm")}
            lines += [{**about, "provider": p, "x": x} for p, x in values.items() if x and slower(x)]
    return sorted(lines, key=lambda line: (record.PRIMARY.index(line["state"]), line["x"]))


def rivals(row: dict, state: str) -> list[str]:
    """Whom fastnorm is compared with in a row: in that of a peer the peer alone, for torch is in fastnorm's own."""
    peer = row.get("provider", "fastnorm")
    return [p for p in record.providers(row, state) if p not in OURS and peer in ("fastnorm", p)]


def _counted(found: Record) -> str:
    rows = own(found.rows)
    primary = [record.speedup(row, record.primary(row), "torch") for row in rows]
    primary = [value for value in primary if value]
    count = sum(map(slower, primary))
    state = record.primary(rows[0]) if rows else ""
    return f"{found.name}: torch is faster in {count} of {len(primary)} rows ({state} time)"
