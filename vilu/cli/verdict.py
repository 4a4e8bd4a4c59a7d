"""What `vilu train` says: how often CLIP is right, whether the head helps, and how many images it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import ClipSpec
    from vilu.embeddings import EmbeddedSet
    from vilu.evaluation.chance import Accuracy
    from vilu.recipes import Recipe
    from vilu.train import Validation


def name_of_clip(spec: ClipSpec | None, train: EmbeddedSet) -> str:
    """Return what messages call the CLIP that embedded the training data."""
    if spec is None:
        return f"the CLIP of {train.name}"
    return f"CLIP {spec.name}{f' ({spec.pretrained})' if spec.pretrained else ''}"


def clip_accuracy_on(train: EmbeddedSet, recipe: Recipe) -> Accuracy:
    """Return CLIP's accuracy on the training data. Captions are ranked in groups as large as a batch."""
    from vilu.evaluation.chance import accuracy
    from vilu.evaluation.evaluate import correct

    group = min(recipe.batch_size, len(train)) if train.captions else len(train.text)
    right = correct(train, group if train.captions else None)
    return accuracy(right, None if train.labels is None else train.labels.numpy(), group)


def verdict_word(validation: Validation | None) -> str | None:
    """Return the verdict as one word; None without a validation."""
    if validation is None:
        return None
    if validation.too_few:
        return "too few to say"
    return "better" if validation.better else "worse" if validation.worse else "not better"


def verdict(validation: Validation | None) -> str:
    """Say in words whether the head is better than MCM on the validation data."""
    if validation is None:
        return "validation: none, or CLIP is always right or always wrong on it: it cannot say whether this head helps"
    v = validation
    p_value = "" if v.too_few else f", p = {v.p_value:.3f}"  # of a handful it would be far too small
    line = (
        f"validation, {v.samples} images, {v.failures} failures: AUC {v.auc:.1%} (MCM {v.mcm_auc:.1%}{p_value}), "
        f"FPR95 {v.fpr95:.1%} (MCM {v.mcm_fpr95:.1%})"
    )
    if v.better:
        return line
    if v.too_few:
        rarer = "failures" if v.failures * 2 <= v.samples else "right answers"
        return f"{line}\nthere are too few {rarer} to say whether this head is better than the free MCM score"
    word = "significantly WORSE" if v.worse else "not significantly better"
    return (
        f"{line}\nthis head is {word} than the free MCM score here: train on more images "
        "(`vilu eval --learning-curve` shows how much they help)"
    )


CURVE_SHARES = (0.175, 0.35, 0.7)  # shares of the data that heads are trained on; the rest tests them


def images_needed(train: EmbeddedSet, recipe: Recipe, progress: Callable[[str, int, int], None]) -> str:
    """Say in words how many training images a head of this recipe needs to beat MCM."""
    import torch

    from vilu.evaluation.learning_curve import learning_curve
    from vilu.train import fit

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
    sizes = [int(share * len(train)) for share in CURVE_SHARES]
    try:
        curve = learning_curve(
            train[order[: sizes[-1]]],
            train[order[sizes[-1] :]],
            sizes,
            [recipe.seed],
            lambda part, seed: fit(part, replace(recipe, seed=seed)).head,
            progress=progress,
        )
    except UserError as error:
        return f"cannot tell: {error}"
    return curve.needed.text
