"""Fixtures of all folders: the embedded CLIP, a checkpoint and one export."""

import shutil
from pathlib import Path
from typing import Any

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
def exported(tmp_path_factory, clip, checkpoint, tower_cache):
    """(repository, what parity.json holds, what was measured) of the one export for all tests."""
    from vilu.export import export

    root = tmp_path_factory.mktemp("export") / "model_repository"
    measured: list[Any] = []
    options = {"max_batch_size": 8, "cache": tower_cache, "on_measured": measured.append}
    report = export(checkpoint, root, clip=clip, **options)
    return root, report, measured[0]


@pytest.fixture(scope="session")
def repository(exported) -> Path:
    """One export for all tests: copy it before changing it."""
    root: Path = exported[0]
    return root


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """A CLIP of another image size and width than the embedded one."""
    from tests.support.cascade import larger_clip

    return larger_clip(tmp_path_factory.mktemp("larger") / "clip")


@pytest.fixture(scope="session")
def cascade(tmp_path_factory, clip, checkpoint, larger, exported, tower_cache):
    """One export of a cascade for all tests: copy it before changing it. A third of the digits goes on to stage 2."""
    from tests.support.cascade import Cascade, failures, stage
    from vilu.export import export
    from vilu.export.cascade import export_cascade
    from vilu.tiny import data

    def write(chosen, folder, *, on_measured, **options):
        if chosen is not checkpoint:
            return export(chosen, folder, on_measured=on_measured, **options)
        shutil.copytree(exported[0], folder)  # which that export wrote for this very stage
        on_measured(exported[2])
        return exported[1]

    checkpoints = checkpoint, stage(larger, checkpoint.class_set.names, 3, 0.5)
    threshold = float(failures(checkpoint, clip, data.digits("test").images[:96]).quantile(0.66))
    root = tmp_path_factory.mktemp("cascade") / "model_repository"
    options = {"write": write, "precision": "float32", "max_batch_size": 8, "cache": tower_cache}
    report = export_cascade(checkpoints, (clip, larger), root, threshold=threshold, **options)
    return Cascade(root, checkpoints, (clip, larger), threshold, report)
