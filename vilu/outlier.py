"""How unlike the training images an image is: a score for images that show none of the classes.

P(failure) judges which of the candidates is right, and is blind to an image that shows none of them. The outlier score
asks something else: does the image embedding lie in the direction of any class, as the training images show them?

    score(v) = 1 − max_c cos(F (v − m), F (m_c − m))

m (D) is the mean training image, m_c (K, D) that of class c, and F (D, D) whitens what is left of a training image
after its class's mean is taken away. This is the nearest class mean under the tied covariance of a Mahalanobis score
(Lee et al. 2018), by angle, as the length of v − m tells little on embeddings of norm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vilu.embeddings import BLOCK
from vilu.errors import UserError

FEWEST = 20  # training images; with fewer a covariance means nothing
PULL = 5.0  # for the covariance, a class mean counts so many images at the overall mean besides its own
TEXT = 1.0  # a prototype counts so many images where the class's text points to, so every class has one


@dataclass(frozen=True)
class Outlier:
    """An outlier score, and the threshold above which an image counts as outside the class set.

    mean: m (D,) float32.
    factor: F (D, D) float32.
    prototypes: (K, D) float32, F (m_c − m) with rows of norm 1.
    threshold: highest score that is inside; None: not calibrated.
    refused: share of the images inside the class set above the threshold when it was calibrated; None: not calibrated.
    """

    mean: Tensor
    factor: Tensor
    prototypes: Tensor
    threshold: float | None = None
    refused: float | None = None

    def __post_init__(self) -> None:
        dim = len(self.mean) if self.mean.ndim else 0
        shapes = [tuple(t.shape) for t in (self.mean, self.factor, self.prototypes)]
        if not dim or shapes[:2] != [(dim,), (dim, dim)] or shapes[2][1:] != (dim,) or not shapes[2][0]:
            raise UserError(f"outlier score: tensors of shapes {shapes}, expected (D,), (D, D) and (K, D)")
        if (self.threshold is None) != (self.refused is None):
            raise UserError("outlier score: the threshold and the refused share belong together")
        if self.threshold is not None and not -0.01 < self.threshold < 2.01:
            raise UserError(f"outlier score: the threshold must be in [0, 2], got {self.threshold}")
        if self.refused is not None and not 0 <= self.refused < 1:
            raise UserError(f"outlier score: the refused share must be in [0, 1), got {self.refused}")
        longest = float(self.prototypes.double().norm(dim=1).max())
        if not longest < 1.01:  # the score would not be in [0, 2]
            raise UserError(f"outlier score: the prototypes must be rows of norm 1, the longest has {longest:g}")

    @torch.no_grad()
    def score(self, image_embedding: Tensor) -> Tensor:
        """The outlier score (N,) float32 in [0, 2] of L2-normalised images (N, D): the higher, the more unlike.

        Raises:
            UserError: embeddings of another width.
        """
        dim = len(self.mean)
        if image_embedding.ndim != 2 or image_embedding.shape[1] != dim:
            raise UserError(f"outlier score: reads (N, {dim}), got {tuple(image_embedding.shape)}")
        found = []
        for rows in image_embedding.split(BLOCK):
            white = F.normalize((rows.float() - self.mean) @ self.factor.T, dim=1)
            found.append(1 - (white @ self.prototypes.T).amax(dim=1))
        return torch.cat(found) if found else torch.empty(0)

    def calibrated(self, image_embedding: Tensor, refused: float) -> Outlier:
        """The same score, with the threshold that refuses at most a share of images that are inside the class set.

        Args:
            image_embedding: (N, D) of held-out images that show one of the classes.
            refused: share of them that may be refused, in (0, 1).

        The threshold is the split-conformal one: the ceil((1 − refused) · (N + 1))-th smallest score. On average over
        the draw of the N images, at most a share `refused` of new images from the same source lies above it.

        Raises:
            UserError: a share out of range, or too few images for it.

        Source: Vovk et al., "Algorithmic Learning in a Random World", 2005, chapter 4 (inductive conformal prediction).
        """
        if not 0 < refused < 1:
            raise UserError(f"the refused share must be in (0, 1), got {refused}")
        count = len(image_embedding)
        rank = math.ceil((1 - refused) * (count + 1) - 1e-9)
        if rank > count:
            raise UserError(
                f"{count} images are too few to refuse at most {refused:g} of them: {math.ceil(1 / refused) - 1} needed"
            )
        return replace(self, threshold=float(self.score(image_embedding).sort().values[rank - 1]), refused=refused)

    def refuses(self, image_embedding: Tensor) -> Tensor:
        """(N,) bool: whether each image lies above the threshold. Raises UserError where there is none."""
        if self.threshold is None:
            raise UserError("outlier score: it has no threshold; calibrate it first")
        return ~(self.score(image_embedding) <= self.threshold)  # a score that is no number is refused


def about_outlier(outlier: Outlier | None) -> dict[str, float | None] | None:
    """What `vilu info` and a repository's parity.json say of an outlier score, in JSON's types."""
    return None if outlier is None else {"threshold": outlier.threshold, "refused": outlier.refused}


def fit_outlier(image_embedding: Tensor, labels: Tensor | None, text_embeddings: Tensor) -> Outlier:
    """Fit the outlier score to training images.

    The covariance is shrunk as Ledoit and Wolf do, since D is often above N.

    Args:
        image_embedding: (N, D), L2-normalised.
        labels: (N,) integers in [0, K), the class of each image.
        text_embeddings: (K, D), L2-normalised. Less their mean, and as long as the class means less theirs, they stand
            for TEXT images of each class: all there is of a class without training images.

    Raises:
        UserError: captions (labels None), fewer than FEWEST images, images of one class alone, or shapes that do not
            fit.

    Reference: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
        Attacks", NeurIPS 2018; Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
        J. Multivariate Analysis 2004 (the shrinkage, by scikit-learn).
    """
    import numpy as np
    from sklearn.covariance import ledoit_wolf

    if labels is None:
        raise UserError("outlier score: captions have no class set that an image could be outside of")
    if image_embedding.ndim != 2 or labels.shape != image_embedding.shape[:1]:
        raise UserError(f"outlier score: images {tuple(image_embedding.shape)} and their labels do not fit")
    if len(image_embedding) < FEWEST:
        raise UserError(f"outlier score: {len(image_embedding)} training images are too few, {FEWEST} are needed")
    if len(labels.unique()) < 2:
        raise UserError("outlier score: the training images show one class, so there is no direction to tell apart")
    x, t, place = image_embedding.double().cpu(), text_embeddings.double().cpu(), labels.long().cpu()
    mean, text = x.mean(dim=0), t - t.mean(dim=0)
    counts = torch.bincount(place, minlength=len(t)).double()[:, None]
    sums = torch.zeros_like(t).index_add_(0, place, x)
    shrunk = (sums + PULL * mean) / (counts + PULL)  # (K, D) class means
    covariance, _ = ledoit_wolf((x - shrunk[place]).numpy(), assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    floor = max(1e-6 * float(values.max()), 1e-12)  # images that are all alike have no direction to measure along
    factor = torch.from_numpy(axes.T / np.sqrt(values.clip(floor))[:, None])
    length = (shrunk - mean).norm(dim=1)[counts[:, 0] > 0].mean() / text.norm(dim=1).mean().clamp(min=1e-12)
    prototypes = (sums + TEXT * (mean + length * text)) / (counts + TEXT)
    return Outlier(mean.float(), factor.float(), F.normalize((prototypes - mean) @ factor.T, dim=1).float())
