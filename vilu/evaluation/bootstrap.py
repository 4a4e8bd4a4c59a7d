"""The bootstrap over samples: intervals and paired tests of the metrics.

There is one way to draw a resample (`_counts`), one interval (`interval`) and one p-value (`comparison`). There are two
ways to compute on the resamples:

* `bootstrap` and `paired_bootstrap` take any metric and call it on every resample (AUC and FPR95 as below, which is
  much faster);
* `resampled_metrics` gives all metrics of `columns.COLUMNS` for many scores on the same resamples, and sorts each score
  only once. A resample is a count for each sample (a multinomial); on a sorted score every ranking metric is a sum over
  cumulative counts, and ECE and Brier are matrix products with the counts. Its numbers are those of
  `vilu.evaluation.metrics` on the resampled samples.

The same seed draws the same resamples in both. Where a metric needs right and wrong answers, a resample that lacks one
kind is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError
from vilu.evaluation import metrics
from vilu.evaluation.columns import BINS, COLUMNS, COVERAGES, INDEX, TPR
from vilu.evaluation.metrics import Bools, Floats, Metric, OneSidedError, one_sided

BLOCK = 16  # resamples whose counts are held at once
ROUNDING = 1e-12  # metrics that differ by less are equal: their sums were only added in another order


@dataclass(frozen=True)
class Interval:
    """A metric on the whole sample, with its bootstrap percentile interval.

    value: the metric on the whole sample.
    low: lower end of the interval.
    high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The difference of a metric between two scores of the same samples.

    difference: metric(a) − metric(b) on the whole sample.
    low: lower end of its bootstrap percentile interval.
    high: upper end of the interval.
    p_value: two-sided p-value of the hypothesis that the metrics are equal.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap(
    metric: Metric,
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of one metric: draw N of the N samples with replacement, `resamples` times.

    Args:
        metric: a function of `vilu.evaluation.metrics`, with its options bound (`partial(fpr_at_tpr, tpr=0.9)`). For
            `ece` and `brier` the second argument here is the failure probability.
        confidence: (N,).
        correct: (N,) bool.
        resamples: number of resamples, at least 1.
        level: share of the resampled values inside the interval, in (0, 1).
        seed: seed of the random generator; the same seed gives the same interval.

    Raises:
        OneSidedError: the metric needs both right and wrong answers, and one kind is absent.
        UserError: an option out of range, or arrays that do not fit.

    Reference: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Example:
        >>> bootstrap(metrics.brier, [0.5] * 8, [True, False] * 4)
        Interval(value=0.25, low=0.25, high=0.25)
    """
    confidence, correct = metrics.check(confidence, correct)
    _check_level(level)
    value = metric(confidence, correct)
    resampled = _resampled((metric,), (confidence,), correct, resamples, seed)[:, 0]
    return Interval(value, *_percentiles(resampled, level))


def paired_bootstrap(
    metric: Metric,
    confidence_a: ArrayLike,
    confidence_b: ArrayLike,
    correct: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Test whether metric(a) − metric(b) is more than chance; both are computed on the same resamples.

    With d the difference on a resample, p = min(1, 2 · (1 + min(#{d ≤ 0}, #{d ≥ 0})) / (1 + resamples)). It is never
    0: the smallest p-value is 2 / (1 + resamples).

    Args:
        metric: as in `bootstrap`.
        confidence_a: (N,), the first score.
        confidence_b: (N,), the second score of the same answers.
        correct: (N,) bool.
        resamples: number of resamples, at least 1.
        level: share of the resampled differences inside the interval, in (0, 1).
        seed: seed of the random generator.

    Raises:
        OneSidedError: the metric needs both right and wrong answers, and one kind is absent.
        UserError: an option out of range, or arrays that do not fit.

    Reference: Efron & Tibshirani 1993, chapter 15; the added one after Davison & Hinkley, "Bootstrap
    Methods and their Application", 1997, section 4.2.

    Example:
        >>> right = [True] * 20 + [False] * 20
        >>> paired_bootstrap(metrics.auroc, range(40, 0, -1), range(40), right, resamples=99).p_value
        0.02
    """
    a, correct = metrics.check(confidence_a, correct)
    b, _ = metrics.check(confidence_b, correct)
    _check_level(level)
    difference = metric(a, correct) - metric(b, correct)
    resampled = _resampled((metric, metric), (a, b), correct, resamples, seed)
    resampled_difference = resampled[:, 0] - resampled[:, 1]
    return Comparison(difference, *_percentiles(resampled_difference, level), _p_value(resampled_difference))


def metric_values(confidence: Floats, probability: Floats | None, correct: Bools) -> Floats:
    """Every metric of COLUMNS on the whole sample, by `vilu.evaluation.metrics`.

    Args:
        confidence: (N,).
        probability: (N,) P(failure), or None for a score that gives none.
        correct: (N,) bool.

    Returns:
        (len(COLUMNS),), NaN where a metric is not defined.
    """
    row = []
    for column in COLUMNS:
        source = probability if column.probability else confidence
        undefined = source is None or (column.two_sided and one_sided(correct))
        row.append(float("nan") if source is None or undefined else column.function(source, correct))
    return np.array(row)


def resampled_metrics(
    confidences: Mapping[str, Floats],
    probabilities: Mapping[str, Floats],
    correct: Bools,
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """Every metric of COLUMNS for every score on the same resamples.

    Args:
        confidences: by score name, its confidence (N,).
        probabilities: by score name, its P(failure) (N,), for the scores that give one.
        correct: (N,) bool.
        resamples: number R of resamples.
        seed: seed of the random generator.
        progress: called with (resamples done, R).

    Returns:
        by score name, (R, len(COLUMNS)); a column is NaN throughout where its metric is not defined.

    Raises:
        UserError: lengths or values that `vilu.evaluation.metrics` refuses, or fewer than one resample.
    """
    _check_resamples(resamples)
    rankings, errors = {}, {}
    for name, confidence in confidences.items():
        checked, correct = metrics.check(confidence, correct)
        rankings[name] = _Ranking(checked, correct)
        if name in probabilities:
            probability, _ = metrics.check_probability(probabilities[name], correct)
            errors[name] = _errors(probability, correct)
    out = {name: np.full((resamples, len(COLUMNS)), np.nan) for name in rankings}
    ranked = [i for i, column in enumerate(COLUMNS) if not column.probability]
    undefined = [i for i, column in enumerate(COLUMNS) if column.two_sided and one_sided(correct)]
    for at, times in _count_blocks(correct, resamples, seed):
        for name, ranking in rankings.items():
            for i, row in enumerate(times):
                out[name][at + i, ranked] = ranking(row)
            out[name][at : at + len(times), undefined] = np.nan
            if name in errors:
                sums = times @ errors[name] / len(correct)
                out[name][at : at + len(times), INDEX["ece"]] = np.abs(sums[:, :-1]).sum(axis=1)
                out[name][at : at + len(times), INDEX["brier"]] = sums[:, -1]
        if progress:
            progress(at + len(times), resamples)
    return out


def interval(value: float, resampled: Floats, level: float) -> Interval | None:
    """The percentile interval of a metric from its values on the resamples (R,); None where it is not defined."""
    if np.isnan(value) or np.isnan(resampled).any():
        return None
    return Interval(float(value), *_percentiles(resampled, level))


def comparison(difference: float, resampled: Floats, level: float) -> Comparison | None:
    """As `interval`, for a difference of two metrics; with the p-value of `paired_bootstrap`."""
    found = interval(difference, resampled, level)
    if found is None:
        return None
    return Comparison(found.value, found.low, found.high, _p_value(resampled))


def _percentiles(resampled: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _p_value(differences: Floats) -> float:
    equal = np.abs(differences) < ROUNDING
    tail = 1 + min((equal | (differences < 0)).sum(), (equal | (differences > 0)).sum())
    return float(min(1.0, 2 * tail / (1 + len(differences))))


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level must be in (0, 1), got {level}")


def resample_counts(size: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """How often each of `size` samples is in a resample (size,), for one resample after another without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield np.bincount(rng.integers(size, size=size), minlength=size)


def _resampled(
    functions: tuple[Metric, ...], confidences: tuple[Floats, ...], correct: Bools, resamples: int, seed: int
) -> Floats:
    """functions[i](confidences[i]) on each resample: (resamples, len(functions)).

    The functions must be defined on the whole sample: what is not would be drawn again for ever.
    """
    _check_resamples(resamples)
    if all(function in (metrics.auroc, metrics.fpr_at_tpr) for function in functions):
        places = [0 if function is metrics.auroc else 1 for function in functions]
        rankings = [_Ranking(confidence, correct) for confidence in confidences]
        return np.array(
            [
                [ranking(times)[place] for ranking, place in zip(rankings, places, strict=True)]
                for _, block in _count_blocks(correct, resamples, seed)
                for times in block
            ]
        )
    # Sorted once: the metrics' own sort then meets sorted values, several times cheaper on 50,000 samples.
    orders = [np.argsort(confidence, kind="stable") for confidence in confidences]
    rows: list[list[float]] = []
    for times in resample_counts(len(correct), seed):
        picks = [np.repeat(order, times[order]) for order in orders]
        try:
            rows.append([f(c[p], correct[p]) for f, c, p in zip(functions, confidences, picks, strict=True)])
        except OneSidedError:
            continue
        if len(rows) == resamples:
            break
    return np.array(rows)


def _count_blocks(correct: Bools, resamples: int, seed: int) -> Iterator[tuple[int, Floats]]:
    """(number of the first resample, counts (up to BLOCK, N)) until there are `resamples`."""
    size, any_side = len(correct), one_sided(correct)
    drawn = (times for times in resample_counts(size, seed) if any_side or 0 < times @ correct < size)
    for at in range(0, resamples, BLOCK):
        block = np.empty((min(BLOCK, resamples - at), size))
        for row in block:
            row[:] = next(drawn)
        yield at, block


class _Ranking:
    """One score, sorted from the highest confidence down, its ties grouped.

    Every count is an integer in float64, so sums are exact and two scores of equal ranking get equal numbers.
    """

    def __init__(self, confidence: Floats, correct: Bools) -> None:
        size = len(confidence)
        self.order = np.argsort(-confidence, kind="stable")
        ordered = confidence[self.order]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self.ends = None if len(ends) == size else ends
        self.wrong = (~correct[self.order]).astype(np.float64)
        self.harmonic = np.append(0.0, (1 / np.arange(1, size + 1)).cumsum())
        self.kept = np.array([metrics.kept_samples(c, size) for c in COVERAGES], dtype=np.float64)
        groups = len(ends)
        # Counts through each group, of all and of the wrong, from 0 before the first.
        self.all, self.failed = np.zeros(groups + 1), np.zeros(groups + 1)

    def __call__(self, times: Floats) -> list[float]:
        """AUC, FPR95, AUPR-err, AURC, accuracies, as if sample i came times[i] times."""
        count, failed = self.all, self.failed
        weight = times[self.order]
        for total, weights in ((count, weight), (failed, weight * self.wrong)):
            if self.ends is None:
                np.cumsum(weights, out=total[1:])
            else:
                np.take(weights.cumsum(), self.ends, out=total[1:])
        right = count - failed
        rights, failures, size = right[-1], failed[-1], count[-1]
        wrong_here, here = np.diff(failed), np.diff(count)
        rate = wrong_here / np.maximum(here, 1)

        auc = fpr = aupr = float("nan")
        if rights and failures:
            auc = wrong_here @ (right[1:] + right[:-1]) / (2 * rights * failures)
            fpr = _interpolated_fpr(right, failed)
            below = np.maximum(size - count[:-1], 1)
            aupr = (wrong_here * (failures - failed[:-1])) @ (1 / below) / failures
        # Inside a group the i-th accepted has failed[g-1] + (i − count[g-1]) · rate failures before it; over i
        # this sums to the group's failures and a difference of harmonic numbers.
        places = self.harmonic[count.astype(np.intp)]
        aurc = (failures + (failed[:-1] - count[:-1] * rate) @ np.diff(places)) / size
        group = np.searchsorted(count, self.kept, side="left") - 1
        accuracies = 1 - (failed[group] + (self.kept - count[group]) * rate[group]) / self.kept
        return [auc, fpr, aupr, aurc, *accuracies]


def _interpolated_fpr(right: Floats, failed: Floats) -> float:
    """np.interp(TPR, right / rights, failed / failures), where a flat end counts at its rightmost point."""
    rights, failures = right[-1], failed[-1]
    # The largest count whose share is not above TPR, by the very division that `metrics` compares.
    most = np.floor(TPR * rights) + 1
    while most / rights > TPR:
        most -= 1
    at = np.searchsorted(right, most, side="right") - 1
    if at == len(right) - 1:
        return 1.0
    slope = (failed[at + 1] - failed[at]) / (right[at + 1] - right[at])
    return float((failed[at] + slope * (TPR * rights - right[at])) / failures)


def _errors(probability: Floats, correct: Bools) -> Floats:
    """(N, BINS + 1): wrong − P(failure) in its bin's column, and its square in the last.

    With counts w, ECE is Σ_b |Σ_i w_i column_b,i| / N and Brier Σ_i w_i square_i / N.
    """
    error = ~correct - probability
    out = np.zeros((len(error), BINS + 1))
    out[np.arange(len(error)), metrics.bin_index(probability, BINS)] = error
    out[:, -1] = error**2
    return out
