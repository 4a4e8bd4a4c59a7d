"""Samples that are held out of training: they choose the epoch and say what the head is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vilu.embeddings import EmbeddedSet
from vilu.evaluation.bootstrap import paired_bootstrap
from vilu.evaluation.metrics import OneSidedError, auroc, fpr_at_tpr
from vilu.head import ViLUHead
from vilu.recipes import Recipe
from vilu.training.batches import ClipAnswers, evaluation_batches
from vilu.training.loss import failure_weights, head_logit

RESAMPLES = 999


@dataclass(frozen=True)
class Validation:
    """The head beside MCM, which needs no training, on the samples that chose the head's epoch.

    samples: number of samples.
    failures: number of samples that CLIP answers wrong.
    auc: AUC of the head.
    fpr95: FPR95 of the head.
    mcm_auc: AUC of MCM.
    mcm_fpr95: FPR95 of MCM.
    p_value: two-sided p-value that both have the same AUC (paired bootstrap).
    """

    samples: int
    failures: int
    auc: float
    fpr95: float
    mcm_auc: float
    mcm_fpr95: float
    p_value: float

    @property
    def better(self) -> bool:
        """Whether the head is significantly better than MCM, at 5%."""
        return self.auc > self.mcm_auc and self.p_value < 0.05

    @property
    def worse(self) -> bool:
        """Whether the head is significantly worse than MCM, at 5%."""
        return self.auc < self.mcm_auc and self.p_value < 0.05


def validation_rows(answers: ClipAnswers | None, data: EmbeddedSet, recipe: Recipe, folds: int | None) -> list[Tensor]:
    """The rows (M,) of each fold, or of one validation share; none where the recipe asks for no validation.

    The cut is stratified by CLIP's mistakes, so each part has failures.
    """
    if not recipe.validation:
        return []
    generator = torch.Generator().manual_seed(recipe.seed)
    place = torch.full((len(data),), -1)
    kinds = [torch.ones(len(data), dtype=torch.bool)] if answers is None else [answers.wrong, ~answers.wrong]
    for kind in kinds:
        members = kind.nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        if folds is None:
            place[members[: max(1, round(recipe.validation * len(members)))]] = 0
        else:
            place[members] = torch.arange(len(members)) % folds
    return [(place == fold).nonzero().squeeze(1) for fold in range(folds or 1)]


class Predictions(NamedTuple):
    """A head's output for N samples, with what it should have been.

    logits: (N,) failure logits.
    wrong: (N,) bool, whether CLIP's answer is wrong.
    odds: (N,) CLIP's log-odds of being wrong.
    target: (N,) CLIP's probability of the true class for the "mse" loss; empty for "bce".
    weights: (N,) weight of each sample in the loss.
    """

    logits: Tensor
    wrong: Tensor
    odds: Tensor
    target: Tensor
    weights: Tensor


class HeldOut:
    """A run's predictions for N samples that it is not trained on, epoch by epoch (0: before the first step).

    logits: by epoch, (N,).
    means: by epoch, the mean loss, as far as it has been computed.
    wrong, odds, target, weights: as in `Predictions`; they do not change from epoch to epoch.
    """

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.means: list[float] = []
        self.wrong = self.odds = self.target = self.weights = torch.empty(0)

    def add(self, predictions: Predictions) -> None:
        """Add the predictions of one more epoch."""
        logits, self.wrong, self.odds, self.target, self.weights = predictions
        self.logits.append(logits)

    def join(self, other: HeldOut) -> None:
        """Add the samples of another fold. A fold that stopped early keeps its last predictions from there on."""
        if not self.logits:
            self.__dict__.update(other.__dict__)
            return
        epochs = max(len(self.logits), len(other.logits))
        mine, theirs = ([*x.logits, *[x.logits[-1]] * (epochs - len(x.logits))] for x in (self, other))
        self.logits, self.means = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)], []
        for name in ("wrong", "odds", "target", "weights"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def losses(self, epoch: int) -> Tensor:
        """The loss of each sample (N,) at an epoch."""
        logits = self.logits[epoch]
        if len(self.target):
            return self.weights * (torch.sigmoid(-logits) - self.target).square()
        return F.binary_cross_entropy_with_logits(logits, self.wrong.float(), self.weights, reduction="none")

    def loss(self, epoch: int) -> float:
        """The mean loss at an epoch."""
        return float(self.losses(epoch).mean())

    def best(self, recipe: Recipe) -> int:
        """The epoch with the least loss; with the prior, epoch 0 unless the gain is above its standard error.

        Few samples choose among many epochs by luck. A head with the prior starts as MCM, which is better than a
        lucky epoch.
        """
        while len(self.means) < len(self.logits):
            self.means.append(self.loss(len(self.means)))
        best = min(range(len(self.means)), key=self.means.__getitem__)
        if recipe.prior:
            gain = self.losses(0) - self.losses(best)
            if len(gain) < 2 or float(gain.mean()) <= float(gain.std()) / math.sqrt(len(gain)):
                return 0
        return best

    def history(self, train_losses: list[float]) -> list[dict[str, float]]:
        """By epoch, "epoch" with the "train_loss" and "validation_loss" that are known."""
        rows = []
        for epoch in range(max(len(self.logits), len(train_losses) + 1)):
            row = {"epoch": float(epoch)}
            if 0 < epoch <= len(train_losses):
                row["train_loss"] = train_losses[epoch - 1]
            if epoch < len(self.logits):
                row["validation_loss"] = self.loss(epoch)
            rows.append(row)
        return rows

    def validation(self, epoch: int, seed: int) -> Validation | None:
        """The head of an epoch beside MCM; None without samples, or where all answers are right or all are wrong."""
        if not self.logits:
            return None
        confidence, right = -self.logits[epoch].numpy(), ~self.wrong.numpy()
        # The prior's log-odds rank as MCM does, and stay apart where its float32 would tie.
        mcm = -self.odds.numpy()
        try:
            comparison = paired_bootstrap(auroc, confidence, mcm, right, resamples=RESAMPLES, seed=seed)
        except OneSidedError:
            return None
        return Validation(
            samples=len(right),
            failures=int((~right).sum()),
            auc=auroc(confidence, right),
            fpr95=fpr_at_tpr(confidence, right),
            mcm_auc=auroc(mcm, right),
            mcm_fpr95=fpr_at_tpr(mcm, right),
            p_value=comparison.p_value,
        )


@torch.no_grad()
def predict(
    head: ViLUHead, data: EmbeddedSet, answers: ClipAnswers | None, rows: Tensor, recipe: Recipe
) -> Predictions:
    """The head's output for the samples `rows` of the data."""
    with_log_odds = replace(recipe, prior=True)
    logits, wrong, odds, target = [], [], [], [torch.empty(0)]
    for batch in evaluation_batches(data, answers, rows, with_log_odds):
        logits.append(head_logit(head, batch))
        wrong.append(batch.wrong)
        if batch.log_odds is not None:
            odds.append(batch.log_odds)
        if batch.target is not None and recipe.loss == "mse":
            target.append(batch.target)
    failure = torch.cat(wrong)
    # One weight for all: a block with a rare failure in it must not count it more than the others do.
    weights = failure_weights(failure, recipe.failure_weight).float()
    return Predictions(torch.cat(logits), failure, torch.cat(odds), torch.cat(target), weights)
