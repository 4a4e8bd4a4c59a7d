"""A summary of the calibration data, which a monitor compares a server's answers with: counts in fixed bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError

# The bins are fixed before any data are seen, as `vilu.evaluation.sequential.Drift` needs them.
FAILURE_BINS = 80  # of the logit of P(failure), a quarter wide, from -10 to 10
# Narrow, as distances in many dimensions are much alike, and ties are broken at random.
DISTANCE_BINS = 384  # of the binary logarithm of an embedding's distance, a 64th wide, from -2 to 4


def failure_bins(failure_probability: ArrayLike) -> NDArray[np.int64]:
    """The bin of each P(failure) (N,)."""
    p = np.clip(np.asarray(failure_probability, np.float64), 1e-9, 1 - 1e-9)
    bins: NDArray[np.int64] = np.clip((4 * (np.log(p) - np.log1p(-p) + 10)).astype(np.int64), 0, FAILURE_BINS - 1)
    return bins


def distance_bins(embedding: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.int64]:
    """The bin of each embedding's (N, D) distance from the mean (D,): the mean over D of squares over variances."""
    square = (np.asarray(embedding, np.float64) - np.asarray(mean)) ** 2 / (np.asarray(variance) + 1e-12)
    log = np.log2(np.maximum(square.mean(axis=1), 1e-9))
    bins: NDArray[np.int64] = np.clip((64 * (log + 2)).astype(np.int64), 0, DISTANCE_BINS - 1)
    return bins


def summarise(
    failure_probability: ArrayLike, class_index: ArrayLike, classes: int, embedding: ArrayLike | None = None
) -> dict[str, Any]:
    """The summary of N samples, as JSON can hold it.

    Args:
        failure_probability: (N,) in [0, 1].
        class_index: (N,) predicted classes.
        classes: K, number of classes.
        embedding: (N, D) image embeddings. Mean and variance come from the even rows and the distances from the odd
            ones, so that the distances are as those of new images.

    Raises:
        UserError: fewer than 2 samples.
    """
    failure = np.asarray(failure_probability)
    if len(failure) < 2:
        raise UserError("a reference needs at least 2 samples")
    found: dict[str, Any] = {
        "samples": len(failure),
        "failure_probability": np.bincount(failure_bins(failure), minlength=FAILURE_BINS).tolist(),
        "classes": np.bincount(np.asarray(class_index), minlength=classes).tolist(),
    }
    if embedding is not None:
        rows = np.asarray(embedding, np.float64)
        mean, variance = rows[::2].mean(axis=0), rows[::2].var(axis=0)
        mean, variance = np.round(mean, 6), np.round(variance, 9)
        counts = np.bincount(distance_bins(rows[1::2], mean, variance), minlength=DISTANCE_BINS)
        found["embedding"] = {"mean": mean.tolist(), "variance": variance.tolist(), "distance": counts.tolist()}
    return found
