"""CLIP's embeddings of a data set. Training, scores and evaluation read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.errors import UserError

BLOCK = 4096  # rows in one computation, so that temporary tensors stay small for any number of images


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N images or texts, with the input and output of CLIP's projection where a score needs them.

    The tensors may have any floating dtype; scores read them as float32. They may be mapped from a file, because this
    class never copies more than BLOCK rows at once.

    normalised: embeddings (N, D) with rows of norm 1.
    activation: input (N, P) of CLIP's last projection; None where it was not kept.
    output: output (N, D) of that projection before normalisation; None where it was not kept.

    Raises:
        UserError: the shapes do not fit together, or a value is not finite.
    """

    normalised: Tensor
    activation: Tensor | None = None
    output: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self._fields():
            if value.ndim != 2 or not value.is_floating_point():
                raise UserError(
                    f"embeddings: {name} must be floating and two-dimensional, got {value.dtype} {tuple(value.shape)}"
                )
            if len(value) != len(self.normalised):
                raise UserError(f"embeddings: {name} has {len(value)} rows, normalised {len(self.normalised)}")
            if not all(torch.isfinite(rows).all() for rows in value.split(BLOCK)):
                raise UserError(f"embeddings: {name} holds a value that is not finite")
        if self.output is not None and self.output.shape != self.normalised.shape:
            raise UserError(f"embeddings: output is {tuple(self.output.shape)}, not {tuple(self.normalised.shape)}")

    def __len__(self) -> int:
        return len(self.normalised)

    def __getitem__(self, rows: slice | Tensor) -> Embeddings:
        """Return the embeddings of these rows."""
        return Embeddings(**{name: value[rows] for name, value in self._fields()})

    def float(self) -> Embeddings:
        """Return a copy with every tensor as float32."""
        return Embeddings(**{name: value.float() for name, value in self._fields()})

    def _fields(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("normalised", "activation", "output"):
            value = getattr(self, name)
            if value is not None:
                yield name, value


@dataclass(frozen=True)
class EmbeddedSet:
    """A data set embedded by CLIP: images with labels from a closed set of classes, or images with captions.

    name: name that tables show.
    image: embeddings of the N images.
    text: embeddings of the K classes, or of the N captions; row i is then the caption of image i.
    labels: class of each image, (N,) int64 in [0, K); None for captions.
    class_names: the K class names; empty for captions.
    logit_scale: factor that CLIP puts on the cosine v · t before the softmax.
    skipped: one line for each image that could not be read. Such an image is not among the N.
    rows: index (N,) int64 of each image in the data that it was read from; None stands for 0 to N-1.

    Raises:
        UserError: there is no image, or widths, labels or names do not fit together.
    """

    name: str
    image: Embeddings
    text: Embeddings
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    logit_scale: float = 100.0
    skipped: tuple[str, ...] = ()
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.image):
            raise UserError(f"{self.name}: no images")
        if self.image.normalised.shape[1] != self.text.normalised.shape[1]:
            raise UserError(
                f"{self.name}: image embeddings are {self.image.normalised.shape[1]} wide, "
                f"text embeddings {self.text.normalised.shape[1]}"
            )
        if self.labels is None:
            if len(self.text) != len(self.image):
                raise UserError(f"{self.name}: {len(self.image)} images but {len(self.text)} captions")
            return
        if self.labels.shape != (len(self.image),) or self.labels.is_floating_point():
            raise UserError(f"{self.name}: {len(self.image)} images need as many integer labels")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.text):
            raise UserError(
                f"{self.name}: labels must lie in 0..{len(self.text) - 1}, "
                f"got {int(self.labels.min())}..{int(self.labels.max())}"
            )
        if len(self.class_names) not in (0, len(self.text)):
            raise UserError(f"{self.name}: {len(self.class_names)} class names but {len(self.text)} text embeddings")

    def __len__(self) -> int:
        return len(self.image)

    @property
    def captions(self) -> bool:
        """Whether each image has a text of its own instead of a label."""
        return self.labels is None

    def __getitem__(self, rows: slice | Tensor) -> EmbeddedSet:
        """Return the images of these rows. A closed set keeps all its classes."""
        return EmbeddedSet(
            self.name,
            self.image[rows],
            self.text[rows] if self.labels is None else self.text,
            None if self.labels is None else self.labels[rows],
            self.class_names,
            self.logit_scale,
            rows=torch.arange(len(self))[rows] if self.rows is None else self.rows[rows],
        )
