import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from tritonclient.grpc import model_config_pb2

from vilu import Checkpoint, UserError, ViLUHead, load_clip
from vilu.cli.export import export_command
from vilu.export import export, measure, parity
from vilu.export.build import README
from vilu.export.job import FEW_INPUTS
from vilu.tiny import data

GRAPHS = {"clip_image", "clip_text", "vilu_head", "vilu_full", "vilu_embeddings", "vilu_details"}  # that are measured
ENSEMBLES = {  # and their steps; the last of those that answer gives what is computed only for who asks
    "vilu": ["preprocess", "clip_image", "vilu_head", "vilu_details"],
    "vilu_open": ["preprocess", "clip_image", "vilu_embeddings", "vilu_embeddings"],
    "vilu_text": ["tokenize", "clip_text"],
}
MODELS = {"preprocess", "tokenize", "class_sets", "vilu_details", *GRAPHS, *ENSEMBLES}


def test_every_graph_is_proven(repository):
    report = json.loads((repository / "parity.json").read_text())
    assert set(report["graphs"]) == GRAPHS
    assert (report["precision"], report["over_budget"]) == ("float32", [])
    for name, providers in report["graphs"].items():
        rows = [row for by_batch in providers.values() for row in by_batch.values()]
        assert all(set(by_batch) == {"8"} for by_batch in providers.values())
        assert rows[0]["inputs"] >= (FEW_INPUTS if name in ("vilu_full", "clip_text") else 256)
        for row in rows:
            assert row["argmax_agreement"] == 1
            assert max(row["max_abs_error"].values()) <= 1e-4
    for name in ("vilu_full", "vilu_head"):
        assert {"FAILURE_PROBABILITY", "OUTLIER_SCORE"} < set(report["graphs"][name]["cpu"]["8"]["max_abs_error"])


