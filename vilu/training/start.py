"""The head before its first training step."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.head import PARTS, ViLUHead
from vilu.recipes import Recipe
from vilu.seeding import seeded
from vilu.training.batches import ClipAnswers, make_batch
from vilu.training.loss import weighted_bce


def initial_head(data: EmbeddedSet, answers: ClipAnswers | None, train: Tensor, recipe: Recipe) -> ViLUHead:
    """The head before its first training step.

    With the prior, the MLP gives a constant, and the prior's weight and that constant are fitted to CLIP's mistakes.

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
    if answers is not None:
        odds, wrong = answers.log_odds[train], answers.wrong[train]
    else:
        some = [make_batch(data, None, rows, recipe) for rows in train[:BLOCK].split(recipe.batch_size)]
        odds = torch.cat([batch.log_odds for batch in some if batch.log_odds is not None])
        wrong = torch.cat([batch.wrong for batch in some])
    slope, offset = _fit_prior(odds, wrong, recipe)
    with torch.no_grad():
        head.prior.fill_(slope)
        head.output_layer.weight.zero_()
        head.output_layer.bias.fill_(offset)
    return head


def _fit_prior(odds: Tensor, wrong: Tensor, recipe: Recipe) -> tuple[float, float]:
    """Slope and offset on CLIP's log-odds (N,) with the least loss.

    A weak pull of the slope to 1 keeps both finite on separable data.
    """
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
