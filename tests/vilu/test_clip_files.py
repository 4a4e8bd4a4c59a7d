"""Weights files of a CLIP in the forms that people keep them in."""

import argparse
import copy
import json
import logging
import pickle
import subprocess
from collections import OrderedDict, defaultdict
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vilu import UserError, load_clip
from vilu.checkpoint import Checkpoint, ClipSpec
from vilu.clip import load_clip_for
from vilu.clip.files import read_weights
from vilu.head import ViLUHead

NAME, SIGMOID = "vilu-test-vit", "vilu-test-sigmoid"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small open_clip model whose configuration open_clip knows by NAME."""
    folder = tmp_path_factory.mktemp("configs")
    sigmoid = {**CONFIG, "custom_text": True, "init_logit_bias": -10, "text_cfg": {**TEXT, "pool_type": "last"}}
    for name, config in ((NAME, CONFIG), (f"{NAME}-quickgelu", {**CONFIG, "quick_gelu": True}), (SIGMOID, sigmoid)):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    return load_clip(NAME, "random").model


@pytest.fixture(scope="module")
def other(model):
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def under(prefix, state):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def saved(path, document):
    torch.save(document, path)
    return str(path)


def same(clip, state):
    found = clip.model.state_dict()
    assert found.keys() == state.keys()
    return all(torch.equal(found[name], state[name].float()) for name in state)


LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.5",
    "hyper_parameters": {"args": argparse.Namespace(lr=0.1, folder=Path("data"))},
    "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
}


@pytest.mark.parametrize(
    "form",
    [
        lambda state, other: state,
        lambda state, other: {**LIGHTNING, "state_dict": state},
        lambda state, other: {**LIGHTNING, "state_dict": {**under("model.", state), "head.weight": torch.ones(3)}},
        lambda state, other: under("module.", state),
        lambda state, other: under("_orig_mod.", state),
        lambda state, other: {"model": under("module._orig_mod.clip.", state)},
        lambda state, other: {"state_dict": under("net.visual_encoder._orig_mod.", state)},
        lambda state, other: {"model": other, "ema": state},
        lambda state, other: {"state_dict": other, "state_dict_ema": under("module.", state)},
        lambda state, other: {"model": other, "model_ema": {"module": state}},
        lambda state, other: {"state_dict": {**under("model.", other), **under("ema_model.", state)}},
        lambda state, other: {"model": other, "modelEma": state},
        lambda state, other: {"model": other, "EMA": under("module.", state)},
        lambda state, other: {"model": other, "averaged_model": {**under("module.", state), "n": torch.ones(1)}},
        lambda state, other: {"model": other, "exponential_moving_average": state},
        lambda state, other: {"model": state, "optimizer": {"state": under("m.", {"x": torch.ones(2)})}},
    ],
    ids=["plain", "lightning", "lightning-model", "ddp", "compiled", "nested", "odd-prefix", "ema", "state_dict_ema",
         "model_ema", "ema_model", "camel", "capitals", "averaged", "words", "with-optimizer"],
)  # fmt: skip
def test_every_nesting_and_prefix(model, other, tmp_path, form):
    state = model.state_dict()
    document = form(state, other)
    assert same(load_clip(NAME, saved(tmp_path / "weights.pt", document)), state)
    flat = {name: tensor.clone() for name, tensor in flattened(document)}
    save_file(flat, tmp_path / "weights.safetensors")
    assert same(load_clip(NAME, str(tmp_path / "weights.safetensors")), state)


def flattened(document, name=""):
    for key, value in document.items():
        if isinstance(value, torch.Tensor):
            yield f"{name}{key}", value
        elif isinstance(value, dict):
            yield from flattened(value, f"{name}{key}.")


def test_nobody_reads_of_random_weights_where_a_file_has_them(model, tmp_path, caplog):
    load_clip(NAME, saved(tmp_path / "weights.pt", model.state_dict()))
    assert "random" not in caplog.text
    logging.warning("No news")
    assert "No news" in caplog.text


def test_half_precision_is_read_as_float32(model, tmp_path):
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    clip = load_clip(NAME, saved(tmp_path / "half.pt", half))
    assert same(clip, half)
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}


def test_older_files(model, tmp_path):
    """One without zip, and one of the layout before open_clip put a text tower of its own class below "text."."""
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_clip(NAME, str(tmp_path / "old.pt")), model.state_dict())
    state = load_clip(SIGMOID, "random").model.state_dict()
    older = {name.removeprefix("text."): t for name, t in state.items() if name != "logit_bias"}
    clip = load_clip(SIGMOID, saved(tmp_path / "older.pt", {"state_dict": under("module.", older)}))
    assert same(clip, {**state, "logit_bias": torch.zeros(())})


def archive(model, path, **buffers):
    """A TorchScript archive as OpenAI ships it: traced, float16, with three numbers beside the weights."""
    model = copy.deepcopy(model)
    for name, value in buffers.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 16, 16), "encode_text": torch.zeros(1, 77, dtype=torch.long)}
    torch.jit.trace_module(model, inputs).half().save(str(path))


OPENAI = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}


def test_openai_archive_gets_quick_gelu(model, tmp_path):
    quick = load_clip(f"{NAME}-quickgelu", "random")
    path = tmp_path / "ViT.pt"
    archive(quick.model, path, **OPENAI)
    clip = load_clip(NAME, str(path))
    half = {name: t.half() for name, t in quick.model.state_dict().items()}
    assert same(clip, half)
    quick.model.load_state_dict(half)
    pixels = torch.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).to(torch.uint8)
    tokens = clip.tokenize(["a photo of a cat."])
    assert torch.equal(clip.encode_pixels(pixels), quick.encode_pixels(pixels))
    assert torch.equal(clip.encode_tokens(tokens), quick.encode_tokens(tokens))
    # An archive that somebody else traced says nothing about the activation.
    archive(load_clip(NAME, "random").model, tmp_path / "own.pt")
    plain = load_clip(NAME, str(tmp_path / "own.pt"))
    assert not torch.equal(plain.encode_pixels(pixels), quick.encode_pixels(pixels))


def test_quick_gelu_is_part_of_the_fingerprint(model, tmp_path):
    path = saved(tmp_path / "weights.pt", model.state_dict())
    plain, quick = load_clip(NAME, path), load_clip(f"{NAME}-quickgelu", path)
    assert plain.spec.fingerprint != quick.spec.fingerprint
    checkpoint = Checkpoint(ViLUHead(16), plain.spec)
    with pytest.raises(UserError, match="not on these"):
        load_clip_for(checkpoint, "head", f"{NAME}-quickgelu", path)
    # A checkpoint from before that holds the SHA-256 of the weights alone; its name tells of the activation.
    before = ClipSpec(f"{NAME}-quickgelu", path, 100.0, plain.spec.fingerprint)
    assert load_clip_for(Checkpoint(ViLUHead(16), before)).spec == quick.spec
    assert load_clip_for(Checkpoint(ViLUHead(16), before), "head", f"{NAME}-quickgelu", path).spec == quick.spec
    with pytest.raises(UserError, match="not on these"):
        load_clip_for(Checkpoint(ViLUHead(16), before), "head", NAME, path)


class Malicious(nn.Module):
    """A module that writes a file when torch.jit.load makes it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        self.logit_scale = torch.from_file(state[0], True, 8)  # type: ignore[assignment]

    def forward(self):
        return self.logit_scale


