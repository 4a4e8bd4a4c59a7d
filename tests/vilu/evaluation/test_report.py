"""vilu.evaluation.report: what its tables, HTML and figures hold, and that the HTML file stands alone."""

import base64
import csv
import io
import json
import re
import stat
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from tests.support.evaluation import captioned, closed, head, quick
from vilu.cli.tables import MIDDLE, WIDE, print_tables
from vilu.errors import UserError
from vilu.evaluation.columns import COLUMNS
from vilu.evaluation.evaluate import Case, evaluate
from vilu.evaluation.learning_curve import learning_curve
from vilu.evaluation.report import tables as report
from vilu.evaluation.report.figures import figures
from vilu.evaluation.report.formatting import best
from vilu.evaluation.report.html import summary

HOSTILE = "<script>alert('x')</script> $a_{$ [bold] \"&amp; ../../etc"
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def evaluation():
    """Two closed sets, captions with a sweep and a learning curve; a hostile name; rows with and without numbers."""
    train = closed(seed=9)
    cases = [
        Case(closed(200, name=HOSTILE), train, head(12)),
        Case(closed(noise=0.01, seed=2, name="easy"), train, head(12)),
        Case(captioned(60, dim=12), None, head(12)),
    ]
    found = quick(cases, ["MCM", "Entropy", "Rel-U", "LVU-MSE", "ViLU"], candidates=(8, 16))
    curve = learning_curve(train, cases[0].test, [20, 40, 80], [0, 1], lambda part, seed: head(12, seed), resamples=20)
    return replace(found, curves={HOSTILE: curve}, settings={"checkpoint": HOSTILE})


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "out"
    report.write(evaluation, output)
    return output


