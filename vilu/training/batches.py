"""What CLIP answers to the training data, and batches of that data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.head import PARTS, log_odds
from vilu.recipes import Recipe


class Batch(NamedTuple):
    """B images with CLIP's answers to them.

    image: (B, D) float32.
    text: (K, D) float32, the candidates.
    predicted: (B,) int64, the row of `text` that CLIP answers.
    wrong: (B,) bool, whether that answer is wrong.
    log_odds: (B,) CLIP's log-odds of being wrong, for a head with the prior.
    target: (B,) CLIP's probability of the true class, for the "mse" loss.
    attended: (B, D) attention over the candidates, where training does not change it.
    """

    image: Tensor
    text: Tensor
    predicted: Tensor
    wrong: Tensor
    log_odds: Tensor | None
    target: Tensor | None
    attended: Tensor | None = None


class ClipAnswers(NamedTuple):
    """What CLIP answers to the N images of a closed set; for captions it depends on the batch.

    predicted: (N,) int64, the class that CLIP answers.
    wrong: (N,) bool.
    log_odds: (N,) CLIP's log-odds of being wrong.
    target: (N,) CLIP's probability of the true class.
    attended: (N, D) float32, attention over the classes; None where training changes it or it was not kept.
    mass: (K,) float64, the sum of CLIP's probabilities of each class.
    """

    predicted: Tensor
    wrong: Tensor
    log_odds: Tensor
    target: Tensor
    attended: Tensor | None
    mass: Tensor


def clip_answers(data: EmbeddedSet, recipe: Recipe, *, keep_attention: bool = True) -> ClipAnswers | None:
    """CLIP's answers to a closed set; None for captions.

    Args:
        data: the training data.
        recipe: settings of the training.
        keep_attention: also keep the attention, where no projection will change it.

    Raises:
        UserError: too few samples, only one class, or CLIP is right or wrong on nearly all of them.
    """
    if data.labels is None:
        if len(data) < 4:
            raise UserError(f"{data.name}: {len(data)} captioned images are too few to train on")
        return None
    if len(data.text) < 2 or bool((data.labels == data.labels[0]).all()):
        raise UserError(f"{data.name}: all {len(data)} samples are of one class; at least two are needed")
    keep_attention = keep_attention and recipe.projection == "identity" and "attended" in (recipe.parts or PARTS)
    attended = _file_backed(len(data), data.image.normalised.shape[1]) if keep_attention else None
    # Made before the loop: small tensors kept from each block would lie between the large ones and pin their memory.
    predicted, odds, target = torch.empty(len(data), dtype=torch.int64), torch.empty(len(data)), torch.empty(len(data))
    mass = torch.zeros(len(data.text), dtype=torch.float64)
    for start in range(0, len(data), BLOCK):
        rows = slice(start, start + BLOCK)
        logits = data.image.normalised[rows].float() @ data.text.normalised.T
        p = torch.softmax(data.logit_scale * logits, dim=-1)
        predicted[rows], odds[rows] = logits.argmax(dim=-1), log_odds(data.logit_scale * logits)
        target[rows] = p.gather(1, data.labels[rows, None]).squeeze(1)
        mass += p.sum(dim=0)
        if attended is not None:
            attended[rows] = p @ data.text.normalised  # the scale is CLIP's own where there are no projections
    wrong = predicted != data.labels
    failures = int(wrong.sum())
    if failures < 2 or failures > len(wrong) - 2:
        raise UserError(f"{data.name}: CLIP is wrong on {failures} of {len(wrong)} samples; both kinds are needed")
    return ClipAnswers(predicted, wrong, odds, target, attended, mass)


def make_batch(
    data: EmbeddedSet,
    answers: ClipAnswers | None,
    rows: Tensor,
    recipe: Recipe,
    mine: Tensor | None = None,
    image: Tensor | None = None,
) -> Batch:
    """The batch of the samples `rows`, or one process's part of it.

    Args:
        data: the training data.
        answers: as `clip_answers` gives them for the data.
        rows: (M,) samples of the whole batch; among captions, their texts are the candidates.
        recipe: settings of the training.
        mine: (B,) places in `rows` that this process works on; None: all.
        image: (B, D) embeddings to use in place of the data's own, of freshly augmented images.
    """
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


def evaluation_batches(data: EmbeddedSet, answers: ClipAnswers | None, rows: Tensor, recipe: Recipe) -> Iterator[Batch]:
    """Batches of the samples `rows` in order; captions in groups as large as in training, to be as hard to rank."""
    for some in rows.split(recipe.batch_size if data.captions else BLOCK):
        if not data.captions or len(some) > 1:
            yield make_batch(data, answers, some, recipe)


def _file_backed(rows: int, width: int) -> Tensor | None:
    """(rows, width) float32 in a file without a name, so that memory does not grow with the data; None: no room."""
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, 4 * rows * width)  # a mapping that meets a full disk is a SIGBUS
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
    except (OSError, AttributeError):  # AttributeError: a system without posix_fallocate
        return None
