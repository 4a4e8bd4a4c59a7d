"""A folder of transformers' CLIPModel or SiglipModel answers as transformers does."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vilu import UserError, load_clip
from vilu.checkpoint import Checkpoint
from vilu.clip import load_clip_for
from vilu.export.graphs import ImageGraph, write_graph
from vilu.export.tokenizer import write_tokenizer
from vilu.head import ViLUHead
from vilu.preprocess.text import Tokenizer

transformers = pytest.importorskip("transformers")

WORDS = ["a", "photo", "of", "cat", "dog", "big", "small", "."]
VOCABULARY = {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3, **{word: i for i, word in enumerate(WORDS, 4)}}
LAST = len(VOCABULARY)  # the id of the token that ends a text
TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**TEXT, "hidden_size": 48, "image_size": 16, "patch_size": 8}
NAMES, PROMPTS = ["cat", "big dog"], ["a photo of a cat.", "a photo of a big dog."]


def tokenizer(length, first, last):
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, pre_tokenizers, processors

    inner = Inner(models.WordLevel({**VOCABULARY, last: len(VOCABULARY)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = {**VOCABULARY, last: len(VOCABULARY)}
    single = f"{first} $A {last}" if first else f"$A {last}"
    used = [(token, ids[token]) for token in (first, last) if token]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": last, "model_max_length": length}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="right", **names)


def clip(act="quick_gelu", eos=LAST, **more):
    text = {**TEXT, "vocab_size": len(VOCABULARY) + 1, "max_position_embeddings": 12, "hidden_act": act}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": eos, **more},
        vision_config={**IMAGE, "hidden_act": act, **more},
        projection_dim=24,
    )
    return transformers.CLIPModel(config), tokenizer(12, "<bos>", "<end>")


def siglip(**more):
    text = {**TEXT, "vocab_size": len(VOCABULARY) + 1, "max_position_embeddings": 9, "projection_size": 48}
    config = transformers.SiglipConfig(text_config={**text, **more}, vision_config={**IMAGE, **more})
    return transformers.SiglipModel(config), tokenizer(9, "", "<end>")


def write(folder, made):
    model, words = made
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():  # transformers' own start is nearly the same for all inputs
        if "norm" not in name and "logit" not in name and "layrnorm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    side = model.config.vision_config.image_size
    if model.config.model_type == "clip":
        settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
        settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    else:
        settings = {"size": {"height": side, "width": side}, "resample": 2}
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model, words, settings


def embedding(output):
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.mark.parametrize(
    "make",
    [clip, lambda: clip("gelu", eos=VOCABULARY["."]), lambda: clip("gelu", eos=2, layer_norm_eps=1e-3), siglip],
    ids=["clip", "clip-eos", "clip-gelu", "siglip"],
)
def test_embeddings_equal_those_of_transformers(make, tmp_path):
    model, words, settings = write(tmp_path, make())
    ours = load_clip(f"hf-dir:{tmp_path}")
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(settings[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    values = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    length = model.config.text_config.max_position_embeddings
    tokens = words(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        image, text = embedding(model.get_image_features(values)), embedding(model.get_text_features(tokens))
        theirs = model(input_ids=tokens, pixel_values=values).logits_per_image
    assert torch.equal(ours.tokenize(PROMPTS), tokens)
    assert not torch.allclose(text[0], text[1], atol=1e-3)  # so the comparison below can fail
    torch.testing.assert_close(ours.encode_pixels(pixels), image, atol=2e-6, rtol=0)
    torch.testing.assert_close(ours.encode_tokens(tokens), text, atol=2e-6, rtol=0)
    logits = ours.spec.logit_scale * ours.encode_pixels(pixels) @ ours.class_set(NAMES).text_embeddings.T
    bias = getattr(model, "logit_bias", torch.zeros(1)).detach()
    torch.testing.assert_close(logits + bias, theirs, atol=1e-3, rtol=1e-4)
    assert ours.transform.resize_mode == ("squash" if "height" in settings["size"] else "shortest")
    assert ours.transform.interpolation == {2: "bilinear", 3: "bicubic"}[settings["resample"]]


@pytest.mark.parametrize("make", [clip, siglip], ids=["clip", "siglip"])
def test_export(make, tmp_path):
    folder = tmp_path / "model"
    write(folder, make())
    ours = load_clip(f"hf-dir:{folder}")
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = ours.encode_pixels(pixels).numpy()
    write_graph(ImageGraph(ours), pixels[:2], tmp_path / "image.onnx", "PIXELS", {"IMAGE_EMBEDDING": [ours_dim(ours)]})
    session = onnxruntime.InferenceSession(tmp_path / "image.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"PIXELS": pixels.numpy()})[0], expected, atol=1e-5)
    transform = write_tokenizer(ours, tmp_path / "tokenizer.json")
    ids = Tokenizer(tmp_path / "tokenizer.json", transform).encode(PROMPTS)
    assert np.array_equal(ids, ours.tokenize(PROMPTS).numpy())


def ours_dim(clip):
    return clip.class_set(NAMES).text_embeddings.shape[1]


def test_a_checkpoint_finds_its_folder_again(tmp_path, monkeypatch):
    write(tmp_path / "model", clip())
    monkeypatch.chdir(tmp_path)
    first = load_clip("hf-dir:model")
    assert first.spec.name == f"hf-dir:{tmp_path / 'model'}"
    monkeypatch.chdir("/")
    checkpoint = Checkpoint(ViLUHead(24), first.spec)
    assert load_clip_for(checkpoint).spec == first.spec
    write(tmp_path / "model", clip("gelu"))  # the same weights with another activation
    with pytest.raises(UserError, match="not those the head was trained on"):
        load_clip_for(checkpoint)


def test_what_cannot_be_served_is_refused(tmp_path):
    settings = write(tmp_path, clip())[2]

    def refused(words, **changes):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words) as caught:
            load_clip(f"hf-dir:{tmp_path}")
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert str(caught.value).startswith(str(tmp_path))
        assert str(caught.value).isprintable()

    refused("model type 'blip' is not supported", model_type="blip")
    refused(
        "activation 'relu' is not supported",
        text_config={"hidden_act": "relu"},
        vision_config={**IMAGE, "hidden_act": "relu"},
    )
    refused("describe no model", text_config=[1])
    refused("describe no model", vision_config={**IMAGE, "num_attention_heads": 5, "hidden_size": "wide"})
    refused("text_projection has shape", projection_dim=25)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"shortest_edge": 20}}))
    refused("resized to .* and cut to .* which is not supported")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    refused("holds no model.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_clip(f"hf-dir:{tmp_path}")


def test_shards_and_a_pickle(tmp_path):
    model = write(tmp_path / "whole", clip())[0]
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    prints = {load_clip(f"hf-dir:{tmp_path / kind}").spec.fingerprint for kind in ("whole", "shards", "pickle")}
    assert len(prints) == 1


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("make", [clip, siglip])
def test_a_folder_is_trained_on_exported_and_served(tmp_path, make):
    from vilu import Predictor
    from vilu.serving import Client, Server

    write(tmp_path / "model", make())
    random = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(60):
            pixels = random.integers(0, 160, (20, 24, 3)) + 40 * i
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{n}.png")
    head, served = tmp_path / "head.safetensors", tmp_path / "served"
    made = ["--clip", f"hf-dir:{tmp_path / 'model'}", "--data", tmp_path / "photos", "--epochs", "2", "--output", head]
    for words in (["train", *made], ["export", "--ckpt", head, "--output", served, "--allow-loss"]):
        done = subprocess.run([sys.executable, "-m", "vilu", *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    images = sorted((tmp_path / "photos").rglob("1*.png"))
    with Server(served, log=tmp_path / "log") as server, Client(server.grpc_url) as client:
        answers = client.ask(images)
        own = client.ask(images[:2], labels=["a small cat", "dog"])
    eager = Predictor(head)
    for found, wanted in ((answers, eager(images)), (own, eager(images[:2], labels=["a small cat", "dog"]))):
        assert [one.label for one in found] == [one.label for one in wanted]
        np.testing.assert_allclose(
            [one.failure_probability for one in found], [one.failure_probability for one in wanted], atol=1e-4
        )
