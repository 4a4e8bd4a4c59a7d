"""Accuracy against cost: cascades that a doubt steers, and each of their models alone, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vilu.errors import UserError
from vilu.evaluation.bootstrap import Comparison, Interval, comparison, interval, resample_counts
from vilu.evaluation.cascade import Stage, answered_by, reached
from vilu.evaluation.metrics import Floats

OURS = "P(failure)"
METHODS = {
    OURS: "An image goes on where the head's P(failure) is above the threshold.",
    "MCM": "An image goes on where 1 − max p is above the threshold; p are CLIP's probabilities.",
    "Entropy": "An image goes on where the normalised entropy of CLIP's probabilities is above the threshold.",
    "random": "An image goes on where a random number is above the threshold.",
}
SHARES = 100  # steps of the share that goes beyond stage 1
ALL = -1.0  # a threshold that every doubt is above
BLOCK = 16  # resamples whose counts are held at once


@dataclass(frozen=True)
class Cost:
    """The cost of one image, in multiply-adds of the image towers and in measured milliseconds."""

    multiply_adds: float
    milliseconds: float


@dataclass(frozen=True)
class Alone:
    """One model that answers every image.

    name: name of the model.
    accuracy: share of right answers.
    cost: of one image.
    """

    name: str
    accuracy: Interval
    cost: Cost


@dataclass(frozen=True)
class Point:
    """A cascade at one threshold.

    threshold: an answer goes on where its doubt > threshold; ALL sends every image to the last stage.
    reached: share of the images that reach each stage; the first is 1.
    accuracy: share of right answers.
    cost: mean cost of an image.
    """

    threshold: float
    reached: tuple[float, ...]
    accuracy: Interval
    cost: Cost


@dataclass(frozen=True)
class Line:
    """A cascade at many thresholds.

    method: key of METHODS, the doubt that steers it.
    points: from the threshold that asks the last stage least to the one that asks it always.
    cheapest: the point of least cost whose accuracy is at most the margin below the last stage alone.
    share: its multiply-adds, a share of those of the last stage alone; each resample chooses its own point.
    against: the share of P(failure) minus this one, on the same resamples; None for P(failure) itself.
    """

    method: str
    points: tuple[Point, ...]
    cheapest: Point
    share: Interval
    against: Comparison | None


@dataclass(frozen=True)
class CascadeCurve:
    """Accuracy against cost on one data set.

    name: name of the data set.
    samples: number N of images.
    margin: accuracy that `Line.cheapest` may lose against the last stage alone, a fraction.
    alone: one a stage.
    lines: one a doubt.
    resamples, level, seed: of the bootstrap.
    """

    name: str
    samples: int
    margin: float
    alone: tuple[Alone, ...]
    lines: tuple[Line, ...]
    resamples: int
    level: float
    seed: int


def cascade_curve(
    name: str,
    models: Sequence[str],
    by_method: Mapping[str, Sequence[Stage]],
    costs: Sequence[Cost],
    *,
    margin: float = 0.005,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CascadeCurve:
    """Compare cascades over the same models, and each model alone, on the same images.

    The thresholds of a doubt are those that send 0%, 1%, ... 100% of the images beyond stage 1. The p-value of
    `Line.against` is that of `bootstrap.paired_bootstrap`: the hypothesis is that the cheapest thresholds within the
    margin cost the same. These thresholds are chosen on the images that they are judged on, for every doubt alike;
    `cascade.within_margin` is the one to promise with.

    Args:
        name: name of the data set.
        models: name of each stage's model, the smallest first.
        by_method: by key of METHODS, the stages with this doubt; they share their answers.
        costs: cost of one image at each stage.
        margin: in [0, 1).
        resamples: number of bootstrap resamples, at least 1.
        level: level of the intervals, in (0, 1).
        seed: seed of the bootstrap.
        progress: called with (resamples done, resamples).

    Raises:
        UserError: fewer than two stages, stages of different samples, or an option out of range.
    """
    first = next(iter(by_method.values()))
    if len(first) < 2:
        raise UserError(f"a cascade needs at least two stages, got {len(first)}")
    if any(len(stage.doubt) != len(first[0].doubt) for stages in by_method.values() for stage in stages):
        raise UserError("the stages of a cascade need the same samples")
    if not 0 <= margin < 1:
        raise UserError(f"the margin must be in [0, 1), got {margin}")
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    size = len(first[0].doubt)
    right = np.stack([stage.correct for stage in first], axis=1).astype(np.float64)
    thresholds = {method: _thresholds(stages[0].doubt) for method, stages in by_method.items()}
    answers = {
        method: np.stack([answered_by(stages, threshold) for threshold in thresholds[method]], axis=1)
        for method, stages in by_method.items()
    }
    # The whole sample is the first row; the resamples follow. Counts of right answers are integers, so they are exact.
    alone = np.empty((resamples + 1, len(first)))
    accuracy = {method: np.empty((resamples + 1, found.shape[1])) for method, found in answers.items()}
    spent = {method: np.empty((resamples + 1, found.shape[1])) for method, found in answers.items()}
    total = np.cumsum([cost.multiply_adds for cost in costs])
    cells = {method: (np.take_along_axis(right, found, axis=1), total[found]) for method, found in answers.items()}
    draws = resample_counts(size, seed)
    for at in range(0, resamples + 1, BLOCK):
        rows = slice(at, min(at + BLOCK, resamples + 1))
        times = np.stack([np.ones(size) if row == 0 else next(draws) for row in range(rows.start, rows.stop)])
        alone[rows] = times @ right / size
        for method, (correct, cost) in cells.items():
            accuracy[method][rows], spent[method][rows] = times @ correct / size, times @ cost / size
        progress(rows.stop - 1, resamples)

    def described(values: Floats) -> Interval:
        found = interval(values[0], values[1:], level)
        assert found is not None  # an accuracy and a cost are always defined
        return found

    def points(method: str) -> tuple[Point, ...]:
        return tuple(
            Point(float(threshold), shares, described(accuracy[method][:, place]), _mean(costs, shares))
            for place, threshold in enumerate(thresholds[method])
            for shares in [reached(by_method[method], threshold)]
        )

    enough = {method: found >= alone[:, -1:] - margin for method, found in accuracy.items()}
    cheapest = {method: np.where(enough[method], spent[method], np.inf) for method in spent}
    shares = {method: found.min(axis=1) / costs[-1].multiply_adds for method, found in cheapest.items()}
    lines = []
    for method in by_method:
        drawn = points(method)
        difference = shares[OURS] - shares[method] if method != OURS and OURS in shares else None
        against = None if difference is None else comparison(difference[0], difference[1:], level)
        best = drawn[int(cheapest[method][0].argmin())]
        lines.append(Line(method, drawn, best, described(shares[method]), against))
    singles = zip(models, alone.T, costs, strict=True)
    stages = tuple(Alone(model, described(values), cost) for model, values, cost in singles)
    return CascadeCurve(name, size, margin, stages, tuple(lines), resamples, level, seed)


def _thresholds(doubt: Floats) -> Floats:
    """Thresholds, from the highest down, that send k% of the samples on, where ties allow it; the last sends all."""
    ordered = np.sort(doubt)[::-1]
    places = np.unique(np.round(np.linspace(0, 1, SHARES + 1) * len(doubt)).astype(int))
    kept = np.unique(ordered[places[places < len(doubt)]])[::-1]
    return np.append(kept, ALL)


def _mean(costs: Sequence[Cost], shares: Sequence[float]) -> Cost:
    """The mean cost of an image where these shares of the images reach each stage."""
    pairs = list(zip(costs, shares, strict=True))
    return Cost(
        sum(share * cost.multiply_adds for cost, share in pairs),
        sum(share * cost.milliseconds for cost, share in pairs),
    )
