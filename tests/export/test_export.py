import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import save_file
from tritonclient.grpc import model_config_pb2

from vilu import Checkpoint, UserError, ViLUHead, load_clip
from vilu.cli import export_command
from vilu.export import export, parity
from vilu.export.export import README
from vilu.tiny import data

# The package's attribute of this name is the function.
module = import_module("vilu.export.export")
MODELS = {"preprocess", "clip_image", "vilu_head", "vilu_full", "clip_text", "vilu"}


def test_every_graph_is_proven_at_three_batch_sizes(repository):
    report = json.loads((repository / "parity.json").read_text())
    assert set(report["graphs"]) == MODELS - {"preprocess", "vilu"}
    for providers in report["graphs"].values():
        assert set(providers["cpu"]) == {"1", "2", "8"}
        for row in providers["cpu"].values():
            assert row["inputs"] >= 256
            assert row["argmax_agreement"] == 1
            assert max(row["max_abs_error"].values()) <= 1e-4
    assert "FAILURE_PROBABILITY" in report["graphs"]["vilu_full"]["cpu"]["1"]["max_abs_error"]


def test_graphs_load_in_old_runtimes_and_name_no_machine(repository):
    for name in MODELS - {"preprocess", "vilu"}:
        path = repository / name / "1" / "model.onnx"
        model = onnx.load(path)
        assert model.ir_version <= 10
        assert all(item.version <= 20 for item in model.opset_import)
        assert {item.domain for item in model.opset_import} <= {""}
        for value in [*model.graph.input, *model.graph.output]:
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_configs_are_complete(repository):
    assert {path.name for path in repository.iterdir() if path.is_dir()} == MODELS
    for name in MODELS:
        config = text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.name == name
        assert config.max_batch_size == 8
        if name == "vilu":
            assert [step.model_name for step in config.ensemble_scheduling.step] == [
                "preprocess",
                "clip_image",
                "vilu_head",
            ]
            assert (repository / name / "1").is_dir()
        else:
            assert [(group.kind, group.count) for group in config.instance_group] == [
                (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
            ]
            assert (repository / name / "1" / config.default_model_filename).is_file()
            assert config.HasField("dynamic_batching")
    assert (repository / "labels.txt").read_text().splitlines() == list(data.digits("test").names)


def test_the_committed_readme_is_the_one_export_writes(repository):
    committed = Path(__file__).parents[2] / "serving" / "model_repository" / "README.md"
    assert committed.read_bytes() == README.read_bytes() == (repository / "README.md").read_bytes()


def test_the_same_checkpoint_gives_the_same_files(repository, tmp_path, clip, checkpoint):
    export(checkpoint, tmp_path / "again", clip=clip, max_batch_size=8)
    for path in repository.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(repository)).read_bytes(), path


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_graph_over_the_budget_leaves_the_old_repository(repository, tmp_path, monkeypatch, clip, checkpoint):
    root = tmp_path / "repository"
    shutil.copytree(repository, root)
    before = snapshot(root)
    original = module._references

    def moved(*arguments):
        references = original(*arguments)
        references["vilu_head"].outputs["FAILURE_PROBABILITY"][100] += 2e-4
        return references

    monkeypatch.setattr(module, "_references", moved)
    with pytest.raises(UserError, match=r"export refused: vilu_head .* FAILURE_PROBABILITY differs by"):
        export(checkpoint, root, clip=clip, max_batch_size=2)
    assert snapshot(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


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
    assert set(report["graphs"]["vilu_full"]["cpu"]) == {"1", "2", "3"}
    assert (tmp_path / "repository" / "labels.txt").read_text("utf-8").splitlines() == list(class_set.names)


def test_disagreeing_answers_and_nan_are_over_the_budget():
    feed = np.zeros((2, 1), np.float32)
    reference = parity.Reference("X", feed, {"CLASS_INDEX": np.array([[0], [1]]), "P": np.array([[0.1], [0.2]])})
    row = parity.compare({"CLASS_INDEX": np.array([[0], [0]]), "P": np.array([[0.1], [np.nan]])}, reference)
    assert row["argmax_agreement"] == 0.5
    assert row["max_abs_error"]["P"] == float("inf")
    assert len(list(parity.failures({"g": {"cpu": {"1": row}}}))) == 2


def test_bad_requests_write_nothing(tmp_path, clip, checkpoint):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    cases = [
        (checkpoint, mine, {}, "no export wrote"),
        (checkpoint, mine / "thesis.tex", {}, "not a folder"),
        (checkpoint, mine / "thesis.tex" / "x", {}, "cannot be written"),
        (Checkpoint(checkpoint.head), tmp_path / "r", {}, "no CLIP name"),
        (tmp_path / "absent.safetensors", tmp_path / "r", {}, "cannot be read"),
        (checkpoint, tmp_path / "r", {"max_batch_size": 1}, "at least 2"),
        (checkpoint, tmp_path / "r", {"images": [np.zeros((8, 8, 3), np.uint8)]}, "at least 256 images"),
        (Checkpoint(ViLUHead(64), clip.spec, checkpoint.class_set), tmp_path / "r", {}, "the head is 64 wide"),
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


def test_unknown_clip_names_suggest_near_ones():
    with pytest.raises(UserError, match=r"near: .*ViT-B-32"):
        load_clip("ViT-B32", "openai")
    with pytest.raises(UserError, match="name its weights"):
        load_clip("ViT-B-32")


def test_command_line_help_names_its_options():
    assert {"ckpt", "output", "classes"} <= {parameter.name for parameter in export_command.params}
