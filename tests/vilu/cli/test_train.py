"""`vilu train`: what it says of CLIP and of the head, as lines and as JSON, and the CLIP that it does not take."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.support.embeddings import unit_rows
from vilu.checkpoint import load_checkpoint
from vilu.cli.train import train_command, verdict
from vilu.training.validation import Validation


@pytest.fixture
def vilu(command_line):
    return command_line(train_command, "vilu train")


def embeddings(path, noise, samples=200, classes=8):
    generator = torch.Generator().manual_seed(0)
    t = unit_rows(classes, 16, 0).float()
    labels = torch.arange(samples) % classes
    v = F.normalize(t[labels] + noise * torch.randn(samples, 16, generator=generator), dim=1)
    np.savez(path, image_embedding=v, labels=labels, text_embeddings=t)
    return (v @ t.T).argmax(dim=1) == labels


QUICK = ["--recipe", "plain", "--epochs", 2, "--no-estimate-images"]


def test_it_says_how_often_clip_is_right_beside_chance(vilu, tmp_path):
    right = embeddings(tmp_path / "world.npz", 0.35)
    assert 50 < int(right.sum()) < 150
    arguments = ["--embeddings", tmp_path / "world.npz", "--output", tmp_path / "a.safetensors", *QUICK]
    code, out, err = vilu(*arguments)
    assert (code, err) == (0, "")
    share = float(right.float().mean())
    first = f"the CLIP of world: right on {share:.1%} of 200 images; chance is 12.5% (1 of 8 classes)"
    assert out.splitlines()[0] == first
    code, out, err = vilu(*arguments, "--json")
    assert code == 0
    document = json.loads(out)
    assert err.splitlines()[0] == first
    assert document["accuracy"] == pytest.approx(share)
    assert (document["chance"], document["chance_rule"]) == (0.125, "1 of 8 classes")
    assert (document["clip"], document["classes"], document["samples"]) == (None, 8, 200)
    assert document["epochs"] == 2
    assert document["checkpoint"] == str(tmp_path / "a.safetensors")
    assert document["validation"]["samples"] == 30
    assert document["verdict"] == "too few to say"


@pytest.mark.parametrize(
    ("noise", "said"), [(8.0, "warning: CLIP is at chance"), (0.14, "warning: CLIP is nearly always right")]
)
def test_it_warns_of_answers_that_teach_little(vilu, tmp_path, noise, said):
    embeddings(tmp_path / "world.npz", noise)
    code, out, err = vilu("--embeddings", tmp_path / "world.npz", "--output", tmp_path / "a.safetensors", *QUICK)
    assert code == 0
    assert err.startswith(said)
    assert "p = " not in out


def test_a_claim_needs_failures_and_right_answers():
    figures = {"auc": 0.9, "fpr95": 0.5, "mcm_auc": 0.8, "mcm_fpr95": 0.6, "p_value": 0.002}
    assert "p = 0.002" in verdict(Validation(200, 60, **figures))
    for samples, failures, rarer in ((45, 44, "right answers"), (45, 1, "failures"), (1000, 951, "right answers")):
        said = verdict(Validation(samples, failures, **figures))
        assert "p = " not in said
        assert f"too few {rarer} to say" in said


def test_the_embedded_clip_is_not_taken_for_other_data(vilu, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    code, out, err = vilu("--data", tmp_path / "photos", "--output", tmp_path / "a.safetensors")
    assert (code, out) == (2, "")
    assert "photos: name the CLIP that answers, such as --clip ViT-B-32 --pretrained FILE" in err
    assert "--clip vilu-tiny uses it all the same" in err
    assert err.count("\n") == 1
    named = ["--clip", "vilu-tiny", "--cache", tmp_path / "cache"]
    code, _, err = vilu("--data", tmp_path / "photos", "--output", tmp_path / "a.safetensors", *named)
    assert code == 2
    assert "name the CLIP" not in err  # two images are too few, but the CLIP is taken
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_interrupt_says_how_to_go_on(vilu, tmp_path, monkeypatch):
    def fit(*arguments, state, **options):
        state.touch()
        raise KeyboardInterrupt

    embeddings(tmp_path / "world.npz", 0.35)
    monkeypatch.setattr("vilu.train.fit", fit)
    code, _, err = vilu("--embeddings", tmp_path / "world.npz", "--output", tmp_path / "a.safetensors", *QUICK)
    assert (code, err.rstrip("\n")) == (130, "interrupted: the same command goes on where it was")


@pytest.mark.parametrize("recipe", ["plain", "default"])
def test_a_users_classes_may_have_one_embedding(vilu, tmp_path, recipe):
    """ImageNet's usual names hold such a pair. CLIP answers the first of them, and the head is trained as ever."""
    embeddings(tmp_path / "world.npz", 0.35)
    world = dict(np.load(tmp_path / "world.npz"))
    world["text_embeddings"][5] = world["text_embeddings"][2]
    np.savez(tmp_path / "twins.npz", **world, class_names=list("abcdefgh"))
    asked = ["--embeddings", tmp_path / "twins.npz", "--output", tmp_path / "a.safetensors", *QUICK[2:]]
    code, _, err = vilu(*asked, "--recipe", recipe)
    assert code == 0
    assert "warning: class name 6 ('f') has the same text embedding as class name 3 ('c')" in err
    assert load_checkpoint(tmp_path / "a.safetensors").class_set.names == tuple("abcdefgh")
