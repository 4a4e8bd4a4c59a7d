"""The head before its first training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.head import PARTS, ViLUHead
from vilu.recipes import Recipe
from vilu.seeding import seeded
from vilu.training.batches import ClipAnswers, make_batch
from vilu.training.linear import LIMIT, Classes, carry, fit_linear
from vilu.training.loss import failure_weights, head_columns


def initial_head(data: EmbeddedSet, answers: ClipAnswers | None, train: Tensor, recipe: Recipe) -> ViLUHead:
    """The head before its first training step.

    With the prior, it gives CLIP's log-odds plus a linear function of what the MLP reads, fitted to CLIP's mistakes.

    Args:
        data: the training data.
        answers: as `clip_answers` gives them for the data.
        train: (M,) rows of the data to train on.
        recipe: settings of the training.

    Raises:
        UserError: settings that `ViLUHead` refuses.
    """
    dim = data.image.normalised.shape[1]
    with seeded(recipe.seed):
        try:
            head = ViLUHead(
                dim,
                parts=PARTS if recipe.parts is None else recipe.parts,
                projection=recipe.projection,
                attention_scale=data.logit_scale if recipe.form == "authors" else dim**-0.5,
                logit_scale=data.logit_scale if recipe.prior else None,
            )
        except ValueError as error:
            raise UserError(f"recipe: {error}") from None
    if head.prior is None:
        return head
    some = [make_batch(data, answers, rows, recipe) for rows in _drawn(data, train, recipe)]
    odds = torch.cat([batch.log_odds for batch in some if batch.log_odds is not None])
    wrong = torch.cat([batch.wrong for batch in some])
    if not wrong.any() or wrong.all():
        return head
    with torch.no_grad():
        parts = [head_columns(head, batch) for batch in some]
        columns = {part: torch.cat([one[part] for one in parts]) for part in head.parts}
    weights = failure_weights(wrong, recipe.failure_weight)
    classes = None
    if answers is not None:
        predicted = torch.cat([batch.predicted for batch in some])
        answered = torch.bincount(predicted, minlength=len(answers.mass))
        mass = answered / len(predicted) + answers.mass / len(data)
        classes = Classes(predicted, data.text.normalised, mass)
    start = fit_linear(odds, columns if recipe.linear else {}, wrong, weights, recipe.seed, classes)
    with torch.no_grad():
        head.prior.fill_(start.slope)
    carry(head, start)
    return head


def _drawn(data: EmbeddedSet, train: Tensor, recipe: Recipe) -> Sequence[Tensor]:
    """At most LIMIT of the rows, in parts: as many captions as training shows together, or any number of labels."""
    if len(train) > LIMIT:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))[:LIMIT]]
    return train.split(recipe.batch_size if data.captions else BLOCK)
