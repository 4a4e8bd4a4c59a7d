"""The linear start of a head: CLIP's log-odds plus a linear function of what the MLP reads, with its own shrinkage.

    logit = a · log((1 − p) / p) + w_p · t_pred + w_a · (z − t_pred) + b

t_pred tells which answers CLIP tends to get wrong, z − t_pred with which other candidates it confuses them. A function
of embeddings, not of class numbers, also serves class sets that were not trained on.

w_p has two forms. In the first, answers with similar embeddings have similar weights. In the second, each class has a
weight of its own (the class bias of `vilu.scores.ClassBias`), and w_p is the linear function of t_pred that is nearest
to these weights: with no more classes than dimensions, it is equal to them. Each form is fitted with several L2
penalties. The start is the mean of all these regressions and of the one without a linear function. Each counts as much
as its cross-validated loss is likely to be the least, so few samples move MCM's ranking little.

The MLP can hold the function exactly: two units of each layer carry max(x, 0) and max(−x, 0), the last one subtracts
them. The head's form, its files, graphs and kernels stay as they are, and training goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.head import ViLUHead
from vilu.training.logistic import Design, average_shares, newton

LIMIT = 20_000  # samples, or classes with a weight each: the function has about a thousand weights
PENALTIES = (32.0, 8.0, 2.0, 0.5, 0.125)  # each solution starts the next
FOLDS = 5
CAUTION = 0.5  # standard errors of its gain over no linear function by which a regression's loss is raised
DRAWS = 200  # of the Bayesian bootstrap that gives the regressions their shares
ENERGY = 0.999  # share of the features' variance that their principal components must keep
COMPONENTS = 256  # at most
RIDGE = 1e-6  # on the squared length of w_p, beside the mean squared error of the class weights


class Classes(NamedTuple):
    """The class set of N samples.

    predicted: (N,) int64, the class that CLIP answers.
    text: (K, D) text embeddings.
    mass: (K,) how much each class counts: how often CLIP answers it, or nearly does.
    """

    predicted: Tensor
    text: Tensor
    mass: Tensor


class Linear(NamedTuple):
    """A linear start.

    slope: factor a on CLIP's log-odds.
    weight: (W,) weights of the columns that the MLP reads.
    bias: the offset b.
    share: share of the regressions with a linear function in the average, from 0 to 1.
    """

    slope: float
    weight: Tensor
    bias: float
    share: float


def fit_linear(
    odds: Tensor,
    columns: dict[str, Tensor],
    wrong: Tensor,
    weights: Tensor,
    seed: int,
    classes: Classes | None = None,
) -> Linear:
    """Fit the linear start to CLIP's mistakes.

    Args:
        odds: (N,) CLIP's log-odds of being wrong.
        columns: what the MLP reads: part (of `vilu.head.PARTS`) to (N, D), in the MLP's order;
            none: fit the slope and the offset alone.
        wrong: (N,) bool, whether CLIP's answer is wrong.
        weights: (N,) weight of each sample in the loss.
        seed: seed of the cross-validation's folds.
        classes: the class set, for a weight per class; None: captions, which have no class set.

    Source: the class bias, a logistic regression with a weight per predicted class, as a function of embeddings. The
        average is pseudo-BMA+ (`vilu.training.logistic.average_shares`).
    """
    base = torch.stack([odds.double(), torch.ones(len(odds), dtype=torch.float64)], dim=1)
    y, w = wrong.double(), weights.double()
    models = []
    if columns:
        models.append(_model(base, columns, None))
        if classes is not None and "predicted" in columns and len(classes.text) <= LIMIT:
            models.append(_model(base, columns, classes))
    shares = _shares(base, columns, models, y, w, seed)
    found = shares @ torch.stack([*_path(base, models, y, w)])
    return Linear(max(float(found[0]), 1e-2), found[2:].float(), float(found[1]), 1 - float(shares[0]))


def carry(head: ViLUHead, linear: Linear) -> None:
    """Make the head's MLP give the linear function, and nothing else, until training changes it."""
    layers = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        layers[-1].weight.zero_()
        layers[-1].bias.fill_(linear.bias)
        if not linear.weight.any() or min(head.hidden) < 2:
            return
        for i, layer in enumerate(layers[:-1]):
            layer.weight[-2:] = 0
            layer.bias[-2:] = 0
            if i:
                layer.weight[:-2, -2:] = 0  # what the other units read stays as it was drawn
                layer.weight[-2, -2] = layer.weight[-1, -1] = 1
            else:
                layer.weight[-2], layer.weight[-1] = linear.weight, -linear.weight
        layers[-1].weight[0, -2], layers[-1].weight[0, -1] = 1, -1


