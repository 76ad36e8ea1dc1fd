"""The benchmarks' results as people read them: which rows hold, the figures of pictures and tables, and the page itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import plots
import record
import report
import report_figures
import report_page
import report_tables

NAME = "Some <b>CPU</b> & co"
MACHINE = {"device": NAME, "isa": "AVX2", "threads": 2, "torch": "2.13", "fastnorm": "0.1.0", "date": "2026-12-01T10:00:00"}
GPU = {"gpu": "Some GPU", "torch": "2.13", "absent": {"apex": "no <module>"}, "triton": "3.6", "commit": "c0ffee" * 6}
OTHERS = ("torch", "compile", "keras")


def norm(op, shape, mode="forward", dtype="fp32", us=100.0, torch=2.0, copy=1.0, states=("wall",), **changes):
    """A row whose `us` is fastnorm's; torch takes `torch` times that, and a copy `us / copy`."""
    moved = {"forward": 2, "backward": 3, "both": 5, "eval": 2}[mode]
    times = {"fastnorm": us, **{name: us * (torch + 0.1 * i) for i, name in enumerate(OTHERS)}, "copy": us / copy}
    each = lambda function: {state: function() for state in states}
    row = {"op": op, "shape": shape, "layout": "dense", "dtype": dtype, "mode": mode, "model": "", "tiny": False}
    row |= {"moved": moved, "bytes": 4096, "us": each(lambda: times), "spread": each(lambda: {"fastnorm": 0.01})}
    row["copies"] = each(lambda: {name: value / times["copy"] for name, value in times.items() if name != "copy"})
    row["speedup"] = each(lambda: {name: times[name] / us for name in OTHERS})
    return {**row, **changes}


SWEEP = {"model": "sweep over N"}
NORMS = [
    *(norm("LN", [64, n], mode, copy=2.5, **SWEEP) for n in (64, 256, 1024) for mode in ("forward", "backward")),
    *(norm("BN", [16, 64, 56, 56], mode, dtype, torch=3.0) for mode in ("forward", "backward") for dtype in ("fp32", "bf16")),
    norm("BN", [64, 256, 14, 14], layout="channels_last", torch=0.75),
    *(norm("LN", [8, 64], mode, us=4.0, tiny=True) for mode in ("forward", "backward", "both", "eval")),
    norm("add+RMS", [8, 512], peak={"fastnorm": 3 << 20, "torch": 5 << 20}, saved={"fastnorm": 1 << 20}),
    {**norm("GN", [4, 320, 8, 8]), "refused": {"keras": "y is off by <i>3</i>"}},
]
NORMS[-1].pop("us")
ERRORS = [{"op": "LN", "shape": [8, 64], "layout": "dense", "dtype": "fp32", "result": "y", "error": 3e-7,
           "torch_error": 1e-7, "allowed": 2e-7}]  # fmt: skip
