"""What commands say and where: tables that fit, lines for a pipe, progress without a terminal, -q, -v, --log-file."""

import json
import os
import subprocess
import sys
import time

import click
import pytest
from rich.cells import cell_len

from vilu.cli import group, output, progress, run, tables
from vilu.errors import FailedError, UserError


@pytest.fixture(autouse=True)
def _plain():
    yield
    output.set_up()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(output, "in_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")


ROWS = [
    ("photos/" + "very long folder/" * 6 + "IMG_0042.jpg", "small red striped star", "0.912", "0.100", "accept"),
    ("写真/" * 20 + "名前.jpg", "a", "0.100", "0.900", "reject"),
    ("a\tb\nc\x1b[31m.jpg", "[bold]label[/]", "0.500", "0.500", "accept"),
    ("\udcff.jpg", "x", "0.500", "0.500", "reject"),
]


def test_a_table_fits_eighty_columns(terminal, capsys):
    tables.print_rows(tables.ANSWER_COLUMNS, ROWS, cut=(0, 1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert all(cell_len(line.rstrip()) <= 80 for line in lines)
    assert lines[2].split()[0].startswith("photos")
    assert "IMG_0042.jpg" in lines[2]
    assert "striped star" in lines[2]
    assert "\\t" in lines[4]
    assert "[bold]label[/]" in lines[4]
    assert "\x1b[31m.jpg" not in lines[4]


def test_a_pipe_gets_whole_cells_between_tabs(capsys):
    tables.print_rows(tables.ANSWER_COLUMNS, ROWS, cut=(0, 1))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [len(cells) for cells in lines] == [5] * len(ROWS)
    assert lines[0] == list(ROWS[0])
    assert lines[2][0] == r"a\tb\nc\x1b[31m.jpg"


@pytest.mark.parametrize("width", [8, 9, 20])
@pytest.mark.parametrize("text", ["short", "a" * 30, "名" * 30])
def test_a_shortened_text_has_its_beginning_and_end(text, width):
    found = tables.shorten(text, width)
    assert cell_len(found) <= width
    assert found[0] == text[0]
    assert found[-1] == text[-1]
    assert (found == text) == (cell_len(text) <= width)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with progress.progress_bar() as bar:
        bar("embedding", 1200, 4000)
        wait_for(lambda: "embedding" in sys.stderr.getvalue())
        bar("loading", 0, 1)
        wait_for(lambda: "loading: after" in sys.stderr.getvalue())
    out, err = capsys.readouterr()
    assert out == ""
    assert "embedding: 1,200 of 4,000 (30%) after 0 s" in err.splitlines()


def wait_for(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_short_step_and_a_quiet_one_print_nothing(monkeypatch, capsys):
    with progress.progress_bar() as bar:
        bar("embedding", 1, 2)
    output.set_up(quiet=True)
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with progress.progress_bar() as bar:
        bar("embedding", 1, 2)
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vilu", "train", "--help"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


# ------------------------------------------------------------------------------------- the group's options


@pytest.fixture
def speaking(monkeypatch, capsys):
    """speaking("-q") -> (exit code, stdout, stderr) of a command that says something of each kind."""

    @click.command("health")
    @click.option("--fail", type=click.Choice(["user", "failed"]))
    def health(fail):
        output.note("a note")
        output.warn("a warning")
        output.document({"nan": float("nan"), "rows": [1.5, float("inf")], "name": "é"})
        if fail:
            raise {"user": UserError, "failed": FailedError}[fail]("it is wrong")

    monkeypatch.setattr("vilu.cli.health.health_command", health)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["vilu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run(group, "vilu")
        return stopped.value.code, *capsys.readouterr()

    return call


def test_quiet_hides_notes_alone(speaking):
    code, out, err = speaking("health")
    assert (code, err) == (0, "a note\na warning\n")
    assert json.loads(out) == {"nan": None, "rows": [1.5, None], "name": "é"}
    assert speaking("-q", "health") == (0, out, "a warning\n")


@pytest.mark.parametrize(("kind", "code"), [("user", 2), ("failed", 1)])
def test_the_exit_code_says_who_is_at_fault(speaking, kind, code):
    ended, _, err = speaking("-q", "health", "--fail", kind)
    assert (ended, err) == (code, "a warning\nvilu: it is wrong\n")
    ended, _, err = speaking("-v", "health", "--fail", kind)
    assert ended == code
    assert "Traceback" in err


def test_the_log_file_has_all_that_was_said(speaking, tmp_path):
    log = tmp_path / "log"
    speaking("--log-file", log, "-q", "health", "--fail", "failed")
    speaking("--log-file", log, "health")
    text = log.read_text()
    assert text.count("INFO vilu.cli.said: a note") == 2
    assert text.count("WARNING vilu.cli.said: a warning") == 2
    assert text.count("vilu: it is wrong") == 1
    assert '"rows"' in text


def test_a_log_file_that_cannot_be_is_one_line(speaking, tmp_path):
    code, out, err = speaking("--log-file", tmp_path / "absent" / "log", "health")
    assert (code, out) == (2, "")
    assert "cannot be written (No such file or directory)" in err
    assert err.count("\n") == 1
    assert speaking("-q", "-v", "health")[0] == 2
