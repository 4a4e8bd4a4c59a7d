"""Fingerprints: a sample is known again whatever it comes as, and another one is not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.files import jpeg, put, shard
from vilu import load_clip
from vilu.data import embed, load_embeddings, open_source
from vilu.fingerprints import COLUMNS, TOLERANCE, fingerprints, known, remembered, too_many


def crowded(rows, dim, seed=0, spread=1.0):
    """Embeddings around a common direction, as CLIP's are."""
    centre = torch.randn(dim, generator=torch.Generator().manual_seed(7))
    return F.normalize(centre + spread * torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dim", [24, 512, 1152])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sample_is_known_in_every_type(dim, dtype):
    v = crowded(2000, dim)
    samples = remembered(v)
    assert (samples.shape, samples.dtype) == ((2000, COLUMNS), torch.int16)
    again = v.to(dtype)
    assert known(again, samples).float().mean() > 0.999
    assert known(F.normalize(again.float() * 3, dim=1), samples).float().mean() > 0.999


@pytest.mark.parametrize("spread", [1.0, 0.2])
def test_other_samples_are_not_known(spread):
    """With a spread of 0.2, two embeddings have a cosine of 0.96."""
    assert not known(crowded(20_000, 256, 1, spread), remembered(crowded(20_000, 256, 2, spread))).any()


def test_rounding_at_every_edge_of_the_index():
    """Values that lie on an edge of a cell or of the 16 bits are found from either side."""
    edges = [[x] * COLUMNS for x in (-32768, -32767, -128, -1, 0, 127, 128, 32767)]
    kept = torch.tensor(edges, dtype=torch.int16)
    axes = fingerprints(torch.eye(16, dtype=torch.float64)).double()  # (16, 8): the signs, in steps
    inverse = torch.linalg.pinv(axes)
    for row in kept.double():
        for noise in (-TOLERANCE, -1, 0, 1, TOLERANCE):
            assert known(((row + noise) @ inverse)[None], kept).all()
            assert not known(((row + noise + 20 * TOLERANCE) @ inverse)[None], kept).any()


def test_the_number_that_is_kept_is_bounded():
    v = crowded(500, 32)
    part = remembered(v, limit=100)
    assert len(part) == 100
    assert int(known(v, part).sum()) == 100
    assert len(remembered(v[:1].expand(50, -1))) == 1
    assert not known(v, torch.empty(0, COLUMNS, dtype=torch.int16)).any()


def test_what_false_positives_explain():
    assert not too_many(0, 100)
    assert too_many(1, 100)
    assert not too_many(1, 10_000)
    assert too_many(2, 10_000)


def test_files_shards_tables_and_embeddings_are_the_same_samples(tmp_path):
    """The same images as a folder, as shards, in a table and as embeddings, whatever the batch size and the type."""
    clip = load_clip()
    draw = np.random.default_rng(0)
    pictures = [jpeg(tuple(int(x) for x in draw.integers(0, 256, 3)), (40 + i, 30)) for i in range(24)]
    for i, data in enumerate(pictures):
        put(tmp_path / "folder" / "ab"[i % 2] / f"{i}.jpg", data)
    images = [(f"{i}.jpg", data) for i, data in enumerate(pictures)]
    shard(tmp_path / "a.tar", [*images, *((f"{i}.txt", b"x") for i in range(24))])
    rows = "".join(f"{tmp_path / 'folder' / 'ab'[i % 2] / f'{i}.jpg'},x\n" for i in range(24))
    (tmp_path / "t.csv").write_text(f"path,caption\n{rows}")
    trained = embed(open_source(str(tmp_path / "folder")), clip, batch_size=24)
    samples = remembered(trained.image.normalised)
    np.savez(
        tmp_path / "e.npz",
        image_embedding=3 * trained.image.normalised.numpy().astype(np.float64),
        text_embeddings=trained.text.normalised.numpy(),
        labels=trained.labels.numpy(),
    )
    for name, batch_size, dtype in (("folder", 1, "float32"), ("a.tar", 7, "float32"), ("t.csv", 5, "float16")):
        again = embed(open_source(str(tmp_path / name)), clip, batch_size=batch_size, dtype=dtype)
        assert known(again.image.normalised, samples).all(), name
    assert known(load_embeddings(tmp_path / "e.npz").image.normalised, samples).all()
    others = embed(open_source(dataset="digits", split="test"), clip)
    assert not known(others.image.normalised, samples).any()
