"""Scores that are formulas over CLIP's probabilities p = softmax(s · v tᵀ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, Embeddings
from vilu.errors import UserError
from vilu.scores.base import Score, probabilities


class MCM(Score):
    """max_j p_j, the maximum concept matching score: CLIP's own confidence, in (0, 1].

    Reference: Ming et al., "Delving into Out-of-Distribution Detection with Vision-Language Representations",
    NeurIPS 2022, equation 1.

    Example:
        >>> image_embedding = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> MCM().confidence(image_embedding, text_embeddings=torch.eye(2), logit_scale=5.0).round(decimals=3)
        tensor([0.9930, 0.7310])
    """

    name = "MCM"

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        return probabilities(image.normalised, text.normalised, scale).amax(dim=-1)


class Entropy(Score):
    """Σ_j p_j log p_j / log K, the negative normalised entropy, in [−1, 0]; 0 where K = 1.

    Reference: Shannon 1948; the row "Entropy" of ViLU (arXiv 2507.07620), table 1.
    """

    name = "Entropy"

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        p = probabilities(image.normalised, text.normalised, scale)
        return -torch.special.entr(p).sum(dim=-1) / math.log(max(len(text), 2))


class Doctor(Score):
    """−(1 − g) / g with g = Σ_j p_j², the alpha form (the beta form ranks as MCM does); in [1 − K, 0].

    Reference: Granese et al., "DOCTOR: A Simple Method for Detecting Misclassification Errors", NeurIPS 2021,
    definition 1.
    """

    name = "Doctor"

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        g = probabilities(image.normalised, text.normalised, scale).square().sum(dim=-1)
        return (g - 1) / g


class RelU(Score):
    """−p D pᵀ, the relative uncertainty, with a matrix D that is learned from CLIP's mistakes.

    D ∝ relu(λ · E_wrong[p pᵀ] − (1 − λ) · E_right[p pᵀ]) off the diagonal, 0 on it, with Frobenius norm 1. If no answer
    is wrong, or none is right, that mean counts as 0. If no entry is positive (always so where nothing is wrong), D is
    constant off the diagonal, which ranks as the Gini index. With K = 1, D = 0 and every confidence is 0. p is computed
    at `logit_scale / temperature`. All K classes are used, also for an odd K, where the authors' code drops one.

    Args:
        lam: λ, weight of the wrong answers, in [0, 1].
        temperature: T, positive and finite.

    Raises:
        UserError: an option out of range; in `fit`, captions; in `confidence`, another number of classes.

    Reference: Dadalto et al., "A Data-Driven Measure of Relative Uncertainty for Misclassification Detection",
    ICLR 2024, equation 8.
    """

    name = "Rel-U"
    needs_fit = True

    def __init__(self, lam: float = 0.5, temperature: float = 1.0) -> None:
        if not 0 <= lam <= 1:
            raise UserError(f"Rel-U: lam must be in [0, 1], got {lam}")
        if not 0 < temperature < math.inf:
            raise UserError(f"Rel-U: temperature must be positive and finite, got {temperature}")
        self.lam = lam
        self.temperature = temperature

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        if labels is None:
            raise UserError("Rel-U learns one matrix over a fixed class set: captions cannot fit it")
        v, t = image.normalised, text.normalised
        count = len(text)
        # Both sides in float64: their difference is small beside either.
        moments = torch.zeros(2, count, count, dtype=torch.float64, device=t.device)
        sizes = [0, 0]
        for i in range(0, len(image), BLOCK):
            p = probabilities(v[i : i + BLOCK], t, scale / self.temperature)
            wrong = (v[i : i + BLOCK] @ t.T).argmax(dim=-1) != labels[i : i + BLOCK]
            for side, members in enumerate((p[~wrong].double(), p[wrong].double())):
                moments[side] += members.T @ members
                sizes[side] += len(members)
        right, wrong = moments[0] / max(sizes[0], 1), moments[1] / max(sizes[1], 1)
        off_diagonal = 1 - torch.eye(count, dtype=torch.float64, device=t.device)
        matrix = torch.relu(self.lam * wrong - (1 - self.lam) * right) * off_diagonal
        if not matrix.any():
            matrix = off_diagonal
        norm = matrix.norm()
        self.matrix = (matrix / norm if norm > 0 else matrix).float()

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        if len(text) != len(self.matrix):
            raise UserError(f"Rel-U was fitted on {len(self.matrix)} classes, got {len(text)}")
        p = probabilities(image.normalised, text.normalised, scale / self.temperature)
        return -(p @ self.matrix.to(p.device) * p).sum(dim=-1)
