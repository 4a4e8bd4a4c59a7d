"""The head's output on a batch, and the training loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vilu.head import ViLUHead
from vilu.recipes import Recipe
from vilu.training.batches import Batch


def weighted_bce(failure_logit: Tensor, failure: Tensor, weight: float | Tensor | None = None) -> Tensor:
    """Weighted binary cross-entropy, the mean over B samples.

    Args:
        failure_logit: (B,).
        failure: (B,) bool, True where CLIP's answer is wrong.
        weight: weight of the wrong samples; None: log(1 + n_right / n_wrong), counted in the batch.

    Returns:
        the loss, a scalar.

    Source: ViLU (arXiv 2507.07620), section 3.3; the weighting is called "adaptative" in the authors' code.

    Example:
        >>> weighted_bce(torch.zeros(2), torch.tensor([True, False]), weight=1.0).round(decimals=4)
        tensor(0.6931)
    """
    weights = failure_weights(failure, weight).to(failure_logit.dtype)
    return F.binary_cross_entropy_with_logits(failure_logit, failure.to(failure_logit.dtype), weights)


def failure_weights(failure: Tensor, weight: float | Tensor | None) -> Tensor:
    """The weight of each sample (B,): 1, and for the wrong ones `weight`, or the default of `weighted_bce` for None."""
    if weight is None:
        wrong = failure.sum()
        weight = torch.log1p((len(failure) - wrong) / wrong.clamp(min=1))
    return torch.where(failure, weight, 1.0)


def head_columns(head: ViLUHead, batch: Batch) -> dict[str, Tensor]:
    """What the MLP reads: each of the head's parts to its columns (B, D), in the MLP's order."""
    columns = {}
    if "image" in head.parts:
        columns["image"] = batch.image
    if "predicted" in head.parts:
        columns["predicted"] = batch.text[batch.predicted]
    if "attended" in head.parts:
        if batch.attended is not None:
            columns["attended"] = batch.attended
        elif len(batch.text) < len(batch.image) or head.projection == "identity":
            columns["attended"] = head.attend(batch.image, batch.text)
        else:
            query, key, value = head.projections()
            u = batch.image @ query.T @ key
            attention = torch.softmax(head.attention_scale * u @ batch.text.T, dim=-1)
            columns["attended"] = attention @ batch.text @ value.T
    return columns


def head_logit(head: ViLUHead, batch: Batch) -> Tensor:
    """failure_logit (B,): `head(batch.image, batch.text)`, with the matrix products in the order that costs least.

    As (W_Q v) · (W_K t_j) = (W_Kᵀ W_Q v) · t_j and Σ α_j W_V t_j = W_V Σ α_j t_j, only the B images are projected,
    not the K texts.

    Raises:
        ValueError: the head has the prior, but the batch has no log-odds.
    """
    logit = head.mlp(torch.cat([*head_columns(head, batch).values()], dim=-1)).squeeze(-1)
    if head.prior is not None:
        if batch.log_odds is None:
            raise ValueError("a head with the prior needs a batch with log-odds")
        logit = logit + head.prior * batch.log_odds
    return logit


def batch_loss(head: ViLUHead, batch: Batch, recipe: Recipe, samples: int, world: int) -> Tensor:
    """This process's share of the loss of a batch.

    The shares of all processes add up to the mean over the samples of the batch.

    Args:
        head: the head in training.
        batch: the samples of this process.
        recipe: settings of the training.
        samples: number of samples of the batch in all processes.
        world: number of processes.

    Raises:
        ValueError: the batch lacks what the recipe's loss or the head's prior needs.
    """
    logit = head_logit(head, batch)
    weight: float | Tensor | None = recipe.failure_weight
    if weight is None:
        wrong = batch.wrong.sum()
        if world > 1:
            dist.all_reduce(wrong)
        weight = torch.log1p((samples - wrong) / wrong.clamp(min=1))
    if recipe.loss == "mse":
        if batch.target is None:
            raise ValueError("the mse loss needs a batch with CLIP's probability of the true class")
        return (failure_weights(batch.wrong, weight) * (torch.sigmoid(-logit) - batch.target).square()).sum() / samples
    # Summed: a process may have none of a last, small batch, and a mean over none is NaN.
    weights = failure_weights(batch.wrong, weight).to(logit.dtype)
    return F.binary_cross_entropy_with_logits(logit, batch.wrong.to(logit.dtype), weights, reduction="sum") / samples
