"""Every program in examples/ runs as its first lines say, and prints what it promises."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test():
    here = Path(__file__).read_text("utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f'run("{example.name}"' in here, f"no test runs {example.name}"


@pytest.mark.slow
def test_train_from_embeddings():
    printed = run("train_from_embeddings.py").splitlines()
    auc = {line.split(":")[0]: float(line.split("AUC ")[1].split()[0]) for line in printed}
    assert set(auc) == {"MCM", "ViLU"}
    assert auc["ViLU"] > auc["MCM"] - 0.02


@pytest.mark.slow
def test_evaluate(tmp_path):
    printed = run("evaluate.py", tmp_path)
    assert all(f"{method} " in printed for method in ("MCM", "Entropy", "Doctor", "Rel-U", "ViLU"))
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_calibrate_and_refuse():
    refused, promised = run("calibrate_and_refuse.py").splitlines()
    assert "refused" in refused
    accepted = float(promised.split("on new images ")[1].split("%")[0])
    risk = float(promised.split("accepted, ")[1].split("%")[0])
    assert accepted > 10
    assert risk <= 10


@pytest.mark.slow
@pytest.mark.server
def test_export_serve_ask(tmp_path):
    printed = run("export_serve_ask.py", tmp_path).splitlines()
    assert len(printed) == 8
    assert all(line.endswith(("accepted", "refused")) for line in printed)
    assert (tmp_path / "model_repository" / "parity.json").is_file()


@pytest.mark.server
def test_own_labels(running, photos, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(photos[0])
    printed = run("own_labels.py", tmp_path / "photo.jpg", "zero", "one", "--url", running.grpc_url).splitlines()
    assert printed[0].split(":")[0] in ("zero", "one")
    assert sorted(line.split("% ")[1] for line in printed[1:]) == ["one", "zero"]


@pytest.mark.server
def test_async_folder(running, photos, tmp_path):
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    for i, photo in enumerate(photos):
        (folder / f"{i}.jpg").write_bytes(photo)
    (folder / "damaged.jpg").write_bytes(photos[0][:100])
    printed = run("async_folder.py", tmp_path / "photos", tmp_path / "answers.csv", "--url", running.grpc_url)
    assert printed.startswith(f"{len(photos) + 1} answers")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    assert [row["image"] for row in rows if row["error"]] == [str(folder / "damaged.jpg")]
    assert all(0 <= float(row["failure_probability"]) <= 1 for row in rows if not row["error"])
