"""Answers in files: each format holds what was answered, and a file is whole or not there."""

import csv
import json

import pytest

from vilu.errors import UserError
from vilu.serving import Answer, ServerUnavailable
from vilu.serving.answer_file import DETAILS, FIELDS, FORMATS, ROWS, open_answer_file

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
