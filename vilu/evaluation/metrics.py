"""How well a confidence tells right answers from wrong ones, and how honest P(failure) is.

All on NumPy arrays of one value a sample, success being the positive class. Two families:

* ranking, of a confidence (higher = more likely right): `auroc`, `fpr_at_tpr`, `aupr_error`, `aurc`,
  `risk_coverage`, `accuracy_at_coverage`; unchanged by any increasing transform of the confidence, by the
  order of the samples, and by how ties happen to be sorted;
* calibration, of a failure probability in [0, 1]: `ece`, `brier`, `reliability`.

Every function raises `UserError` (a ValueError) on arrays that are empty, of different lengths, not
one-dimensional, not finite, or on a `correct` that is neither bool nor 0/1. `auroc`, `fpr_at_tpr` and
`aupr_error` compare two classes and raise `OneSidedError` where one of them is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Metric = Callable[[Floats, Bools], float]


class OneSidedError(UserError):
    """Every answer is right, or every answer is wrong: nothing to rank."""


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the ROC curve: P(confidence of a right answer > of a wrong one), a tie counting 1/2.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Reference: Hendrycks & Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks", ICLR 2017.

    Example:
        >>> auroc([0.9, 0.8, 0.7, 0.6], [True, False, True, False])
        0.75
    """
    from sklearn.metrics import auc, roc_curve

    confidence, correct = check(confidence, correct, two_sided="AUROC")
    fprs, tprs, _ = roc_curve(correct, confidence)
    return float(auc(fprs, tprs))


def fpr_at_tpr(confidence: ArrayLike, correct: ArrayLike, tpr: float = 0.95) -> float:
    """Share of wrong answers still accepted where a share `tpr` of the right ones is: FPR95.

    The ROC's false positive rate interpolated linearly between its vertices, `np.interp(tpr, tprs, fprs)`;
    the FPR at the first threshold with TPR >= `tpr` is another number, by up to 0.05 on published tables.
    Where the curve is flat at exactly `tpr`, the rightmost point counts.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.
        tpr: true positive rate in (0, 1].

    Reference: ViLU (arXiv 2507.07620), section 4, as computed by the authors' code.

    Example:
        >>> fpr_at_tpr([0.9, 0.8, 0.7, 0.6], [True, False, True, False], tpr=0.75)
        0.5
    """
    from sklearn.metrics import roc_curve

    confidence, correct = check(confidence, correct, two_sided="FPR at TPR")
    if not 0 < tpr <= 1:
        raise UserError(f"tpr must be in (0, 1], got {tpr}")
    fprs, tprs, _ = roc_curve(correct, confidence)
    return float(np.interp(tpr, tprs, fprs))


