"""One HTML file of the newest results of every machine: figures, pictures, and tables that sort and filter.

It loads nothing, and can be opened from a disk. --pictures also saves the pictures of the newest CPU and of the newest GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from html import escape
from itertools import groupby
from pathlib import Path

import record
from report_figures import drawings
from report_page import facts, page, picture
from report_tables import TABLES, summary

HERE = Path(__file__).resolve().parent
TITLE = "fastnorm: results"


def by_machine(records: list[record.Record]) -> list[list[record.Record]]:
    return [list(group) for _, group in groupby(records, key=lambda found: found.slug)]


def build(records: list[record.Record]) -> str:
    """The page, as text."""
    machines = by_machine(records)
    links = [("summary", "Summary"), *((group[0].slug, group[0].name) for group in machines)]
    contents = "".join(f'<li><a href="#{at}">{escape(name)}</a></li>' for at, name in links)
    parts = [f'<section id="summary"><h2>Summary</h2>{EXPLAINED}{summary(records)}</section>', *map(section, machines)]
    return page(TITLE, contents, "\n".join(parts))


EXPLAINED = (
    "<p>Figures are medians over rounds in which everyone is measured in turn, after a match with the float64 oracle. "
    "“x torch” is how many times as fast as torch fastnorm is, the median over the rounds; “of a copy” is "
    "the speed at which a norm moves the bytes that it has to move, over that of a copy. On a GPU “cold” is device time "
    "with an empty L2, “warm” with what the call before left there, and “host” what a call costs the host. "
    "Each row is the last one measured on its machine.</p>"
)


def section(group: list[record.Record]) -> str:
    """One machine."""
    first = group[0]
    about = {key: said(value) for found in reversed(group) for key, value in found.machine.items()}
    about = {key: value for key, value in about.items() if value}
    sources = {(source.name, source.date, source.commit) for found in group for source in found.sources}
    files = [(name, " ".join(filter(None, [date, commit[:12]]))) for name, date, commit in sorted(sources)]
    parts = [f'<section id="{first.slug}"><h2>{escape(first.name)}</h2>', facts(about.items())]
    parts += ["<h3>Files, when they were measured, and of which commit</h3>", facts(files), *drawn(group)]
    parts += [TABLES[found.kind](found) for found in group]
    return "\n".join([*parts, "</section>"])


def said(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {said(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(said, value))
    return "" if value is None else str(value)


def drawn(group: list[record.Record]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for drawing in drawings(group):
            path = Path(folder, f"{drawing.name}.svg")
            drawing.draw(path)
            parts.append(picture(path, f"{group[0].slug}-{drawing.name}", drawing.what))
    return parts


def save_pictures(records: list[record.Record], folder: Path) -> list[Path]:
    """Those of the CPU and of the GPU whose norms were measured last, as cpu-NAME and gpu-NAME."""
    paths = []
    for kind, gpu in (("cpu", False), ("gpu", True)):
        groups = [group for group in by_machine(records) if group[0].gpu == gpu and group[0].kind == "norms"]
        newest = max(groups, key=lambda group: group[0].order, default=[])
        for drawing in drawings(newest) if newest else []:
            paths.append(folder / f"{kind}-{drawing.name}.png")
            drawing.draw(paths[-1])
    return paths


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, nargs="+", default=[HERE / "results", HERE / "out"], metavar="FOLDER",
                   help="where the JSON files are (default: bench/results and bench/out)")  # fmt: skip
    p.add_argument("--out", type=Path, default=HERE / "out" / "report.html", metavar="PATH", help="default: %(default)s")
    p.add_argument("--pictures", type=Path, metavar="FOLDER", help="save the README's pictures there, too")
    args = p.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        p.error("matplotlib is not installed: pip install matplotlib")
    records = record.newest(args.results)
    if not records:
        p.error(f"no results in {', '.join(map(str, args.results))}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(build(records), encoding="utf-8")
    print(args.out)
    if args.pictures:
        print(*save_pictures(records, args.pictures), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
