"""`vilu info`: what a checkpoint and a repository hold, and hostile files in one line."""

import json
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import replace

import pytest
from safetensors import safe_open

import vilu
from vilu import Checkpoint, ViLUHead, save_checkpoint
from vilu.cli import main
from vilu.serving import about

NOTE = {
    "data": "digits",
    "split": "val",
    "samples": 400,
    "threshold": {
        "rule": "risk", "target": 0.05, "threshold": 0.4, "coverage": 0.8, "risk": 0.02, "tpr": 0.9, "samples": 400,
        "failures": 30, "confidence": 0.95, "bound": 0.048,
    },
}  # fmt: skip
META = {
    "data": "digits",
    "samples": 1000,
    "accuracy": 0.92,
    "chance": 0.1,
    "recipe": {"name": "default", "seed": 3},
    "best_epoch": 7,
    "validation": {"auc": 0.91, "mcm_auc": 0.88, "fpr95": 0.3, "mcm_fpr95": 0.4, "samples": 1000, "failures": 80},
    "calibration": NOTE,
}


@pytest.fixture
def info(monkeypatch, capsys):
    """info(path, "--json") -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["vilu", "info", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


def lines_of(out):
    return {line[:14].strip(): line[14:] for line in out.splitlines()}


def test_a_checkpoint(info, checkpoint, tmp_path):
    path = tmp_path / "head.safetensors"
    save_checkpoint(replace(checkpoint, meta=META), path)
    code, out, err = info(path)
    assert (code, err) == (0, "")
    lines = lines_of(out)
    assert lines["CLIP"].startswith("vilu-tiny, logit scale ")
    assert checkpoint.clip.fingerprint[:12] in lines["CLIP"]
    assert lines["classes"].startswith(f"{len(checkpoint.class_set)}: {checkpoint.class_set.names[0]}, ")
    parameters = sum(p.numel() for p in checkpoint.head.parameters())
    assert f"MLP 384-512-256-128-1; {parameters:,} parameters" in lines["head"]
    assert "P(failure) < 0.505" in lines["threshold"]
    assert (
        "at most 5% of the accepted answers are wrong, with 95% confidence; from 400 samples of digits"
        in (lines["promise"])
    )
    assert lines["trained on"] == "digits, 1000 samples"
    assert lines["accuracy"] == "CLIP is right on 92% of the training data (chance 10%)"
    assert "AUC 91% (MCM 88%), FPR95 30% (MCM 40%) on 1000 samples with 80 failures" in lines["figures"]
    assert lines["recipe"] == "default, seed 3, best epoch 7"
    assert f"vilu {vilu.__version__}" in lines["written with"]
    assert "torch " in lines["written with"]
    _, out, _ = info(path, "--json")
    found = json.loads(out)
    assert found["class_set"]["names"] == list(checkpoint.class_set.names)
    assert found["clip"]["fingerprint"] == checkpoint.clip.fingerprint
    assert found["calibration"] == NOTE
    assert found["head"]["hidden"] == [512, 256, 128]
    assert found["training"]["samples"] == 1000


def test_a_checkpoint_without_clip_classes_or_notes(info, tmp_path):
    path = tmp_path / "head.safetensors"
    save_checkpoint(Checkpoint(ViLUHead(16, hidden=(8,))), path)
    code, out, _ = info(path)
    assert code == 0
    assert "none is named" in lines_of(out)["CLIP"]
    assert "not calibrated" in lines_of(out)["threshold"]
    assert "promise" not in lines_of(out)


def test_notes_of_any_form_do_no_harm(info, tmp_path):
    """The notes are whatever JSON a file holds, and its names must not steer the terminal."""
    strange = {
        "data": ["\x1b[2J"], "samples": {}, "validation": {"auc": "x"}, "recipe": 3,
        "calibration": {"threshold": {"bound": []}, "probability": 1}, "other\n": "\x1b]0;",
    }  # fmt: skip
    for meta in ({"calibration": 7}, strange):
        save_checkpoint(Checkpoint(ViLUHead(16, hidden=(8,)), meta=meta), tmp_path / "head.safetensors")
        code, out, err = info(tmp_path / "head.safetensors")
        assert (code, err) == (0, "")
        assert "\x1b" not in out


def test_a_repository(info, repository, checkpoint, tmp_path):
    code, out, err = info(repository)
    assert (code, err) == (0, "")
    lines = lines_of(out)
    assert checkpoint.clip.fingerprint[:12] in lines["CLIP"]
    assert lines["versions"] == "1; 1 is served"
    assert "max_labels 1,000" in lines["limits"]
    assert "max_image_bytes 20,971,520" in lines["limits"]
    assert "max_queue 256" in lines["limits"]
    assert "onnxruntime " in lines["written with"]
    assert lines["runs as"].startswith("float32, cpu, ")
    assert out.count("\nmodel ") == len(list(repository.glob("*/config.pbtxt")))
    found = json.loads(info(repository, "--json")[1])
    assert found["class_set"]["names"] == list(checkpoint.class_set.names)
    assert found["threshold"] == checkpoint.threshold
    assert {"vilu", "vilu_embeddings", "clip_image"} <= {model["name"] for model in found["models"]}

    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("sets"))  # a server may have put some already
    assert json.loads(info(copy, "--json")[1])["class_sets"] == []
    sets = copy / "class_sets" / "sets"
    sets.mkdir()
    header = {"names": ["cat", "dog"], "threshold": None, "templates": ["{}"], "fingerprint": ""}
    for name in ("pets@1", "pets@12", "old@1"):
        (sets / name).write_bytes(json.dumps(header).encode() + b"\n\x00\xff")
    (sets / "old@2.removed").touch()
    assert lines_of(info(copy)[1])["class set"] == "pets@12: 2 classes, the default threshold"


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def pickled(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3")


def cut(path):
    save_checkpoint(Checkpoint(ViLUHead(16, hidden=(8,))), path)
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b""), "not a checkpoint"),
        (lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 100), "not a checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "not a checkpoint"),
        (pickled, "not a checkpoint that can be read safely"),
        (cut, "cut short"),
        (os.mkfifo, "not a file or folder"),
        (lambda path: path.mkdir(), "not a repository that `vilu export` wrote"),
    ],
    ids=["absent", "empty", "huge header", "pickle", "pickle in zip", "cut", "pipe", "folder"],
)
@pytest.mark.filterwarnings("error")  # a warning would be another line
def test_a_hostile_file_is_one_line(info, tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "it")
    code, out, err = info("it")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("parity.json", b"[1]", "not a JSON object"),
        ("parity.json", b"{" * 100_000, "not a JSON object"),
        ("parity.json", b'{"a": "' + b"x" * 2000 + b'"}', "larger than"),
        ("labels.txt", b"\xff\xfe", "not UTF-8"),
        ("vilu/config.pbtxt", b"name: [", "not a Triton model configuration"),
    ],
)
def test_a_hostile_repository_is_one_line(info, repository, tmp_path, monkeypatch, file, content, said):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("*.onnx"))
    if said == "larger than":
        monkeypatch.setattr(about, "MOST_BYTES", 1000)
    (copy / file).write_bytes(content)
    code, out, err = info(copy)
    assert (code, out) == (2, "")
    assert f"{file}: {said}" in err
    assert err.count("\n") == 1


def test_reports_of_any_form_do_no_harm(info, repository, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("*.onnx"))
    (copy / "parity.json").write_text(
        json.dumps({"clip": [], "answers": {"cpu": 1}, "calibration": "x", "versions": 1})
    )
    code, out, err = info(copy)
    assert (code, err) == (0, "")
    assert "none is named" in lines_of(out)["CLIP"]


def test_a_repository_needs_no_torch(repository):
    import subprocess

    code = (
        "import sys; from vilu.serving.about import about_repository; about_repository(__import__('pathlib').Path("
        f"{str(repository)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_older_file_does_not_say_what_wrote_it(checkpoint, tmp_path):
    from safetensors.torch import save_file

    from vilu.checkpoint import written_with

    path = tmp_path / "head.safetensors"
    save_checkpoint(checkpoint, path)
    assert written_with(path)["vilu"] == vilu.__version__
    with safe_open(path, "pt") as file:
        tensors, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for libraries in (None, "[", '{"vilu": 1}'):
        kept = {key: value for key, value in notes.items() if key != "vilu.libraries"}
        save_file(tensors, path, kept | ({} if libraries is None else {"vilu.libraries": libraries}))
        assert written_with(path) is None
        assert vilu.load_checkpoint(path).threshold == checkpoint.threshold