def test_no_code_of_a_file_runs(model, tmp_path):
    trace = tmp_path / "trace"
    torch.jit.script(Malicious(str(trace))).save(str(tmp_path / "script.pt"))
    torch.jit.load(str(tmp_path / "script.pt"))
    assert trace.exists()  # so this archive is an attack where torch.jit.load reads it
    trace.unlink()
    with pytest.raises(UserError, match=r"script\.pt"):
        load_clip(NAME, str(tmp_path / "script.pt"))

    class Touch:
        def __reduce__(self):
            return subprocess.getoutput, (f"touch {trace}",)

    state = model.state_dict()
    assert same(load_clip(NAME, saved(tmp_path / "touch.pt", {"state_dict": state, "callbacks": Touch()})), state)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"state_dict": Touch()}))
    with pytest.raises(UserError, match="not weights that can be read safely"):
        load_clip(NAME, str(tmp_path / "plain.pkl"))
    assert not trace.exists()


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        load_clip(NAME, str(path))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    for word in (str(path), *words):
        assert word in message
    return message


def test_a_whole_module_is_refused_in_one_line(model, tmp_path):
    for document in (model, {"model": model, "epoch": 3}):
        refused(saved(tmp_path / "module.pt", document), "whole pickled module (open_clip.model.CLIP)", "state_dict()")
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "only their own code can read", "state_dict()")


