"""What is asked about images, and the answers: shared by `vilu.Predictor` and the server's clients. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from vilu.errors import FailedError

if TYPE_CHECKING:
    from PIL import Image

ImageLike = Union[str, "os.PathLike[str]", bytes, np.ndarray, "Image.Image"]
TOP = 5  # most labels in an answer's details


class RequestRefused(FailedError):  # noqa: N818 - an answer, not a fault of the program
    """The question is wrong, so there is no answer: a damaged image, an unknown model."""


@dataclass(frozen=True)
class Answer:
    """The answer for one image.

    Attributes:
        source: the image's path, or "image N" for one that came as bytes or pixels.
        label: the class that CLIP chose.
        class_index: its place in the class set, from 0.
        confidence: CLIP's softmax probability of that class, in [0, 1].
        failure_probability: ViLU's probability that the label is wrong, in [0, 1].
        accept: whether failure_probability is below the class set's threshold and, where the outlier score has a
            threshold and the label is of the checkpoint's own classes, outlier_score is not above it.
        error: why there is no answer; the other fields then hold nothing. None where there is one.
        class_set: "NAME@VERSION" of the server's class set; "" for labels that came with the request. None unless asked
            for.
        top: the labels with the largest probabilities, at most 5, each with its probability. Empty unless asked for.
        entropy: the confidence Σ p log p / log K, in [-1, 0]. None unless asked for.
        doctor: the confidence -(1 - g) / g with g = Σ p², in [1 - K, 0]. None unless asked for.
        concepts: the labels that the head attended to most, each with its weight. Empty unless asked for.
        stage: the stage of a cascade that gave the answer, from 1. None unless a cascade was asked.
        escalation_failed: whether a later stage of the cascade was to answer and could not; accept is then False.
        embedding: (D,) float32 image embedding of unit length. None unless asked for.
        outlier_score: how unlike the training images the image is, in [0, 2] (`vilu.outlier`). None where the
            checkpoint has no such score, and from a server unless asked for.
        id: what feedback names, where the server records its answers (`vilu serve --record`).

    Example:
        >>> answer = Answer("cat.jpg", "cat", 3, 0.91, 0.07, accept=True)
        >>> answer.raise_for_error().label
        'cat'
    """

    source: str
    label: str = ""
    class_index: int = -1
    confidence: float = float("nan")
    failure_probability: float = float("nan")
    accept: bool = False
    error: str | None = None
    class_set: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    entropy: float | None = None
    doctor: float | None = None
    concepts: tuple[tuple[str, float], ...] = ()
    stage: int | None = None
    escalation_failed: bool = False
    embedding: np.ndarray | None = field(default=None, compare=False, repr=False)
    id: str = field(default="", compare=False, repr=False)
    outlier_score: float | None = None

    def raise_for_error(self) -> Answer:
        """Return this answer. Raises RequestRefused where it has an error."""
        if self.error is not None:
            raise RequestRefused(f"{self.source}: {self.error}")
        return self


def opened(image: ImageLike, index: int) -> tuple[str, bytes | Image.Image | Answer]:
    """Name an image and open it.

    Args:
        image: a path, encoded bytes, a Pillow image, or pixels (H, W, 3) uint8 in RGB.
        index: the image's place among those that are asked about, from 0; it names an image without a path.

    Returns:
        The name, and encoded bytes or a Pillow image in its own mode; in their place an Answer with the error for a
        file that cannot be read, and for anything else that is no image.

    Example:
        >>> opened(b"...", 7)
        ('image 7', b'...')
    """
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        try:
            return name, Path(name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            return name, Answer(name, error=f"cannot be read ({getattr(error, 'strerror', None) or error})")
    name = f"image {index}"
    if isinstance(image, bytes):
        return name, image
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            return name, Answer(name, error=f"arrays must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
        return name, Image.fromarray(image)
    if not isinstance(image, Image.Image):
        return name, Answer(name, error=f"not a path, bytes, a Pillow image or an array, but {type(image).__name__}")
    try:
        image.load()
        return name, image
    except Exception as error:  # Pillow reads a lazily opened file here, and raises many types on a damaged one
        return name, Answer(name, error=f"image cannot be decoded ({type(error).__name__})")
