"""Answers in files: each format holds what was answered, and a file is whole or not there."""

import csv
import json
import os

import pytest

from vilu.errors import UserError
from vilu.serving import Answer, ServerUnavailable
from vilu.serving.answer_file import DETAILS, FIELDS, FORMATS, ROWS, open_answer_file, read_part

GOOD = Answer("a.jpg", "cat", 2, 0.75, 0.125, True, class_set="pets@3", top=(("cat", 0.75), ("dog", 0.25)), entropy=0.5)
BAD = Answer("b.jpg", error="not an image")


def rows_of(path):
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    with path.open(newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_holds_the_answers(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"answers{suffix}"
    with open_answer_file(path, (*FIELDS, *DETAILS)) as file:
        file.add(GOOD)
        file.add(BAD)
        assert not path.exists()
    good, bad = rows_of(path)
    assert (good["source"], good["label"], float(good["failure_probability"])) == ("a.jpg", "cat", 0.125)
    pairs = {".jsonl": [["cat", 0.75], ["dog", 0.25]], ".csv": '[["cat", 0.75], ["dog", 0.25]]'}
    assert good["top"] == pairs.get(suffix, [{"label": "cat", "weight": 0.75}, {"label": "dog", "weight": 0.25}])
    assert (bad["source"], bad["error"]) == ("b.jpg", "not an image")
    assert not bad.get("label")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_large_parquet_file_is_written_in_parts(tmp_path):
    pytest.importorskip("pyarrow")
    with open_answer_file(tmp_path / "a.parquet") as file:
        for index in range(ROWS + 3):
            file.add(Answer(f"{index}.jpg", "cat", index))
    assert [row["class_index"] for row in rows_of(tmp_path / "a.parquet")] == list(range(ROWS + 3))


def test_what_was_answered_before_an_error_is_kept_beside(tmp_path):
    (tmp_path / "a.csv").write_text("an earlier run\n")

    def interrupted():
        with open_answer_file(tmp_path / "a.csv") as file:
            file.add(GOOD)
            raise ServerUnavailable("gone")

    with pytest.raises(UserError, match=r"gone; the answers until then are in .*a\.part\.csv"):
        interrupted()
    assert [row["source"] for row in rows_of(tmp_path / "a.part.csv")] == ["a.jpg"]
    assert (tmp_path / "a.csv").read_text() == "an earlier run\n"


@pytest.mark.parametrize("name", ["answers.txt", "answers", "missing/answers.csv"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"must end in|cannot be written") as error, open_answer_file(tmp_path / name):
        pass
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("columns", [FIELDS, (*FIELDS, *DETAILS)], ids=["plain", "details"])
def test_an_interrupted_file_goes_on_where_it_stopped(tmp_path, suffix, columns):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path, whole = tmp_path / f"a{suffix}", tmp_path / f"whole{suffix}"
    with open_answer_file(whole, columns) as file:
        for answer in (GOOD, BAD, GOOD):
            file.add(answer)

    def interrupted():
        with open_answer_file(path, columns, earlier=read_part(path, columns)) as file:
            file.add(GOOD)
            file.add(BAD)
            raise KeyboardInterrupt

    assert read_part(path, columns) == []
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; the answers until then are in .*a\.part\..* --resume"):
        interrupted()
    assert [row["source"] for row in read_part(path, columns)] == ["a.jpg", "b.jpg"]
    with open_answer_file(path, columns, earlier=read_part(path, columns)) as file:
        file.add(GOOD)
    assert rows_of(path) == rows_of(whole)
    assert [row["source"] for row in read_part(path, columns)] == ["a.jpg", "b.jpg", "a.jpg"]
    with pytest.raises(UserError, match=r"holds .*, not "):
        read_part(path, (*columns, "embedding"))
    path.write_bytes(b"\x00\xffnothing\n")
    with pytest.raises(UserError):
        read_part(path, columns)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_that_a_kill_cut_is_asked_again(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with open_answer_file(path) as file:
        file.add(GOOD)
        file.add(GOOD)
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_part(path, FIELDS)) == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_earlier_answers_are_kept_until_they_are_written_again(tmp_path, suffix):
    """A kill while a resumed run begins leaves what the first one kept."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"a{suffix}"

    def interrupted():
        with open_answer_file(path) as file:
            file.add(GOOD)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    kept = read_part(path, FIELDS)
    with open_answer_file(path, earlier=kept) as file:
        assert read_part(path, FIELDS) == kept
        file.add(GOOD)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"a{suffix}"]
    assert len(read_part(path, FIELDS)) == 2


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "there").mkdir()
    link, pipe = tmp_path / "a.csv", tmp_path / "pipe"
    link.symlink_to(tmp_path / "there" / "real.csv")
    with open_answer_file(link) as file:
        file.add(GOOD)
    assert link.is_symlink()
    assert len(rows_of(link)) == 1
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open_answer_file(pipe, suffix=".jsonl") as file:
        file.add(GOOD)
    assert json.loads(os.read(reader, 10_000))["source"] == GOOD.source
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.csv", "pipe", "there"]
