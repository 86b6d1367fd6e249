"""The report's page: it says what the record says, loads nothing, runs nothing, and escapes what is not its own."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from recorded_run import make_run
from typer.testing import CliRunner

from linearize.cli import app
from linearize.evaluate import TEACHER
from linearize.modeling.errors import EvaluationError
from linearize.report import plots, write_report
from linearize.report.record import open_runs
from linearize.report.words import summary

HOSTILE = (
    """<script>alert(1)</script><img src=x onerror="a()"> 'q' ${7*7} {{7*7}} $a^b$ | ]]> &lt; """
    "[x](javascript:1) `"
)
VOID = {"meta", "br", "hr", "img", "input", "link"}
ORDER = [
    "summary", "loss", "layers", "fidelity", "recall", "costs", "ablations", "gates", "continuation", "lm-eval",
    "provenance",
]  # fmt: skip


class Page(HTMLParser):
    """A page's elements, its text by section, its table rows; fails where tags do not pair."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.attributes = [], [], [], [], []
        self.section, self.texts, self.rows = "", {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.attributes += given
        self.ids += [given["id"]] if "id" in given else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag == "section":
            self.section = given["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("hostile") / "run", note=HOSTILE)
    return [path.read_text(encoding="utf-8") for path in write_report([run])]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("bare") / "run", bare=True)
    page, twin = write_report([run])
    assert (page, twin) == (run / "report.html", run / "report.md")
    return run, page.read_text(encoding="utf-8"), twin.read_text(encoding="utf-8")


def test_the_page_parses_and_has_its_sections_in_order(hostile):
    page = Page(hostile[0])
    assert [key for key in page.texts if key in ORDER] == ORDER
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") >= 20


def test_the_page_loads_nothing_and_runs_nothing(hostile, bare):
    for text in (hostile[0], bare[1]):
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
        assert not [name for name in page.attributes if name.startswith("on")]
        assert all(link.startswith("#") for link in page.links)
        assert {link[1:] for link in page.links} <= set(page.ids)
        assert not re.search(r"https?://|@import", text)
        assert all(at.startswith("#") for at in re.findall(r"url\(([^)]*)", text))


def test_what_comes_from_a_run_is_escaped_and_not_computed(hostile):
    html, markdown = hostile
    page, said = Page(html), " ".join(HOSTILE.split())
    for section in ("summary", "recall", "ablations", "gates", "lm-eval", "provenance"):
        assert said in " ".join(page.texts[section].split()), section
    assert "<script" not in html + markdown.split("```")[0]
    assert "<img" not in markdown.split("### Recipe")[0]
    assert "](javascript" not in markdown.split("### Recipe")[0]
    assert " 49 " not in page.texts["provenance"]


def test_markdown_tables_are_as_wide_as_their_headers(hostile):
    width = None
    for line in hostile[1].splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells is None or cells == width, line
        width = cells


def test_the_numbers_are_those_of_the_record(hostile, tmp_path):
    run = make_run(tmp_path / "run", note=HOSTILE)
    record = json.loads((run / "results.json").read_text())["results"]
    rows = {tuple(row) for row in Page(hostile[0]).rows}
    for length, by_model in record["likelihood"].items():
        for model, measured in by_model.items():
            if model == TEACHER:
                continue
            for bucket in measured["buckets"]:
                where = f"{bucket['start']:,} to {bucket['end'] - 1:,}"
                figures = (f"{bucket['kl']:.4f}", f"{bucket['top1']:.3f}", f"{bucket['tokens']:,}")
                assert (model, where, *figures) in rows, length
    flat = [[" ".join(cell.split()) for cell in row] for row in rows]
    for gate in record["gates"]["gates"]:
        found = next(row for row in flat if row[0] == gate["name"])
        assert gate["status"] in found[1]
        assert found[3:5] == ["" if gate[k] is None else f"{gate[k]:.3g}" for k in ("difference", "bound")]
    for cell in record["suite"]["cells"]:
        where = [cell["label"], f"{cell['length']:,}", f"{cell['depth']:.0f} %", cell["model"]]
        found = next(row for row in flat if row[:4] == where)
        low, high = 100 * cell["low"], 100 * cell["high"]
        assert found[4].startswith(f"{100 * cell['score']:.0f} % [{low:.0f}, {high:.0f}]")
        assert ("below gate" in found[4]) == cell["gated"]
    for point in json.loads((run / "speed.json").read_text())["speed"]["points"]:
        if point["ms"] is None:
            assert any(
                row[:3] == [f"{point['length']:,}", "1", TEACHER] and point["not_run"] in row for row in flat
            )


def test_what_was_not_measured_is_said_not_to_have_run(bare):
    _, html, markdown = bare
    page = Page(html)
    for section in ("loss", "layers", "costs", "ablations", "gates", "continuation", "lm-eval"):
        assert "Not run: " in page.texts[section], section
    assert "Not run: the recall suite by depth" in page.texts["recall"]
    assert (
        "Not run: integrity gates, the recall suite by depth, ablations, free continuation, lm-eval tasks, speed."
        in page.texts["summary"]
    )
    assert markdown.count("Not run: ") >= 8


def test_the_summary_begins_with_a_linear_branch_that_nothing_shows_to_be_used(tmp_path):
    run = make_run(tmp_path / "run", bare=True)
    assert any(
        line.startswith("The linear branch is used: passkey at 1,024")
        for line in summary(open_runs([run])[0])
    )
    record = json.loads((run / "results.json").read_text())
    for cell in record["results"]["recall"]:
        if cell["model"] == "student":
            other = [
                c
                for c in record["results"]["recall"]
                if (c["task"], c["length"]) == (cell["task"], cell["length"])
            ]
            cell["hits"] = next(c["hits"] for c in other if c["model"] == "window control")
    (run / "results.json").write_text(json.dumps(record))
    first = summary(open_runs([run])[0])[0]
    assert first.startswith("No evidence that the linear branch is used: in none of 2 recall cells")
    assert "KL is -0.030" in first


def test_likelihood_that_promises_more_than_is_written_is_said(tmp_path):
    """Only lines over all depths that the teacher masters, and only what the count of prompts does not explain."""
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "results.json").read_text())
    whole = record["results"]["suite"]["cells"]
    cell = next(c for c in whole if c["model"] == "student")

    def said(*lines):
        made = [
            cell | {"task": task, "label": task, "depth": None, "model": model, "length": 512, "gated": gated}
            | {"correct": right, "score": right / 50, "likelihood": sure, "gap": 100 * (sure - right / 50)}
            for task, gated, *models in lines
            for model, right, sure in zip((TEACHER, "student"), *zip(*models, strict=True), strict=True)
        ]  # fmt: skip
        record["results"]["suite"]["cells"] = whole + made
        (folder / "results.json").write_text(json.dumps(record))
        return [line for line in summary(open_runs([folder])[0]) if "likelihood" in line]

    assert said() == []
    near, gated = ("qa1", False, (50, 1.0), (40, 0.9)), ("qa3", True, (10, 0.2), (0, 0.9))
    (line,) = said(near, gated)
    assert line.startswith("In all 1 lines of the suite") and "within 10 points" in line
    (line,) = said(near, ("MK2", False, (48, 1.0), (20, 0.98)), gated)
    assert "look better than it writes: in 1 of 2 lines" in line
    assert "MK2 at 512 tokens: 98 % by likelihood, 40 % [28, 54] written, over 50 prompts" in line
    assert line.endswith("a gap of +58 points, where the teacher's is +4.")


