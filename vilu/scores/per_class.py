"""Scores with something of their own for each class: a weight (class bias), or a mean training image (TrustVLM)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilu.embeddings import BLOCK, Embeddings
from vilu.errors import UserError
from vilu.head import log_odds
from vilu.scores.base import Score, probabilities

PENALTIES = (math.inf, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)  # 1 / C; infinite: no class weights
FOLDS = 5


class Bias(NamedTuple):
    """A fitted class bias: logit = slope · log-odds + offset + weight[predicted class].

    slope, offset: numbers.
    weight: (K,).
    """

    slope: float
    offset: float
    weight: Tensor

    def logit(self, odds: Tensor, predicted: Tensor) -> Tensor:
        """The failure logit (N,) of CLIP's log-odds (N,) and predicted classes (N,)."""
        return self.slope * odds + self.offset + self.weight[predicted]


class ClassBias(Score):
    """A logistic regression of CLIP's mistakes on MCM's log-odds and the predicted class.

    P(failure) = sigmoid(a · log((1 − p) / p) + b + w[argmax p]), p = max softmax. a and b are free; the K weights w
    have an L2 penalty, 1/2 · Σ w² / C beside the summed cross-entropy. C has the least cross-validated loss (FOLDS
    folds, stratified by failure), and may be 0, which leaves MCM's ranking. A class that is never answered has weight
    0. The confidence is 1 − P(failure), in float64.

    Args:
        inverse_c: 1 / C of the weights; None: cross-validation chooses from `PENALTIES`.
        seed: seed of the folds.

    Raises:
        UserError: a negative 1 / C; in `fit`, captions, or data where CLIP is always right or always wrong; in
            `confidence`, another number of classes.

    Source: the simplest rival of a learned failure predictor in a fixed class set; it reads nothing of the image but
        CLIP's answer. It is Platt scaling (1999) with a random effect for each class.
    """

    name = "class bias"
    needs_fit = True

    def __init__(self, inverse_c: float | None = None, seed: int = 0) -> None:
        if inverse_c is not None and not inverse_c > 0:
            raise UserError(f"class bias: inverse_c must be positive, got {inverse_c}")
        self.inverse_c = inverse_c
        self.seed = seed

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        if labels is None:
            raise UserError("class bias learns one weight per class of a fixed class set: captions cannot fit it")
        odds, predicted = _answers(image.normalised, text.normalised, scale)
        wrong = (predicted != labels.cpu()).double()
        if not wrong.any() or wrong.all():
            side = "wrong" if wrong.any() else "right"
            raise UserError(f"class bias: CLIP is {side} on all {len(wrong)} training samples; both kinds are needed")
        self.chosen = self.inverse_c or choose_penalty(odds, predicted, wrong, len(text), self.seed)
        self.bias = fit_bias(odds, predicted, wrong, len(text), self.chosen)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        if len(text) != len(self.bias.weight):
            raise UserError(f"class bias was fitted on {len(self.bias.weight)} classes, got {len(text)}")
        odds, predicted = _answers(image.normalised, text.normalised, scale)
        return torch.sigmoid(-self.bias.logit(odds, predicted)).to(image.normalised.device)


def fit_bias(odds: Tensor, predicted: Tensor, wrong: Tensor, classes: int, penalty: float, steps: int = 100) -> Bias:
    """The class bias of least penalised cross-entropy, by Newton's method.

    Args:
        odds: (N,) float64, CLIP's log-odds of being wrong.
        predicted: (N,) int64 in [0, classes).
        wrong: (N,) float64, 1 where CLIP's answer is wrong.
        classes: number K of classes.
        penalty: 1 / C; infinite: no class weights.
        steps: number of Newton steps, at most.
    """
    tie = 1e-6 * len(odds)  # keeps slope and offset finite where MCM separates the two kinds
    x = torch.stack([odds, torch.ones_like(odds)], dim=1)
    beta, weight = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    start = beta.clone()
    shrunk = 1.0 if math.isinf(penalty) else penalty

    def by_class(values: Tensor) -> Tensor:
        return torch.zeros(classes, *values.shape[1:], dtype=torch.float64).index_add_(0, predicted, values)

    def loss(beta: Tensor, weight: Tensor) -> float:
        logit = x @ beta + weight[predicted]
        data = F.binary_cross_entropy_with_logits(logit, wrong, reduction="sum")
        return float(data + 0.5 * (tie * (beta - start).square().sum() + shrunk * weight.square().sum()))

    value = loss(beta, weight)
    for _ in range(steps):
        p = torch.sigmoid(x @ beta + weight[predicted])
        curve = p * (1 - p)
        gradient = x.T @ (p - wrong) + tie * (beta - start)
        hessian = (x * curve[:, None]).T @ x + tie * torch.eye(2, dtype=torch.float64)
        if math.isinf(penalty):
            step, class_step = torch.linalg.solve(hessian, gradient), torch.zeros_like(weight)
        else:  # the class weights do not meet one another: they are eliminated one by one
            class_gradient, diagonal = by_class(p - wrong) + penalty * weight, by_class(curve) + penalty
            mixed = by_class(x * curve[:, None])  # (K, 2)
            reduced = hessian - mixed.T @ (mixed / diagonal[:, None])
            step = torch.linalg.solve(reduced, gradient - mixed.T @ (class_gradient / diagonal))
            class_step = (class_gradient - mixed @ step) / diagonal
        size = 1.0
        while size > 1e-6 and (trial := loss(beta - size * step, weight - size * class_step)) > value:
            size /= 2
        if size <= 1e-6:
            break
        beta, weight = beta - size * step, weight - size * class_step
        value, gain = trial, value - trial
        if gain < 1e-12 * len(odds):
            break
    return Bias(float(beta[0]), float(beta[1]), weight)