def aupr_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Average precision with failure as the positive class, ranked by -confidence: AUPR-err.

    Σ_k (R_k − R_{k−1}) P_k over the distinct confidences from the lowest up. A ranking without information
    gives the failure rate, not 1/2.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Reference: Hendrycks & Gimpel, ICLR 2017; `sklearn.metrics.average_precision_score`.

    Example:
        >>> round(aupr_error([0.9, 0.8, 0.7, 0.6], [True, False, True, False]), 4)
        0.8333
    """
    from sklearn.metrics import average_precision_score

    confidence, correct = check(confidence, correct, two_sided="AUPR-err")
    return float(average_precision_score(~correct, -confidence))


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Error rate among the i most confident answers, for i = 1 .. N.

    coverage_i = i / N; risk_i = (expected number of failures among the first i) / i. Inside a group of
    ties the expectation is over its orders, so the curve does not depend on how they are sorted.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Returns:
        coverage (N,) and risk (N,).

    Reference: El-Yaniv & Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 2010.

    Example:
        >>> coverage, risk = risk_coverage([0.9, 0.5, 0.5], [True, True, False])
        >>> coverage.round(3).tolist(), risk.round(3).tolist()
        ([0.333, 0.667, 1.0], [0.0, 0.25, 0.333])
    """
    confidence, correct = check(confidence, correct)
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    failures = np.bincount(group, weights=~correct)
    accepted = np.arange(1, len(confidence) + 1)
    # Through the corners of the groups: linear between them is the mean over the orders of a tie.
    failed = np.interp(accepted, np.append(0, size.cumsum()), np.append(0, failures.cumsum()))
    return accepted / len(confidence), failed / accepted


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean of `risk_coverage`'s risks. Lower is better.

    0 where every answer is right, 1 where every answer is wrong.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Reference: Geifman, Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", ICLR 2019.

    Example:
        >>> round(aurc([0.9, 0.5, 0.5], [True, True, False]), 4)
        0.1944
    """
    return float(risk_coverage(confidence, correct)[1].mean())


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Share of right answers among the most confident ceil(coverage · N).

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.
        coverage: share of the answers that is kept, in (0, 1].

    Reference: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.

    Example:
        >>> accuracy_at_coverage([0.9, 0.8, 0.7, 0.6], [True, False, True, False], coverage=0.5)
        0.5
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage must be in (0, 1], got {coverage}")
    risk = risk_coverage(confidence, correct)[1]
    return float(1 - risk[kept(coverage, len(risk)) - 1])


def kept(coverage: float, samples: int) -> int:
    """ceil(coverage · samples), where 0.07 · 100 = 7.000000000000001 is meant as 7."""
    return max(1, int(np.ceil(round(coverage * samples, 9))))


def reliability(
    failure_probability: ArrayLike, correct: ArrayLike, bins: int = 15
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """The reliability diagram of P(failure): `bins` equal-width bins, [lower, upper), the last one closed.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.
        bins: how many.

    Returns:
        mean P(failure) (bins,), failure rate (bins,), both NaN in an empty bin, and samples (bins,).

    Example:
        >>> [column.tolist() for column in reliability([0.1, 0.3, 0.9], [True, False, False], bins=2)]
        [[0.2, 0.9], [0.5, 1.0], [2, 1]]
    """
    probability, correct = check_probability(failure_probability, correct)
    if bins < 1:
        raise UserError(f"bins must be at least 1, got {bins}")
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability, side="right")
    samples = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=probability, minlength=bins) / samples
        rate = np.bincount(place, weights=~correct, minlength=bins) / samples
    return mean, rate, samples


def ece(failure_probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of P(failure): Σ_b n_b / N · |failure rate_b − mean P(failure)_b|.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.
        bins: equal-width bins, as `reliability` draws them.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Example:
        >>> round(ece([0.1, 0.3, 0.9], [True, False, False], bins=2), 4)
        0.2333
    """
    mean, rate, samples = reliability(failure_probability, correct, bins)
    return float(np.nansum(np.abs(rate - mean) * samples) / samples.sum())


def brier(failure_probability: ArrayLike, correct: ArrayLike) -> float:
    """Mean of (P(failure) − [wrong])². Lower is better; 0.25 for a constant 1/2.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.

    Reference: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.

    Example:
        >>> round(brier([0.1, 0.3, 0.9], [True, False, False]), 4)
        0.17
    """
    probability, correct = check_probability(failure_probability, correct)
    return float(np.mean((probability - ~correct) ** 2))


