"""What `gpu.py` and its sections share: one JSON, which is replaced as a whole, so that a run may be killed at any time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from record import write

ATTEMPTS = 2  # a row during which the process died this often is not tried again


class OutOfTime(Exception):
    """A row was cut short; `partial` is what it has."""

    def __init__(self, partial: dict):
        self.partial = partial


class Section:
    """One section's part of the JSON. A row is {"row": its name, ...}, and has a sentence under "failed" where it did."""

    def __init__(self, path: Path, name: str, seconds: float = float("inf")):
        self.path, self.name = path, name
        self.end = time.monotonic() + seconds
        self.parent = os.getppid()
        self.document = json.loads(path.read_text())
        self.data = self.document["sections"].setdefault(name, {"complete": False, "rows": []})

    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        write(self.path, self.document)

    def each(self, names: Iterable[str], measure: Callable[[str], dict], least: Callable[[str], float]) -> None:
        """Measure, in order, the rows that are not there yet, each while its `least` seconds are left; saved as they come."""
        rows = self.data["rows"]
        there = {row["row"] for row in rows}
        for name in names:
            if name in there:
                continue
            if self.left() < least(name) or self._orphaned():
                return
            try:
                row, late = self._attempt(name, measure), False
            except OutOfTime as e:
                row, late = e.partial, True
            if self._orphaned():
                return
            row = {"row": name, **row}
            self.data.pop("running", None)
            if late:
                self.data["partial"] = row
                self.save()
                return
            rows.append(row)
            self.save()
        self.data["complete"] = True
        self.save()

    def _attempt(self, name, measure):
        before = self.data.get("running", {})
        attempts = before.get("attempts", 0) if before.get("row") == name else 0
        if attempts >= ATTEMPTS:
            return {"failed": f"the process died here {attempts} times"}
        self.data["running"] = {"row": name, "attempts": attempts + 1}
        self.data.pop("partial", None)
        self.save()
        return measure(name)

    def _orphaned(self) -> bool:
        """The command was killed; another one may write into the file by now."""
        return os.getppid() != self.parent


def progress(names):
    """With a bar where there is a terminal and tqdm."""
    if importlib.util.find_spec("tqdm") is None:
        return names
    from tqdm import tqdm

    return tqdm(names, disable=None)


def failures(section: dict) -> list[str]:
    """What failed in a section, in one line each."""
    rows = [*section["rows"], *([section["partial"]] if "partial" in section else [])]
    found = [f"{row['row']}: {row['failed']}" for row in rows if "failed" in row]
    return found + ([section["ended"]] if "ended" in section else [])


def script(measure: Callable, doc: str | None, argv=None) -> int:
    """The main function of a section's script; `measure` takes the section and the device. 0: it ended in order."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("section")
    p.add_argument("--json", type=Path, required=True, metavar="PATH", help="the file of gpu.py")
    p.add_argument("--device", required=True)
    p.add_argument("--seconds", type=float, required=True, help="stop with what there is by then")
    args = p.parse_args(argv)
    section = Section(args.json, args.section, args.seconds)
    measure(section, args.device)
    return 0