class _Model(NamedTuple):
    """One form of the linear function.

    design: what the samples are regressed on.
    to_columns: from the regression's weights to slope, offset and the weights of the columns (2 + W,).
    """

    design: Design
    to_columns: Callable[[Tensor], Tensor]


def _model(base: Tensor, columns: dict[str, Tensor], classes: Classes | None) -> _Model:
    """The form of the linear function without (None) or with a weight per class."""
    features, to_weight = _features(columns, similar=classes is None)
    x = torch.cat([base, features], dim=1)
    width = x.shape[1]
    if classes is None:
        design, nearest = Design(x), None
    else:
        design, nearest = Design(x, classes.predicted, len(classes.text)), _nearest(classes)

    def to_columns(beta: Tensor) -> Tensor:
        weight, offset = to_weight(beta[2:width])
        if nearest is not None:
            of_text, level = nearest(beta[width:])
            weight["predicted"] = weight["predicted"] + of_text
            offset += level
        return torch.cat([beta[:1], beta[1:2] + offset, *weight.values()])

    return _Model(design, to_columns)


def _nearest(classes: Classes) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A function from class weights (K,) to the nearest linear function of text embeddings: weights (D,), offset.

    Least squares, each class counted by its mass. RIDGE keeps the function small where classes have nearly one
    embedding.
    """
    share = (classes.mass / classes.mass.sum()).double()
    text = classes.text.double()
    mean = share @ text
    centred = text - mean
    gram = (centred * share[:, None]).T @ centred
    factor = torch.linalg.cholesky(gram + RIDGE * torch.eye(len(gram), dtype=torch.float64))

    def nearest(weight: Tensor) -> tuple[Tensor, float]:
        level = share @ weight
        moment = centred.T @ (share * (weight - level))
        of_text = torch.cholesky_solve(moment[:, None], factor).squeeze(1)
        return of_text, float(level - mean @ of_text)

    return nearest


def _features(
    columns: dict[str, Tensor], similar: bool
) -> tuple[Tensor, Callable[[Tensor], tuple[dict[str, Tensor], float]]]:
    """Principal components (N, R) float64 of the features; and a function from their weights to the columns'.

    The features are t_pred without its mean, over its mean length, and z − t_pred at twice that scale: measured on
    CLIP ViT-B/32 embeddings, that is the order of what each of them explains.

    Args:
        columns: as in `fit_linear`.
        similar: whether t_pred is a feature; else the classes have weights of their own.
    """
    predicted, attended = columns.get("predicted"), columns.get("attended")
    base = predicted if predicted is not None else attended
    if base is None:
        base = next(iter(columns.values()))
    scale = float((base.double() - base.double().mean(dim=0)).norm(dim=1).mean().clamp(min=1e-6))
    blocks: list[tuple[Tensor, dict[str, float]]] = []  # a feature block, and its factor on each column
    if predicted is not None:
        if similar:
            blocks.append((predicted.double() / scale, {"predicted": 1 / scale}))
        if attended is not None:
            factor = 2 / scale
            blocks.append(((attended - predicted).double() * factor, {"attended": factor, "predicted": -factor}))
    elif attended is not None:
        blocks.append((attended.double() / scale, {"attended": 1 / scale}))
    else:
        blocks.append((base.double() / scale, {"image": 1 / scale}))
    width = base.shape[1]
    phi = torch.cat([block for block, _ in blocks], dim=1) if blocks else base.double()[:, :0]
    mean = phi.mean(dim=0)
    phi = phi - mean
    axes = _principal_axes(phi) if blocks else phi.new_zeros(0, 0)

    def to_weight(beta: Tensor) -> tuple[dict[str, Tensor], float]:
        per_feature = beta @ axes
        out = {part: torch.zeros(width, dtype=torch.float64) for part in columns}
        for i, (_, factors) in enumerate(blocks):
            for part, factor in factors.items():
                out[part] += factor * per_feature[i * width : (i + 1) * width]
        return out, -float(per_feature @ mean)

    return phi @ axes.T, to_weight


def _principal_axes(phi: Tensor) -> Tensor:
    """(R, W) orthonormal rows: the fewest principal axes of phi (N, W) that keep ENERGY, at most COMPONENTS."""
    from scipy.linalg import eigh

    wide = len(phi) < phi.shape[1]
    gram = (phi @ phi.T if wide else phi.T @ phi).numpy()
    size = len(gram)
    energy, vectors = (
        torch.from_numpy(part.copy())
        for part in eigh(gram, subset_by_index=(max(0, size - COMPONENTS), size - 1), check_finite=False)
    )
    energy, vectors = energy.flip(0).clamp(min=0), vectors.T.flip(0)
    total = max(float(gram.trace()), 1e-12)
    kept = min(int((energy.cumsum(0) / total < ENERGY).sum()) + 1, len(energy))
    axes = vectors[:kept]
    return F.normalize(axes @ phi, dim=1) if wide else axes


def _shares(base: Tensor, columns: dict[str, Tensor], models: list[_Model], y: Tensor, w: Tensor, seed: int) -> Tensor:
    """The share of each regression of `_path`, from cross-validated losses. The folds are stratified by failure."""
    regressions = 1 + len(models) * len(PENALTIES)
    folds = min(FOLDS, int(y.sum()), int((1 - y).sum()))
    if folds < 2 or not models:
        return F.one_hot(torch.tensor(0), regressions).double()
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(y), dtype=torch.int64)
    for kind in (y > 0, y == 0):
        members = kind.nonzero().squeeze(1)
        place[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    losses = torch.zeros(regressions, len(y), dtype=torch.float64)
    for fold in range(folds):
        held = place == fold
        parts = [part[held].float() for part in columns.values()]
        for i, found in enumerate(_path(base, models, y, w, ~held)):
            logit = base[held] @ found[:2]
            if found[2:].any():
                for part, weight in zip(parts, found[2:].float().split([p.shape[1] for p in parts]), strict=True):
                    logit += part @ weight
            losses[i, held] = F.binary_cross_entropy_with_logits(logit, y[held], w[held], reduction="none")
    return average_shares(losses, CAUTION, DRAWS, seed)


def _path(base: Tensor, models: list[_Model], y: Tensor, w: Tensor, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Slope, offset and column weights (2 + W,) of each regression on the samples `rows` (None: all).

    The first has no linear function: its result has no column weights (2,) where there are no models, else zeros. Then
    come the models, each with all PENALTIES.
    """
    rows = torch.ones(len(y), dtype=torch.bool) if rows is None else rows
    y, w = y[rows], w[rows]
    plain = newton(Design(base[rows]), y, w, 1.0, None)
    starts = [F.pad(plain, (0, model.design.x.shape[1] + model.design.classes - 2)) for model in models]
    yield F.pad(plain, (0, len(models[0].to_columns(starts[0])) - 2)) if models else plain
    for model, beta in zip(models, starts, strict=True):
        design = model.design.rows(rows)
        for penalty in PENALTIES:
            beta = newton(design, y, w, penalty, beta)
            yield model.to_columns(beta)
