"""Seeded embeddings, the devices tests run on, and how close a probability must come to its reference."""

import pytest
import torch
import torch.nn.functional as F

# Largest difference of a probability from a float64 reference, by the dtype that was computed in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    """(rows, dim) float64 unit vectors around a common direction, crowded as real CLIP embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dim, generator=generator, dtype=torch.float64)
    return F.normalize(centre + torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)