def test_several_runs_share_plots_and_tables(tmp_path):
    runs = [
        make_run(tmp_path / name, bare=True, gain=gain) for name, gain in (("lolcats", 1.0), ("liger", 2.0))
    ]
    words = ["report", *map(str, runs), "--output", str(tmp_path / "both.html"), "--json"]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["markdown"] == str(tmp_path / "both.md")
    page = Page((tmp_path / "both.html").read_text())
    for text in (page.texts["fidelity"], page.texts["costs"], page.texts["summary"]):
        assert "lolcats" in text and "liger: window control" in text
    fidelity = [row for row in page.rows if row[:2] == ["1,024", TEACHER]]
    assert len(fidelity) == 1  # one teacher, one row
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_record_makes_the_same_page(bare):
    run, html, markdown = bare
    assert [path.read_text(encoding="utf-8") for path in write_report([run])] == [html, markdown]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", bare=True)
    for folder, output in ((tmp_path, None), (run, tmp_path / "page.txt"), (run, tmp_path / "run")):
        with pytest.raises(EvaluationError):
            write_report([folder], output)
    with pytest.raises(EvaluationError, match="no run is named"):
        write_report([])
    (run / "results.json").write_text('{"results": {"source": 1}}')
    made = CliRunner().invoke(app, ["report", str(run)])
    assert made.exit_code == 2
    assert "results.json: cannot be read" in made.stderr and made.stderr.count("\n") == 1
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(EvaluationError, match=r"linearize\[report\]"):
        write_report([run])
    assert sorted(path.name for path in run.iterdir()) == ["results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_names_that_would_meet_are_moved_apart():
    lines = [plots.Line(f"name{i}", [1, 2, 4], [1.0, 1.0, 1.0 + i / 1000], series=i) for i in range(5)]
    svg = plots.lines("k", lines, x="x", y="y", alt="a")
    found = re.findall(r'y="([\d.]+)"[^>]*>name\d', svg)
    heights = sorted(map(float, found))
    assert len(heights) == 5
    assert all(b - a > 12 for a, b in itertools.pairwise(heights))


def test_a_number_that_is_not_known_leaves_a_gap():
    line = plots.Line(
        "a", [1, 2, 4], [1.0, float("nan"), 3.0], [0.5, float("nan"), 2.5], [1.5, float("nan"), 3.5]
    )
    assert (
        "nan"
        not in plots.lines("k", [line, plots.Line("b", [1], [float("nan")])], x="x", y="y", alt="a").lower()
    )
