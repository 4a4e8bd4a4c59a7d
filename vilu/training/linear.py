"""The linear start of a head: CLIP's log-odds plus a linear function of what the MLP reads, with its own shrinkage.

    logit = a · log((1 − p) / p) + w_p · t_pred + w_a · (z − t_pred) + b

t_pred tells which answers CLIP tends to get wrong, z − t_pred with which other candidates it confuses them. A function
of embeddings, not of class numbers, also serves class sets that were not trained on. The weights are those of a
logistic regression whose L2 penalty is chosen by cross-validation, so few samples leave MCM's ranking as it is.

The MLP can hold the function exactly: two units of each layer carry max(x, 0) and max(−x, 0), the last one subtracts
them. The head's form, its files, graphs and kernels stay as they are, and training goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilu.head import ViLUHead

LIMIT = 20_000  # samples are enough: the function has about a thousand weights
PENALTIES = (math.inf, 32.0, 8.0, 2.0, 0.5, 0.125)  # from "no linear function" on; each solution starts the next
FOLDS = 5
CAUTION = 0.5  # standard errors by which the gain over no linear function must exceed 0: few samples choose by luck
ENERGY = 0.999  # share of the features' variance that their principal components must keep
COMPONENTS = 256  # at most


class Linear(NamedTuple):
    """A linear start.

    slope: factor a on CLIP's log-odds.
    weight: (W,) weights of the columns that the MLP reads.
    bias: the offset b.
    penalty: the L2 penalty chosen; infinite: no linear function.
    """

    slope: float
    weight: Tensor
    bias: float
    penalty: float


def fit_linear(odds: Tensor, columns: dict[str, Tensor], wrong: Tensor, weights: Tensor, seed: int) -> Linear:
    """Fit the linear start to CLIP's mistakes.

    Args:
        odds: (N,) CLIP's log-odds of being wrong.
        columns: what the MLP reads: part (of `vilu.head.PARTS`) to (N, D), in the MLP's order;
            none: fit the slope and the offset alone.
        wrong: (N,) bool, whether CLIP's answer is wrong.
        weights: (N,) weight of each sample in the loss.
        seed: seed of the cross-validation's folds.

    Source: the class bias (a logistic regression with a weight per predicted class) as a function of embeddings.
    """
    x = torch.stack([odds.double(), torch.ones(len(odds), dtype=torch.float64)], dim=1)
    y, w = wrong.double(), weights.double()
    if not columns:
        beta = _newton(x, y, w, math.inf, None)
        return Linear(max(float(beta[0]), 1e-2), torch.zeros(0), float(beta[1]), math.inf)
    features, to_weight = _features(columns)
    x = torch.cat([x, features], dim=1)
    penalty = _choose_penalty(x, y, w, seed)
    beta = _newton(x, y, w, math.inf, None)
    for value in PENALTIES[1 : PENALTIES.index(penalty) + 1]:
        beta = _newton(x, y, w, value, beta)
    weight, offset = to_weight(beta[2:])
    return Linear(max(float(beta[0]), 1e-2), weight.float(), float(beta[1]) + offset, penalty)


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


def _features(columns: dict[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, float]]]:
    """Principal components (N, R) float64 of the features; and a function from their weights to the columns'.

    The features are t_pred without its mean, over its mean length, and z − t_pred at twice that scale: measured on
    CLIP ViT-B/32 embeddings, that is the order of what each of them explains.
    """
    predicted, attended = columns.get("predicted"), columns.get("attended")
    blocks: list[tuple[Tensor, dict[str, float]]] = []  # a feature block, and its factor on each column
    base = predicted if predicted is not None else attended
    if base is None:
        base = next(iter(columns.values()))
    scale = float((base.double() - base.double().mean(dim=0)).norm(dim=1).mean().clamp(min=1e-6))
    if predicted is not None:
        blocks.append((predicted.double() / scale, {"predicted": 1 / scale}))
        if attended is not None:
            factor = 2 / scale
            blocks.append(((attended - predicted).double() * factor, {"attended": factor, "predicted": -factor}))
    elif attended is not None:
        blocks.append((attended.double() / scale, {"attended": 1 / scale}))
    else:
        blocks.append((base.double() / scale, {"image": 1 / scale}))
    phi = torch.cat([block for block, _ in blocks], dim=1)
    mean = phi.mean(dim=0)
    phi = phi - mean
    axes = _principal_axes(phi)

    def to_weight(beta: Tensor) -> tuple[Tensor, float]:
        per_feature = beta @ axes
        width = base.shape[1]
        out = {part: torch.zeros(width, dtype=torch.float64) for part in columns}
        for (_, factors), part_weight in zip(blocks, per_feature.split(width), strict=True):
            for part, factor in factors.items():
                out[part] += factor * part_weight
        return torch.cat([out[part] for part in columns]), -float(per_feature @ mean)

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


def _choose_penalty(x: Tensor, y: Tensor, w: Tensor, seed: int) -> float:
    """The penalty with the least cross-validated loss. The folds are stratified by failure."""
    folds = min(FOLDS, int(y.sum()), int((1 - y).sum()))
    if folds < 2:
        return math.inf
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(y), dtype=torch.int64)
    for kind in (y > 0, y == 0):
        members = kind.nonzero().squeeze(1)
        place[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    losses = torch.zeros(len(PENALTIES), len(y), dtype=torch.float64)
    for fold in range(folds):
        held = place == fold
        beta = None
        for i, penalty in enumerate(PENALTIES):
            beta = _newton(x[~held], y[~held], w[~held], penalty, beta)
            logits = x[held] @ beta
            losses[i, held] = F.binary_cross_entropy_with_logits(logits, y[held], w[held], reduction="none")
    best = int(losses.mean(dim=1).argmin())
    gain = losses[0] - losses[best]
    if float(gain.mean()) <= CAUTION * float(gain.std()) / math.sqrt(len(y)):
        return math.inf
    return PENALTIES[best]


def _newton(x: Tensor, y: Tensor, w: Tensor, penalty: float, start: Tensor | None, steps: int = 60) -> Tensor:
    """Weights (2 + R,) of the penalised logistic regression; a weak pull of the slope to 1 keeps it finite."""
    columns = 2 if math.isinf(penalty) else x.shape[1]
    full, x = x.shape[1], x[:, :columns]
    pull = torch.full((columns,), penalty if columns > 2 else 0.0, dtype=torch.float64)
    pull[0], pull[1] = 2e-3 * len(x), 1e-6 * len(x)
    rest = torch.zeros(columns, dtype=torch.float64)
    rest[0] = 1.0
    beta = rest.clone() if start is None else start[:columns].clone()

    def loss(at: Tensor) -> Tensor:
        data = F.binary_cross_entropy_with_logits(x @ at, y, w, reduction="sum")
        return data + 0.5 * (pull * (at - rest).square()).sum()

    value = loss(beta)
    factor, fresh = None, False
    for _ in range(steps):
        p = torch.sigmoid(x @ beta)
        gradient = x.T @ (w * (p - y)) + pull * (beta - rest)
        if factor is None:
            curvature = (x * (w * p * (1 - p)).clamp(min=1e-9)[:, None]).T @ x + torch.diag(pull)
            factor, fresh = torch.linalg.cholesky(curvature), True
        move = torch.cholesky_solve(gradient[:, None], factor).squeeze(1)
        size = 1.0
        while size > 1e-4 and (trial := loss(beta - size * move)) > value:
            size /= 2
        if size <= 1e-4:
            if fresh:
                break
            factor = None
            continue
        expected = 0.5 * float(gradient @ move)  # the gain of a quadratic loss
        beta, gain, value = beta - size * move, float(value - trial), trial
        if max(gain, expected) < 1e-7 * len(x):
            break
        # The curvature is what costs. It serves again as long as it foretells the gain.
        factor, fresh = (factor, False) if size == 1 and gain > 0.7 * expected else (None, False)
    return F.pad(beta, (0, full - columns))