ERRORS += [
    {"op": op, "layout": layout, "dtype": "fp32", "ratio": ratio, "result": "y", "error": 1e-7, "torch_error": 1e-7 * ratio}
    for op, layout in (("LN", "dense"), ("BN", "dense"), ("BN", "channels_last"))
    for ratio in (1.0, 100.0, 10000.0)
]
MODELS = [
    {"block": "pre-norm", "shape": [8, 64], "dtype": "fp32", "norms": norms, "compiled": compiled, "step_us": step,
     "spread": 0.01, "x torch": 1000 / step, "peak": peak << 20, "saved": 1 << 20, "loss": [3.0, 2.0, 1.0], "difference": 1e-6}
    for norms, compiled, step, peak in (("torch.nn", False, 1000.0, 8), ("fused", False, 800.0, 6), ("fused", True, 500.0, 6))
]  # fmt: skip
OVERHEAD = [
    {"module": "LayerNorm", "shape": [8, 64], "mode": "forward", "us": 2.0, "torch_us": 5.0, "ratio": 0.4, "spread": 0.1}
]
BENCHED = {
    "rows": [
        {"row": "fastnorm, LN", "provider": "fastnorm", "rows": [norm("LN", [8192, 64], states=("cold", "warm", "host"))]},
        {"row": "compile, LN", "provider": "compile", "rows": [], "not timed": "wrong: dx is off"},
        {"row": "quack, LN", "provider": "quack", "rows": [norm("LN", [8192, 64], torch=9.0, states=("cold", "warm", "host"))]},
    ],
    "complete": True,
    "providers": {"fastnorm": None, "apex": "No module named 'apex'"},
}
TESTED = {"rows": [{"row": "numerics", "failed": "2 of 9 tests fail"}], "complete": False, "seconds": 3.5}
SECTIONS = {"bench": BENCHED, "tests": TESTED, "errors": {"rows": [{"row": "LN", "results": ERRORS[:1]}], "complete": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    every = {"norms": NORMS, "errors": ERRORS, "models": MODELS}
    for name, rows in every.items():
        record.write(folder / f"{name}.json", {"machine": MACHINE, "rows": rows})
    other = {**MACHINE, "threads": 1, "date": "2026-12-03T10:00:00"}  # newer, and without a norm
    record.write(folder / "overhead.json", {"machine": other, "rows": OVERHEAD})
    record.write(folder / "some-gpu" / "2026-12-02.json", {"machine": GPU, "sections": SECTIONS})
    (folder / "other.json").write_text("[1, 2]\n")  # no results
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return record.newest([folder])


# ---------------------------------------------------------------- records


def test_kinds_of_files(records):
    found = {(r.name, r.kind): len(r.rows) for r in records}
    cpu, gpu = f"{NAME}, AVX2, 2 threads", "Some GPU"
    counts = {"norms": len(NORMS), "errors": len(ERRORS), "models": len(MODELS)}
    counts = {(cpu, kind): count for kind, count in counts.items()}
    counts[f"{NAME}, AVX2, 1 thread", "overhead"] = 1
    assert found == {**counts, (gpu, "norms"): 2, (gpu, "errors"): 1, (gpu, "sections"): 3}
    assert [r.gpu for r in records] == [False] * 4 + [True] * 3
    assert records[1].slug == "some-b-cpu-b-co-avx2-2-threads"
    assert {row["provider"] for row in records[4].rows} == {"fastnorm", "quack"}


def test_the_last_row_of_a_job_holds(tmp_path):
    """Rows of several files complement each other; those beside another torch do not."""
    undated = {key: value for key, value in MACHINE.items() if key != "date"}
    a, b, c = norm("LN", [8, 64], us=1.0), norm("LN", [8, 64], us=2.0), norm("BN", [8, 64], us=3.0)
    record.write(tmp_path / "2026-12-01-2.json", {"machine": undated, "rows": [b]})
    record.write(tmp_path / "2026-12-01.json", {"machine": undated, "rows": [a, c, norm("RMS", [8, 64])]})
    record.write(tmp_path / "fused-2026-12-02.json", {"machine": undated, "rows": [norm("RMS", [8, 64], us=4.0)]})
    record.write(tmp_path / "a.json", {"machine": {**undated, "date": "2026-12-02T09:30"}, "rows": [norm("RMS", [8, 64])]})
    old = norm("GN", [4, 32, 8, 8])
    record.write(tmp_path / "2026-11-01.json", {"machine": {**undated, "torch": "2.11"}, "rows": [old]})
    (found,) = record.newest([tmp_path])
    held = {row["op"]: (row["us"]["wall"]["fastnorm"], row["measured"]) for row in found.rows}
    assert held == {"LN": (2.0, "2026-12-01 (run 2)"), "BN": (3.0, "2026-12-01"), "RMS": (4.0, "2026-12-02")}
    files = ("2026-12-01.json", "2026-12-01-2.json", "fused-2026-12-02.json")
    assert [(s.name, s.rows) for s in found.sources] == [(name, 1) for name in files]


def test_a_block_is_not_compiled_unless_it_says_so(tmp_path):
    old = {key: value for key, value in MODELS[1].items() if key in ("block", "shape", "dtype", "norms", "peak")}
    record.write(tmp_path / "a.json", {"machine": {**MACHINE, "date": "2026-11-01"}, "rows": [old]})
    record.write(tmp_path / "b.json", {"machine": MACHINE, "rows": MODELS})
    (found,) = record.newest([tmp_path])
    assert [row["step_us"] for row in found.rows if row["norms"] == "fused"] == [800.0, 500.0]


def test_when_a_file_was_measured(tmp_path):
    """By the machine's entry, else by the name, else, outside a repository, by the time of the file."""
    path = tmp_path / "2026-12-01-3.json"
    assert record.measured(path, {"date": "2026-11-30T08:15:00"}) == ("2026-11-30", "08:15", 1)
    assert record.measured(path, {}) == ("2026-12-01", "", 3)
    plain = tmp_path / "cpu.json"
    plain.write_text("{}")
    os.utime(plain, (1_000_000_000, 1_000_000_000))
    assert record.measured(plain, {}) == ("2001-09-09", "01:46", 1)


def test_a_commit_dates_a_file(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "cpu.json").write_text("{}")
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    dated = {**os.environ, "GIT_COMMITTER_DATE": "2020-02-03T04:05:06+00:00"}
    for command in (["init", "-q"], ["add", "cpu.json"], [*who, "commit", "-qm", "results"]):
        subprocess.run(["git", *command], cwd=tmp_path, env=dated, check=True)
    assert record.measured(tmp_path / "cpu.json", {}) == ("2020-02-03", "04:05", 1)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "out.json"
    record.write(path, {"rows": []})
    with pytest.raises(TypeError):
        record.write(path, {"rows": [object()]})
    os.link(path, tmp_path / "before.json")  # who has it open reads on in the old one
    record.write(path, {"rows": [1]})
    assert [json.loads(p.read_text())["rows"] for p in (path, tmp_path / "before.json")] == [[1], []]
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_figures_of_a_row():
    row = norm("LN", [8, 64], "backward", us=10.0, torch=3.0, copy=2.0)
    assert record.copies(row, "wall", "fastnorm") == pytest.approx(2.0)
    assert record.share(row, "wall", "fastnorm") == pytest.approx(0.75)  # of 3 tensors in the time of two copies, 4 tensors
    assert record.share(row, "wall", "torch") == pytest.approx(0.25)
    assert record.speedup(row, "wall", "keras") == pytest.approx(3.2)
    row["speedup"]["wall"]["torch"], row["copies"]["wall"]["torch"] = 2.9, 5.0  # measured in turn: not that of the medians
    assert record.speedup(row, "wall", "torch") == 2.9
    assert record.share(row, "wall", "torch") == pytest.approx(0.3)
    medians = {**row, "copies": {}, "speedup": {}}
    assert record.copies(medians, "wall", "torch") == pytest.approx(6.0)
    assert record.speedup(medians, "wall", "torch") == pytest.approx(3.0)
    assert record.speedup(row, "wall", "apex") is None
    assert record.primary(norm("LN", [8, 64], states=("host", "warm", "cold"))) == "cold"


# ---------------------------------------------------------------- figures of pictures and tables


def test_means_count_a_norm_once(records):
    """A GPU's row of a peer has torch's time, too."""
    rows = [norm("LN", [8, n], torch=ratio) for n, ratio in ((64, 1.0), (65, 4.0), (66, 2.0))]
    peer = {**norm("LN", [8, 64], torch=100.0), "provider": "quack"}
    assert report_figures.means([*rows, peer]) == {("LN", "fp32", "forward"): pytest.approx((2.0, 1.0, 4.0))}


def test_shares_over_n(records):
    found = report_figures.over_n([row for row in records[1].rows if row["model"] == "sweep over N"])
    assert list(found) == ["forward", "backward"]
    assert set(found["forward"]["fp32"]) == {"fastnorm", *OTHERS}
    assert found["forward"]["fp32"]["fastnorm"] == [(n, pytest.approx(0.4)) for n in (64, 256, 1024)]
    assert found["backward"]["fp32"]["torch"] == [(n, pytest.approx(0.3)) for n in (64, 256, 1024)]


def test_figures_of_a_peer_are_those_of_its_own_row(records):
    found = report_figures.panels_of(records[4].rows, report_figures.norm_of, record.speedup)["fp32"]["forward"]
    assert found["torch"] == {"LN 8192x64": pytest.approx(2.0)}


def test_blocks_beside_those_of_torch():
    found = report_figures.beside_torch(MODELS)
    assert found["step time"]["pre-norm fp32"] == {"fused": (0.8,) * 3, "fused compiled": (0.5,) * 3}
    assert found["peak memory"]["pre-norm fp32"] == {"fused": (0.75,) * 3, "fused compiled": (0.75,) * 3}


def test_what_is_faster_is_listed(records):
    found = report_tables.faster(records[1])
    listed = {(line["norm"], line["provider"], round(line["x"], 2)) for line in found}
    assert listed == {("BN 64x256x14x14 channels_last", p, x) for p, x in (("torch", 0.75), ("compile", 0.85), ("keras", 0.95))}
    rows = [norm("LN", [8, 64], torch=0.996), {**norm("LN", [8, 64], torch=0.5), "provider": "quack"}]
    assert (
        report_tables.faster(record.Record({}, [{**r, "measured": ""} for r in rows], "norms", Path(), ("", "", 1), True)) == []
    )


def luminance(color):
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def test_colors_stand_out_on_white_and_on_black():
    colors = {plots.GREY, *plots.SERIES.values(), *plots.COLORS.values(), *(color for color, _ in plots.PROVIDERS.values())}
    assert {
        color: background for color in colors for background in ("#ffffff", "#0d1117") if contrast(color, background) < 3
    } == {}
    markers = [marker for _, marker in plots.PROVIDERS.values()]
    assert len(set(markers)) == len(markers)


# ---------------------------------------------------------------- pictures and page


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The page and the pictures, by the command."""
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    out = tmp_path_factory.mktemp("out")
    arguments = ["--results", str(folder), "--out", str(out / "new" / "report.html"), "--pictures", str(out)]
    assert report.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def page(written):
    return (written / "new" / "report.html").read_text(encoding="utf-8")


LABELS = {
    "cpu-layer-norm": ["Layer norm on", "fp32 forward", "fp32 backward", ">fastnorm<", ">torch<", ">keras<", ">256<", ">N<"],
    "cpu-batch-norm": ["16x64x56x56", "64x256x14x14 channels_last", "bf16 forward", "bf16 backward", ">compile<"],
    "cpu-speedup": [">add+RMS<", ">BN<", ">forward<", ">backward<", ">bf16<"],
    "cpu-calls": [">LN 8x64 fp32<", "forward", "backward", "both", "eval", ">keras<"],
    "cpu-errors": [">BN channels_last<", ">LN<", ">fp32 fastnorm<", ">fp32 torch<", "std of the input"],
    "cpu-steps": ["step time", "peak memory", ">pre-norm fp32<", ">fused compiled<"],
    "cpu-losses": [">pre-norm fp32<", ">torch.nn<", ">fused<", ">loss<"],
    "gpu-layer-norm": ["Some GPU", "8192x64"],
    "gpu-speedup": [">LN<"],
}


def test_every_picture_is_there(written):
    from matplotlib import image

    assert {path.stem for path in written.glob("*.svg")} == set(LABELS)
    for name, labels in LABELS.items():
        svg = written.joinpath(f"{name}.svg")
        assert [label for label in labels if label not in svg.read_text()] == []
        assert svg.stat().st_size < 200_000
        picture = image.imread(svg.with_suffix(".png"))
        assert picture[0, 0, 3] == 0  # no background
        assert 0.01 < (picture[..., 3] > 0.5).mean() < 0.9


def test_a_picture_is_made_small_and_its_words_stay():
    marks = "".join(f'    <use href="#m" x="{x}.123456" y="2.0001" style="fill: red"/>\n' for x in (1, 2))
    svg = f'<g>\n  <!-- a tick -->\n  <g clip-path="url(#c)">\n{marks}  </g>\n  <text x="1.98765">0.825</text>\n</g>\n'
    small = '<use href="#m" x="1.12" y="2"/>\n<use href="#m" x="2.12" y="2"/>\n'
    shared = f'<g clip-path="url(#c)" style="fill: red">\n{small}</g>'
    assert plots._small(svg) == f'<g>\n{shared}\n<text x="1.99">0.825</text>\n</g>\n'


def test_the_same_rows_give_the_same_pictures(records, written, tmp_path):
    drawing = next(d for d in report_figures.drawings(records[1:4]) if d.name == "errors")
    drawing.draw(tmp_path / "again.png")
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (written / f"cpu-errors{suffix}").read_bytes()


class Reader(HTMLParser):
    """Checks that what is opened is closed, and collects ids, references and the rows of the tables."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.rows, self.loaded = [], [], set(), [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loaded += [(tag, key) for key in ("src", "data", "action", "poster") if key in attrs]
        self.references |= {attrs["href"]} if "href" in attrs else set()
        self.references |= set(re.findall(r"url\((.*?)\)", " ".join(filter(None, attrs.values()))))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"]:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_the_page_is_one_sound_file(page, read):
    assert read.open == []
    assert len(read.ids) == len(set(read.ids))
    assert {reference for reference in read.references if reference.removeprefix("#") not in read.ids} == set()
    assert read.loaded == []
    assert re.findall(r"https?://|@import|<link|\ssrc=", page) == []


def test_the_page_has_every_row(page, read, records):
    """A line for each state of each row of norms, and for each other row."""
    expected = sum(len(row.get("us", [""])) if r.kind == "norms" else 1 for r in records for row in r.rows)
    behind = sum(len(report_tables.faster(r)) for r in records if r.kind == "norms")
    means = len({(r.slug, report_tables.GROUPS.get(row["op"], "")) for r in records if r.kind == "norms"
                 for row in report_figures.own(r.rows)})  # fmt: skip
    assert len([row for row in read.rows if row]) == expected + behind + means
    text = "\n".join(" ".join(row) for row in read.rows)
    for row in NORMS:
        assert f"{row['op']} {'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']} {row['mode']}" in text
    assert "keras: y is off by <i>3</i>" in text
    assert "2 of 9 tests fail" in text
    assert "compile, LN: wrong: dx is off" in text
    assert "apex: No module named 'apex'" in text
    assert "LARGER" in text
    for found in records:
        assert f'<section id="{found.slug}">' in page
    assert "c0ffeec0ffee" in page


def test_empty_columns_are_left_out():
    columns = [report_page.Column(key, report_page.text(key)) for key in ("full", "empty")]
    made = report_page.table("some", columns, [{"full": 1}, {"empty": ""}])
    assert re.findall("<button[^>]*>(.*?)</button>", made) == ["full"]
    assert made.count("<td>") == 2


def test_what_is_written_is_escaped(page):
    assert "Some &lt;b&gt;CPU&lt;/b&gt; &amp; co" in page
    assert "<b>CPU" not in page
    assert "<i>3" not in page
    assert "apex: no &lt;module&gt;" in page


CLICKS = """<script>
const table = document.querySelector('[aria-label="Norms: all rows"] table');
const head = [...table.rows[0].cells].find(cell => cell.textContent === "us");
const box = head.closest(".table").querySelector("input");
const figures = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[head.cellIndex].textContent);
const seen = [];
for (const time of [1, 2]) {
  head.firstElementChild.click();
  seen.push([head.getAttribute("aria-sort"), figures()]);
}
box.value = "BN  BF16";
box.dispatchEvent(new Event("input"));
seen.push([box.closest(".table").querySelector("output").value, figures()]);
document.body.textContent = "SEEN" + JSON.stringify(seen) + "NEES";
</script>"""


def test_tables_sort_and_filter(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here to open the page in")
    path = tmp_path / "clicked.html"
    path.write_text(page.replace("</body>", f"{CLICKS}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    result = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    ascending, descending, filtered = json.loads(re.search("SEEN(.*)NEES", result.stdout)[1])
    figures = ["4"] * 4 + ["100"] * 12
    assert ascending == ["ascending", [*figures, ""]]  # by number, and what was not timed at the end
    assert descending == ["descending", [*figures[::-1], ""]]
    assert filtered == ["2 of 17 rows", ["100", "100"]]


def test_nothing_to_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    with pytest.raises(SystemExit) as ended:
        report.main(["--results", str(tmp_path), "--out", str(tmp_path / "report.html")])
    assert ended.value.code == 2
    assert f"no results in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
