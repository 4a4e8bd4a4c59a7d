"""Penalised logistic regression by Newton's method, with a weight per class beside the features at little cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Design(NamedTuple):
    """What N samples are regressed on.

    x: (N, 2 + R) float64: CLIP's log-odds, 1, and R features.
    predicted: (N,) int64, the sample's class, where each class has a weight of its own; None: no such weights.
    classes: number K of classes; 0 where `predicted` is None.
    """

    x: Tensor
    predicted: Tensor | None = None
    classes: int = 0

    def rows(self, chosen: Tensor) -> Design:
        """The design of the samples `chosen`."""
        return Design(self.x[chosen], None if self.predicted is None else self.predicted[chosen], self.classes)

    def logit(self, beta: Tensor) -> Tensor:
        """The logits (N,) of the weights (2 + R + K,)."""
        logit = self.x @ beta[: self.x.shape[1]]
        return logit if self.predicted is None else logit + beta[self.x.shape[1] :][self.predicted]

    def gradient(self, residual: Tensor) -> Tensor:
        """The gradient (2 + R + K,) of Σ residual (N,) · logit."""
        return torch.cat([self.x.T @ residual, self.by_class(residual)])

    def by_class(self, values: Tensor) -> Tensor:
        """The sums (K, ...) of the values (N, ...) of each class."""
        sums = torch.zeros(self.classes, *values.shape[1:], dtype=torch.float64)
        return sums if self.predicted is None else sums.index_add_(0, self.predicted, values)


class _Curvature:
    """X' S X + diag(pull), factored. The weights of the classes do not meet one another: they are eliminated first."""

    def __init__(self, design: Design, s: Tensor, pull: Tensor) -> None:
        width = design.x.shape[1]
        scaled = design.x * s[:, None]
        self.diagonal = design.by_class(s) + pull[width:]  # (K,)
        self.mixed = design.by_class(scaled)  # (K, 2 + R)
        own = scaled.T @ design.x + torch.diag(pull[:width])
        self.factor = torch.linalg.cholesky(own - self.mixed.T @ (self.mixed / self.diagonal[:, None]))

    def solve(self, gradient: Tensor) -> Tensor:
        """The Newton step (2 + R + K,) of a gradient."""
        width = len(self.factor)
        own, of_class = gradient[:width], gradient[width:]
        step = torch.cholesky_solve((own - self.mixed.T @ (of_class / self.diagonal))[:, None], self.factor).squeeze(1)
        return torch.cat([step, (of_class - self.mixed @ step) / self.diagonal])


def newton(design: Design, y: Tensor, w: Tensor, penalty: float, start: Tensor | None, steps: int = 60) -> Tensor:
    """The weights (2 + R + K,) of least Σ w · cross-entropy + penalty / 2 · (the squares of the last R + K weights).

    A weak pull of the slope on the log-odds to 1 keeps it finite.

    Args:
        design: what is regressed on.
        y: (N,) float64 in {0, 1}.
        w: (N,) float64, weight of each sample.
        penalty: the L2 penalty, above 0.
        start: weights to start from; None: those of CLIP's own log-odds.
        steps: number of Newton steps, at most.
    """
    samples, width = design.x.shape
    pull = torch.full((width + design.classes,), penalty, dtype=torch.float64)
    pull[0], pull[1] = 2e-3 * samples, 1e-6 * samples
    rest = torch.zeros(len(pull), dtype=torch.float64)
    rest[0] = 1.0
    beta = rest.clone() if start is None else start.clone()

    def loss(at: Tensor) -> Tensor:
        data = F.binary_cross_entropy_with_logits(design.logit(at), y, w, reduction="sum")
        return data + 0.5 * (pull * (at - rest).square()).sum()

    value = loss(beta)
    curvature, fresh = None, False
    for _ in range(steps):
        p = torch.sigmoid(design.logit(beta))
        gradient = design.gradient(w * (p - y)) + pull * (beta - rest)
        if curvature is None:
            curvature, fresh = _Curvature(design, (w * p * (1 - p)).clamp(min=1e-9), pull), True
        move = curvature.solve(gradient)
        size = 1.0
        while size > 1e-4 and (trial := loss(beta - size * move)) > value:
            size /= 2
        if size <= 1e-4:
            if fresh:
                break
            curvature = None
            continue
        expected = 0.5 * float(gradient @ move)  # the gain of a quadratic loss
        beta, gain, value = beta - size * move, float(value - trial), trial
        if max(gain, expected) < 1e-7 * samples:
            break
        # The curvature is what costs. It serves again as long as it foretells the gain.
        curvature, fresh = (curvature, False) if size == 1 and gain > 0.7 * expected else (None, False)
    return beta


def average_shares(losses: Tensor, caution: float, draws: int, seed: int) -> Tensor:
    """(M,) the share of each of M regressions in their average, from the cross-validated losses (M, N); pseudo-BMA+.

    In each draw the samples have random weights (Bayesian bootstrap) and the shares are exp(−summed loss), normalised.
    The result is the mean over the draws.

    Args:
        losses: (M, N) float64; the first regression is the one to fall back on.
        caution: standard errors of the gain over the first regression by which the others' losses are raised.
        draws: number of draws.
        seed: their seed.

    Source: Yao, Vehtari, Simpson & Gelman, "Using stacking to average Bayesian predictive distributions", Bayesian
        Analysis 13 (2018), section 3.3, with cross-validated losses.
    """
    samples = losses.shape[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(draws, samples, dtype=torch.float64).exponential_(generator=generator)
    totals = samples * (drawn / drawn.sum(dim=1, keepdim=True)) @ losses.T
    totals += caution * math.sqrt(samples) * (losses - losses[0]).std(dim=1)
    return torch.softmax(-totals, dim=1).mean(dim=0)