def test_answers_are_measured_as_they_are_served(repository):
    report = json.loads((repository / "parity.json").read_text())
    answers = report["answers"][report["provider"]]
    assert answers["images"] == 256
    assert answers["cosine"]["min"] > 1 - 1e-6
    assert answers["failure_probability_error"]["max"] <= 1e-4
    assert 100 < answers["ranking"]["images"] < 156, "half of the default images are digits, and their labels are known"
    assert abs(answers["ranking"]["change"]["AUC"]) < 1e-6
    batches = report["batches"][report["provider"]]
    assert batches["sizes"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batches["argmax_changes"] == 0
    assert batches["failure_probability_moves"] <= 1e-6
    text = (repository / "parity.md").read_text()
    assert "float32, cpu" in text
    assert "100.00%" in text
    assert (repository / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_graphs_load_in_old_runtimes_and_name_no_machine(repository):
    paths = sorted(repository.rglob("*.onnx"))
    assert len(paths) == 11
    assert {path.parent.parent.name for path in paths} == {*GRAPHS, "vilu_details"}
    for path in paths:
        model = onnx.load(path)
        assert model.ir_version <= 10
        assert all(item.version <= 20 for item in model.opset_import)
        assert {item.domain for item in model.opset_import} <= {"", "com.microsoft"}
        for value in [*model.graph.input, *model.graph.output]:
            axis = "classes" if value.name == "TEXT_EMBEDDINGS" else "batch"
            assert value.type.tensor_type.shape.dim[0].dim_param == axis
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_configs_are_complete(repository):
    assert {path.name for path in repository.iterdir() if path.is_dir()} == MODELS
    for name in MODELS:
        config = text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.name == name
        assert config.max_batch_size == 8
        if name in ENSEMBLES:
            steps = config.ensemble_scheduling.step
            assert [step.model_name for step in steps] == ENSEMBLES[name]
            # Such a tensor would make the server leave out steps that are needed.
            taken = {tensor for step in steps for tensor in step.input_map.values()}
            assert not taken & {output.name for output in config.output}
            assert (repository / name / "1").is_dir()
        else:
            assert [(group.kind, group.count) for group in config.instance_group] == [
                (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
            ]
            assert (repository / name / "1" / config.default_model_filename).is_file()
            if name in ("vilu_head", "vilu_details"):
                assert not config.dynamic_batching.HasField("default_queue_policy")
                continue
            queue = config.dynamic_batching.default_queue_policy
            assert 0 < queue.max_queue_size <= 1024
            assert queue.default_timeout_microseconds > 0
            assert queue.allow_timeout_override
    assert (repository / "labels.txt").read_text().splitlines() == list(data.digits("test").names)


def test_the_committed_readme_is_the_one_export_writes(repository):
    committed = Path(__file__).parents[2] / "serving" / "model_repository" / "README.md"
    assert committed.read_bytes() == README.read_bytes() == (repository / "README.md").read_bytes()


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_files(repository, tmp_path, clip, checkpoint):
    export(checkpoint, tmp_path / "again", clip=clip, max_batch_size=8)
    for path in repository.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":  # a server that read it wrote those
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(repository)).read_bytes(), path


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_graph_over_the_budget_leaves_the_old_repository(repository, tmp_path, monkeypatch, clip, checkpoint):
    root = tmp_path / "repository"
    shutil.copytree(repository, root)
    before = snapshot(root)
    original = measure.eager_references

    def moved(*arguments):
        references = original(*arguments)
        references["vilu_head"].outputs["FAILURE_PROBABILITY"][100] += 2e-4
        return references

    monkeypatch.setattr(measure, "eager_references", moved)
    with pytest.raises(UserError, match=r"export refused: vilu_head .* FAILURE_PROBABILITY differs by"):
        export(checkpoint, root, clip=clip, max_batch_size=2)
    assert snapshot(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.slow
def test_a_vision_transformer_and_names_with_accents_are_exported(tmp_path):
    """Another architecture, width and tokenizer than the embedded default's, from a folder in open_clip's layout."""
    folder = tmp_path / "clip"
    folder.mkdir()
    config = {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    preprocess = {"size": 32, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    clip = load_clip(f"local-dir:{folder}")
    class_set = clip.class_set(("café au lait", "smörgåsbord", "東京の塔"), ("a {}.", "the {} in the dark"))
    form = {"projection": "separate", "attention_scale": 48**-0.5, "logit_scale": clip.spec.logit_scale}
    head = ViLUHead(48, hidden=(32,), **form).eval().requires_grad_(False)
    for layer in (head.query, head.key, head.value):
        torch.nn.init.normal_(layer.weight, std=0.3)
    report = export(Checkpoint(head, clip.spec, class_set), tmp_path / "repository", clip=clip, max_batch_size=3)
    assert set(report["graphs"]["vilu_full"]["cpu"]) == {"3"}
    (batches,) = report["batches"].values()
    assert batches["sizes"] == [1, 2, 3]
    assert (tmp_path / "repository" / "labels.txt").read_text("utf-8").splitlines() == list(class_set.names)


def test_disagreeing_answers_and_nan_are_over_the_budget():
    feed = np.zeros((2, 1), np.float32)
    reference = parity.Reference("X", feed, {"CLASS_INDEX": np.array([[0], [1]]), "P": np.array([[0.1], [0.2]])})
    row = parity.compare_outputs({"CLASS_INDEX": np.array([[0], [0]]), "P": np.array([[0.1], [np.nan]])}, reference)
    assert row["argmax_agreement"] == 0.5
    assert row["max_abs_error"]["P"] == float("inf")
    report = {"precision": "float32", "graphs": {"g": {"cpu": {"1": row}}}, "answers": {}}
    assert len(list(parity.over_budget(report))) == 2


def test_bad_requests_write_nothing(tmp_path, clip, checkpoint):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    cases: list[tuple[Any, Path, dict[str, Any], str]] = [
        (checkpoint, mine, {}, "no export wrote"),
        (checkpoint, mine / "thesis.tex", {}, "not a folder"),
        (checkpoint, mine / "thesis.tex" / "x", {}, "cannot be written"),
        (Checkpoint(checkpoint.head), tmp_path / "r", {}, "no CLIP name"),
        (tmp_path / "absent.safetensors", tmp_path / "r", {}, "cannot be read"),
        (checkpoint, tmp_path / "r", {"max_batch_size": 1}, "at least 2"),
        (checkpoint, tmp_path / "r", {"images": [np.zeros((8, 8, 3), np.uint8)]}, "at least 256 images"),
        (
            Checkpoint(ViLUHead(64), clip.spec, checkpoint.class_set),
            tmp_path / "r",
            {},
            "reads embeddings 64 wide, CLIP vilu-tiny gives 128",
        ),
    ]
    for ckpt, output, options, message in cases:
        with pytest.raises(UserError, match=message):
            export(ckpt, output, clip=clip, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_other_weights_than_the_heads_are_refused(tmp_path, checkpoint):
    from dataclasses import replace

    stranger = replace(checkpoint, clip=replace(checkpoint.clip, fingerprint="00" * 32))
    with pytest.raises(UserError, match="not those the head was trained on"):
        export(stranger, tmp_path / "r")


@pytest.fixture
def command(tmp_path, checkpoint, monkeypatch, capsys):
    """`vilu export` in this process: what it prints to stderr, after exit code 2 and with nothing new on the disk."""
    from vilu import save_checkpoint
    from vilu.cli import run

    save_checkpoint(checkpoint, tmp_path / "head.safetensors")

    def refuse(*arguments, ckpt=tmp_path / "head.safetensors", output=tmp_path / "repository"):
        before = snapshot(tmp_path)
        given = ["--ckpt", ckpt, *arguments, "--output", output]
        monkeypatch.setattr("sys.argv", ["vilu-export", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            run(export_command, "vilu-export")
        assert ended.value.code == 2
        assert snapshot(tmp_path) == before
        assert not [path for path in tmp_path.rglob(".*") if path.is_dir()]
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("vilu-export: ")]
        return line

    return refuse


def authors_file(path, dim):
    """A checkpoint in the authors' layout, which names neither CLIP nor classes."""
    widths = [3 * dim, 512, 256, 128, 1]
    state = {"iteration_count": torch.tensor(0)}
    for i, (wide, narrow) in enumerate(pairwise(widths)):
        state |= {f"mlp.{2 * i}.weight": torch.zeros(narrow, wide), f"mlp.{2 * i}.bias": torch.zeros(narrow)}
    state |= {f"in_proj_{side}.weight": torch.eye(dim) for side in "vt"}
    torch.save({"epoch": 1, "state_dict": state}, path)
    return path


def test_unknown_clip_names_suggest_near_ones(command):
    assert "near: ViT-B-32" in command("--clip", "ViT-B32", "--pretrained", "openai")
    with pytest.raises(UserError, match="name its weights"):
        load_clip("ViT-B-32")


def test_weights_of_another_architecture(command, tmp_path):
    save_file({"logit_scale": torch.zeros(()), "visual.proj": torch.zeros(3, 5)}, tmp_path / "other.safetensors")
    line = command("--clip", "RN50", "--pretrained", tmp_path / "other.safetensors")
    assert re.search(r"other\.safetensors: tensor \S+ is missing, where 1 of the \d+ tensors of RN50 are", line)


def test_a_head_of_another_width(command, tmp_path):
    ckpt = authors_file(tmp_path / "authors.ckpt", 64)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    line = command("--clip", "vilu-tiny", "--classes", tmp_path / "classes.txt", ckpt=ckpt)
    assert "reads embeddings 64 wide, CLIP vilu-tiny gives 128" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [("cat\ndog\ncat\n", "class name 3 ('cat') repeats class name 1"), ("cat\n\ndog\n", "class name 2 is empty")],
)
def test_bad_class_files(command, tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    assert message in command("--classes", tmp_path / "classes.txt")


def test_too_few_images_to_calibrate_on(command, tmp_path):
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(photos / f"{i}.png")
    line = command("--precision", "int8", "--images", photos)
    assert "at least 320 images (64 to calibrate on, 256 others to measure on), got 300" in line


def test_an_unwritable_output(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in command(output=tmp_path / "file" / "repository")


def test_a_full_disk_leaves_the_old_repository(command, tmp_path, repository):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in repository.rglob("*") if path.is_file()) + (2 << 20)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        shutil.copytree(repository, disk / "repository")
        assert "No space left on device" in command("--max-batch-size", "2", output=disk / "repository")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_command_line_help_names_its_options():
    assert {"ckpt", "output", "classes"} <= {parameter.name for parameter in export_command.params}
