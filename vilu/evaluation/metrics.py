"""Metrics of a failure predictor: how well a confidence ranks right answers above wrong ones, and how well calibrated
P(failure) is.

All functions take NumPy arrays with one value a sample; success is the positive class. There are two families:

* ranking metrics of a confidence (higher = more likely right): `auroc`, `fpr_at_tpr`, `aupr_error`, `aurc`,
  `risk_coverage`, `accuracy_at_coverage`. No increasing transform of the confidence changes them, nor does the order
  of the samples, nor the way ties happen to be sorted;
* calibration metrics of a failure probability in [0, 1]: `ece`, `brier`, `reliability`.

All values are fractions, not percentages. Every function raises `UserError` (a ValueError) for arrays that are empty,
of different lengths, not one-dimensional or not finite, and for a `correct` that is neither bool nor 0/1. `auroc`,
`fpr_at_tpr` and `aupr_error` compare two classes and raise `OneSidedError` where one class is absent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Metric = Callable[[Floats, Bools], float]  # (confidence or P(failure), correct) to a value


class OneSidedError(UserError):
    """Every answer is right, or every answer is wrong, so there is nothing to rank."""


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the ROC curve, in [0, 1]: the probability that a right answer has more confidence than a wrong one.

    A tie counts 1/2. Higher is better; a confidence without information gives 1/2.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Raises:
        OneSidedError: every answer is right, or every answer is wrong.
        UserError: arrays that do not fit (see the top of this module).

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
    """False positive rate at a true positive rate, in [0, 1]; FPR95 at the default. Lower is better.

    This is the share of the wrong answers that are accepted where a share `tpr` of the right answers is accepted.
    The ROC curve is interpolated linearly between its vertices, `np.interp(tpr, tprs, fprs)`. The FPR at the first
    threshold with TPR >= `tpr` is another number, by up to 0.05 on published tables. Where the curve is flat at
    exactly `tpr`, its rightmost point counts.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.
        tpr: true positive rate in (0, 1].

    Raises:
        OneSidedError: every answer is right, or every answer is wrong.
        UserError: a `tpr` out of range, or arrays that do not fit (see the top of this module).

    Reference: ViLU (arXiv 2507.07620), section 4, computed as in the authors' code (github.com/ykrmm/ViLU).

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
    """Average precision with failure as the positive class, ranked by -confidence: AUPR-err, in [0, 1].

    The sum Σ_k (R_k − R_{k−1}) P_k runs over the distinct confidences from the lowest up, with recall R and
    precision P. Higher is better; a confidence without information gives the failure rate, not 1/2.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Raises:
        OneSidedError: every answer is right, or every answer is wrong.
        UserError: arrays that do not fit (see the top of this module).

    Reference: Hendrycks & Gimpel, ICLR 2017; `sklearn.metrics.average_precision_score`.

    Example:
        >>> round(aupr_error([0.9, 0.8, 0.7, 0.6], [True, False, True, False]), 4)
        0.8333
    """
    from sklearn.metrics import average_precision_score

    confidence, correct = check(confidence, correct, two_sided="AUPR-err")
    return float(average_precision_score(~correct, -confidence))


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """The risk-coverage curve: the error rate among the i most confident answers, for i = 1 .. N.

    coverage_i = i / N, and risk_i = (expected number of failures among the first i) / i. Inside a group of ties the
    expectation is over all their orders, so the curve does not depend on how ties are sorted.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Returns:
        coverage (N,) and risk (N,), both fractions.

    Raises:
        UserError: arrays that do not fit (see the top of this module).

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
    """Area under the risk-coverage curve: the mean of the risks of `risk_coverage`, in [0, 1]. Lower is better.

    It is 0 where every answer is right and 1 where every answer is wrong.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.

    Raises:
        UserError: arrays that do not fit (see the top of this module).

    Reference: Geifman, Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers", ICLR 2019.

    Example:
        >>> round(aurc([0.9, 0.5, 0.5], [True, True, False]), 4)
        0.1944
    """
    return float(risk_coverage(confidence, correct)[1].mean())


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Share of right answers among the most confident ceil(coverage · N) answers, in [0, 1]. Higher is better.

    Args:
        confidence: (N,), higher = more likely right.
        correct: (N,) bool.
        coverage: share of the answers that is kept, in (0, 1].

    Raises:
        UserError: a `coverage` out of range, or arrays that do not fit (see the top of this module).

    Reference: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.

    Example:
        >>> accuracy_at_coverage([0.9, 0.8, 0.7, 0.6], [True, False, True, False], coverage=0.5)
        0.5
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage must be in (0, 1], got {coverage}")
    risk = risk_coverage(confidence, correct)[1]
    return float(1 - risk[kept_samples(coverage, len(risk)) - 1])


def kept_samples(coverage: float, samples: int) -> int:
    """How many samples a coverage keeps: ceil(coverage · samples), where 0.07 · 100 = 7.000000000000001 counts as 7."""
    return max(1, int(np.ceil(round(coverage * samples, 9))))


def reliability(
    failure_probability: ArrayLike, correct: ArrayLike, bins: int = 15
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """The reliability diagram of P(failure), over bins of equal width; a bin is [lower, upper), the last one closed.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.
        bins: number of bins.

    Returns:
        the mean P(failure) of each bin (bins,), its failure rate (bins,), both NaN in an empty bin, and its number
        of samples (bins,).

    Raises:
        UserError: fewer than one bin, a probability outside [0, 1], or arrays that do not fit.

    Example:
        >>> [column.tolist() for column in reliability([0.1, 0.3, 0.9], [True, False, False], bins=2)]
        [[0.2, 0.9], [0.5, 1.0], [2, 1]]
    """
    probability, correct = check_probability(failure_probability, correct)
    if bins < 1:
        raise UserError(f"bins must be at least 1, got {bins}")
    place = bin_index(probability, bins)
    samples = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=probability, minlength=bins) / samples
        rate = np.bincount(place, weights=~correct, minlength=bins) / samples
    return mean, rate, samples


def bin_index(probability: Floats, bins: int) -> NDArray[np.intp]:
    """The bin of `reliability` that each probability (N,) falls into, from 0 to bins − 1."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability, side="right")


