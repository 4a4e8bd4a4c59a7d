"""How the AUC of a head grows with the training data, beside MCM, which needs no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.bootstrap import Interval, metric_values, resampled_metrics
from vilu.evaluation.columns import INDEX
from vilu.evaluation.evaluate import Progress, confidences, correct, group_sizes, headline, one_line
from vilu.evaluation.metrics import Floats, OneSidedError, one_sided
from vilu.evaluation.results import LearningCurve, NeededImages, Point, too_few
from vilu.head import ViLUHead
from vilu.scores import MCM, ViLU

FARTHEST = 100  # an extrapolation beyond this many times the largest size is not reported
EXPONENTS = np.geomspace(0.05, 3, 400)  # candidates for the exponent c of the power law


def learning_curve(
    train: EmbeddedSet,
    test: EmbeddedSet,
    sizes: Sequence[int],
    seeds: Sequence[int],
    fit: Callable[[EmbeddedSet, int], ViLUHead],
    *,
    candidates: int | None = None,
    resamples: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearningCurve:
    """Train heads on growing parts of `train` and score the AUC of each on `test`.

    A seed puts the training images in an order, and a size takes the first of them, so the parts of one seed are
    nested. The mean difference from MCM is tested with a t-test: the square of its standard error is the variance
    between seeds over their number, plus the bootstrap variance of the mean over test images; the degrees of freedom
    are Satterthwaite's. With one seed the variance between seeds is not known and counts as 0.

    Args:
        train: the data whose parts are trained on.
        test: the data that is scored; captions in groups of `candidates`.
        sizes: numbers of training images, each in [1, len(train)].
        seeds: at least one.
        fit: (part of train, seed) to a trained head; where it raises a UserError, that seed is left out.
        candidates: number of captions in a group; None: the one that `evaluate` shows in its table.
        resamples: number of bootstrap resamples of the test images.
        seed: seed of the bootstrap.
        progress: called with (what is done now, steps done, steps in all).

    Raises:
        OneSidedError: CLIP is always right, or always wrong, on `test`.
        UserError: no sizes or seeds, or a size out of range.
    """
    sizes, seeds = sorted(set(sizes)), list(dict.fromkeys(seeds))
    if not sizes or not seeds:
        raise UserError(f"learning curve: {len(sizes)} sizes and {len(seeds)} seeds; both are needed")
    if sizes[0] < 1 or sizes[-1] > len(train):
        raise UserError(f"learning curve: sizes must lie in 1..{len(train)}, got {sizes[0]}..{sizes[-1]}")
    candidates = candidates or headline(group_sizes(test))
    right = correct(test, candidates)
    if one_sided(right):
        side = "right" if right.all() else "wrong"
        raise OneSidedError(
            f"{test.name}: all {len(right)} answers are {side}: AUC is not defined, so there is no learning curve"
        )
    found: dict[str, Floats] = confidences({"MCM": MCM()}, test, candidates)
    trained: dict[int, list[str]] = {size: [] for size in sizes}
    reasons: dict[int, str] = {}
    for i, (size, one) in enumerate((size, one) for size in sizes for one in seeds):
        if progress:
            progress(f"learning curve: {size} images, seed {one}", i, len(sizes) * len(seeds))
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(one))[:size]
        key = f"{size}/{one}"
        try:
            found |= confidences({key: ViLU(fit(train[rows], one))}, test, candidates)
            trained[size].append(key)
        except UserError as error:
            reasons[size] = one_line(error)
    resampled = resampled_metrics(
        found,
        {},
        right,
        resamples=resamples,
        seed=seed,
        progress=(lambda done, total: progress("learning curve: bootstrap", done, total)) if progress else None,
    )
    auc = INDEX["auc"]
    whole = {key: float(metric_values(confidence, None, right)[auc]) for key, confidence in found.items()}
    columns = {key: table[:, auc] for key, table in resampled.items()}
    low, high = np.quantile(columns["MCM"], [0.025, 0.975])
    mcm = Interval(whole["MCM"], float(low), float(high))
    points, errors = [], []
    few = too_few(int((~right).sum()), len(right))
    for size in sizes:
        keys = trained[size]
        point, spread = _point(size, keys, whole, columns, reasons.get(size, ""))
        if few:
            point = replace(point, p_value=None)
        points.append(point)
        if keys:
            errors.append(spread)
    parts = [[columns[key] for key in trained[size]] for size in sizes]
    needed, law = _needed_images(points, np.array(errors), whole["MCM"], parts, columns["MCM"], seed)
    if few:
        needed = NeededImages("unknown", f"cannot tell: {few} to test on, are too few")
    return LearningCurve(test.name, len(right), tuple(seeds), mcm, tuple(points), needed, law)


def fit_power_law(sizes: Floats, aucs: Floats, errors: Floats) -> Floats:
    """Fit AUC = a − b · size^−c with b ≥ 0 and a ≤ 1, by least squares weighted by 1 / errors².

    For each exponent c of a grid the rest is a linear fit; the best exponent is taken.

    Args:
        sizes: (S,) numbers of training images.
        aucs: (..., S) AUC at each size, in [0, 1].
        errors: (S,) standard errors of the AUCs.

    Returns:
        (..., 3): a, b and c.

    Reference: Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017; Rosenfeld et al., "A
    Constructive Prediction of the Generalization Error Across Scales", ICLR 2020 (the constant a).
    """
    weight = errors**-2.0 / np.sum(errors**-2.0)
    x = (sizes / sizes.max()) ** -EXPONENTS[:, None]  # (E, S)
    y = aucs[..., None, :]  # (..., 1, S)
    mean_x, mean_y = x @ weight, y @ weight
    centred = x - mean_x[:, None]
    b = np.maximum(-((y - mean_y[..., None]) * centred) @ weight / (centred**2 @ weight), 0)
    a = mean_y + b * mean_x
    # A curve whose limit is above 1 is held at 1 and its slope fitted again.
    above = a > 1
    b = np.where(above, np.maximum(((1 - y) * x) @ weight / (x**2 @ weight), 0), b)
    a = np.where(above, 1.0, a)
    loss = ((y - a[..., None] + b[..., None] * x) ** 2) @ weight
    best = loss.argmin(axis=-1)[..., None]
    a, b = (np.take_along_axis(part, best, axis=-1)[..., 0] for part in (a, b))
    c = EXPONENTS[best[..., 0]]
    return np.stack([a, b * sizes.max() ** c, c], axis=-1)


def crossing(law: Floats, target: Floats | float) -> Floats:
    """The size at which a − b · size^−c reaches `target`; infinite where it never does. `law` is (..., 3)."""
    a, b, c = np.moveaxis(np.asarray(law, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        size = np.exp(np.log(b / (a - target)) / c)
    return np.where(a > target, size, np.inf)


def _point(
    size: int, keys: list[str], whole: dict[str, float], columns: dict[str, Floats], reason: str
) -> tuple[Point, float]:
    """The point of one size, and the standard error of its difference from MCM."""
    from scipy.stats import t

    if not keys:
        return Point(size, (), reason=reason), math.nan
    aucs = np.array([whole[key] for key in keys])
    count, mean = len(aucs), float(aucs.mean())
    between = float(aucs.var(ddof=1)) / count if count > 1 else 0.0
    over_images = float(np.var(np.mean([columns[key] for key in keys], axis=0) - columns["MCM"]))
    error = math.sqrt(between + over_images)
    difference = mean - whole["MCM"]
    # Satterthwaite, the bootstrap's variance taken as known; no variance between seeds leaves the normal law.
    freedom = (count - 1) * (error**2 / between) ** 2 if between > 0 else math.inf
    p_value = float(2 * t.sf(abs(difference) / error, freedom)) if error > 0 else float(difference == 0)
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(between) if count > 1 else None
    return Point(
        size,
        tuple(aucs.tolist()),
        mean,
        None if half is None else mean - half,
        None if half is None else mean + half,
        difference,
        p_value,
        reason,
    ), error


def _needed_images(
    points: Sequence[Point],
    errors: Floats,
    mcm: float,
    resampled: Sequence[Sequence[Floats]],
    mcm_resampled: Floats,
    seed: int,
) -> tuple[NeededImages, tuple[float, float, float] | None]:
    """The answer, and the power law (a, b, c) where one could be fitted; `resampled`: AUCs (R,) by size and seed."""
    usable = [i for i, point in enumerate(points) if point.mean is not None]
    law = None
    floor = max(float(np.max(errors, initial=0.0)) * 1e-3, 1e-9)  # a size without any spread must not take all weight
    errors = np.maximum(errors, floor)
    sizes = np.array([points[i].size for i in usable], dtype=np.float64)
    if len(usable) >= 3:
        law = fit_power_law(sizes, np.array([points[i].mean for i in usable]), errors)
    power_law = None if law is None else (float(law[0]), float(law[1]), float(law[2]))
    reached = len(usable)
    while reached and points[usable[reached - 1]].better:
        reached -= 1
    if reached < len(usable):
        size = points[usable[reached]].size
        before = points[usable[reached - 1]].size if reached else 0
        text = f"significantly better than MCM from {size:,} training images" + (
            f" (not at {before:,})" if before else ""
        )
        return NeededImages("reached", text, size, before, size), power_law
    if law is None:
        return NeededImages("unknown", "cannot tell: heads could be trained at fewer than three sizes"), power_law
    # Better by what would be significant with the spread at the largest size.
    margin = 1.96 * float(errors[-1])
    means = _seed_means([resampled[i] for i in usable], np.random.default_rng(seed))
    largest = int(sizes[-1])
    estimate = float(crossing(law, mcm + margin))
    over = np.maximum(crossing(fit_power_law(sizes, means, errors), mcm_resampled + margin), largest)
    low, high = (float(q) for q in np.quantile(over, [0.025, 0.975], method="nearest"))
    if not estimate <= FARTHEST * largest or not np.median(over) <= FARTHEST * largest:
        return NeededImages(
            "unknown",
            f"cannot tell: not better at {largest:,} training images, and the curve does not rise above MCM within "
            f"{FARTHEST} times as many",
        ), power_law
    size = _rounded(max(estimate, largest))
    bounded = high <= FARTHEST * largest
    bounds = f"{_rounded(low):,} to {_rounded(high):,}" if bounded else f"at least {_rounded(low):,}"
    return NeededImages(
        "extrapolated",
        f"not yet at {largest:,}; by extrapolation about {size:,} training images ({bounds})",
        size,
        _rounded(low),
        _rounded(high) if bounded else None,
    ), power_law


def _seed_means(resampled: Sequence[Sequence[Floats]], rng: np.random.Generator) -> Floats:
    """(R, S): on each resample of the images, the mean over a resample of the seeds."""
    means = []
    for seeds in map(np.array, resampled):  # (n, R)
        count, resamples = seeds.shape
        picks = rng.integers(count, size=(count, resamples))
        means.append(np.take_along_axis(seeds, picks, axis=0).mean(axis=0))
    return np.stack(means, axis=1)


def _rounded(size: float) -> int:
    """Rounded to two digits: an extrapolation is no more precise."""
    scale = 10 ** max(0, math.floor(math.log10(size)) - 1)
    return round(size / scale) * scale
