"""The files of results: how one is written, and which rows of all of them hold today."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

PRIMARY = ("cold", "wall", "warm", "host")  # the first of these that a row has is the state it is judged by
# What two rows of the same job have in common: the later one holds. "provider" is beside whom a GPU's row was measured.
JOBS = {
    "norms": ("op", "shape", "layout", "dtype", "mode", "provider"),
    "errors": ("op", "shape", "layout", "dtype", "result", "ratio"),
    "models": ("block", "shape", "dtype", "norms", "compiled"),
    "overhead": ("module", "shape", "mode"),
    "sections": ("section",),
}
KINDS = tuple(JOBS)
OF_A_RUN = ("date", "commit", "sources", "dirty")  # entries of a machine that say nothing of the machine


def write(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(new, path)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Source:
    """A file, and how many of its rows hold."""

    name: str
    date: str
    commit: str
    rows: int


@dataclass
class Record:
    """Rows of one kind from one machine."""

    machine: dict
    rows: list[dict]
    kind: str
    path: Path
    when: tuple[str, str, int]  # the day, the time and the number of the run on that day, as far as they are known
    gpu: bool
    sources: list[Source] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.machine.get("gpu") or self.machine.get("device") or "unknown machine"

    @property
    def name(self) -> str:
        """Of the machine: what its CPU can and how much of it was used matters where that did the work."""
        if self.gpu:
            return self.device
        threads = self.machine.get("threads")
        more = self.machine.get("isa"), f"{threads} thread{'s' * (threads != 1)}" if threads else None
        return ", ".join(filter(None, (self.device, *more)))

    @property
    def slug(self) -> str:
        return slug(self.name)

    @property
    def date(self) -> str:
        day, time, number = self.when
        return " ".join(filter(None, (day, time, f"(run {number})" if number > 1 else None)))

    @property
    def order(self) -> tuple:
        """By this the last one is the newest; of a day, those whose time is not known come last."""
        day, time, number = self.when
        return day, time or "24:00", number, self.path.name

    def job(self, row: dict) -> tuple:
        return tuple(json.dumps(row.get(key, False)) for key in JOBS[self.kind])


def kind_of(row: dict) -> str | None:
    if "section" in row:
        return "sections"
    if "error" in row and "torch_error" in row:
        return "errors"
    if "op" in row and "mode" in row:
        return "norms"
    if "block" in row:
        return "models"
    return "overhead" if "module" in row else None


def flattened(document: dict) -> list[dict]:
    """The rows, of all sections where there are some; one more row says how each section ended."""
    rows = list(document.get("rows", []))
    for name, section in document.get("sections", {}).items():
        rows.append({"section": name, **section})
        for row in section["rows"]:
            rows += [{**inner, "provider": row["provider"]} for inner in row.get("rows", []) if "provider" in row]
            rows += row.get("results", [])
    return rows


def load(path: Path) -> list[Record]:
    """One record for each kind of row in a file; none where it is no file of results."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or not isinstance(document.get("machine"), dict):
        return []
    found: dict[str, list[dict]] = {}
    for row in flattened(document):
        if kind := kind_of(row):
            found.setdefault(kind, []).append(row)
    machine = document["machine"]
    about = path, measured(path, machine), of_gpu(machine, found.get("norms", []))
    return [Record(machine, rows, kind, *about) for kind, rows in found.items()]


def of_gpu(machine: dict, rows: list[dict]) -> bool:
    """Times of a GPU are cold, warm and of the host; the other files of one have its kernels as their backend."""
    timed = any("cold" in row.get("us", {}) for row in rows)
    return timed or "gpu" in machine or str(machine.get("backend", "")).endswith("kernels")


def measured(path: Path, machine: dict) -> tuple[str, str, int]:
    """When: by the machine's entry, else by the file's name, else by its commit, else by its time."""
    if date := machine.get("date"):
        return date[:10], date[11:16], 1
    if named := re.search(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?", path.stem):
        return named[1], "", int(named[2] or 1)
    date = _committed(path) or datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat()
    return date[:10], date[11:16], 1


def _committed(path: Path) -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "log", "-1", "--format=%cI", "--", path.name]
    result = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def newest(folders: Iterable[Path]) -> list[Record]:
    """One record for every machine and kind, of the rows that hold; machines by name, GPUs last."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for path in sorted({path.resolve() for folder in folders for path in Path(folder).rglob("*.json")}):
        for record in load(path):
            groups.setdefault((record.slug, record.kind), []).append(record)
    return sorted(map(merged, groups.values()), key=lambda r: (r.gpu, r.name, KINDS.index(r.kind)))


def merged(records: list[Record]) -> Record:
    """Of each job the row of the last file; files beside another torch than the last one's are another comparison."""
    records = sorted(records, key=lambda r: r.order)
    last = records[-1]
    records = [r for r in records if r.machine.get("torch") == last.machine.get("torch")]
    found = {}
    for record in records:
        for row in record.rows:
            found[record.job(row)] = record, row
    machine = {key: value for record in records for key, value in record.machine.items() if key not in OF_A_RUN}
    holding = [record for record, _ in found.values()]
    sources = [Source(r.path.name, r.date, r.machine.get("commit") or "", sum(h is r for h in holding)) for r in records]
    rows = [{**row, "measured": record.date} for record, row in found.values()]
    return Record(machine, rows, last.kind, last.path, last.when, last.gpu, [s for s in sources if s.rows])


# ---------------------------------------------------------------- figures of a row of norms


def primary(row: dict) -> str:
    return next(state for state in PRIMARY if state in row["us"])


def providers(row: dict, state: str) -> list[str]:
    """Who was timed, the copy aside."""
    return [name for name in row["us"].get(state, {}) if name != "copy"]


def copies(row: dict, state: str, provider: str) -> float | None:
    """The time in copies of x: as measured in turn, else of the medians."""
    us = row["us"].get(state, {})
    if provider in row.get("copies", {}).get(state, {}):
        return row["copies"][state][provider]
    return us[provider] / us["copy"] if provider in us and us.get("copy") else None


def share(row: dict, state: str, provider: str) -> float | None:
    """Of the speed of a copy: 1 where the ideal traffic is moved as fast as a copy moves its own."""
    found = copies(row, state, provider)
    return row["moved"] / 2 / found if found and "moved" in row else None


def speedup(row: dict, state: str, provider: str) -> float | None:
    """How many times as fast as `provider` fastnorm is: as measured in turn, else of the medians."""
    us = row["us"].get(state, {})
    if provider in row.get("speedup", {}).get(state, {}):
        return row["speedup"][state][provider]
    return us[provider] / us["fastnorm"] if provider in us and us.get("fastnorm") else None
