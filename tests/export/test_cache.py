"""The cache of towers: proven, bounded, whole or absent, and used by the next export of the same CLIP."""

import copy
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from vilu import ViLUHead
from vilu.export import build, export, towers
from vilu.export.cache import ARRAYS, INDEX, Cache, key

NAME = key(kind="test")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"weights" * 1000)
    return path


def test_an_entry_comes_back_as_it_was_kept(cache, graph, tmp_path):
    assert not cache.fetch(NAME, tmp_path / "a")
    cache.keep(NAME, [graph])
    assert cache.fetch(NAME, tmp_path / "a")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == graph.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.onnx"]
    arrays = {"x": np.arange(6.0).reshape(2, 3)}
    cache.keep_arrays(key(kind="other"), arrays)
    np.testing.assert_array_equal(cache.arrays(key(kind="other"))["x"], arrays["x"])


def change_byte(folder):
    content = bytearray((folder / "model.onnx").read_bytes())
    content[100] ^= 1
    (folder / "model.onnx").write_bytes(content)


def link(folder):
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def climb(folder):
    size, checksum = json.loads((folder / INDEX).read_text())["model.onnx"]
    (folder.parent / "escaped.onnx").write_bytes((folder / "model.onnx").read_bytes())
    (folder / INDEX).write_text(json.dumps({"../escaped.onnx": [size, checksum]}))


@pytest.mark.parametrize(
    "damage",
    [
        change_byte,
        link,
        climb,
        lambda folder: (folder / "model.onnx").unlink(),
        lambda folder: (folder / "model.onnx").write_bytes(b""),
        lambda folder: (folder / INDEX).write_text('{"model.onnx": [1'),
        lambda folder: (folder / INDEX).write_text("[" * 100_000),
        lambda folder: (folder / INDEX).write_text('{"model.onnx": 7}'),
        lambda folder: (folder / INDEX).write_text(" " * (1 << 17) + "{}"),
    ],
)
def test_a_damaged_entry_is_no_entry_and_is_made_again(cache, graph, tmp_path, damage):
    cache.keep(NAME, [graph])
    damage(cache.folder / NAME)
    assert not cache.fetch(NAME, tmp_path / "a")
    assert not (tmp_path / "escaped.onnx").exists()
    assert not list((tmp_path / "a").glob("*"))
    assert not (cache.folder / NAME).exists()
    cache.keep(NAME, [graph])
    assert cache.fetch(NAME, tmp_path / "a")


def test_damaged_arrays_are_no_entry(cache):
    cache.keep_arrays(NAME, {"x": np.ones(4)})
    content = (cache.folder / NAME / ARRAYS).read_bytes()
    (cache.folder / NAME / ARRAYS).write_bytes(content[:-1] + b"\x01")
    assert cache.arrays(NAME) == {}
    assert not (cache.folder / NAME).exists()


def test_a_folder_that_others_can_write_is_not_used(cache, graph, tmp_path):
    cache.keep(NAME, [graph])
    cache.folder.chmod(0o777)
    assert not cache.fetch(NAME, tmp_path / "a")
    (tmp_path / "link").symlink_to(cache.folder)
    cache.folder.chmod(0o700)
    assert not Cache(tmp_path / "link").fetch(NAME, tmp_path / "a")
    assert cache.fetch(NAME, tmp_path / "a")
    if os.geteuid() == 0:
        os.chown(cache.folder, 12345, 12345)
        assert not cache.fetch(NAME, tmp_path / "a")


def test_a_cache_that_cannot_be_written_does_no_harm(graph, tmp_path):
    cache = Cache(graph / "below a file")
    cache.keep(NAME, [graph])
    cache.keep_arrays(NAME, {"x": np.ones(1)})
    assert not cache.fetch(NAME, tmp_path / "a")


def test_entries_not_used_for_longest_go_first(graph, tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=3 * graph.stat().st_size)  # room for two and their indexes
    names = [key(number=i) for i in range(3)]
    for age, name in enumerate(names[:2]):
        cache.keep(name, [graph])
        os.utime(cache.folder / name / INDEX, (age, age))
    assert cache.fetch(names[0], tmp_path / "a")  # used now
    half = cache.folder / ".half.part-1"
    half.mkdir()
    os.utime(half, (1, 1))
    cache.keep(names[2], [graph])
    assert not half.exists(), "what a killed export left long ago"
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted([names[0], names[2]])
    Cache(cache.folder, max_bytes=10).keep(key(number=4), [graph])
    assert not (cache.folder / key(number=4)).exists(), "larger than the whole cache"


def test_the_next_export_of_a_clip_neither_traces_it_nor_runs_it(
    repository, tower_cache, tmp_path, monkeypatch, clip, checkpoint
):
    def write(module, example, path, *arguments, **options):
        assert not path.parent.parent.name.startswith("clip_")
        return original(module, example, path, *arguments, **options)

    original = build.write_graph
    monkeypatch.setattr(build, "write_graph", write)
    monkeypatch.setattr(towers.session, "open_session", refuse_towers(towers.session.open_session))
    torch.manual_seed(1)
    other = replace(checkpoint, head=ViLUHead(128).eval().requires_grad_(False), threshold=0.4)
    report = export(other, tmp_path / "r", clip=clip, max_batch_size=8, cache=tower_cache)
    assert report["over_budget"] == []
    for name in ("clip_image", "clip_text"):
        for file in (repository / name / "1").iterdir():
            if file.suffix in (".onnx", ".data"):
                assert (tmp_path / "r" / name / "1" / file.name).read_bytes() == file.read_bytes()
    before = json.loads((repository / "parity.json").read_text())
    assert report["graphs"]["clip_image"] == before["graphs"]["clip_image"]
    assert report["head"] != before["head"]


def refuse_towers(open_session):
    def guarded(path, *arguments, **options):
        assert path.parent.parent.name not in ("clip_image", "clip_text"), "a tower was run"
        return open_session(path, *arguments, **options)

    return guarded


def test_the_digest_covers_weights_buffers_and_settings(clip):
    first = towers.clip_digest(clip)
    assert towers.clip_digest(copy.deepcopy(clip)) == first
    changed = copy.deepcopy(clip)
    changed.mean[0] += 1e-3  # a buffer that is in no state_dict
    assert towers.clip_digest(changed) != first
    changed = copy.deepcopy(clip)
    next(changed.parameters()).data.view(-1)[0] += 1
    assert towers.clip_digest(changed) != first
    changed = copy.deepcopy(clip)
    next(m for m in changed.modules() if isinstance(m, torch.nn.LayerNorm)).eps = 1e-3
    assert towers.clip_digest(changed) != first
