"""Small data sets, heads and quick scores for the tests of evaluation."""

from functools import partial

import numpy as np
import torch

from tests.support.embeddings import unit_rows
from vilu import ViLUHead
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.evaluation.evaluate import evaluate
from vilu.scores import LVU, SCORES, ConfidNet, ProbVLM, Training

QUICK = Training(epochs=2, batch_size=16)
FACTORIES = {
    **SCORES,
    "LVU-BCE": lambda: LVU("bce", QUICK),
    "LVU-MSE": lambda: LVU("mse", QUICK),
    "ConfidNet": lambda: ConfidNet(training=QUICK),
    "ProbVLM": lambda: ProbVLM(passes=2, training=QUICK),
}
quick = partial(evaluate, factories=FACTORIES, resamples=20)


def closed(count=80, classes=5, dim=12, noise=0.7, seed=0, name="world", projection=False, names=None):
    generator = torch.Generator().manual_seed(seed)
    text = unit_rows(classes, dim, 5).float()
    labels = torch.randint(classes, (count,), generator=generator)
    image = torch.nn.functional.normalize(text[labels] + noise * torch.randn(count, dim, generator=generator), dim=1)

    def embeddings(rows):
        return Embeddings(rows, 2 * rows, 3 * rows) if projection else Embeddings(rows)

    names = tuple(f"class {i}" for i in range(classes)) if names is None else names
    return EmbeddedSet(name, embeddings(image), embeddings(text), labels, names)


def write_npz(path, data, **more):
    """Write a data set as --embeddings reads it."""
    arrays = {"image_embedding": data.image.normalised, "text_embeddings": data.text.normalised, "labels": data.labels}
    np.savez(path, **more, **arrays)


def captioned(count=70, dim=8, noise=0.6, seed=0, distinct=None, projection=False):
    text = unit_rows(distinct or count, dim, seed).float()[torch.arange(count) % (distinct or count)]
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(text + noise * torch.randn(count, dim, generator=generator), dim=1)
    pictures, captions = (Embeddings(rows, rows, rows) if projection else Embeddings(rows) for rows in (image, text))
    return EmbeddedSet("captions", pictures, captions)


def head(dim, seed=0):
    torch.manual_seed(seed)
    return ViLUHead(dim, hidden=(16,)).eval()