def choose_penalty(odds: Tensor, predicted: Tensor, wrong: Tensor, classes: int, seed: int) -> float:
    """The penalty of `PENALTIES` with the least cross-validated loss; arguments as in `fit_bias`."""
    place = stratified_folds(wrong > 0, FOLDS, seed)
    losses = [0.0] * len(PENALTIES)
    for fold in range(int(place.max()) + 1):
        held = place == fold
        for i, penalty in enumerate(PENALTIES):
            bias = fit_bias(odds[~held], predicted[~held], wrong[~held], classes, penalty)
            logit = bias.logit(odds[held], predicted[held])
            losses[i] += float(F.binary_cross_entropy_with_logits(logit, wrong[held], reduction="sum"))
    return PENALTIES[min(range(len(PENALTIES)), key=losses.__getitem__)]


def stratified_folds(kind: Tensor, folds: int, seed: int) -> Tensor:
    """(N,) the fold of each sample, each fold with its share of both kinds (N,) bool; fewer folds for a rare kind."""
    folds = max(1, min(folds, int(kind.sum()), int((~kind).sum())))
    generator = torch.Generator().manual_seed(seed)
    place = torch.zeros(len(kind), dtype=torch.int64)
    for side in (kind, ~kind):
        members = side.nonzero().squeeze(1)
        place[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    return place


def _answers(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """CLIP's log-odds of being wrong (N,) float64 and its predicted class (N,), on the CPU."""
    odds, predicted = [], []
    for rows in image.split(BLOCK):
        logits = scale * rows @ text.T
        odds.append(log_odds(logits).double().cpu())
        predicted.append(logits.argmax(dim=1).cpu())
    return torch.cat(odds), torch.cat(predicted)


class TrustVLM(Score):
    """max_j p_j + v · P[argmax_j p_j], with the normalised mean training image P_c of each class c.

    CLIP's own image encoder gives v and the prototypes; the paper also tries other encoders. A class without a training
    image gets the normalised mean of all training images, as the paper has no such class.

    Args:
        weight: factor on the image-to-image similarity; the authors' code has 1.

    Raises:
        UserError: a weight that is not positive and finite; in `fit`, captions; in `confidence`, another number of
            classes.

    Reference: Dong et al., "To Trust Or Not To Trust Your Vision-Language Model's Prediction", arXiv 2505.23745,
    section 3, and the authors' code (github.com/EPFL-IMOS/TrustVLM), which takes 16 images of each class; here all
    training images count.
    """

    name = "TrustVLM"
    needs_fit = True

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 < weight < math.inf:
            raise UserError(f"TrustVLM: weight must be positive and finite, got {weight}")
        self.weight = weight

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        if labels is None:
            raise UserError("TrustVLM needs a mean image for each class of a fixed class set: captions cannot fit it")
        v = image.normalised
        sums = torch.zeros(len(text), v.shape[1], device=v.device).index_add_(0, labels, v)
        present = torch.bincount(labels, minlength=len(text)) > 0
        self.prototypes = F.normalize(torch.where(present[:, None], sums, v.mean(dim=0)), dim=1)

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        if len(text) != len(self.prototypes):
            raise UserError(f"TrustVLM was fitted on {len(self.prototypes)} classes, got {len(text)}")
        v = image.normalised
        p, predicted = probabilities(v, text.normalised, scale).max(dim=1)
        return p + self.weight * (v * self.prototypes.to(v.device)[predicted]).sum(dim=1)
