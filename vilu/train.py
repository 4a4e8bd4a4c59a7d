"""Training of the ViLU head on CLIP embeddings: closed set and captions, deterministic and resumable.

CLIP is frozen, so what of a step depends on it alone is computed once: which answers are wrong, t_pred, the prior
and, without projections, the attention of a closed set. What is left of a step is matrix products, in the order that
costs least (`_head_logit`).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vilu import atomic
from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.evaluation.metrics import OneSidedError, auroc, fpr_at_tpr, paired_bootstrap
from vilu.head import PARTS, ViLUHead, log_odds
from vilu.recipes import FOLDED_SAMPLES, Recipe
from vilu.seeding import seeded

STATE_VERSION = 1
RESAMPLES = 999


class Batch(NamedTuple):
    """Images (B, D) float32 with what CLIP makes of them; `text` (K, D) are their candidates."""

    image: Tensor
    text: Tensor
    predicted: Tensor  # (B,) int64 row of `text`
    wrong: Tensor  # (B,) bool
    log_odds: Tensor | None  # (B,), for a head with the prior
    target: Tensor | None  # (B,), p[true class], for an MSE
    attended: Tensor | None = None  # (B, D), where it does not change while training


@dataclass(frozen=True)
class Validation:
    """The head beside the free MCM score on the samples that chose its epoch; None where one-sided.

    p_value: two-sided, of equal AUC (paired bootstrap).
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
        """Whether it is significantly worse."""
        return self.auc < self.mcm_auc and self.p_value < 0.05


@dataclass(frozen=True)
class Trained:
    """The head of the best epoch (0: before the first step) and of the last one, evaluated and frozen."""

    head: ViLUHead
    last: ViLUHead
    best_epoch: int
    history: list[dict[str, float]]
    validation: Validation | None


def weighted_bce(failure_logit: Tensor, failure: Tensor, weight: float | Tensor | None = None) -> Tensor:
    """Weighted binary cross-entropy, mean over B (ViLU, section 3.3; the authors' "adaptative" weighting).

    Args:
        failure_logit: (B,).
        failure: (B,) bool, True where CLIP's prediction is wrong.
        weight: of the wrong samples; None: log(1 + n_correct / n_wrong), counted in the batch.
    """
    weights = _weights(failure, weight).to(failure_logit.dtype)
    return F.binary_cross_entropy_with_logits(failure_logit, failure.to(failure_logit.dtype), weights)


def _weights(failure: Tensor, weight: float | Tensor | None) -> Tensor:
    if weight is None:
        wrong = failure.sum()
        weight = torch.log1p((len(failure) - wrong) / wrong.clamp(min=1))
    return torch.where(failure, weight, 1.0)


