"""Images and candidate labels for traffic, and what the eager model answers to all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vilu import Checkpoint
from vilu.clip import Clip
from vilu.preprocess.image import decode
from vilu.tiny import data

TIE = 1e-5  # candidates whose probabilities are nearer than this may come in either order


@dataclass
class Answers:
    """The eager model's over one candidate set, for every image: label index, the next one where they tie, the two
    probabilities."""

    names: Sequence[str]
    rows: np.ndarray  # (K, D)
    index: np.ndarray
    second: np.ndarray  # index where there is no tie
    confidence: np.ndarray
    failure: np.ndarray


class World:
    """Images, and what the eager model says of them over the class set and over candidates of a request's own.

    Args:
        images: encoded.
        sets: candidates; those of equal size may share a request.
    """

    def __init__(self, clip: Clip, checkpoint: Checkpoint, images: Sequence[bytes], sets: Sequence[Sequence[str]]):
        assert checkpoint.class_set is not None
        self.clip, self.head, self.threshold = clip, checkpoint.head, np.float32(checkpoint.threshold)
        self.templates = checkpoint.class_set.templates
        self.images = list(images)
        self.pixels = np.stack([decode(image, clip.transform) for image in images])
        parts = [clip.embed_images([self.pixels[i : i + 64]]) for i in range(0, len(images), 64)]
        self.embedding = torch.cat(parts)
        self.closed = self.answers(checkpoint.class_set.names, checkpoint.class_set.text_embeddings)
        self.open = [self.answers(names, clip.class_set(names, self.templates).text_embeddings) for names in sets]

    def answers(self, names: Sequence[str], rows: torch.Tensor) -> Answers:
        scaled = self.clip.spec.logit_scale * self.embedding @ rows.T
        p, order = torch.softmax(scaled, dim=1).sort(dim=1, descending=True)
        other = min(1, len(names) - 1)
        tied = p[:, 0] - p[:, other] < TIE
        failure = self.head.failure_probability(self.embedding, rows)
        columns = order[:, 0], torch.where(tied, order[:, other], order[:, 0]), p[:, 0], failure
        return Answers(list(names), rows.numpy(), *(column.numpy() for column in columns))


def digits_and_shapes(count: int, seed: int = 0) -> list[bytes]:
    """`count` distinct images of both embedded worlds (split test), as JPEG, PNG and WebP of many sizes."""
    digits = data.digits("test", seed).images
    drawn = data.shapes("test", count, seed).images
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        image = Image.fromarray(digits[i // 2 % len(digits)] if i % 2 else drawn[i])
        image = image.resize((int(draw.integers(32, 320)), int(draw.integers(32, 320))), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        kind = ("JPEG", "PNG", "WEBP")[i % 3]
        image.save(buffer, kind, **({} if kind == "PNG" else {"quality": int(draw.integers(60, 96))}))
        made.append(buffer.getvalue())
    return made


def label_sets(count: int, seed: int = 0, largest: int = 40) -> list[list[str]]:
    """`count` candidate sets of 2 to `largest` labels, drawn from one vocabulary, some beyond ASCII; many sets share a
    size."""
    draw = np.random.default_rng(seed)
    words = [f"handwritten {word}" for word in data.DIGITS]
    words += [f"{z} {c} {s}" for z in data.SIZES for c in data.COLOURS for s in data.SHAPES]
    words += ["a cat", "ein Bär", "кот", "猫", "naïve café", "x" * 200]
    sizes = [size for size in (2, 3, 5, 10, 20, largest) if size <= largest]
    return [[words[i] for i in draw.permutation(len(words))[: sizes[n % len(sizes)]]] for n in range(count)]
