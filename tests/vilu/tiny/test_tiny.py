import hashlib
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vilu import UserError, load_clip, tiny
from vilu.preprocess.image import pixels
from vilu.tiny import data, train_clip


def hashes(images):
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def test_no_scan_is_in_two_splits():
    _, labels, index = data._scans()
    chosen = np.concatenate([index[split] for split in data.SPLITS])
    assert sorted(chosen) == list(range(1797))
    for split in data.SPLITS:
        assert set(labels[index[split]]) == set(range(10))


def test_no_image_is_in_two_splits_and_a_seed_repeats_itself():
    seen: set[bytes] = set()
    for split in data.SPLITS:
        for drawn in (data.digits(split), data.shapes(split, 300)):
            mine = hashes(drawn.images)
            assert len(mine) == len(drawn.images)
            assert not mine & seen
            seen |= mine
        assert hashes(data.shapes(split, 50).images) == hashes(data.shapes(split, 50).images)
    assert not hashes(data.shapes("test", 50).images) & hashes(data.shapes("test", 50, seed=1).images)
    with pytest.raises(ValueError, match="split must be"):
        data.shapes("val", 1)


@pytest.mark.parametrize("source", [data.digits("test"), data.shapes("test", 200)], ids=["digits", "shapes"])
def test_images_labels_and_captions_fit(source):
    assert source.images.shape[1:] == (64, 64, 3)
    assert source.images.dtype == np.uint8
    assert len(source.images) == len(source.labels) == len(source.captions)
    assert source.labels.dtype == np.int64
    for label, caption in zip(source.labels, source.captions, strict=True):
        assert all(word in caption for word in source.names[label].split())


def test_captions_number_in_the_thousands():
    assert len(set(data.shapes("test", 7000).captions)) > 2000


@pytest.mark.parametrize(("name", "most"), [(tiny.NAME, 10_000_000), (tiny.LARGE, 12_000_000)])
def test_weights_are_small_half_precision_and_fit_the_tokenizer(name, most):
    folder = tiny.FOLDERS[name]
    weights = folder / "open_clip_model.safetensors"
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= most
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16, torch.int64}
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config == train_clip.PLANS[name].config
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"))
    assert tokenizer.vocab_size == config["model_cfg"]["text_cfg"]["vocab_size"]
    assert (folder / "bpe.txt.gz").read_bytes() == (tiny.FOLDER / "bpe.txt.gz").read_bytes()


def test_the_clips_are_honest_and_the_large_one_is_better():
    small, large = (train_clip.zero_shot(folder, "test", count=1000) for folder in tiny.FOLDERS.values())
    for name in small:
        assert 0.60 <= small[name] <= 0.95, name
        assert small[name] + 0.05 <= large[name] <= 0.99, name


def test_fewer_captions_are_wrong_where_that_is_asked_for():
    """Nothing else changes: the same images and labels, and where no look-alike is named the same words."""
    for draw, wrong in ((data.digits, 0.7), (lambda *a, **k: data.shapes(a[0], 2000, **k), 0.75)):
        usual, better, best = draw("clip"), draw("clip", misnamed=0.2), draw("clip", misnamed=0.0)
        for other in (better, best):
            assert np.array_equal(usual.images, other.images)
            assert np.array_equal(usual.labels, other.labels)
        changed = [
            np.mean([a != b for a, b in zip(one.captions, best.captions, strict=True)]) for one in (usual, better)
        ]
        assert changed[0] / wrong == pytest.approx(changed[1] / 0.2, rel=0.3)
        assert changed[0] > 0.05


def test_training_repeats_itself(tmp_path):
    for name in ("a", "b"):
        train_clip.train(tmp_path / name, seed=3, steps=2, batch_size=16, count=64)
    first, second = ((tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "bpe.txt.gz",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_most_steps_of_the_large_clip_see_half_of_the_side(tmp_path, monkeypatch):
    sides = []
    embed = train_clip._embed

    def seen(tower, x):
        sides.append(x.shape[-1])
        return embed(tower, x)

    monkeypatch.setattr(train_clip, "_embed", seen)
    train_clip.train(tmp_path / "a", seed=3, steps=6, batch_size=4, count=8, name=tiny.LARGE)
    assert sides == [64] * 5 + [128]
    weights = load_file(tmp_path / "a" / "open_clip_model.safetensors")
    assert len(weights["visual.attnpool.positional_embedding"]) == 17
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_pixels_and_embeddings_are_those_of_open_clip():
    clip = load_clip()
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny.FOLDER}")
    image = Image.fromarray(data.shapes("test", 1).images[0])
    ours = clip.embed_images([pixels(image, clip.transform)[None]])
    with torch.no_grad():
        theirs = clip.model.encode_image(transform(image)[None], normalize=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_failed_training_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="a batch of 5000 needs as many images"):
        train_clip.train(tmp_path / "a", seed=0, steps=1, batch_size=5000, count=64)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        train_clip.train(tmp_path / "file" / "b", seed=0, steps=1, batch_size=16, count=64)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_training_command(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["train_clip", *map(str, arguments)])
        train_clip.main()
        return capsys.readouterr().out

    options = ("--seed", 3, "--steps", 2, "--batch-size", 16, "--shapes", 64)
    out = call("--output", tmp_path / "clip", *options)
    assert re.fullmatch(r"digits: zero-shot accuracy .*% on clip_val\nshapes: zero-shot accuracy .*%.*\n", out)
    steps = []
    train_clip.train(tmp_path / "same", 3, 2, 16, 64, progress=lambda what, done, total: steps.append((done, total)))
    assert steps[-2:] == [(1, 2), (2, 2)]
    weights = "open_clip_model.safetensors"
    assert (tmp_path / "clip" / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        call("--output", tmp_path / "file" / "clip", *options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