def train_head(
    image_embedding: Tensor,
    labels: Tensor | None,
    text_embeddings: Tensor,
    *,
    attention_scale: float = 100.0,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ViLUHead:
    """Train a head to predict where argmax v · t differs from the label; `fit` with tensors.

    Args:
        image_embedding: (N, D), L2-normalised.
        labels: (N,) int64 in [0, K), or None for captions: text row i is image i's own.
        text_embeddings: (K, D) of the class set, or (N, D) captions, L2-normalised.
        attention_scale: CLIP's logit scale.

    Returns:
        The head in evaluation mode; the same seed gives the same weights.

    Raises:
        UserError: as `fit`.
    """
    data = EmbeddedSet(
        "training data", Embeddings(image_embedding), Embeddings(text_embeddings), labels, (), attention_scale
    )
    return fit(data, recipe, progress=progress).head


def fit(
    data: EmbeddedSet,
    recipe: Recipe | None = None,
    *,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    augmented: Callable[[Tensor, int], Tensor] | None = None,
) -> Trained:
    """Train a head on what CLIP gets wrong.

    Under torchrun every process calls this with the same data: a batch is cut over the processes, its candidates
    are the whole batch's, and the weights stay equal in all of them.

    Args:
        data: the training data; labels None trains on captions, the candidates being those of the batch.
        recipe: settings; the "default" one where not given.
        state: file that holds the run after every epoch; a run that finds one of its own continues it and ends
            with the same weights. It is removed at the end.
        progress: called with (epochs done, epochs in all).
        log: called with each epoch's figures.
        augmented: gives image embeddings (B, D) of the samples (B,) of an epoch, instead of data.image.

    Raises:
        UserError: too few samples, CLIP always right or always wrong, a state of another run, or a loss that is
            no longer finite.
    """
    recipe = recipe or Recipe()
    rank, _ = _ranks()
    if not data.captions:
        data = replace(data, text=data.text.float())  # once, not in every step
    answers = _answers(data, recipe, kept=augmented is None)
    everything = torch.arange(len(data))
    folds = 1
    if recipe.validation and len(data) <= FOLDED_SAMPLES:
        folds = min(recipe.folds, len(data) // 2, len(data) if answers is None else int(answers.wrong.sum()))
    parts = _cut(answers, data, recipe, folds if folds > 1 else None)
    steps = -(-len(data) // recipe.batch_size)
    epochs = max(recipe.epochs, -(-recipe.min_steps // steps))
    total = epochs * (folds + 1 if folds > 1 else 1)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    stop, watched = epochs, _Watched()
    if folds > 1:
        for held in parts:
            mask = torch.ones(len(data), dtype=torch.bool)
            mask[held] = False
            run = _Run(_start(data, answers, everything[mask], recipe), recipe, epochs)
            _train(run, data, answers, everything[mask], held, epochs, tick, None, augmented)
            watched.join(run.watched)
        stop, parts = watched.best(recipe), []
    held = parts[0] if parts else everything[:0]
    mask = torch.ones(len(data), dtype=torch.bool)
    mask[held] = False
    run = _Run(_start(data, answers, everything[mask], recipe), recipe, epochs)
    identity = _identity(data, recipe, epochs) if state is not None else ""
    if state is not None and state.exists():
        run.load(state, identity)

    def saved() -> None:
        if state is not None and rank == 0:
            run.save(state, identity)
        tick()

    _train(run, data, answers, everything[mask], held, stop, saved, log, augmented)
    if folds == 1:
        watched = run.watched
    head = run.head
    last = copy.deepcopy(head).eval().requires_grad_(False)
    head.load_state_dict(run.best)
    head.eval().requires_grad_(False)
    if state is not None and rank == 0:
        state.unlink(missing_ok=True)
        state.with_name(f"{state.name}.part").unlink(missing_ok=True)
    history = watched.history(run.train_losses)
    return Trained(head, last, run.best_epoch, history, watched.validation(run.best_epoch, recipe.seed))


def _train(
    run: _Run,
    data: EmbeddedSet,
    answers: _Answers | None,
    train: Tensor,
    held: Tensor,
    stop: int,
    tick: Callable[[], None],
    log: Callable[[dict[str, float]], None] | None,
    augmented: Callable[[Tensor, int], Tensor] | None,
) -> None:
    """Epochs until `stop`, or until patience ends; leaves the best one in `run.best`."""
    recipe, head = run.recipe, run.head
    rank, world = _ranks()
    if run.epoch == 0 and len(held):
        run.watched.add(*_over(head, data, answers, held, recipe))
    batches = -(-len(train) // recipe.batch_size)
    if data.captions and batches > 1 and len(train) % recipe.batch_size:
        batches -= 1  # with fewer candidates, the last batch would be an easier question than the others
    while run.epoch < stop and not run.exhausted:
        head.train()
        total, seen = 0.0, 0
        generator = torch.Generator().manual_seed(_seed(recipe.seed, run.epoch))
        order = train[torch.randperm(len(train), generator=generator)].split(recipe.batch_size)[:batches]
        for chosen in order:
            run.before_step()
            mine = torch.arange(len(chosen)).tensor_split(world)[rank]
            own = augmented(chosen[mine], run.epoch) if augmented else None
            batch = _batch(data, answers, chosen, recipe, mine, own)
            loss = _loss(head, batch, recipe, len(chosen), world)
            run.step(loss, world)
            total += float(loss.detach()) * len(chosen)
            seen += len(chosen)
        run.epoch += 1
        run.schedule.step()
        figures = {"epoch": float(run.epoch), "train_loss": total / seen}
        if not math.isfinite(figures["train_loss"]):
            raise UserError(f"training diverged in epoch {run.epoch}: lower the learning rate")
        head.eval()
        run.train_losses.append(figures["train_loss"])
        if len(held):
            run.watched.add(*_over(head, data, answers, held, recipe))
            figures["validation_loss"] = run.watched.loss(run.epoch)
        run.keep()
        if log:
            log(figures)
        tick()


class _Watched:
    """What a run said of samples it was not trained on, epoch by epoch: logits (N,), with wrong and log-odds (N,)."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.means: list[float] = []
        self.wrong = self.odds = self.target = self.weights = torch.empty(0)

    def add(self, logits: Tensor, wrong: Tensor, odds: Tensor, target: Tensor, weights: Tensor) -> None:
        self.logits.append(logits)
        self.wrong, self.odds, self.target, self.weights = wrong, odds, target, weights

    def join(self, other: _Watched) -> None:
        """Add the samples of another fold. A fold that stopped early stands still from there on."""
        if not self.logits:
            self.__dict__.update(other.__dict__)
            return
        epochs = max(len(self.logits), len(other.logits))
        mine, theirs = ([*x.logits, *[x.logits[-1]] * (epochs - len(x.logits))] for x in (self, other))
        self.logits, self.means = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)], []
        for name in ("wrong", "odds", "target", "weights"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def losses(self, epoch: int) -> Tensor:
        """(N,) loss of each sample; `target` holds p[true class] for an MSE, else nothing."""
        logits = self.logits[epoch]
        if len(self.target):
            return self.weights * (torch.sigmoid(-logits) - self.target).square()
        return F.binary_cross_entropy_with_logits(logits, self.wrong.float(), self.weights, reduction="none")

    def loss(self, epoch: int) -> float:
        return float(self.losses(epoch).mean())

    def best(self, recipe: Recipe) -> int:
        """The epoch of least loss; with the prior, the start unless the gain is more than its standard error.

        Few samples choose among many epochs by luck. Without learning anything the head is MCM: a better start
        than a lucky epoch.
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


class _Answers(NamedTuple):
    """What CLIP answers to a closed set, (N,) each; None for captions, where it depends on the batch."""

    predicted: Tensor
    wrong: Tensor
    log_odds: Tensor
    target: Tensor
    attended: Tensor | None  # (N, D) float32


def _answers(data: EmbeddedSet, recipe: Recipe, *, kept: bool = True) -> _Answers | None:
    """CLIP's answers, and with `kept` the attention too where no projection will change it."""
    if data.labels is None:
        if len(data) < 4:
            raise UserError(f"{data.name}: {len(data)} captioned images are too few to train on")
        return None
    if len(data.text) < 2 or bool((data.labels == data.labels[0]).all()):
        raise UserError(f"{data.name}: all {len(data)} samples are of one class; at least two are needed")
    kept = kept and _projection(recipe) == "identity" and "attended" in (recipe.parts or PARTS)
    attended = _scratch(len(data), data.image.normalised.shape[1]) if kept else None
    # Made before the loop: small tensors kept from each block would lie between the large ones and pin their memory.
    predicted, odds, target = torch.empty(len(data), dtype=torch.int64), torch.empty(len(data)), torch.empty(len(data))
    for start in range(0, len(data), BLOCK):
        rows = slice(start, start + BLOCK)
        logits = data.image.normalised[rows].float() @ data.text.normalised.T
        p = torch.softmax(data.logit_scale * logits, dim=-1)
        predicted[rows], odds[rows] = logits.argmax(dim=-1), log_odds(data.logit_scale * logits)
        target[rows] = p.gather(1, data.labels[rows, None]).squeeze(1)
        if attended is not None:
            attended[rows] = p @ data.text.normalised  # the scale is CLIP's own where there are no projections
    wrong = predicted != data.labels
    failures = int(wrong.sum())
    if failures < 2 or failures > len(wrong) - 2:
        raise UserError(f"{data.name}: CLIP is wrong on {failures} of {len(wrong)} samples; both kinds are needed")
    return _Answers(predicted, wrong, odds, target, attended)


def _scratch(rows: int, width: int) -> Tensor | None:
    """(rows, width) float32 in a file without a name, so that memory does not grow with the data; None: no room."""
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, 4 * rows * width)  # a mapping that meets a full disk is a SIGBUS
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
    except (OSError, AttributeError):  # AttributeError: a system without posix_fallocate
        return None


def _cut(answers: _Answers | None, data: EmbeddedSet, recipe: Recipe, folds: int | None) -> list[Tensor]:
    """Rows that choose the epoch: of every fold, or one share; stratified, so that each has failures."""
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


def _projection(recipe: Recipe) -> str:
    if recipe.form == "paper":
        return "separate"
    return "identity" if recipe.freeze_steps is None else "shared"


def _start(data: EmbeddedSet, answers: _Answers | None, train: Tensor, recipe: Recipe) -> ViLUHead:
    """The head before the first step; with the prior, its MLP gives a constant and the prior is calibrated."""
    dim = data.image.normalised.shape[1]
    with seeded(recipe.seed):
        try:
            head = ViLUHead(
                dim,
                parts=PARTS if recipe.parts is None else recipe.parts,
                projection=_projection(recipe),
                attention_scale=data.logit_scale if recipe.form == "authors" else dim**-0.5,
                logit_scale=data.logit_scale if recipe.prior else None,
            )
        except ValueError as error:
            raise UserError(f"recipe: {error}") from None
    if not recipe.prior:
        return head
    if answers is not None:
        odds, wrong = answers.log_odds[train], answers.wrong[train]
    else:
        some = [_batch(data, None, rows, recipe) for rows in train[:BLOCK].split(recipe.batch_size)]
        odds = torch.cat([batch.log_odds for batch in some if batch.log_odds is not None])
        wrong = torch.cat([batch.wrong for batch in some])
    slope, offset = _logistic(odds, wrong, recipe)
    last = head.mlp[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        assert head.prior is not None
        head.prior.fill_(slope)
        last.weight.zero_()
        last.bias.fill_(offset)
    return head


def _logistic(odds: Tensor, wrong: Tensor, recipe: Recipe) -> tuple[float, float]:
    """Slope and offset on the prior of least loss; a little pull to 1 keeps them finite on separable data."""
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")
    odds = odds.double()

    def closure() -> Tensor:
        solver.zero_grad()
        loss = weighted_bce(parameters[0] * odds + parameters[1], wrong, recipe.failure_weight)
        loss = loss + 1e-3 * (parameters[0] - 1).square()
        loss.backward()
        return loss

    if wrong.any() and not wrong.all():
        solver.step(closure)
    slope, offset = parameters.tolist()
    return max(slope, 1e-2), offset


def _batch(
    data: EmbeddedSet,
    answers: _Answers | None,
    rows: Tensor,
    recipe: Recipe,
    mine: Tensor | None = None,
    image: Tensor | None = None,
) -> Batch:
    """The samples `rows`, or those of them at `mine`; among captions the candidates are those of all `rows`."""
    own = rows if mine is None else rows[mine]
    v = data.image.normalised[own].float() if image is None else image
    if data.labels is None:
        t = data.text.normalised[rows].float()
        target = torch.arange(len(rows)) if mine is None else mine
    else:
        t = data.text.normalised
        target = data.labels[own]
        if answers is not None and image is None:
            attended = None if answers.attended is None else answers.attended[own]
            chosen = answers.predicted[own], answers.wrong[own], answers.log_odds[own], answers.target[own]
            return Batch(v, t, *chosen, attended)
    logits = v @ t.T
    at_target = logits.gather(1, target[:, None]).squeeze(1)
    if data.captions:
        wrong = at_target < logits.amax(dim=-1)  # a tie counts as right
    else:
        wrong = logits.argmax(dim=-1) != target
    scale = data.logit_scale
    odds = log_odds(scale * logits) if recipe.prior else None
    probability = torch.exp(scale * at_target - torch.logsumexp(scale * logits, dim=-1))
    return Batch(v, t, logits.argmax(dim=-1), wrong, odds, probability if recipe.loss == "mse" else None)


def _head_logit(head: ViLUHead, batch: Batch) -> Tensor:
    """head(batch.image, batch.text), with its products in the order that costs least.

    (W_Q v) · (W_K t_j) = (W_Kᵀ W_Q v) · t_j and Σ α_j W_V t_j = W_V Σ α_j t_j: B rows are projected, not K.
    """
    columns = []
    if "image" in head.parts:
        columns.append(batch.image)
    if "predicted" in head.parts:
        columns.append(batch.text[batch.predicted])
    if "attended" in head.parts:
        if batch.attended is not None:
            columns.append(batch.attended)
        elif len(batch.text) < len(batch.image) or head.projection == "identity":
            columns.append(head.attend(batch.image, batch.text))
        else:
            query, key, value = head.projections()
            u = batch.image @ query.T @ key
            columns.append(torch.softmax(head.attention_scale * u @ batch.text.T, dim=-1) @ batch.text @ value.T)
    logit = head.mlp(torch.cat(columns, dim=-1)).squeeze(-1)
    if head.prior is not None:
        assert batch.log_odds is not None
        logit = logit + head.prior * batch.log_odds
    return logit


def _loss(head: ViLUHead, batch: Batch, recipe: Recipe, samples: int, world: int) -> Tensor:
    """This process's share of the batch's loss: the shares of all processes add up to the mean over `samples`."""
    logit = _head_logit(head, batch)
    weight: float | Tensor | None = recipe.failure_weight
    if weight is None:
        wrong = batch.wrong.sum()
        if world > 1:
            dist.all_reduce(wrong)
        weight = torch.log1p((samples - wrong) / wrong.clamp(min=1))
    if recipe.loss == "mse":
        assert batch.target is not None
        return (_weights(batch.wrong, weight) * (torch.sigmoid(-logit) - batch.target).square()).sum() / samples
    # Summed: a process may have none of a last, small batch, and a mean over none is NaN.
    weights = _weights(batch.wrong, weight).to(logit.dtype)
    return F.binary_cross_entropy_with_logits(logit, batch.wrong.to(logit.dtype), weights, reduction="sum") / samples


def _evaluation_batches(data: EmbeddedSet, answers: _Answers | None, rows: Tensor, recipe: Recipe) -> Iterator[Batch]:
    # Captions: groups of the training batch's size, so that the question is as hard as in training.
    for some in rows.split(recipe.batch_size if data.captions else BLOCK):
        if not data.captions or len(some) > 1:
            yield _batch(data, answers, some, recipe)


@torch.no_grad()
def _over(
    head: ViLUHead, data: EmbeddedSet, answers: _Answers | None, rows: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logit, wrong, log-odds, target (none but for an MSE) and weight of each of these samples (N,)."""
    asked = replace(recipe, prior=True)
    columns: list[list[Tensor]] = [[], [], [], []]
    for batch in _evaluation_batches(data, answers, rows, asked):
        target = torch.empty(0) if batch.target is None or recipe.loss != "mse" else batch.target
        assert batch.log_odds is not None
        for column, value in zip(columns, (_head_logit(head, batch), batch.wrong, batch.log_odds, target), strict=True):
            column.append(value)
    logits, wrong, odds, target = (torch.cat(column) for column in columns)
    # One weight for all: a block with a rare failure in it must not count it more than the others do.
    return logits, wrong, odds, target, _weights(wrong, recipe.failure_weight).float()


class _Run:
    """The part of training that changes from epoch to epoch, and its file."""

    def __init__(self, head: ViLUHead, recipe: Recipe, epochs: int) -> None:
        self.head, self.recipe = head, recipe
        parameters = list(head.parameters())
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
            )

        def rate(epoch: int) -> float:
            warm = 1.0
            if epoch < recipe.warmup_epochs:
                warm = 0.1 + 0.9 * epoch / recipe.warmup_epochs
            return warm * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.epoch = self.steps = self.best_epoch = 0
        self.best = copy.deepcopy(head.state_dict())
        self.train_losses: list[float] = []
        self.watched = _Watched()

    @property
    def exhausted(self) -> bool:
        return self.recipe.patience is not None and self.epoch - self.best_epoch > self.recipe.patience

    def before_step(self) -> None:
        frozen = self.recipe.freeze_steps is not None and self.steps < self.recipe.freeze_steps
        for layer in (self.head.query, self.head.key, self.head.value):
            if layer is not None:
                layer.weight.requires_grad_(not frozen)
        self.steps += 1

    def step(self, loss: Tensor, world: int) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if world > 1:
            gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            dist.all_reduce(loss.detach())
        self.optimizer.step()

    def keep(self) -> None:
        """Keep the weights when this epoch is the best so far: by validation, or simply the last where none is."""
        if not self.watched.logits or self.watched.best(self.recipe) == self.epoch:
            self.best, self.best_epoch = copy.deepcopy(self.head.state_dict()), self.epoch

    def save(self, path: Path, identity: str) -> None:
        document = {
            "identity": identity,
            "head": self.head.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.epoch, self.steps, self.best_epoch],
            "train_losses": self.train_losses,
            "watched": self.watched.__dict__,
        }
        content = io.BytesIO()  # torch.save itself answers a full disk with its own internals
        torch.save(document, content)
        atomic.write(path, content.getbuffer())

    def load(self, path: Path, identity: str) -> None:
        try:
            document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if document["identity"] != identity:
                raise UserError(f"{path}: belongs to a run with other data or settings; remove it to start anew")
            self.head.load_state_dict(document["head"])
            self.optimizer.load_state_dict(document["optimizer"])
            self.epoch, self.steps, self.best_epoch = (int(n) for n in document["counters"])
            self.best, self.train_losses = document["best"], list(document["train_losses"])
            self.watched.__dict__.update(document["watched"])
        except UserError:
            raise
        except Exception as error:  # a damaged file raises many types; all mean the same to the user
            raise UserError(
                f"{path}: not the state of a training run ({type(error).__name__}); remove it to start anew"
            ) from None
        self.schedule.last_epoch = self.epoch
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * self.schedule.lr_lambdas[0](self.epoch)


def _identity(data: EmbeddedSet, recipe: Recipe, epochs: int) -> str:
    """What a state must share with the run that continues it: settings, versions, and the data."""
    digest = hashlib.sha256(json.dumps([STATE_VERSION, torch.__version__, asdict(recipe), epochs]).encode())
    digest.update(repr((data.name, len(data), data.logit_scale)).encode())
    for tensor in (data.image.normalised, data.text.normalised, data.labels):
        if tensor is not None:
            for rows in tensor.split(BLOCK):
                digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _seed(seed: int, epoch: int) -> int:
    """An epoch's own seed: a run that continues needs no generator's state."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little") >> 1


def _ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
