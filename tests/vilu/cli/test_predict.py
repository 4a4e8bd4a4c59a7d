"""`vilu predict`: the answers in each format, with one line for each bad image."""

import csv
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from vilu import Predictor, save_checkpoint
from vilu.cli import main
from vilu.tiny import data


@pytest.fixture(scope="module")
def world(tmp_path_factory, checkpoint, clip):
    """A folder with a checkpoint and images, of which the second is no image; the answers for the others."""
    root = tmp_path_factory.mktemp("predict")
    save_checkpoint(checkpoint, root / "head.safetensors")
    (root / "images").mkdir()
    for i, image in enumerate(data.digits("test").images[:3]):
        Image.fromarray(np.asarray(image)).save(root / "images" / f"{i}.png")
    (root / "images" / "0bad.png").write_bytes(b"no image")
    good = [root / "images" / f"{i}.png" for i in range(3)]
    return root, Predictor(checkpoint, clip=clip)(good)


@pytest.fixture
def predict(world, monkeypatch, capfdbinary):
    """predict("--format csv") -> (exit code, stdout, stderr) of `vilu predict` on the folder of images."""
    root, _ = world

    def call(*options):
        ckpt = str(root / "head.safetensors")
        monkeypatch.setattr("sys.argv", ["vilu", "predict", str(root / "images"), "--ckpt", ckpt, *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            main()
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return stopped.value.code, out, err.decode()

    return call


def check(rows, answers):
    """Rows of a file: three answers and, in its place, the image that cannot be read."""
    bad = rows.pop(1)
    assert bad["source"].endswith("0bad.png")
    assert "not a JPEG" in bad["error"]
    assert not bad.get("label")
    for row, answer in zip(rows, answers, strict=True):
        assert row["source"] == answer.source
        assert row["label"] == answer.label
        assert float(row["failure_probability"]) == pytest.approx(answer.failure_probability, abs=1e-5)
        assert float(row["confidence"]) == pytest.approx(answer.confidence, abs=1e-5)
        assert float(row["outlier_score"]) == pytest.approx(answer.outlier_score, abs=1e-5)
        assert not row["error"]


def test_piped_it_prints_tab_separated_lines(world, predict):
    code, out, err = predict()
    assert code == 1
    lines = [line.split("\t") for line in out.decode().splitlines()]
    assert [line[0] for line in lines] == [answer.source for answer in world[1]]
    for (_, label, confidence, failure, verdict, outlier), answer in zip(lines, world[1], strict=True):
        assert float(outlier) == pytest.approx(answer.outlier_score, abs=6e-4)
        assert (label, verdict) == (answer.label, "accept" if answer.accept else "reject")
        assert float(confidence) == pytest.approx(answer.confidence, abs=6e-4)
        assert float(failure) == pytest.approx(answer.failure_probability, abs=6e-4)
    assert err.count("\n") == 1
    assert "0bad.png: not a JPEG, PNG or WEBP image" in err


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("where", ["file", "-", "stdout"])
def test_every_format_goes_to_a_file_or_to_standard_output(world, predict, tmp_path, kind, where):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"answers.{kind}"
    options = {"file": ["--output", path], "-": ["--output", "-", "--format", kind], "stdout": ["--format", kind]}
    code, out, _ = predict(*options[where])
    assert code == 1
    if where == "file":
        assert out.decode() == f"{path}: 4 images, 1 without an answer\n"
        out = path.read_bytes()
    if kind == "parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(io.BytesIO(out)).to_pylist()
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(out.decode())))
    else:
        rows = [{"error": None} | json.loads(line) for line in out.splitlines()]
    check(rows, world[1])


def test_json_is_one_document(world, predict):
    code, out, _ = predict("--json")
    assert code == 1
    check([{"error": None} | row for row in json.loads(out)], world[1])


def test_an_interrupted_run_goes_on(world, predict, tmp_path, monkeypatch):
    answer = Predictor._answers

    def interrupted(*args):
        monkeypatch.setattr(Predictor, "_answers", answer)
        raise KeyboardInterrupt

    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr(Predictor, "_answers", interrupted)
    code, out, err = predict("--output", path, "--batch-size", "2")
    assert (code, out) == (130, b"")
    assert f"the answers until then are in {tmp_path / 'answers.part.jsonl'}, and --resume goes on from there" in err
    code, out, _ = predict("--output", path, "--resume")
    assert (code, out.decode()) == (1, f"{path}: 4 images, 1 without an answer\n")
    check([{"error": None} | json.loads(line) for line in path.read_text().splitlines()], world[1])


def test_options_choose_labels_classes_and_threshold(predict, tmp_path):
    _, out, _ = predict("--label", "a red star", "--label", "a blue cross", "--threshold", "1", "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["label"] for row in rows if "label" in row} <= {"a red star", "a blue cross"}
    assert all(row["accept"] for row in rows if "label" in row)
    (tmp_path / "names.txt").write_text("a cat\na dog\n")
    _, out, _ = predict("--classes", tmp_path / "names.txt", "--details", "--format", "jsonl")
    for row in map(json.loads, out.splitlines()):
        if "label" in row:
            assert {label for label, _ in row["top"]} == {"a cat", "a dog"}
            assert len(row["concepts"]) == 2
            assert -1 <= row["entropy"] <= 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label", "a", "--label", "b", "--classes", "x"], "--label and --classes: give one or the other"),
        (["--json", "--output", "answers.csv"], "--json takes the place of --output"),
        (["--resume"], "--resume needs the --output"),
        (["--output", "answers.txt"], "must end in .jsonl, .csv, .parquet"),
        (["--output", "answers.csv", "--format", "tsv"], "--format tsv is for standard output"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--classes", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(predict, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = predict(*options)
    assert (code, out) == (2, b"")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
