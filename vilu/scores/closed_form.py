"""Scores that are formulas over CLIP's probabilities p = softmax(s · v tᵀ)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, Embeddings
from vilu.errors import UserError
from vilu.scores.base import Score, probabilities
from vilu.scores.per_class import stratified_folds


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


LAMBDAS = (0.02, 0.1, 0.3, 0.5, 0.9)
TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
FOLDS = 5
TUNING_LIMIT = 5000  # samples are enough to choose two numbers


class RelU(Score):
    """−p D pᵀ, the relative uncertainty, with a matrix D that is learned from CLIP's mistakes.

    D ∝ relu(λ · E_wrong[p pᵀ] − (1 − λ) · E_right[p pᵀ]) off the diagonal, 0 on it, with Frobenius norm 1. If no answer
    is wrong, or none is right, that mean counts as 0. If no entry is positive (always so where nothing is wrong), D is
    constant off the diagonal, which ranks as the Gini index. With K = 1, D = 0 and every confidence is 0. p is computed
    at `logit_scale / T`. All K classes are used, also for an odd K, where the authors' code drops one.

    Cross-validation on the training data chooses what is not given of λ (from `LAMBDAS`) and T (from `TEMPERATURES`):
    the mean AUC over FOLDS folds is the highest. Where there are fewer than two wrong or right answers, λ is 0.5 and T
    is 1, the published values.

    Args:
        lam: λ, weight of the wrong answers, in [0, 1]; None: cross-validated.
        temperature: T, positive and finite; None: cross-validated.

    Attributes:
        chosen: after `fit`, (λ, T).

    Raises:
        UserError: an option out of range; in `fit`, captions; in `confidence`, another number of classes.

    Reference: Dadalto et al., "A Data-Driven Measure of Relative Uncertainty for Misclassification Detection",
    ICLR 2024, equation 8; there, too, λ and T are tuned on held-out data.
    """

    name = "Rel-U"
    needs_fit = True

    def __init__(self, lam: float | None = None, temperature: float | None = None) -> None:
        if lam is not None and not 0 <= lam <= 1:
            raise UserError(f"Rel-U: lam must be in [0, 1], got {lam}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"Rel-U: temperature must be positive and finite, got {temperature}")
        self.lam = lam
        self.temperature = temperature

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        if labels is None:
            raise UserError("Rel-U learns one matrix over a fixed class set: captions cannot fit it")
        v, t = image.normalised, text.normalised
        self.chosen = self._choose(v, labels, t, scale)
        lam, temperature = self.chosen
        moments, sizes = _moments(v, labels, t, scale / temperature)
        self.matrix = _matrix(moments, sizes, lam)

    def _choose(self, v: Tensor, labels: Tensor, t: Tensor, scale: float) -> tuple[float, float]:
        """(λ, T) with the highest mean AUC over the folds; among equals, the nearest to the published (0.5, 1)."""
        from sklearn.metrics import roc_auc_score

        lams = LAMBDAS if self.lam is None else (self.lam,)
        temperatures = TEMPERATURES if self.temperature is None else (self.temperature,)
        if len(lams) == len(temperatures) == 1:
            return lams[0], temperatures[0]
        v, labels = v[:: -(-len(v) // TUNING_LIMIT)], labels[:: -(-len(labels) // TUNING_LIMIT)]
        wrong = torch.cat([(rows @ t.T).argmax(dim=1) for rows in v.split(BLOCK)]) != labels
        place = stratified_folds(wrong.cpu(), FOLDS, seed=0).to(v.device)
        folds = int(place.max()) + 1
        published = (0.5 if self.lam is None else self.lam, 1.0 if self.temperature is None else self.temperature)
        if folds < 2:
            return published
        auc = dict.fromkeys(itertools.product(lams, temperatures), 0.0)
        for temperature in temperatures:
            moments, sizes = _moments(v, labels, t, scale / temperature)
            for fold in range(folds):
                held = place == fold
                own, count = _moments(v[held], labels[held], t, scale / temperature)
                p, right = probabilities(v[held], t, scale / temperature), ~wrong[held].cpu().numpy()
                for lam in lams:
                    confidence = -(p @ _matrix(moments - own, sizes - count, lam) * p).sum(dim=-1)
                    auc[lam, temperature] += roc_auc_score(right, confidence.cpu().numpy()) / folds
        best = max(auc.values()) - 1e-9
        off = {pair: abs(pair[0] - published[0]) + abs(math.log(pair[1] / published[1])) for pair in auc}
        return min((pair for pair in auc if auc[pair] >= best), key=off.__getitem__)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        if len(text) != len(self.matrix):
            raise UserError(f"Rel-U was fitted on {len(self.matrix)} classes, got {len(text)}")
        p = probabilities(image.normalised, text.normalised, scale / self.chosen[1])
        return -(p @ self.matrix.to(p.device) * p).sum(dim=-1)


def _moments(v: Tensor, labels: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Σ p pᵀ over the right and over the wrong answers, (2, K, K) float64, and how many there are, (2,)."""
    # Both sides in float64: their difference is small beside either.
    moments = torch.zeros(2, len(t), len(t), dtype=torch.float64, device=t.device)
    sizes = torch.zeros(2, dtype=torch.float64, device=t.device)
    for i in range(0, len(v), BLOCK):
        p = probabilities(v[i : i + BLOCK], t, scale)
        wrong = (v[i : i + BLOCK] @ t.T).argmax(dim=-1) != labels[i : i + BLOCK]
        for side, members in enumerate((p[~wrong].double(), p[wrong].double())):
            moments[side] += members.T @ members
            sizes[side] += len(members)
    return moments, sizes


def _matrix(moments: Tensor, sizes: Tensor, lam: float) -> Tensor:
    """D (K, K) float32, from what `_moments` gives."""
    right, wrong = moments / sizes.clamp(min=1)[:, None, None]
    off_diagonal = 1 - torch.eye(len(right), dtype=torch.float64, device=moments.device)
    matrix = torch.relu(lam * wrong - (1 - lam) * right) * off_diagonal
    if not matrix.any():
        matrix = off_diagonal
    norm = matrix.norm()
    return (matrix / norm if norm > 0 else matrix).float()