def test_messages_name_the_tensor_and_the_prefix(model, other, tmp_path):
    state = model.state_dict()
    path = tmp_path / "weights.pt"
    less = {name: t for name, t in state.items() if name != "visual.proj"}
    refused(saved(path, {"state_dict": under("model.", less)}), "visual.proj is missing under 'state_dict.model.'")
    refused(saved(path, {**less}), "tensor visual.proj is missing, where")
    refused(saved(path, {**state, "visual.extra": torch.ones(1)}), "visual.extra does not belong to")
    refused(saved(path, {**state, "visual.proj": torch.ones(3, 3)}), "visual.proj has shape (3, 3)")
    refused(saved(path, {**state, "visual.proj": state["visual.proj"] * torch.nan}), "visual.proj", "not finite")
    refused(saved(path, {**state, "logit_scale": torch.tensor(100.0)}), "logit_scale must be the logarithm of a factor")
    refused(saved(path, {"student": state, "teacher": other}), "several CLIPs ('student.', 'teacher.')")
    refused(saved(path, {"backbone.layer\x1b[31m": torch.ones(1)}), "has no tensor of", "'backbone'")
    refused(saved(path, {"steps": 3}), "holds no tensors by name")
    refused(saved(path, {"log": defaultdict(list, a=[1]), "state_dict": state}), "only their own code can read")
    refused(saved(path, {**state, "visual.proj": torch.ones(1).expand(1 << 20, 1 << 20)}), "not stored whole")


def test_damaged_files(model, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"PK",
        b"PK\x03\x04" + bytes(100),
        whole[: len(whole) // 2],
        b"version https://git-lfs",
        b"\x80",
    ):
        path.write_bytes(content)
        refused(path, "not weights that can be read safely")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "a pointer of Git LFS")
    path.write_bytes((10**6).to_bytes(8, "little") + b'{"a')
    refused(path, "safetensors")
    refused(tmp_path / "nowhere.pt", "no weights file", "open_clip's tags")
    refused(tmp_path, "cannot be read (Is a directory)")


def test_a_dictionary_that_holds_itself(tmp_path):
    loop: dict[str, object] = {"weight": torch.ones(1)}
    loop["again"] = loop
    assert list(read_weights(Path(saved(tmp_path / "loop.pt", loop))).tensors) == ["weight"]


def test_relative_paths_are_stored_absolute(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "weights.pt", model.state_dict())
    clip = load_clip(NAME, "weights.pt")
    assert clip.spec.pretrained == str(tmp_path / "weights.pt")
    monkeypatch.chdir("/")
    assert load_clip_for(Checkpoint(ViLUHead(16), clip.spec)).spec == clip.spec


def test_a_file_gets_the_preprocessing_of_the_models_own_weights():
    """open_clip gives every file OpenAI's mean and a crop, also where the model's own weights want otherwise."""
    from vilu.clip.load import _preprocessing

    assert _preprocessing("ViT-B-16-SigLIP2")["mean"] == (0.5, 0.5, 0.5)
    assert _preprocessing("ViT-B-16-SigLIP2")["resize_mode"] == "squash"
    assert _preprocessing("ViT-L-14") == {}  # its weights differ among themselves


def test_tags_whose_weights_were_trained_with_quick_gelu():
    """DFN's and OpenAI's weights want it under the plain name too; DataComp's do not."""
    from vilu.clip.load import _needs_quick_gelu

    assert _needs_quick_gelu("ViT-B-16", "dfn2b")
    assert _needs_quick_gelu("ViT-H-14", "dfn5b")
    assert _needs_quick_gelu("ViT-B-16", "openai")
    assert not _needs_quick_gelu("ViT-L-14", "dfn2b_s39b")
    assert not _needs_quick_gelu("ViT-B-16", "datacomp_xl_s13b_b90k")
