"""How a head's AUC grows with the training data, against MCM, which needs none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vilu.embeddings import EmbeddedSet
from vilu.errors import UserError
from vilu.evaluation.bootstrap import INDEX, draws, interval, one_sided, values
from vilu.evaluation.evaluate import confidences, correct, group_sizes, headline, one_line
from vilu.evaluation.metrics import Floats, Interval, OneSidedError
from vilu.head import ViLUHead
from vilu.scores import MCM, ViLU

SIGNIFICANCE = 0.05
FARTHEST = 100  # an extrapolation beyond this many times the largest size is not told
EXPONENTS = np.geomspace(0.05, 3, 400)


@dataclass(frozen=True)
class Point:
    """One training size.

    aucs: of the seeds that trained. mean, low, high: over seeds, a Student interval, low and high None for one
    seed. difference, p_value: of the mean from MCM, over both seeds and test images. reason: of failed seeds.
    """

    size: int
    aucs: tuple[float, ...]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    p_value: float | None = None
    reason: str = ""

    @property
    def better(self) -> bool:
        """Significantly better than MCM."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE and (self.difference or 0) > 0


@dataclass(frozen=True)
class Needed:
    """The size from which the head beats MCM.

    kind: "reached" (between low, the size before, and size), "extrapolated" (size, with a 95% interval whose
    high is None where the draws do not bound it), "unknown". text: the same in words.
    """

    kind: str
    text: str
    size: int | None = None
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class LearningCurve:
    """power_law: (a, b, c) of AUC ≈ a − b · size^−c, None where it was not fitted."""

    test: str
    samples: int
    seeds: tuple[int, ...]
    mcm: Interval
    points: tuple[Point, ...]
    needed: Needed
    power_law: tuple[float, float, float] | None = None


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
    progress: Callable[[str, int, int], None] | None = None,
) -> LearningCurve:
    """Train on growing parts of `train`, score each head's AUC on `test`.

    A seed orders the training images; a size takes the first of them, so a seed's parts are nested.
    Significance: the mean difference from MCM over its standard error, whose square is the variance between
    seeds over their number plus the bootstrap variance of the mean over test images; t with the degrees of
    freedom of Satterthwaite. With one seed the variance between seeds is not known and taken as 0.

    Args:
        train: what is cut. test: scored; captions in groups of `candidates` (None: as `evaluate`'s headline).
        sizes: in [1, len(train)]. seeds: at least one.
        fit: (part of train, seed) to a head; a UserError from it leaves that seed out.
        resamples, seed: of the bootstrap over test images.
        progress: called with (what, done, total).

    Raises:
        UserError: no sizes or seeds, a size out of range, or a one-sided test set.
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
        raise OneSidedError(f"{test.name}: all {len(right)} answers are {side}: no AUC, so no learning curve")
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
    drawn = draws(
        found,
        {},
        right,
        resamples=resamples,
        seed=seed,
        progress=(lambda done, total: progress("learning curve: bootstrap", done, total)) if progress else None,
    )
    auc = INDEX["auc"]
    whole = {key: float(values(confidence, None, right)[auc]) for key, confidence in found.items()}
    columns = {key: table[:, auc] for key, table in drawn.items()}
    mcm = interval(whole["MCM"], columns["MCM"], 0.95)
    assert mcm is not None
    points, errors = [], []
    for size in sizes:
        keys = trained[size]
        point, spread = _point(size, keys, whole, columns, reasons.get(size, ""))
        points.append(point)
        if keys:
            errors.append(spread)
    needed, law = _needed(
        points, np.array(errors), whole["MCM"], [[columns[k] for k in trained[s]] for s in sizes], columns["MCM"], seed
    )
    return LearningCurve(test.name, len(right), tuple(seeds), mcm, tuple(points), needed, law)


def fit_power_law(sizes: Floats, aucs: Floats, errors: Floats) -> Floats:
    """(a, b, c) of least squares, weighted by 1 / errors², in AUC = a − b · size^−c with b ≥ 0 and a ≤ 1.

    For each exponent of a grid the rest is linear; the best exponent is taken.

    Args:
        sizes: (S,). aucs: (..., S). errors: (S,), standard errors.

    Returns:
        (..., 3).

    Reference: Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017; Rosenfeld et al., "A
    Constructive Prediction of the Generalization Error Across Scales", ICLR 2020 (the constant).
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
    """The size at which a − b · size^−c reaches `target`, infinite where it never does; law (..., 3)."""
    a, b, c = np.moveaxis(np.asarray(law, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        size = np.exp(np.log(b / (a - target)) / c)
    return np.where(a > target, size, np.inf)


def _point(
    size: int, keys: list[str], whole: dict[str, float], columns: dict[str, Floats], reason: str
) -> tuple[Point, float]:
    """The point, and the standard error of its difference from MCM."""
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


def _needed(
    points: Sequence[Point],
    errors: Floats,
    mcm: float,
    drawn: Sequence[Sequence[Floats]],
    mcm_drawn: Floats,
    seed: int,
) -> tuple[Needed, tuple[float, float, float] | None]:
    usable = [i for i, point in enumerate(points) if point.mean is not None]
    law = None
    floor = max(float(np.max(errors, initial=0.0)) * 1e-3, 1e-9)  # a size without any spread must not take all weight
    errors = np.maximum(errors, floor)
    sizes = np.array([points[i].size for i in usable], dtype=np.float64)
    if len(usable) >= 3:
        law = fit_power_law(sizes, np.array([points[i].mean for i in usable]), errors)
    told = None if law is None else (float(law[0]), float(law[1]), float(law[2]))
    reached = len(usable)
    while reached and points[usable[reached - 1]].better:
        reached -= 1
    if reached < len(usable):
        size = points[usable[reached]].size
        before = points[usable[reached - 1]].size if reached else 0
        text = f"significantly better than MCM from {size:,} training images" + (
            f" (not at {before:,})" if before else ""
        )
        return Needed("reached", text, size, before, size), told
    if law is None:
        return Needed("unknown", "cannot tell: fewer than three sizes could be trained"), told
    # Better by what would be significant with the spread at the largest size.
    margin = 1.96 * float(errors[-1])
    resampled = _seed_means([drawn[i] for i in usable], np.random.default_rng(seed))
    largest = int(sizes[-1])
    estimate = float(crossing(law, mcm + margin))
    over = np.maximum(crossing(fit_power_law(sizes, resampled, errors), mcm_drawn + margin), largest)
    low, high = (float(q) for q in np.quantile(over, [0.025, 0.975], method="nearest"))
    if not estimate <= FARTHEST * largest or not np.median(over) <= FARTHEST * largest:
        return Needed(
            "unknown",
            f"cannot tell: not better at {largest:,} training images, and the curve does not lead above MCM within "
            f"{FARTHEST} times as many",
        ), told
    size = _rounded(max(estimate, largest))
    bounded = high <= FARTHEST * largest
    said = f"{_rounded(low):,} to {_rounded(high):,}" if bounded else f"at least {_rounded(low):,}"
    return Needed(
        "extrapolated",
        f"not yet at {largest:,}; by extrapolation about {size:,} training images ({said})",
        size,
        _rounded(low),
        _rounded(high) if bounded else None,
    ), told


def _seed_means(drawn: Sequence[Sequence[Floats]], rng: np.random.Generator) -> Floats:
    """(R, S): on each draw of the images, the mean over a draw of the seeds."""
    means = []
    for seeds in map(np.array, drawn):  # (n, R)
        count, resamples = seeds.shape
        picks = rng.integers(count, size=(count, resamples))
        means.append(np.take_along_axis(seeds, picks, axis=0).mean(axis=0))
    return np.stack(means, axis=1)


def _rounded(size: float) -> int:
    """To two figures: an extrapolation has no more."""
    scale = 10 ** max(0, math.floor(math.log10(size)) - 1)
    return round(size / scale) * scale
