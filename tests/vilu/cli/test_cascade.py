"""`vilu calibrate --cascade`: a threshold with its promise, cost and MCM's, or one line."""

import json
import shutil
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from vilu import Checkpoint, UserError, ViLUHead, load_clip, save_checkpoint, tiny
from vilu.checkpoint import load_checkpoint
from vilu.cli.calibrate import calibrate_command
from vilu.cli.cascade import threshold_of
from vilu.cli.eval import eval_command
from vilu.clip.cost import multiply_adds
from vilu.data import embed
from vilu.fingerprints import remembered
from vilu.preprocess.image import pixels
from vilu.tiny import data

embed_module = sys.modules[embed.__module__]
ASKED = ("--dataset", "digits", "--split", "test")
MARGIN = ("--margin", "0.05")


def save(path, clip):
    """A checkpoint whose P(failure) is one minus MCM."""
    class_set = clip.class_set(data.digits("test").names)
    head = ViLUHead(128, hidden=(4,), logit_scale=clip.spec.logit_scale).eval().requires_grad_(False)
    torch.nn.init.zeros_(head.output_layer.weight)
    torch.nn.init.zeros_(head.output_layer.bias)
    checkpoint = Checkpoint(head, clip.spec, class_set)
    save_checkpoint(checkpoint, path)
    return checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory, clip):
    """Checkpoints over the embedded CLIP, "large", and over one whose last projection is noisy, "small"."""
    folder = tmp_path_factory.mktemp("cascade")
    worse = folder / "worse"
    worse.mkdir()
    for name in ("open_clip_config.json", "bpe.txt.gz"):
        shutil.copyfile(tiny.FOLDER / name, worse / name)
    exact = load_file(tiny.FOLDER / "open_clip_model.safetensors")
    large = save(folder / "large.safetensors", clip)
    for noise in (0.2, 0.4, 0.8, 1.6):  # until it is clearly worse
        generator = torch.Generator().manual_seed(0)
        weights = dict(exact)
        for name, tensor in exact.items():
            if name.startswith("visual") and tensor.ndim > 1:
                change = torch.randn(tensor.shape, generator=generator) * noise * tensor.float().std()
                weights[name] = (tensor + change).to(tensor.dtype)
        save_file(weights, worse / "open_clip_model.safetensors")
        small = load_clip(f"local-dir:{worse}")
        if accuracy(small) < accuracy(clip) - 0.06:
            break
    save(folder / "small.safetensors", small)
    return folder, large


def embedded(clip):
    feed = np.stack([pixels(Image.fromarray(image), clip.transform) for image in data.digits("test").images])
    with torch.no_grad():
        return clip.encode_pixels(torch.from_numpy(feed))


def accuracy(clip):
    digits = data.digits("test")
    answers = (embedded(clip) @ clip.class_set(digits.names).text_embeddings.T).argmax(dim=1)
    return float((answers.numpy() == digits.labels).mean())


def calibrate(folder, names, *options, rule=MARGIN):
    paths = [str(folder / f"{name}.safetensors") for name in names]
    arguments = ["--cascade", *paths, "--cache", str(folder / "cache"), *ASKED, *rule, *map(str, options)]
    return CliRunner().invoke(calibrate_command, arguments, catch_exceptions=False, standalone_mode=False)


def test_the_threshold_and_what_it_costs(pair, tmp_path):
    result = calibrate(pair[0], ("small", "large"), "--output", tmp_path / "cascade.json")
    note = json.loads((tmp_path / "cascade.json").read_text())
    assert note["bound"] <= note["target"] == 0.05
    assert note["last_accuracy"] > note["accuracy"] - 1e-9
    assert note["reached"][0] == 1
    assert 0 < note["reached"][1] < 1
    assert [stage["checkpoint"] for stage in note["stages"]] == ["small.safetensors", "large.safetensors"]
    costs = [stage["milliseconds"] for stage in note["stages"]]
    assert note["cost"] == pytest.approx(costs[0] + note["reached"][1] * costs[1])
    last, mcm = [line for line in result.output.splitlines() if line.startswith(("cost", "with MCM"))]
    assert mcm.split(": ")[1] == last.removeprefix("cost ").replace(" an image, ", ", ").split(" of ")[0]
    assert f"{note['reached'][1]:.1%} to stage 2" in result.output
    # `vilu export --cascade` takes it for these checkpoints, in this order.
    paths = [pair[0] / f"{name}.safetensors" for name in ("small", "large")]
    loaded = [load_checkpoint(path) for path in paths]
    given = str(tmp_path / "cascade.json")
    assert threshold_of(given, paths, loaded) == (note["threshold"], note)
    assert threshold_of("0.25", paths, loaded) == (0.25, None)
    with pytest.raises(UserError, match="chosen for another checkpoint as stage 1"):
        threshold_of(given, paths[::-1], loaded[::-1])
    assert note["stages"][1]["accuracy"] == note["last_accuracy"] > note["stages"][0]["accuracy"]


