"""Embedding: what it gives, what the cache keeps, and that it is never stale, half, or another's."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vilu.clip import Clip, load_clip
from vilu.data import embed, load_embeddings, open_source
from vilu.data.cache import Writer, read
from vilu.data.source import ArraySource
from vilu.errors import UserError
from vilu.preprocess.image import decode
from vilu.serving.embedding_file import read_image_embeddings

CODE = """
import sys
from pathlib import Path
from vilu.clip import load_clip
from vilu.data import embed, open_source
from vilu.errors import UserError
"""


@pytest.fixture(scope="session")
def clip():
    return load_clip()


def picture(seed, size=(48, 36)):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def folder(root, per_class=20, classes=("ant", "bee")):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i:03d}.jpg").write_bytes(picture(1000 * number + i))
    return root


def captions(root, count=30):
    (root / "images").mkdir(parents=True)
    lines = ["path,caption"]
    for i in range(count):
        (root / f"images/{i}.jpg").write_bytes(picture(i))
        lines.append(f"images/{i}.jpg,a photo of a small plain red circle number {i}")
    (root / "set.csv").write_text("\n".join(lines))
    return str(root / "set.csv")


def encoded(source, i) -> bytes:
    return source.read(i)


def entries(cache):
    """The folders of a cache, images first."""
    return sorted(cache.iterdir(), key=lambda path: path.name.startswith("classes"))


def contents(cache):
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file() and p.name != "lock"}


# ---------------------------------------------------------------------- what it gives


def test_a_closed_set_is_what_the_towers_give(tmp_path, clip):
    source = open_source(str(folder(tmp_path / "d")))
    reports = []
    data = embed(source, clip, dtype="float32", batch_size=16, progress=lambda *args: reports.append(args))
    pixels = np.stack([decode(encoded(source, i), clip.transform) for i in range(40)])
    assert torch.allclose(data.image.normalised, clip.embed_images([pixels]), atol=1e-5)
    assert torch.equal(data.text.normalised, clip.class_set(("ant", "bee")).text_embeddings)
    assert data.labels.tolist() == [0] * 20 + [1] * 20
    assert data.class_names == ("ant", "bee")
    assert data.logit_scale == clip.spec.logit_scale
    assert data.image.activation is None
    assert [done for _, done, _ in reports] == [16, 32, 40]
    assert {total for _, _, total in reports} == {40}


def test_several_templates_are_averaged_as_the_class_set_does(tmp_path, clip):
    source = open_source(str(folder(tmp_path / "d", per_class=1)))
    templates = ("a photo of a {}.", "a drawing of a {}.", "{}")
    data = embed(source, clip, templates=templates, projection=True)
    expected = clip.class_set(("ant", "bee"), templates).text_embeddings
    assert torch.allclose(data.text.normalised, expected, atol=1e-5)
    with pytest.raises(UserError, match="exactly one"):
        embed(source, clip, templates=("a photo",))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("projection", [False, True])
def test_the_cache_gives_what_memory_gives(tmp_path, clip, dtype, projection):
    source = open_source(captions(tmp_path / "d"))
    plain = embed(source, clip, dtype=dtype, projection=projection, batch_size=8)
    for _ in range(2):  # made, then read
        kept = embed(source, clip, dtype=dtype, projection=projection, batch_size=8, cache=tmp_path / "cache")
        for side in ("image", "text"):
            for field in ("normalised", "activation", "output"):
                a, b = (getattr(getattr(data, side), field) for data in (plain, kept))
                assert (a is None) == (b is None) == (field != "normalised" and not projection)
                if a is not None:
                    assert torch.equal(a, b)
                    assert a.dtype == getattr(torch, dtype)
    assert kept.captions
    assert len(kept) == len(kept.text) == 30
    norms = kept.image.normalised.double().norm(dim=1)
    assert torch.allclose(norms, torch.ones(30).double(), atol=1e-3)


def test_a_whole_cache_asks_no_tower(tmp_path, clip, monkeypatch):
    source = open_source(str(folder(tmp_path / "d")))
    first = embed(source, clip, cache=tmp_path / "cache")
    monkeypatch.setattr(Clip, "encode_pixels", None)
    monkeypatch.setattr(Clip, "encode_tokens", None)
    again = embed(source, clip, cache=tmp_path / "cache")
    assert torch.equal(first.image.normalised, again.image.normalised)
    # What is returned may be written to (torch wants that) without the file changing.
    before = contents(tmp_path / "cache")
    again.image.normalised.zero_()
    assert contents(tmp_path / "cache") == before


def test_what_another_entry_holds_is_not_embedded_again(tmp_path, clip, monkeypatch):
    root = folder(tmp_path / "d")
    for name in ("ant/000.jpg", "bee/019.jpg"):
        (root / name).write_bytes(b"x")
    source = open_source(str(root))
    options: dict[str, Any] = {"batch_size": 8, "workers": 1}
    fresh = embed(source, clip, cache=tmp_path / "fresh", **options)
    exact = embed(source, clip, cache=tmp_path / "exact", dtype="float32", **options)
    embed(source, clip, cache=tmp_path / "projected", dtype="float32", projection=True, **options)
    monkeypatch.setattr(Clip, "encode_pixels", None)
    monkeypatch.setattr(Clip, "encode_tokens", None)
    monkeypatch.setattr(sys.modules["vilu.data.embed"], "COPIED", 7)
    again = embed(source, clip, cache=tmp_path / "exact", **options)
    assert contents(tmp_path / "fresh").items() <= contents(tmp_path / "exact").items()
    assert (again.skipped, again.rows.tolist()) == (fresh.skipped, fresh.rows.tolist())
    for dtype, error in (("float32", 1e-6), ("float16", 1e-3)):
        found = embed(source, clip, cache=tmp_path / "projected", dtype=dtype, **options)
        assert found.image.activation is None
        assert found.skipped == exact.skipped
        assert torch.allclose(found.image.normalised.float(), exact.image.normalised, atol=error)
        assert torch.allclose(found.text.normalised, exact.text.normalised, atol=1e-6)


def test_a_damaged_entry_is_not_copied(tmp_path, clip):
    source = open_source(str(folder(tmp_path / "d", per_class=3)))
    exact = embed(source, clip, cache=tmp_path / "cache", dtype="float32")
    (entry,) = [path for path in entries(tmp_path / "cache") if not path.name.startswith("classes")]
    flip(entry / "image.normalised.npy", 200)
    found = embed(source, clip, cache=tmp_path / "cache")
    assert torch.equal(found.image.normalised, exact.image.normalised.half())


def test_the_result_is_mapped_not_read(tmp_path, clip):
    data = embed(open_source(str(folder(tmp_path / "d"))), clip, cache=tmp_path / "cache")
    file = entries(tmp_path / "cache")[0] / "image.normalised.npy"
    with open("/proc/self/maps") as maps:
        assert any(str(file) in line for line in maps)
    assert data.image.normalised.shape == (40, 128)
    assert np.load(file).shape == (40, 128)  # and it is a plain .npy file


# ---------------------------------------------------------------------- images that cannot be read


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path, clip):
    root = folder(tmp_path / "d")
    (root / "ant/003.jpg").write_bytes(b"nothing")
    (root / "bee/000.jpg").write_bytes(b"")
    (root / "bee/019.jpg").write_bytes(picture(5)[:300])
    source = open_source(str(root))
    for _ in range(2):
        data = embed(source, clip, batch_size=8, cache=tmp_path / "cache")
        assert len(data) == 37
        assert data.labels.tolist() == [0] * 19 + [1] * 18
        assert [line.split(":")[0] for line in data.skipped] == [
            str(root / name) for name in ("ant/003.jpg", "bee/000.jpg", "bee/019.jpg")
        ]
    good = [i for i in range(40) if i not in (3, 20, 39)]
    pixels = np.stack([decode(encoded(source, i), clip.transform) for i in good])
    assert torch.allclose(data.image.normalised.float(), clip.embed_images([pixels]), atol=1e-3)


def test_the_captions_of_unreadable_images_go_with_them(tmp_path, clip):
    path = captions(tmp_path / "d", 20)
    os.remove(tmp_path / "d/images/4.jpg")
    (tmp_path / "d/images/11.jpg").write_bytes(b"x")
    data = embed(open_source(path), clip, batch_size=4, dtype="float32")
    kept = [f"a photo of a small plain red circle number {i}" for i in range(20) if i not in (4, 11)]
    with torch.no_grad():
        expected = clip.encode_tokens(clip.tokenize(kept))
    assert torch.allclose(data.text.normalised, expected, atol=1e-5)
    assert "4.jpg: No such file" in data.skipped[0]


@pytest.mark.parametrize("bad", [5, 40])
def test_too_many_unreadable_images_stop_it(tmp_path, clip, bad):
    root = folder(tmp_path / "d")
    for file in sorted(root.rglob("*.jpg"))[:bad]:
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"d: \d+ of 40 images cannot be read; the first: .*ant/000.jpg: not a JPEG"):
        embed(open_source(str(root)), clip, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("index.json"))


# ---------------------------------------------------------------------- never stale


def test_anything_that_matters_makes_another_entry(tmp_path, clip):
    root = folder(tmp_path / "d", per_class=3)
    cache = tmp_path / "cache"
    seen = 0

    def embedded(clip=clip, **kwargs):
        nonlocal seen
        data = embed(open_source(str(root)), clip, cache=cache, **kwargs)
        now = len([path for path in cache.iterdir() if not path.name.startswith("classes")])
        new, seen = now - seen, now
        return data, new

    assert embedded()[1] == 1
    assert embedded()[1] == 0
    assert embedded(dtype="float32")[1] == 1
    assert embedded(projection=True)[1] == 1
    assert embedded(batch_size=3, workers=1)[1] == 0
    assert embedded(templates=("{}",))[1] == 0  # templates change the text alone
    assert len([path for path in cache.iterdir() if path.name.startswith("classes")]) == 3

    def another(**changes):
        other = Clip(clip.model, clip.spec, clip.tokenize)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    assert embedded(another(spec=replace(clip.spec, fingerprint="0" * 64)))[1] == 1
    assert embedded(another(spec=replace(clip.spec, pretrained="openai")))[1] == 1
    assert embedded(another(transform=replace(clip.transform, interpolation="bilinear")))[1] == 1
    assert embedded(another(mean=clip.mean + 0.1))[1] == 1
    assert embedded(another(tokenize=lambda texts: clip.tokenize([text + "z" for text in texts])))[1] == 1
    (root / "ant/000.jpg").write_bytes(picture(77))
    changed, new = embedded(dtype="float32")
    assert new == 1
    fresh = embed(open_source(str(root)), clip, dtype="float32")
    assert torch.equal(changed.image.normalised, fresh.image.normalised)


def test_data_that_change_meanwhile_are_refused(tmp_path, clip):
    root = folder(tmp_path / "d")

    def meddle(*_):
        (root / "bee/000.jpg").write_bytes(picture(99))

    with pytest.raises(UserError, match="changed while it was being embedded"):
        embed(open_source(str(root)), clip, batch_size=8, cache=tmp_path / "cache", progress=meddle)
    assert not list((tmp_path / "cache").rglob("index.json"))


def test_an_entry_of_another_model_under_this_name_is_refused(tmp_path, clip):
    source = open_source(str(folder(tmp_path / "d")))
    embed(source, clip, cache=tmp_path / "cache")
    mine = entries(tmp_path / "cache")[0]
    index = json.loads((mine / "index.json").read_text())
    index["identity"]["clip"][0] = "ViT-B-32"
    (mine / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is the cache of something else \(its 'clip' differs\)"):
        embed(source, clip, cache=tmp_path / "cache")


# ---------------------------------------------------------------------- never half


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "index.json").write_text("{"),
        lambda entry: (entry / "index.json").write_text("[]"),
        lambda entry: (entry / "index.json").write_text('{"identity": 1, "arrays": {"a": {}}, "skipped": []}'),
        lambda entry: os.remove(entry / "image.normalised.npy"),
        lambda entry: os.truncate(entry / "image.normalised.npy", 500),
        lambda entry: flip(entry / "image.normalised.npy", 200),
        lambda entry: flip(entry / "image.normalised.npy", 20),
    ],
)
def test_a_damaged_entry_is_one_line(tmp_path, clip, damage):
    source = open_source(str(folder(tmp_path / "d", per_class=4)))
    embed(source, clip, cache=tmp_path / "cache")
    entry = entries(tmp_path / "cache")[0]
    damage(entry)
    with pytest.raises(UserError, match=r"damaged .*delete .* to have it made again") as caught:
        embed(source, clip, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    shutil.rmtree(entry)
    assert len(embed(source, clip, cache=tmp_path / "cache")) == 8


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def interrupted(source, clip, cache, after, **kwargs):
    """Embed up to some images, then stop as an error in the middle does."""

    class StopError(Exception):
        pass

    def stop(_, done, total):
        if done >= after:
            raise StopError

    with pytest.raises(StopError):
        embed(source, clip, cache=cache, progress=stop, **kwargs)


@pytest.mark.parametrize(
    "between",
    [
        lambda entry: None,
        lambda entry: append(entry / "image.normalised.npy", b"half a block"),
        lambda entry: append(entry / "image.normalised.npy", bytes(50_000)),  # more than all the rows to come
        lambda entry: append(entry / "journal.jsonl", b'{"position": 40, "arr'),
        lambda entry: append(entry / "journal.jsonl", b'{"position": 40, "arrays": {}}\n'),
        lambda entry: os.truncate(entry / "image.normalised.npy", 128 + 128 * 2 * 10),  # rows lost by a power cut
        lambda entry: flip(entry / "image.normalised.npy", 128 + 128 * 2 * 10),
        lambda entry: flip(entry / "journal.jsonl", 30),
        lambda entry: os.remove(entry / "journal.jsonl"),
        lambda entry: os.remove(entry / "text.output.npy"),
    ],
)
def test_what_is_resumed_ends_with_the_same_bytes(tmp_path, clip, between):
    path = captions(tmp_path / "d")
    (tmp_path / "d/images/2.jpg").write_bytes(b"x")
    (tmp_path / "d/images/29.jpg").write_bytes(b"x")
    source = open_source(path)
    embed(source, clip, cache=tmp_path / "whole", batch_size=8, projection=True)
    interrupted(source, clip, tmp_path / "cache", 16, batch_size=8, projection=True)
    entry = entries(tmp_path / "cache")[0]
    assert not (entry / "index.json").exists()
    with pytest.raises(ValueError, match=r"magic|pickle"):
        np.load(entry / "image.normalised.npy")  # nor does anyone else take it for an array
    between(entry)
    data = embed(source, clip, cache=tmp_path / "cache", batch_size=8, projection=True)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert len(data.skipped) == 2


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


def test_only_what_is_missing_is_embedded_again(tmp_path, clip, monkeypatch):
    source = open_source(str(folder(tmp_path / "d")))
    interrupted(source, clip, tmp_path / "cache", 24, batch_size=8)
    read_again = []
    original = type(source).read

    def read(self, i):
        read_again.append(i)
        return original(self, i)

    monkeypatch.setattr(type(source), "read", read)
    embed(source, clip, cache=tmp_path / "cache", batch_size=8)
    assert sorted(read_again) == list(range(24, 40))


def test_kill_minus_nine_and_resume(tmp_path, clip):
    root = folder(tmp_path / "d", per_class=100)
    script = CODE + textwrap.dedent(
        """
        import time
        def slowly(what, done, total):
            print(done, flush=True)
            time.sleep(0.05)
        embed(open_source(sys.argv[1]), load_clip(), cache=Path(sys.argv[2]), batch_size=8, progress=slowly)
        """
    )
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", script, str(root), str(cache)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 64:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(cache.rglob("index.json"))
    blocks = entries(cache)[0].joinpath("journal.jsonl").read_bytes().count(b"\n") - 1
    assert blocks >= 7
    source = open_source(str(root))
    seen = []
    embed(source, clip, cache=cache, batch_size=8, progress=lambda _, done, total: seen.append(done))
    assert seen[0] == 8 * blocks + 8
    embed(source, clip, cache=tmp_path / "whole", batch_size=8)
    assert contents(cache) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_process_is_told(tmp_path, clip):
    source = open_source(str(folder(tmp_path / "d")))
    holds, go = threading.Event(), threading.Event()

    def wait(*_):
        holds.set()
        go.wait()

    first = threading.Thread(target=embed, args=(source, clip), kwargs={"cache": tmp_path / "cache", "progress": wait})
    first.start()
    holds.wait()
    script = CODE + textwrap.dedent(
        """
        try:
            embed(open_source(sys.argv[1]), load_clip(), cache=Path(sys.argv[2]))
        except UserError as error:
            sys.exit(str(error))
        """
    )
    try:
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "d"), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        go.set()
        first.join()
    assert other.returncode == 1
    assert "another process is writing it" in other.stderr
    assert len(embed(source, clip, cache=tmp_path / "cache")) == 40


def test_a_full_disk_is_one_line_and_a_rerun_goes_on(tmp_path, clip):
    """The limit on a file's size makes the operating system refuse, as a full disk does."""
    root = folder(tmp_path / "d", per_class=50)
    script = CODE + textwrap.dedent(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
        try:
            embed(open_source(sys.argv[1]), load_clip(), cache=Path(sys.argv[2]), batch_size=8)
        except UserError as error:
            print(error)
        """
    )
    cache = tmp_path / "cache"
    run = subprocess.run(
        [sys.executable, "-c", script, str(root), str(cache)], capture_output=True, text=True, check=True
    )
    assert run.stdout.count("\n") == 1
    assert "what is there stays, a rerun goes on from it" in run.stdout
    assert not list(cache.rglob("index.json"))
    seen = []
    source = open_source(str(root))
    embed(source, clip, cache=cache, batch_size=8, progress=lambda _, done, total: seen.append(done))
    assert seen[0] > 8
    embed(source, clip, cache=tmp_path / "whole", batch_size=8)
    assert contents(cache) == contents(tmp_path / "whole")


def test_a_disk_too_small_is_told_at_once(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(UserError, match=r"needs 0\.\d MB, the disk has 0\.0 MB free"):
        embed(open_source(str(folder(tmp_path / "d"))), clip, cache=tmp_path / "cache")


@pytest.mark.parametrize("file", ["index.json", "image.normalised.npy"])
def test_a_cache_of_somebody_else_is_not_called_damaged(tmp_path, clip, monkeypatch, file):
    source = open_source(str(folder(tmp_path / "d", 2)))
    embed(source, clip, cache=tmp_path / "cache")
    entry = entries(tmp_path / "cache")[0]
    read_text, stat = Path.read_text, Path.stat

    def refuse(call):
        def instead(path, *args, **kwargs):
            if path == entry / file:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return instead

    monkeypatch.setattr(Path, "read_text", refuse(read_text))
    monkeypatch.setattr(Path, "stat", refuse(stat))
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); --cache or VILU_CACHE names another"):
        embed(source, clip, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_made(tmp_path, clip):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be (written|read)|damaged"):
        embed(open_source(str(folder(tmp_path / "d", 2))), clip, cache=tmp_path / "file")


def test_the_writer_alone(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    with Writer(tmp_path / "e", {"a": (1, 2)}, 6) as writer:
        writer.append(3, {"x": rows[:4]}, [(0, "zero")])
        assert read(tmp_path / "e", {"a": (1, 2)}) is None
        writer.append(6, {"x": rows[4:]}, [])
        stored = writer.finish()
    assert np.array_equal(stored.arrays["x"], rows)
    assert stored.skipped == [(0, "zero")]
    with pytest.raises(UserError, match="something else"):
        read(tmp_path / "e", {"a": (1, 3)})


# ---------------------------------------------------------------------- values that are no embeddings


def test_an_answer_that_is_not_finite_names_its_image(tmp_path, clip):
    class Broken(Clip):
        def encode_pixels(self, pixels):
            out = super().encode_pixels(pixels).clone()
            out[2, 5] = float("nan")
            return out

        def project_pixels(self, pixels):
            found = super().project_pixels(pixels)
            return found._replace(activation=found.activation * 1e7)

    broken = Broken(clip.model, clip.spec, clip.tokenize)
    source = open_source(str(folder(tmp_path / "d", 4)))
    with pytest.raises(UserError, match=r"ant/002.jpg: CLIP's image normalised is not finite"):
        embed(source, broken, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="image activation is too large for float16: use float32"):
        embed(source, broken, projection=True, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("index.json"))
    with pytest.raises(UserError, match="float16 or float32"):
        embed(source, clip, dtype="float64")


# ---------------------------------------------------------------------- projections


def small_vit(**text):
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        text_cfg={"context_length": 24, "vocab_size": 2014, "width": 32, "heads": 2, "layers": 2, **text},
    )
    return model.eval().requires_grad_(False)


def as_clip(model, clip):
    model.visual.preprocess_cfg = {**open_clip.get_model_preprocess_cfg(clip.model)}
    return Clip(model, clip.spec, clip.tokenize)


def pixels(count=5):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8))


def weights(layer):
    """(P, D) and bias."""
    if isinstance(layer, torch.nn.Linear):
        return layer.weight.T, 0 if layer.bias is None else layer.bias
    return layer, 0


@pytest.mark.parametrize("kind", ["tiny", "vit", "linear text", "custom text", "timm"])
def test_the_projection_maps_what_is_given_to_what_is_given(clip, kind):
    if kind == "tiny":
        subject = clip
        image_layer = clip.model.visual.attnpool.c_proj
    elif kind in ("vit", "linear text"):
        subject = as_clip(small_vit(**({"proj_bias": True} if kind == "linear text" else {})), clip)
        image_layer = subject.model.visual.proj
    else:
        vision: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
        if kind == "timm":
            pytest.importorskip("timm")
            vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(
            embed_dim=24,
            vision_cfg=vision,
            text_cfg={"context_length": 24, "vocab_size": 2014, "width": 32, "heads": 2, "layers": 1},
        )
        subject = as_clip(model.eval().requires_grad_(False), clip)
        image_layer = subject.model.visual.head.proj if kind == "timm" else subject.model.visual.proj
    text_layer = getattr(subject.model, "text", subject.model).text_projection
    batch = pixels()
    if kind == "timm":
        batch = batch.repeat_interleave(5, 1).repeat_interleave(5, 2)
    tokens = clip.tokenize(["a photo of a red circle.", "navy star", "x"])
    state = {name: value.clone() for name, value in subject.model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        for found, plain, layer in (
            (subject.project_pixels(batch), subject.encode_pixels(batch), image_layer),
            (subject.project_tokens(tokens), subject.encode_tokens(tokens), text_layer),
        ):
            matrix, bias = weights(layer)
            assert found.activation.shape == (len(plain), matrix.shape[0])
            assert torch.allclose(found.activation @ matrix + bias, found.output, atol=1e-5)
            assert torch.allclose(F.normalize(found.output, dim=-1), plain, atol=1e-6)
            assert torch.equal(found.normalised, F.normalize(found.output, dim=-1))
            assert found.output.norm(dim=-1).sub(1).abs().max() > 1e-3  # not the unit rows
        # The tower is left as it was, weights and random numbers included.
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[name]) for name, value in subject.model.state_dict().items())
        assert torch.equal(subject.encode_pixels(batch), subject.encode_pixels(batch))


def test_projections_are_read_by_many_threads_at_once(clip):
    from concurrent.futures import ThreadPoolExecutor

    inputs = [pixels(3 + i) for i in range(6)]
    expected = [clip.project_pixels(batch) for batch in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            found = list(pool.map(clip.project_pixels, inputs))
            plain = list(pool.map(clip.encode_pixels, inputs))
            for a, b, c in zip(found, expected, plain, strict=True):
                assert torch.allclose(a.activation, b.activation, atol=1e-5)
                assert torch.allclose(a.normalised, c, atol=1e-5)


def test_a_tower_without_a_projection_is_one_line(tmp_path, clip):
    subject = as_clip(small_vit(), clip)
    subject.model.visual.proj = None
    with pytest.raises(UserError, match="its image tower does not end in one linear projection"):
        subject.project_pixels(pixels())
    subject = as_clip(small_vit(), clip)
    subject.model.text_projection = None
    with pytest.raises(UserError, match="its text tower does not end in one linear projection"):
        embed(open_source(captions(tmp_path / "d", 3)), subject, projection=True)


def test_bayes_vlm_reads_what_is_embedded(tmp_path, clip):
    from vilu.scores.bayes import BayesVLM

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    source = ArraySource(name="noise", images=images, labels=np.arange(40) % 2, class_names=("red circle", "navy star"))
    data = embed(source, clip, projection=True, cache=tmp_path)
    score = BayesVLM().fit(data.image, data.labels, data.text, data.logit_scale)
    found = (score or BayesVLM()).confidence(data.image, data.text, data.logit_scale)
    assert torch.isfinite(found).all()


# ---------------------------------------------------------------------- embeddings made elsewhere


def arrays(seed=0, unit=True):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    if unit:
        image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image, text, np.arange(7) % 3


def write(tmp_path, kind, image, text, labels, names=("a", "b", "ç"), scale=50.0):
    if kind == "npz":
        path = tmp_path / "e.npz"
        extra = {} if labels is None else {"labels": labels, "class_names": np.array(names)}
        np.savez(path, image_embedding=image, text_embeddings=text, logit_scale=scale, **extra)
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        path = tmp_path / "e.safetensors"
        extra = {} if labels is None else {"labels": labels}
        metadata = {"logit_scale": str(scale)} | ({} if labels is None else {"class_names": json.dumps(names)})
        save_file({"image_embedding": image, "text_embeddings": text, **extra}, path, metadata)
    elif kind == "folder":
        path = tmp_path / "e"
        path.mkdir()
        np.save(path / "image_embedding.npy", image)
        np.save(path / "text_embeddings.npy", text)
        np.save(path / "logit_scale.npy", scale)
        if labels is not None:
            np.save(path / "labels.npy", labels)
            (path / "class_names.txt").write_text("\n".join(names))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "e.parquet"
        columns = {"image_embedding": list(image)}
        if labels is None:
            columns["text_embeddings"] = list(text)
        else:
            columns["labels"] = labels
            classes = pa.table({"text_embeddings": list(text), "class_names": list(names)})
            parquet.write_table(classes, tmp_path / "e.text.parquet")
        parquet.write_table(pa.table(columns), path)
    return path


KINDS = ["npz", "safetensors", "folder", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [True, False])
def test_embeddings_made_elsewhere(tmp_path, kind, unit):
    image, text, labels = arrays(unit=unit)
    data = load_embeddings(write(tmp_path, kind, image, text, labels))
    for found, given_ in ((data.image.normalised, image), (data.text.normalised, text)):
        expected = given_.astype(np.float64) / np.linalg.norm(given_.astype(np.float64), axis=1, keepdims=True)
        assert np.allclose(found.double().numpy(), expected, atol=1e-6)
    assert data.labels.tolist() == labels.tolist()
    assert data.class_names == ("a", "b", "ç")
    assert data.logit_scale == (100 if kind == "parquet" else 50)
    assert data.name == "e"


@pytest.mark.parametrize("kind", KINDS)
def test_captions_made_elsewhere(tmp_path, kind):
    image, _, _ = arrays()
    data = load_embeddings(write(tmp_path, kind, image, arrays(1)[0], None))
    assert data.captions
    assert len(data.text) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("value", "word"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero")])
def test_a_row_that_is_no_direction_is_named(tmp_path, kind, value, word):
    image, text, labels = arrays()
    image[4] = value
    with pytest.raises(UserError, match=rf"image_embedding row 4 is {word}"):
        load_embeddings(write(tmp_path, kind, image, text, labels))


def test_without_labels_there_are_captions(tmp_path):
    image, text, _ = arrays()
    np.savez(tmp_path / "e.npz", image_embedding=image, text_embeddings=text)
    with pytest.raises(UserError, match="holds no labels, so text_embeddings must be the captions of the 7 images"):
        load_embeddings(tmp_path / "e.npz")


def test_bfloat16_is_read_with_and_without_torch(tmp_path):
    from safetensors.torch import save_file

    image, text, labels = (torch.from_numpy(array) for array in arrays())
    path = tmp_path / "e.safetensors"
    tensors = {"image_embedding": image.bfloat16(), "text_embeddings": text.bfloat16(), "labels": labels}
    save_file(tensors, path)
    expected = image.bfloat16().float()
    assert np.array_equal(read_image_embeddings(path), expected.numpy())
    assert torch.equal(
        load_embeddings(path).image.normalised, torch.nn.functional.normalize(expected.double(), dim=1).float()
    )
    save_file(tensors, path, {"class_names": "a,b,c"})
    with pytest.raises(UserError, match="class_names in the metadata must be a JSON list"):
        load_embeddings(path)


def test_a_folder_of_unit_rows_is_mapped(tmp_path):
    path = write(tmp_path, "folder", *arrays())
    data = load_embeddings(path)
    with open("/proc/self/maps") as maps:
        assert str(path / "image_embedding.npy") in maps.read()
    assert data.image.normalised.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0.5] * 7)}, "labels must be integers"),
        ({"labels": np.arange(7)}, r"labels must lie in 0\.\.2"),
        ({"labels": np.arange(6) % 3}, "7 images need as many integer labels"),
        ({"class_names": np.array(["a", "b"])}, "2 class names but 3 text embeddings"),
        ({"class_names": np.array(["a", "b", "a"])}, "repeats"),
        ({"class_names": np.array([1, 2, 3])}, "must be strings"),
        (
            {"class_names": np.array(["a", "b", None], object)},
            r"cannot be read as \.npz .*; class_names must be np\.array",
        ),
        ({"labels": np.arange(7) * 0, "text_embeddings": np.ones((1, 5))}, "at least two classes"),
        ({"logit_scale": 4.6052}, "is the logarithm of the factor; give the factor, 100"),
        ({"image_embedding": np.full((7, 5), 1e200)}, "row 0 is not finite"),
        ({"image_embedding": np.zeros((7, 5, 1))}, "must be numbers"),
        ({"image_embedding": np.zeros((0, 5))}, "must be numbers"),
        ({"text_embeddings": np.eye(3, 4)}, "text embeddings 4"),
        ({"logit_scale": -1.0}, "logit_scale must be one positive number"),
        ({"logit_scale": np.ones(3)}, "logit_scale must be one positive number"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    image, text, labels = arrays()
    given_ = {"image_embedding": image, "text_embeddings": text, "labels": labels, **changes}
    np.savez(tmp_path / "e.npz", **given_)
    with pytest.raises(UserError, match=message) as caught:
        load_embeddings(tmp_path / "e.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\xff" * 200, b"PAR1PAR1PAR1"])
def test_a_file_of_embeddings_that_is_none(tmp_path, suffix, content):
    path = tmp_path / f"e{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"e\..*: cannot be read as") as caught:
        load_embeddings(path)
    assert "\n" not in str(caught.value)


def test_embeddings_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_embeddings(tmp_path / "e.npz")
    with pytest.raises(UserError, match="holds no image_embedding, only nothing"):
        load_embeddings(tmp_path)
    (tmp_path / "e.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="are read from"):
        load_embeddings(tmp_path / "e.bin")
    (tmp_path / "image_embedding.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff")
    with pytest.raises(UserError, match=r"image_embedding.npy: cannot be read as an array"):
        load_embeddings(tmp_path)


def test_decoding_and_encoding_run_at_once(clip):
    """The second batch is read only once the tower has the first, and the tower waits until it is read."""
    encoding, reading = threading.Event(), threading.Event()

    class Held(ArraySource):
        def read(self, i):
            if i >= 8:
                assert encoding.wait(60), "the tower was given nothing before all was decoded"
                reading.set()
            return super().read(i)

    class Tower(Clip):
        def encode_pixels(self, batch):
            encoding.set()
            assert reading.wait(60), "nothing is decoded while the tower works"
            return F.normalize(torch.ones(len(batch), 4), dim=1)

        def encode_tokens(self, tokens):
            return F.normalize(torch.ones(len(tokens), 4), dim=1)

    source = Held(
        name="held", images=np.zeros((64, 32, 32, 3), np.uint8), labels=np.arange(64) % 2, class_names=("a", "b")
    )
    threads = torch.get_num_threads()
    data = embed(source, Tower(clip.model, clip.spec, clip.tokenize), batch_size=8, workers=2)
    assert len(data) == 64
    assert torch.get_num_threads() == threads
