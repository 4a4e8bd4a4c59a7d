"""The metrics of many scores on the same bootstrap draws, each score sorted once.

A draw is a count per sample (a multinomial); on a sorted score every ranking metric is a sum over cumulative
counts, and ECE and Brier are matrix products with the counts. The numbers are those of `vilu.evaluation.metrics` on the
drawn samples, and the draws those of `vilu.evaluation.metrics.bootstrap` with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from vilu.errors import UserError
from vilu.evaluation import metrics
from vilu.evaluation.metrics import Bools, Comparison, Floats, Interval, Metric

COVERAGES = (0.8, 0.9, 0.95)
TPR, BINS = 0.95, 15
BLOCK = 16  # draws whose counts are held at once


@dataclass(frozen=True)
class Column:
    """A metric as tables show it.

    higher: whether higher is better. two_sided: undefined where every answer is right or every one wrong.
    probability: computed on P(failure), so only for scores whose output is one.
    """

    key: str
    title: str
    higher: bool
    definition: str
    function: Metric
    two_sided: bool = False
    probability: bool = False


COLUMNS = (
    Column(
        "auc",
        "AUC",
        True,
        "Area under the ROC curve: the chance that a right answer has more confidence than a wrong one, ties 1/2.",
        metrics.auroc,
        two_sided=True,
    ),
    Column(
        "fpr95",
        "FPR95",
        False,
        "Share of wrong answers accepted where 95% of the right ones are; the ROC interpolated linearly.",
        metrics.fpr_at_tpr,
        two_sided=True,
    ),
    Column(
        "aupr_error",
        "AUPR-err",
        True,
        "Average precision of finding the wrong answers by low confidence. Chance gives the failure rate.",
        metrics.aupr_error,
        two_sided=True,
    ),
    Column(
        "aurc",
        "AURC",
        False,
        "Area under the risk-coverage curve: the error rate among the most confident answers, mean over all coverages.",
        metrics.aurc,
    ),
    Column(
        "ece",
        "ECE",
        False,
        f"Expected calibration error of P(failure): mean gap to the rate found, in {BINS} bins of equal width.",
        partial(metrics.ece, bins=BINS),
        probability=True,
    ),
    Column(
        "brier",
        "Brier",
        False,
        "Mean squared difference between P(failure) and the outcome.",
        metrics.brier,
        probability=True,
    ),
    *(
        Column(
            f"accuracy_at_{c * 100:.0f}",
            f"Acc@{c * 100:.0f}",
            True,
            f"Share of right answers among the {c:.0%} most confident.",
            partial(metrics.accuracy_at_coverage, coverage=c),
        )
        for c in COVERAGES
    ),
)
INDEX = {column.key: i for i, column in enumerate(COLUMNS)}


def values(confidence: Floats, probability: Floats | None, correct: Bools) -> Floats:
    """Every column on the whole sample (len(COLUMNS),), by `vilu.evaluation.metrics`; NaN where one is not defined.

    Args:
        confidence: (N,). probability: (N,), P(failure), or None. correct: (N,) bool.
    """
    row = []
    for column in COLUMNS:
        source = probability if column.probability else confidence
        undefined = source is None or (column.two_sided and one_sided(correct))
        row.append(float("nan") if undefined else column.function(source, correct))  # type: ignore[arg-type]
    return np.array(row)


def draws(
    confidences: Mapping[str, Floats],
    probabilities: Mapping[str, Floats],
    correct: Bools,
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """Every column of every score on the same draws.

    A draw that is one-sided although the sample is not is drawn again.

    Args:
        confidences: name to (N,) confidence.
        probabilities: name to (N,) P(failure), for the scores that state one.
        correct: (N,) bool.
        resamples: R.
        seed: of the draws.
        progress: called with (draws done, draws in all).

    Returns:
        name to (R, len(COLUMNS)); NaN throughout a column that is not defined.

    Raises:
        UserError: lengths or values that `vilu.evaluation.metrics` refuses, or resamples below 1.
    """
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
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
    for at, times in _counts(correct, resamples, seed):
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


def one_sided(correct: Bools) -> bool:
    """Whether every answer is right or every one is wrong."""
    return bool(correct.all() or not correct.any())


def interval(value: float, drawn: Floats, level: float) -> Interval | None:
    """The percentile interval of one column (R,); None where the column is not defined."""
    if np.isnan(value) or np.isnan(drawn).any():
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def comparison(difference: float, drawn: Floats, level: float) -> Comparison | None:
    """The interval and two-sided p-value of a difference from its draws (R,), as `metrics.paired_bootstrap` has it."""
    found = interval(difference, drawn, level)
    if found is None:
        return None
    tail = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Comparison(found.value, found.low, found.high, float(min(1.0, 2 * tail / (1 + len(drawn)))))


def _counts(correct: Bools, resamples: int, seed: int) -> Iterator[tuple[int, Floats]]:
    """(first draw's number, counts (up to BLOCK, N)) until there are `resamples`."""
    rng = np.random.default_rng(seed)
    size, any_draw = len(correct), one_sided(correct)
    for at in range(0, resamples, BLOCK):
        times = np.empty((min(BLOCK, resamples - at), size))
        for row in times:
            while True:
                row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
                if any_draw or 0 < row @ correct < size:
                    break
        yield at, times


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
        self.kept = np.array([metrics.kept(c, size) for c in COVERAGES], dtype=np.float64)
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
    # The bins of metrics.reliability.
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probability, side="right")
    out = np.zeros((len(error), BINS + 1))
    out[np.arange(len(error)), place] = error
    out[:, -1] = error**2
    return out
