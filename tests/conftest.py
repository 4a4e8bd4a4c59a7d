"""Shared by all folders: seeded embeddings, and where the public test data lies."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Largest difference of a probability from a float64 reference, by the dtype that was computed in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"public test data is absent ({SHARED})")
    return SHARED


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    """(rows, dim) float64 unit vectors around a common direction, crowded as real CLIP embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dim, generator=generator, dtype=torch.float64)
    return F.normalize(centre + torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture(scope="session")
def clip():
    from vilu import load_clip  # here, so that the tests of the kernels run where open_clip is not installed

    return load_clip()


@pytest.fixture(scope="session")
def checkpoint(clip):
    """An untrained head over the digits; its threshold splits the answers."""
    from vilu import Checkpoint, ViLUHead
    from vilu.tiny import data

    torch.manual_seed(0)
    class_set = clip.class_set(data.digits("clip_val").names)
    head = ViLUHead(class_set.text_embeddings.shape[1], attention_scale=clip.spec.logit_scale)
    return Checkpoint(head.eval().requires_grad_(False), clip.spec, class_set, threshold=0.505)


@pytest.fixture(scope="session")
def repository(tmp_path_factory, clip, checkpoint) -> Path:
    """One export for all tests: copy it before changing it."""
    from vilu.export import export

    root = tmp_path_factory.mktemp("export") / "model_repository"
    export(checkpoint, root, clip=clip, max_batch_size=8)
    return root
