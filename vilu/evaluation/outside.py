"""Images inside the class set against images outside it: which score tells them apart, and what is accepted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings import BLOCK, EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.bootstrap import Interval, bootstrap
from vilu.evaluation.metrics import Bools, Floats, auroc, fpr_at_tpr
from vilu.head import ViLUHead
from vilu.outlier import Outlier

METHODS = {
    "MCM": "CLIP's largest probability",
    "energy": "the log of the sum of the exponentials of CLIP's logits",
    "ViLU": "1 − P(failure)",
    "outlier score": "the distance to the training images",
}


@dataclass(frozen=True)
class OutsideRow:
    """One score on images inside and outside the class set.

    method: a key of METHODS.
    auc: AUC of inside against outside, with its bootstrap interval; inside is the positive class.
    fpr95: share of the outside images accepted where 95% of the inside images are.
    inside_accepted, outside_accepted: shares of the images accepted at the checkpoint's threshold of this score;
        None where it has none.
    """

    method: str
    auc: Interval
    fpr95: float
    inside_accepted: float | None = None
    outside_accepted: float | None = None


@dataclass(frozen=True)
class Outside:
    """The scores on one pair of sets.

    inside, outside: names of the sets.
    samples: numbers of images inside and outside.
    rows: one a score.
    both: shares of the inside and of the outside images accepted by P(failure) and the outlier score together; None
        where either has no threshold.
    """

    inside: str
    outside: str
    samples: tuple[int, int]
    rows: tuple[OutsideRow, ...]
    both: tuple[float, float] | None


def evaluate_outside(
    inside: EmbeddedSet,
    outside: EmbeddedSet,
    head: ViLUHead | None,
    threshold: float | None = None,
    outlier: Outlier | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Outside:
    """Compare the scores on images inside and outside a class set.

    Args:
        inside: images that show one of the classes. Its class set is the one that all scores read.
        outside: images that show none of them; its texts and labels are not read.
        head: the ViLU head; None: no row.
        threshold: failure probability below which an answer is accepted.
        outlier: the outlier score; None: no row.
        resamples, level, seed: of the bootstrap of the AUC.

    Raises:
        UserError: captions, or embeddings of another width.

    Reference: Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, for the energy.
    """
    if inside.captions:
        raise UserError(f"{inside.name}: captions have no class set that an image could be outside of")
    widths = [data.image.normalised.shape[1] for data in (inside, outside)]
    if widths[0] != widths[1]:
        raise UserError(f"{outside.name}: embeddings are {widths[1]} wide, those of {inside.name} are {widths[0]}")
    text = inside.text.normalised.float()
    found: dict[str, list[Floats]] = {}
    refused: list[Bools] = []
    for rows in torch.cat([inside.image.normalised.float(), outside.image.normalised.float()]).split(BLOCK):
        for name, value in _scores(rows, text, inside.logit_scale, head, outlier).items():
            found.setdefault(name, []).append(value.double().numpy())
        if outlier is not None and outlier.threshold is not None:
            refused.append(outlier.refuses(rows).numpy())
    is_inside = np.arange(len(inside) + len(outside)) < len(inside)
    kept: dict[str, Bools] = {}
    if "ViLU" in found and threshold is not None:
        kept["ViLU"] = 1 - np.concatenate(found["ViLU"]) < threshold
    if refused:
        kept["outlier score"] = ~np.concatenate(refused)
    table = []
    for name, parts in found.items():
        confidence = np.concatenate(parts)
        shares = _shares(kept[name], is_inside) if name in kept else (None, None)
        auc = bootstrap(auroc, confidence, is_inside, resamples=resamples, level=level, seed=seed)
        table.append(OutsideRow(name, auc, fpr_at_tpr(confidence, is_inside), *shares))
    both = _shares(kept["ViLU"] & kept["outlier score"], is_inside) if len(kept) == 2 else None
    return Outside(inside.name, outside.name, (len(inside), len(outside)), tuple(table), both)


@torch.no_grad()
def _scores(
    image: Tensor, text: Tensor, scale: float, head: ViLUHead | None, outlier: Outlier | None
) -> dict[str, Tensor]:
    """By method, the confidence (N,) that an image (N, D) shows one of the classes (K, D)."""
    logits = scale * image @ text.T
    found = {"MCM": torch.softmax(logits, dim=1).amax(dim=1), "energy": torch.logsumexp(logits, dim=1)}
    if head is not None:
        found["ViLU"] = 1 - head.failure_probability(image, text).double()
    if outlier is not None:
        found["outlier score"] = -outlier.score(image)
    return found


def _shares(kept: Bools, is_inside: Bools) -> tuple[float, float]:
    return float(kept[is_inside].mean()), float(kept[~is_inside].mean())