@dataclass(frozen=True)
class Interval:
    """A metric on the whole sample and its bootstrap percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """metric(a) − metric(b) on the same samples, its interval, and a two-sided p-value of 'equal'."""

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
    """Percentile bootstrap over samples: draw N with replacement, `resamples` times.

    Args:
        metric: any function here, with its options bound (`partial(fpr_at_tpr, tpr=0.9)`); for `ece` and
            `brier` the second argument is the failure probability.
        confidence: (N,).
        correct: (N,) bool.
        resamples: draws; one in which the metric is one-sided is drawn again.
        level: share of the draws inside the interval, in (0, 1).
        seed: of the draws: the same seed gives the same interval.

    Reference: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Example:
        >>> bootstrap(brier, [0.5] * 8, [True, False] * 4)
        Interval(value=0.25, low=0.25, high=0.25)
    """
    confidence, correct = check(confidence, correct)
    value = metric(confidence, correct)
    draws = _draws((metric,), (confidence,), correct, resamples, level, seed)[:, 0]
    low, high = _percentiles(draws, level)
    return Interval(value, low, high)


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
    """Is metric(a) − metric(b) more than chance? Both are computed on the same draws of the samples.

    p = min(1, 2 · (1 + min(#{d ≤ 0}, #{d ≥ 0})) / (1 + resamples)) over the draws' differences d: never 0,
    so its resolution is 2 / (1 + resamples).

    Args:
        metric: as in `bootstrap`.
        confidence_a, confidence_b: (N,), two scores of the same answers.
        correct: (N,) bool.
        resamples, level, seed: as in `bootstrap`.

    Reference: Efron & Tibshirani 1993, chapter 15; the added one after Davison & Hinkley, "Bootstrap
    Methods and their Application", 1997, section 4.2.

    Example:
        >>> right = [True] * 20 + [False] * 20
        >>> paired_bootstrap(auroc, range(40, 0, -1), range(40), right, resamples=99).p_value
        0.02
    """
    a, correct = check(confidence_a, correct)
    b, _ = check(confidence_b, correct)
    draws = _draws((metric, metric), (a, b), correct, resamples, level, seed)
    difference = draws[:, 0] - draws[:, 1]
    low, high = _percentiles(difference, level)
    tail = 1 + min((difference <= 0).sum(), (difference >= 0).sum())
    return Comparison(
        difference=metric(a, correct) - metric(b, correct),
        low=low,
        high=high,
        p_value=float(min(1.0, 2 * tail / (1 + resamples))),
    )


def _draws(
    metrics: tuple[Metric, ...],
    confidences: tuple[Floats, ...],
    correct: Bools,
    resamples: int,
    level: float,
    seed: int,
) -> Floats:
    """metrics[i](confidences[i]) on each draw: (resamples, len(metrics)), all columns on the same draws."""
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise UserError(f"level must be in (0, 1), got {level}")
    for metric, confidence in zip(metrics, confidences, strict=True):
        metric(confidence, correct)  # what cannot be computed on the whole sample would be drawn for ever
    rng = np.random.default_rng(seed)
    # Sorted once: the metrics' own sort then meets sorted values, several times cheaper on 50,000 samples.
    orders = [np.argsort(confidence, kind="stable") for confidence in confidences]
    rows: list[list[float]] = []
    while len(rows) < resamples:
        times = np.bincount(rng.integers(len(correct), size=len(correct)), minlength=len(correct))
        picks = [np.repeat(order, times[order]) for order in orders]
        try:
            rows.append([m(c[p], correct[p]) for m, c, p in zip(metrics, confidences, picks, strict=True)])
        except OneSidedError:
            continue
    return np.array(rows)


def _percentiles(draws: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check(confidence: ArrayLike, correct: ArrayLike, two_sided: str = "") -> tuple[Floats, Bools]:
    """confidence as float64 (N,) and correct as bool (N,), or a UserError; OneSidedError for `two_sided`."""
    scores, right = np.asarray(confidence), np.asarray(correct)
    if scores.ndim != 1 or right.shape != scores.shape:
        raise UserError(f"confidence and correct must be one-dimensional, of one length: {scores.shape}, {right.shape}")
    if not len(scores):
        raise UserError("confidence and correct are empty")
    if scores.dtype.kind not in "fiub":
        raise UserError(f"confidence must be numbers, got dtype {scores.dtype}")
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(f"confidence holds {scores[at]} at index {at}")
    if right.dtype != bool:
        if right.dtype.kind not in "fiu" or not np.isin(right, (0, 1)).all():
            raise UserError("correct must be bool, or hold only 0 and 1")
        right = right.astype(bool)
    if two_sided and right.all():
        raise OneSidedError(f"{two_sided} is not defined: all {len(right)} answers are right")
    if two_sided and not right.any():
        raise OneSidedError(f"{two_sided} is not defined: all {len(right)} answers are wrong")
    return scores, right


def check_probability(failure_probability: ArrayLike, correct: ArrayLike) -> tuple[Floats, Bools]:
    """`check`, and every failure probability in [0, 1]."""
    probability, right = check(failure_probability, correct)
    outside = (probability < 0) | (probability > 1)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise UserError(f"failure probability {probability[at]} at index {at} is outside [0, 1]")
    return probability, right
