"""Training of the ViLU head on CLIP embeddings: closed set and captions, deterministic and resumable.

CLIP is frozen, so whatever depends on it alone is computed once (`vilu.training.batches`): which answers are wrong,
t_pred, the prior and, without projections, the attention over a closed set. The rest of a step is matrix products, in
the order that costs least (`vilu.training.loss.head_logit`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.head import ViLUHead
from vilu.recipes import CROSS_VALIDATION_LIMIT, Recipe
from vilu.training.batches import ClipAnswers, clip_answers, make_batch
from vilu.training.loss import batch_loss
from vilu.training.run import Run, State, run_identity
from vilu.training.start import initial_head
from vilu.training.validation import HeldOut, Validation, predict, validation_rows

Progress = Callable[[int, int], None]
Augmented = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Trained:
    """What `fit` gives; both heads are in evaluation mode and frozen.

    head: the head of the best epoch.
    last: the head of the last epoch.
    best_epoch: number of the best epoch; 0: before the first step.
    history: by epoch, "epoch" with "train_loss" and "validation_loss" where they are known.
    validation: the head beside MCM on the samples that chose the epoch; None where there are none, or where all their
        answers are right or all are wrong.
    """

    head: ViLUHead
    last: ViLUHead
    best_epoch: int
    history: list[dict[str, float]]
    validation: Validation | None


def train_head(
    image_embedding: Tensor,
    labels: Tensor | None,
    text_embeddings: Tensor,
    *,
    attention_scale: float = 100.0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> ViLUHead:
    """Train a head to predict where CLIP's answer, argmax_j v · t_j, is not the label. This is `fit` on tensors.

    Args:
        image_embedding: (N, D), L2-normalised.
        labels: (N,) int64 in [0, K), or None for captions.
        text_embeddings: (K, D) of the class set, or (N, D) captions, row i being the caption of image i;
            L2-normalised.
        attention_scale: CLIP's logit scale, the factor on v · t.
        recipe: settings of the training (`vilu.recipes`); None: the "default" recipe.
        progress: called with (epochs done, epochs in all).

    Returns:
        the head in evaluation mode, frozen; the same seed gives the same weights.

    Raises:
        UserError: tensors that do not fit, too few samples, only one class, CLIP always right or always wrong, or a
            loss that is no longer finite.

    Source: ViLU (arXiv 2507.07620), section 3; the prior that the default recipe starts from is not in the paper.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> text = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=1)
        >>> labels = torch.arange(200) % 4
        >>> image = torch.nn.functional.normalize(text[labels] + 0.5 * torch.randn(200, 8, generator=generator), dim=1)
        >>> head = train_head(image, labels, text, recipe=Recipe(epochs=2, min_steps=0))
        >>> head.failure_probability(image, text).shape
        torch.Size([200])
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
    progress: Progress | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    augmented: Augmented | None = None,
) -> Trained:
    """Train a head to predict CLIP's mistakes.

    Under torchrun every process calls this with the same data. Each batch is split over the processes, its candidates
    are those of the whole batch, and the weights stay equal in all processes.

    Args:
        data: the training data. With captions (labels None), the candidates are the captions of the batch.
        recipe: settings of the training; None: the "default" recipe.
        state: file that holds the training, written every few seconds at the end of an epoch. A training that finds
            its own state there continues it, in the fold and epoch where it was, and ends with the same weights as
            without the interruption. The file is removed at the end.
        progress: called with (epochs done, epochs in all).
        log: called with the figures of each epoch: "epoch", "train_loss" and, if known, "validation_loss".
        augmented: gives image embeddings (B, D) for the samples (B,) of an epoch, in place of those of the data.

    Raises:
        UserError: too few samples, only one class, CLIP always right or always wrong, a state of another run, or a
            loss that is no longer finite.

    Source: ViLU (arXiv 2507.07620), section 3.3, and the authors' code (github.com/ykrmm/ViLU).
    """
    recipe = recipe or Recipe()
    rank, _ = _rank_and_world()
    if not data.captions:
        data = replace(data, text=data.text.float())  # once, not in every step
    answers = clip_answers(data, recipe, keep_attention=augmented is None)
    folds = 1
    if recipe.validation and len(data) <= CROSS_VALIDATION_LIMIT:
        folds = min(recipe.folds, len(data) // 2, len(data) if answers is None else int(answers.wrong.sum()))
    parts = validation_rows(answers, data, recipe, folds if folds > 1 else None)
    steps = -(-len(data) // recipe.batch_size)
    epochs = max(recipe.epochs, -(-recipe.min_steps // steps))
    total = epochs * (folds + 1 if folds > 1 else 1)
    done = 0

    def epoch_done() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(min(done, total), total)

    kept = State(state, run_identity(data, recipe, epochs) if state is not None else "")
    done = kept.folds * epochs

    def end_of_epoch(run: Run) -> None:
        if rank == 0:
            kept.save(run)
        epoch_done()

    # With cross-validation, the folds choose the epoch at which a last run over all of the data stops.
    stop, cross_validated = epochs, None
    if folds > 1:
        cross_validated = _cross_validate(data, answers, parts, recipe, epochs, kept, end_of_epoch, augmented)
        stop, parts = cross_validated.best(recipe), []
    held, train = _split(len(data), parts[0] if parts else torch.empty(0, dtype=torch.int64))
    run = Run(initial_head(data, answers, train, recipe), recipe, epochs)
    kept.continue_run(run)
    _train_epochs(run, data, answers, train, held, stop, end_of_epoch, log, augmented)
    head = run.head
    last = copy.deepcopy(head).eval().requires_grad_(False)
    head.load_state_dict(run.best)
    head.eval().requires_grad_(False)
    if rank == 0:
        kept.remove()
    held_out = cross_validated or run.held_out
    validation = held_out.validation(run.best_epoch, recipe)
    return Trained(head, last, run.best_epoch, held_out.history(run.train_losses), validation)


def _cross_validate(
    data: EmbeddedSet,
    answers: ClipAnswers | None,
    folds: list[Tensor],
    recipe: Recipe,
    epochs: int,
    kept: State,
    end_of_epoch: Callable[[Run], None],
    augmented: Augmented | None,
) -> HeldOut:
    """The predictions for every sample, each by the run that did not train on the sample's fold."""
    for fold in folds[kept.folds :]:
        held, train = _split(len(data), fold)
        run = Run(initial_head(data, answers, train, recipe), recipe, epochs)
        kept.continue_run(run)
        _train_epochs(run, data, answers, train, held, epochs, end_of_epoch, None, augmented)
        kept.fold_over(run)
    return kept.held_out


def _split(samples: int, held: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are held out, and all others."""
    mask = torch.ones(samples, dtype=torch.bool)
    mask[held] = False
    return held, torch.arange(samples)[mask]


def _train_epochs(
    run: Run,
    data: EmbeddedSet,
    answers: ClipAnswers | None,
    train: Tensor,
    held: Tensor,
    stop: int,
    end_of_epoch: Callable[[Run], None],
    log: Callable[[dict[str, float]], None] | None,
    augmented: Augmented | None,
) -> None:
    """Train on the rows `train` until epoch `stop` or the end of patience; `run.best` holds the best weights."""
    recipe, head = run.recipe, run.head
    rank, world = _rank_and_world()
    if run.epoch == 0 and len(held):
        run.held_out.add(predict(head, data, answers, held, recipe))
    batches = -(-len(train) // recipe.batch_size)
    if data.captions and batches > 1 and len(train) % recipe.batch_size:
        batches -= 1  # the last batch has fewer candidates, which would make its question easier than the others
    while run.epoch < stop and not run.exhausted:
        head.train()
        total, seen = 0.0, 0
        generator = torch.Generator().manual_seed(_epoch_seed(recipe.seed, run.epoch))
        order = train[torch.randperm(len(train), generator=generator)].split(recipe.batch_size)[:batches]
        for chosen in order:
            run.before_step()
            mine = torch.arange(len(chosen)).tensor_split(world)[rank]
            own = augmented(chosen[mine], run.epoch) if augmented else None
            batch = make_batch(data, answers, chosen, recipe, mine, own)
            loss = batch_loss(head, batch, recipe, len(chosen), world)
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
            run.held_out.add(predict(head, data, answers, held, recipe))
            figures["validation_loss"] = run.held_out.loss(run.epoch)
        run.keep_if_best()
        if log:
            log(figures)
        end_of_epoch(run)


def _epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch, so that a run that continues does not need the state of a generator."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little") >> 1


def _rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
