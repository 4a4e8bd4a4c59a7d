"""Fingerprints of samples: a checkpoint knows the samples that its head was trained on.

A fingerprint is eight projections of the image embedding on fixed directions of random signs, in steps of 2^-13. The
same image gives nearly the same embedding whether it comes from a file, a shard or a file of embeddings, whatever the
batch size, and in float32, float16 or bfloat16: each projection then moves by less than TOLERANCE steps. Two images
whose embeddings differ by a distance d have projections that differ by about d · N(0, 1). So they are taken for one
with a probability of about (2 Φ(tolerance / d) - 1)^8: 2e-10 for d = 0.1 (a cosine of 0.995), 5e-16 for d = 0.5.

An embedding cannot be read back from its fingerprint: eight numbers do not determine hundreds.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

COLUMNS = 8
STEPS = 8192  # steps per unit; a fingerprint is kept modulo 2^16 steps
TOLERANCE = 63  # steps: 0.0077, forty standard deviations of float16's rounding and five of bfloat16's
CELL = 128  # steps in a cell of the index; at least 2 · TOLERANCE + 1
INDEXED = 4  # columns that the index covers
LIMIT = 1 << 20  # fingerprints that a checkpoint keeps; a random part of more samples
FALSE_POSITIVES = 1e-4  # share of new samples that may be taken for known ones, far above what the projections give
BLOCK = 4096


def fingerprints(image_embedding: Tensor) -> Tensor:
    """Return the fingerprints (N, 8) int16 of image embeddings (N, D) with rows of norm 1."""
    signs = torch.from_numpy(_signs(image_embedding.shape[1]))
    parts = [rows.detach().cpu().double() @ signs for rows in image_embedding.split(BLOCK)]
    steps = (torch.cat(parts) * STEPS).round().long()
    return ((steps + (1 << 15)) % (1 << 16) - (1 << 15)).to(torch.int16)


def remembered(image_embedding: Tensor, limit: int = LIMIT) -> Tensor:
    """Return what a checkpoint keeps of its training samples: sorted fingerprints (M, 8) int16 without repetitions.

    Args:
        image_embedding: (N, D), rows of norm 1.
        limit: largest M. More samples are represented by `limit` of them, drawn at random.
    """
    rows = torch.randperm(len(image_embedding), generator=torch.Generator().manual_seed(0))[:limit].sort()[0]
    parts = [fingerprints(image_embedding[part]) for part in rows.split(BLOCK)]
    return torch.from_numpy(np.unique(torch.cat(parts).numpy(), axis=0))


def known(image_embedding: Tensor, samples: Tensor) -> Tensor:
    """Say which images are among the samples that a checkpoint remembers.

    Args:
        image_embedding: (N, D), rows of norm 1.
        samples: (M, 8) int16, as `remembered` returns them.

    Returns:
        (N,) bool.
    """
    asked = fingerprints(image_embedding).numpy().astype(np.int64)
    kept = samples.numpy().astype(np.int64)
    keys = _keys(kept[:, :INDEXED] // CELL)
    order = keys.argsort(kind="stable")
    keys, kept = keys[order], kept[order]
    found = np.zeros(len(asked), bool)
    for corner in range(1 << INDEXED):
        # A sample within the tolerance lies in the cell of one of these corners.
        shift = np.array([TOLERANCE if corner >> i & 1 else -TOLERANCE for i in range(INDEXED)])
        here = _keys((asked[:, :INDEXED] + shift) // CELL)
        at, end = np.searchsorted(keys, here, "left"), np.searchsorted(keys, here, "right")
        rows = np.flatnonzero((at < end) & ~found)
        while len(rows):
            difference = (asked[rows] - kept[at[rows]] + (1 << 15)) % (1 << 16) - (1 << 15)
            found[rows] = (np.abs(difference) <= TOLERANCE).all(axis=1)
            at[rows] += 1
            rows = rows[(at[rows] < end[rows]) & ~found[rows]]
    return torch.from_numpy(found)


def too_many(count: int, samples: int) -> bool:
    """Whether so many known ones of so many samples are more than false positives explain."""
    return count > FALSE_POSITIVES * samples


def _signs(dim: int) -> np.ndarray:
    """Return eight directions (D, 8) of signs, the same on every machine and for ever."""
    data = np.frombuffer(hashlib.shake_256(b"vilu fingerprints, 1").digest(dim), np.uint8)
    return np.unpackbits(data[:, None], axis=1).astype(np.float64) * 2 - 1


def _keys(cells: np.ndarray) -> np.ndarray:
    """Return one number for each row of cells (N, INDEXED)."""
    keys = np.zeros(len(cells), np.int64)
    for column in (cells % ((1 << 16) // CELL)).T:
        keys = keys * ((1 << 16) // CELL) + column
    return keys