class Page(HTMLParser):
    """Tags in balance, references, text, and tables by the heading above them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str | None] = []
        self.images: list[str | None] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.images if tag == "img" else self.links).append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data + (" " if self.open[-1] == "small" else "")


def test_the_html_stands_alone(written):
    text = (written / report.HTML).read_text("utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert page.links == []
    assert not re.search(r"@import|url\(|https?://", text)
    assert len(page.images) == len(list(written.glob("*.png"))) > 8
    for source in page.images:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content, validate=True))).format == "PNG"


def test_every_string_of_the_user_is_escaped(written):
    text = (written / report.HTML).read_text("utf-8")
    page = Page(text)
    assert "<script" not in text
    assert HOSTILE in page.text
    assert ["checkpoint", HOSTILE] in page.rows


def test_the_html_holds_every_number_and_says_what_it_is(evaluation, written):
    page = Page((written / report.HTML).read_text("utf-8"))
    rows = {row[0]: row for row in page.rows if len(row) == 3 + len(COLUMNS)}
    result = evaluation.results[-1]  # the last table of this width wins above
    for one in result.rows:
        if one.reason:
            assert [one.method, one.reason] in page.rows
            continue
        for column, shown in zip(COLUMNS, rows[one.method][1:], strict=False):
            cell = one.cells.get(column.key)
            digits = 2 if column.key in ("aurc", "ece", "brier") else 1
            if cell is None:
                assert shown == ""
                continue
            values = [f"{100 * value:.{digits}f}" for value in (cell.value, cell.low, cell.high)]
            assert shown.split() == [f"{values[0]}{values[1]}–{values[2]}"]
    for column in COLUMNS:
        assert column.definition in page.text
    assert "20 resamples and seed 0" in page.text
    assert "AUC against the number of candidates K" in page.text
    assert "Learning curve" in page.text
    assert "all 80 answers are right: AUC, FPR95, AUPR-err are not defined" in page.text


def test_the_best_of_each_column_is_marked(evaluation):
    page = best(evaluation.results[0])
    cells = [row.cells for row in evaluation.results[0].rows if row.cells]
    assert page["auc"] == max(cell["auc"].value for cell in cells)
    assert page["fpr95"] == min(cell["fpr95"].value for cell in cells)
    assert page["brier"] == min(cell["brier"].value for cell in cells if "brier" in cell)
    assert "auc" not in best(evaluation.results[1])


def test_the_json_is_complete_and_strict(evaluation, written):
    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((written / report.JSON).read_text("utf-8"), parse_constant=refuse)
    assert set(document) == {
        "format", "version", "settings", "versions", "metrics", "results", "mean", "sweeps", "learning_curves", "files",
    }  # fmt: skip
    assert (document["format"], document["version"]) == ("vilu-evaluation", 1)
    assert document["settings"] == {"checkpoint": HOSTILE, "resamples": 20, "level": 0.95, "seed": 0}
    assert set(document["versions"]) >= {"python", "vilu", "torch", "numpy"}
    assert sorted(document["files"]) == sorted(path.name for path in written.iterdir())
    first = document["results"][0]
    assert set(first) == {
        "name", "trained_on", "captions", "candidates", "samples", "dropped", "failures", "accuracy", "chance",
        "chance_rule", "note", "methods",
    }  # fmt: skip
    cell = evaluation.results[0].rows[0].cells["auc"]
    assert first["methods"]["MCM"]["metrics"]["auc"] == {"value": cell.value, "low": cell.low, "high": cell.high}
    assert set(first["methods"]["MCM"]["vilu_minus"]["fpr95"]) == {"difference", "low", "high", "p_value"}
    assert first["methods"]["Entropy"]["metrics"]["ece"] is None
    assert document["results"][1]["methods"]["MCM"]["metrics"]["auc"] is None
    captions = document["results"][2]
    assert captions["methods"]["LVU-MSE"]["reason"] == "needs training data to be fitted on"
    assert [result["candidates"] for result in document["sweeps"]["captions"]] == [8, 16]
    assert document["mean"]["methods"]["LVU-MSE"]["reason"] == "not computed on captions"
    assert [point["size"] for point in document["learning_curves"][HOSTILE]["points"]] == [20, 40, 80]


def test_the_csv_has_a_line_for_every_cell(evaluation, written):
    lines = list(csv.DictReader(io.StringIO((written / report.CSV).read_text("utf-8"))))
    # Three sets, one of them at two K, and the mean; five methods.
    assert len(lines) == (2 + 2 + 1) * 5 * len(COLUMNS)
    first = lines[0]
    assert (first["set"], first["method"], first["metric"]) == (HOSTILE, "MCM", "auc")
    assert float(first["value"]) == evaluation.results[0].rows[0].cells["auc"].value
    assert float(first["p_value"]) == evaluation.results[0].rows[0].against["auc"].p_value
    assert {line["candidates"] for line in lines if line["set"] == "captions"} == {"8", "16"}
    for line in lines:
        assert not (line["reason"] and line["value"])
        assert "nan" not in line["value"].lower()


def test_the_figures(evaluation):
    found = figures(evaluation)
    kinds = [name.split("-")[0] + " " + re.search(r"(roc|risk|dens|reli|cand|learn)\w*", name)[0] for name in found]
    assert kinds == [
        "1 roc", "1 risk", "1 densities", "1 reliability", "1 learning",
        "2 risk", "2 densities", "2 reliability",
        "3 roc", "3 risk", "3 densities", "3 reliability", "3 candidates",
    ]  # fmt: skip
    for name, content in found.items():
        assert re.fullmatch(r"[A-Za-z0-9-]+\.png", name)
        image = Image.open(io.BytesIO(content)).convert("L")
        assert min(image.size) > 200
        colors = image.getcolors(256)
        assert colors is not None
        assert len(colors) > 20


def test_a_set_without_any_number_still_has_a_report(tmp_path):
    empty = evaluate([Case(closed())], ["ViLU", "Rel-U"], resamples=3)
    report.write(empty, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {report.JSON, report.CSV, report.HTML}
    assert "ViLU could not be compared" in (tmp_path / "out" / report.HTML).read_text("utf-8")


@pytest.mark.parametrize("width", [60, MIDDLE, WIDE])
def test_the_tables_fit_the_terminal(evaluation, width):
    shown_on = io.StringIO()
    console = Console(file=shown_on, width=width, force_terminal=False)
    print_tables(evaluation, console)
    shown = shown_on.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "needs training data to be fitted on" in shown.replace("\n", " ")
    if width >= MIDDLE:
        cell = evaluation.results[0].rows[0].cells["accuracy_at_90"]
        assert f"{100 * cell.value:.1f}" in shown
        assert "…" not in shown
        assert (f"{100 * cell.low:.1f}–{100 * cell.high:.1f}" in shown) == (width >= WIDE)


def test_the_summary_names_the_rival(evaluation):
    said = summary(evaluation)
    rows = [row for row in evaluation.results[0].rows if row.method != "ViLU"]
    rival = max(rows, key=lambda row: row.cells["auc"].value)
    assert f"({rival.method})" in said
    assert re.search(r"significantly (better|worse)|the difference is not significant", said)
    assert "easy" not in said


def test_an_earlier_report_is_replaced_whole(evaluation, tmp_path):
    output = tmp_path / "deep" / "out"
    report.write(evaluation, output)
    small = evaluate([Case(closed())], ["MCM"], resamples=3)
    report.write(small, output)
    assert len(json.loads((output / report.JSON).read_text())["results"]) == 1
    assert len(list(output.glob("*.png"))) == 4
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert stat.S_IMODE(output.stat().st_mode) & 0o500 == 0o500


def test_nothing_else_is_ever_replaced(evaluation, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"'notes\.txt', which is not part of an earlier report"):
        report.write(evaluation, mine)
    assert (mine / "notes.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        report.write(evaluation, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        report.check_output(tmp_path / "file" / "out")
    small = evaluate([Case(closed())], ["MCM"], resamples=3)
    report.write(small, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        report.write(small, tmp_path / "out")


def test_a_full_disk_leaves_the_earlier_report(tmp_path, monkeypatch):
    small = evaluate([Case(closed())], ["MCM"], resamples=3)
    output = tmp_path / "out"
    report.write(small, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        report.write(small, output)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
