"""Samples that are held out of training: they choose the epoch and say what the head is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from vilu.embeddings import EmbeddedSet
from vilu.evaluation.bootstrap import paired_bootstrap
from vilu.evaluation.metrics import OneSidedError, auroc, fpr_at_tpr
from vilu.evaluation.results import too_few
from vilu.head import ViLUHead
from vilu.recipes import Recipe
from vilu.training.batches import ClipAnswers, evaluation_batches
from vilu.training.loss import failure_weights, head_logit

RESAMPLES = 999


@dataclass(frozen=True)
class Validation:
    """The head beside MCM, which needs no training, on samples that the head was not trained on.

    With cross-validation, the fold of a sample chooses neither its head's weights nor its epoch, and both methods are
    compared within the folds: each fold's head has its own slope and offset.

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
    def too_few(self) -> bool:
        """Whether there are too few failures, or too few right answers, to say which is better."""
        return bool(too_few(self.failures, self.samples))

    @property
    def better(self) -> bool:
        """Whether the head is significantly better than MCM, at 5%."""
        return not self.too_few and self.auc > self.mcm_auc and self.p_value < 0.05

    @property
    def worse(self) -> bool:
        """Whether the head is significantly worse than MCM, at 5%."""
        return not self.too_few and self.auc < self.mcm_auc and self.p_value < 0.05


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
    sizes: number of samples of each fold, in the order of the samples.
    means: by epoch, the mean loss, as far as it has been computed.
    wrong, odds, target, weights: as in `Predictions`; they do not change from epoch to epoch.
    """

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.means: list[float] = []
        self.sizes: list[int] = []
        self.wrong = self.odds = self.target = self.weights = torch.empty(0)

    def add(self, predictions: Predictions) -> None:
        """Add the predictions of one more epoch."""
        logits, self.wrong, self.odds, self.target, self.weights = predictions
        self.logits.append(logits)
        self.sizes = [len(logits)]

    def join(self, other: HeldOut) -> None:
        """Add the samples of another fold. A fold that stopped early keeps its last predictions from there on."""
        if not self.logits:
            self.__dict__.update(other.__dict__)
            return
        epochs = max(len(self.logits), len(other.logits))
        mine, theirs = ([*x.logits, *[x.logits[-1]] * (epochs - len(x.logits))] for x in (self, other))
        self.logits, self.means = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)], []
        self.sizes += other.sizes
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
        return best if not recipe.prior or _clear_gain(self.losses(0) - self.losses(best)) else 0

    def _unseen(self, epoch: int, recipe: Recipe) -> Tensor:
        """(N,) logits whose epoch was chosen by other folds than the sample's own; one fold: those of the epoch."""
        if len(self.sizes) < 2 or epoch == 0:
            return self.logits[epoch]
        losses = torch.stack([self.losses(e) for e in range(len(self.logits))])  # (epochs, N)
        fold = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        chosen = torch.empty_like(self.logits[0])
        for one in range(len(self.sizes)):
            others = losses[:, fold != one]
            best = int(others.mean(dim=1).argmin())
            if recipe.prior and not _clear_gain(others[0] - others[best]):
                best = 0
            chosen[fold == one] = self.logits[best][fold == one]
        return chosen

    def _within_folds(self, scores: Tensor) -> Tensor:
        """(N,) scores as ranks in (0, 1) within their fold; left as they are where there is one fold."""
        if len(self.sizes) < 2:
            return scores
        return torch.cat([torch.from_numpy(rankdata(part) - 0.5) / len(part) for part in scores.split(self.sizes)])

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

    def validation(self, epoch: int, recipe: Recipe) -> Validation | None:
        """The head of an epoch beside MCM; None without samples, or where all answers are right or all are wrong."""
        if not self.logits:
            return None
        confidence, right = -self._within_folds(self._unseen(epoch, recipe)).numpy(), ~self.wrong.numpy()
        # The prior's log-odds rank as MCM does, and stay apart where its float32 would tie.
        mcm = -self._within_folds(self.odds).numpy()
        try:
            comparison = paired_bootstrap(auroc, confidence, mcm, right, resamples=RESAMPLES, seed=recipe.seed)
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


def _clear_gain(gain: Tensor) -> bool:
    """Whether the mean of the samples' gains (N,) is above its standard error."""
    return len(gain) > 1 and float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain))


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