def ece(failure_probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of P(failure): Σ_b n_b / N · |failure rate_b − mean P(failure)_b|. Lower is better.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.
        bins: number of bins of equal width, as in `reliability`.

    Raises:
        UserError: fewer than one bin, a probability outside [0, 1], or arrays that do not fit.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.

    Example:
        >>> round(ece([0.1, 0.3, 0.9], [True, False, False], bins=2), 4)
        0.2333
    """
    mean, rate, samples = reliability(failure_probability, correct, bins)
    return float(np.nansum(np.abs(rate - mean) * samples) / samples.sum())


def brier(failure_probability: ArrayLike, correct: ArrayLike) -> float:
    """Brier score: the mean of (P(failure) − [wrong])², in [0, 1]. Lower is better; a constant 1/2 gives 0.25.

    Args:
        failure_probability: (N,) in [0, 1].
        correct: (N,) bool.

    Raises:
        UserError: a probability outside [0, 1], or arrays that do not fit.

    Reference: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.

    Example:
        >>> round(brier([0.1, 0.3, 0.9], [True, False, False]), 4)
        0.17
    """
    probability, correct = check_probability(failure_probability, correct)
    return float(np.mean((probability - ~correct) ** 2))


def one_sided(correct: Bools) -> bool:
    """Whether every answer is right or every answer is wrong."""
    return bool(correct.all() or not correct.any())


def check(confidence: ArrayLike, correct: ArrayLike, two_sided: str = "") -> tuple[Floats, Bools]:
    """Check the arguments of a metric.

    Args:
        confidence: (N,) numbers.
        correct: (N,) bool, or numbers that are 0 or 1.
        two_sided: name of a metric that needs both right and wrong answers; "" for any other metric.

    Returns:
        confidence as float64 (N,) and correct as bool (N,).

    Raises:
        OneSidedError: `two_sided` is given, and every answer is right or every answer is wrong.
        UserError: arrays that do not fit.
    """
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
    """As `check`; also raises UserError where a failure probability is outside [0, 1]."""
    probability, right = check(failure_probability, correct)
    outside = (probability < 0) | (probability > 1)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise UserError(f"failure probability {probability[at]} at index {at} is outside [0, 1]")
    return probability, right
