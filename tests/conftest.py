"""Fixtures of all folders: the embedded CLIP, a checkpoint and one export."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def clip():
    from vilu import load_clip  # here, so that the tests of the kernels run where open_clip is not installed

    return load_clip()


@pytest.fixture(scope="session")
def checkpoint(clip):
    """An untrained head over the digits, with an outlier score; its threshold splits the answers."""
    from vilu import Checkpoint, ViLUHead
    from vilu.outlier import fit_outlier
    from vilu.tiny import data

    torch.manual_seed(0)
    class_set = clip.class_set(data.digits("clip_val").names)
    t = class_set.text_embeddings
    head = ViLUHead(t.shape[1], attention_scale=clip.spec.logit_scale)
    labels = torch.arange(40) % len(t)
    rows = torch.nn.functional.normalize(t[labels] + torch.randn(40, t.shape[1]) / t.shape[1] ** 0.5, dim=1)
    outlier = fit_outlier(rows, labels, t)
    return Checkpoint(head.eval().requires_grad_(False), clip.spec, class_set, threshold=0.505, outlier=outlier)


@pytest.fixture(scope="session")
def tower_cache(tmp_path_factory) -> Path:
    """Where `repository` kept its towers, which makes another export of the embedded CLIP fast."""
    return tmp_path_factory.mktemp("cache") / "towers"


@pytest.fixture(scope="session")
def repository(tmp_path_factory, clip, checkpoint, tower_cache) -> Path:
    """One export for all tests: copy it before changing it."""
    from vilu.export import export

    root = tmp_path_factory.mktemp("export") / "model_repository"
    export(checkpoint, root, clip=clip, max_batch_size=8, cache=tower_cache)
    return root
