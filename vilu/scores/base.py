"""What all scores share: the inputs, their checks, and the split into blocks of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, Embeddings
from vilu.errors import UserError

if TYPE_CHECKING:
    from typing import Self  # Python 3.11; the type checker runs as that


class Score:
    """The base class of all scores: a confidence in CLIP's zero-shot answer, higher = more likely right.

    A subclass defines `name`, `_confidence` and, where it learns, `needs_fit = True` and `_fit`.

    Attributes:
        name: the name in the published tables.
        needs_fit: whether `fit` must be called before `confidence`.

    Example:
        >>> class Margin(Score):
        ...     name = "Margin"
        ...     def _confidence(self, image, text, scale):
        ...         top = (image.normalised @ text.normalised.T).topk(2).values
        ...         return top[:, 0] - top[:, 1]
        >>> Margin().confidence(torch.tensor([[0.6, 0.8]]), torch.eye(2)).round(decimals=2)
        tensor([0.2000])
    """

    name: str
    needs_fit: bool = False
    _fitted = False

    def fit(
        self,
        embeddings: Tensor | Embeddings,
        labels: Tensor | None,
        text_embeddings: Tensor | Embeddings,
        logit_scale: float = 100.0,
    ) -> Self:
        """Learn from training data; a score that needs none learns nothing. The same seed gives the same score.

        Args:
            embeddings: (N, D) image embeddings, L2-normalised, float32 or float16.
            labels: (N,) integers in [0, K), or None for captions; the candidates are then the captions of a batch.
            text_embeddings: (K, D) of the class set, or (N, D) captions, row i being the caption of image i.
            logit_scale: CLIP's factor on v · t.

        Returns:
            the score itself.

        Raises:
            UserError: shapes or labels that do not fit, values that are not finite, too few samples.
        """
        image, text = _checked(embeddings, text_embeddings, logit_scale)
        if labels is None:
            if len(image) != len(text):
                raise UserError(f"captions: {len(image)} images but {len(text)} texts; they must come in pairs")
        else:
            if labels.shape != (len(image),) or labels.is_floating_point():
                raise UserError(
                    f"labels must be {len(image)} integers, got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            if int(labels.min()) < 0 or int(labels.max()) >= len(text):
                raise UserError(f"labels must lie in 0..{len(text) - 1}, got {int(labels.min())}..{int(labels.max())}")
            labels = labels.long().to(image.normalised.device)
        self._fit(image, labels, text, float(logit_scale))
        self._fitted = True
        return self

    @torch.no_grad()
    def confidence(
        self,
        image_embedding: Tensor | Embeddings,
        text_embeddings: Tensor | Embeddings,
        logit_scale: float = 100.0,
    ) -> Tensor:
        """The confidence in CLIP's answer to each image (B,), on the device of the images.

        Args:
            image_embedding: (B, D), L2-normalised, float32 or float16; computed in float32.
            text_embeddings: (K, D), L2-normalised, the candidates.
            logit_scale: CLIP's factor on v · t.

        Raises:
            UserError: shapes that do not fit, values that are not finite, or a score not yet fitted.
        """
        if self.needs_fit and not self._fitted:
            raise UserError(f"{self.name} must be fitted before it can score")
        image, text = _checked(image_embedding, text_embeddings, logit_scale)
        blocks = [image[slice(i, i + BLOCK)] for i in range(0, len(image), BLOCK)]
        return torch.cat([self._confidence(block, text, float(logit_scale)) for block in blocks])

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        """`fit` after the checks; inputs are float32."""

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        """`confidence` (B,) of at most BLOCK images after the checks; inputs are float32."""
        raise NotImplementedError


def probabilities(image_embedding: Tensor, text_embeddings: Tensor, scale: float) -> Tensor:
    """CLIP's probabilities p = softmax(scale · v tᵀ), (B, K), for images (B, D) and candidates (K, D)."""
    return torch.softmax(scale * image_embedding @ text_embeddings.T, dim=-1)


def _checked(
    image: Tensor | Embeddings, text: Tensor | Embeddings, logit_scale: float
) -> tuple[Embeddings, Embeddings]:
    image = image if isinstance(image, Embeddings) else Embeddings(image)
    text = text if isinstance(text, Embeddings) else Embeddings(text)
    if image.normalised.shape[1] != text.normalised.shape[1]:
        raise UserError(
            f"image embeddings are {image.normalised.shape[1]} wide, text embeddings {text.normalised.shape[1]}"
        )
    if not len(image) or not len(text):
        raise UserError(f"nothing to score: {len(image)} image embeddings, {len(text)} text embeddings")
    if not 0 < logit_scale < float("inf"):
        raise UserError(f"logit_scale must be positive and finite, got {logit_scale}")
    return image.float(), text.float()
