"""Seeded embeddings, the devices tests run on, and how close a probability must come to its reference."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from vilu import ViLUHead
from vilu.recipes import Recipe

# Largest difference of a probability from a float64 reference, by the dtype that was computed in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    """(rows, dim) float64 unit vectors around a common direction, crowded as real CLIP embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dim, generator=generator, dtype=torch.float64)
    return F.normalize(centre + torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


class World(NamedTuple):
    """Image embeddings (N, 24) around six classes' text embeddings, and a head trained on the first 1,000."""

    image_embedding: torch.Tensor
    labels: torch.Tensor
    text_embeddings: torch.Tensor
    head: ViLUHead
    names: tuple[str, ...]


TRAINED = 1000


def small_world(samples: int) -> World:
    from vilu import train_head  # here, so that the tests of the kernels run where SciPy is not installed

    t = unit_rows(6, 24, 0).float()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (samples,), generator=generator)
    noise = 0.02 + 0.25 * torch.rand(samples, 1, generator=generator)
    v = F.normalize(t[labels] + noise * torch.randn(samples, 24, generator=generator), dim=1)
    head = train_head(v[:TRAINED], labels[:TRAINED], t, recipe=Recipe(epochs=3, min_steps=0, folds=1))
    return World(v, labels, t, head, tuple(f"class {i}" for i in range(6)))