def test_a_promise_that_the_first_stage_keeps_alone(pair):
    output = calibrate(pair[0], ("small", "large"), rule=("--target-risk", "0.9")).output
    assert "0.0% to stage 2" in output
    assert "no image goes on: the first stage alone keeps this promise, and needs no cascade" in output


def test_no_image_is_embedded_twice(pair, tmp_path, monkeypatch):
    """Neither what `vilu eval --cascade` kept, nor for two stages of one CLIP."""
    paths, embedded = [str(pair[0] / f"{name}.safetensors") for name in ("small", "large")], []
    original = embed_module._embed_images

    def embed_images(source, tower, *rest):
        embedded.append(tower.clip.spec)
        return original(source, tower, *rest)

    monkeypatch.setattr(embed_module, "_embed_images", embed_images)
    cache = ("--cache", str(tmp_path / "cache"))
    options = ["--dataset", "digits", "--resamples", "2", *cache]
    CliRunner().invoke(eval_command, ["--cascade", *paths, *options], catch_exceptions=False)
    assert len(embedded) == 2
    assert calibrate(pair[0], ("small", "large"), *cache).exception is None
    assert len(embedded) == 2
    CliRunner().invoke(eval_command, ["--cascade", paths[0], paths[1], paths[1], *options[:4]], catch_exceptions=False)
    assert len(embedded) == 4


def test_what_is_refused(pair, tmp_path, clip, monkeypatch):
    folder, large = pair
    with pytest.raises(UserError, match="no better than stage 1"):
        calibrate(folder, ("large", "small"))
    with pytest.raises(UserError, match="two or more"):
        calibrate(folder, ("large",))
    before = (folder / "large.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"large\.safetensors: a cascade's threshold is a JSON file"):
        calibrate(folder, ("small", "large"), "--output", folder / "large.safetensors")
    assert (folder / "large.safetensors").read_bytes() == before
    monkeypatch.setattr("vilu.cli.cascade.load_stage", lambda path: pytest.fail("the output was not looked at first"))
    for output in (tmp_path / "none" / "cascade.json", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            calibrate(folder, ("small", "large"), "--output", output)
    monkeypatch.undo()
    ignored = ("--from-record", folder / "record"), ("--since", "2026-01-01"), ("--seed", 1), ("--target-risk", 0.2)
    for option in ignored:  # of the last, --margin would be
        name = "--margin" if option[0] == "--target-risk" else option[0]
        with pytest.raises(UserError, match=f"^{name} has no meaning beside --cascade"):
            calibrate(folder, ("small", "large"), *option)
    assert large.class_set is not None
    other = replace(large, class_set=clip.class_set(("cat", "dog")))
    save_checkpoint(other, folder / "other.safetensors")
    with pytest.raises(UserError, match="other classes"):
        calibrate(folder, ("small", "other"))
    with pytest.raises(UserError, match=r"at least \d+ are needed"):
        calibrate(folder, ("small", "large"), "--margin", 0.002)
    trained = replace(large, samples=remembered(embedded(clip)[:200]))
    save_checkpoint(trained, folder / "trained.safetensors")
    with pytest.raises(UserError, match="nothing can be promised"):
        calibrate(folder, ("small", "trained"))
    assert not list(tmp_path.iterdir())


def test_multiply_adds_are_those_of_a_known_product(clip):
    """A tower of one linear layer has as many as its weights."""

    class Flat(torch.nn.Module):
        transform = clip.transform

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * clip.transform.size**2, 5, bias=False)

        def encode_pixels(self, pixels):
            return self.layer(pixels.float().flatten(1))

    tower: Any = Flat()
    assert multiply_adds(tower) == 5 * 3 * clip.transform.size**2
