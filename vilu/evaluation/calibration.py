"""Choice of a threshold on P(failure), one of them with a guarantee, and calibration of P(failure), from held-out data.

An answer is accepted when failure_probability < threshold. Every threshold here is a float32 value in [0, 1] and is
chosen with the probabilities rounded to float32, so that a server that compares in float32 accepts exactly the same
samples. Held-out data are used neither to train the head nor to calibrate it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import FailedError, UserError
from vilu.evaluation.metrics import Bools, Floats, OneSidedError, check_probability, kept_samples

if TYPE_CHECKING:
    from vilu.head import ViLUHead

# guaranteed_risk chooses from these thresholds: P(failure) at every 1/16 of a logit from −16 to 12, and 1. The
# guarantee needs them fixed before any data are seen, and also those that begin with a share of the level: for each
# (a, share) in NEAR the first one from logit(target) + a up, and with equal shares of the rest STARTS.
LOGITS = np.arange(-16, 12 + 1 / 32, 1 / 16)
GRID = np.append(1 / (1 + np.exp(-LOGITS)), 1.0).astype(np.float32).astype(np.float64)
STARTS = np.append(np.isin(LOGITS, range(-8, 5)), False)
NEAR = ((0.0, 0.5), (0.75, 0.3))
MORE = (2, 4, 8, 16)  # outlook looks at so many times the data


@dataclass(frozen=True)
class Threshold:
    """A threshold, the rule that chose it, and its effect on the data it was chosen on.

    rule: "risk", "coverage" or "tpr"; "observed" in an `Outlook`.
    target: the value of the rule that was asked for, a fraction.
    threshold: an answer is accepted where failure_probability < threshold.
    coverage: share of the samples that is accepted.
    risk: share of wrong answers among the accepted ones.
    tpr: share of the right answers that is accepted; 1 where no answer is right.
    samples: number of samples.
    failures: number of wrong answers.
    confidence: confidence of the guarantee; None for a rule without a guarantee.
    bound: upper bound on the risk, exact (binomial), at most the target; None for a rule without a guarantee.
    """

    rule: str
    target: float
    threshold: float
    coverage: float
    risk: float
    tpr: float
    samples: int
    failures: int
    confidence: float | None = None
    bound: float | None = None


class TargetNotMetError(FailedError):
    """The target cannot be met on this data.

    attainable: the nearest target that can be met; None where there is none.
    """

    def __init__(self, message: str, attainable: float | None) -> None:
        super().__init__(message)
        self.attainable = attainable


def guaranteed_risk(
    failure_probability: ArrayLike, correct: ArrayLike, target_risk: float, confidence: float = 0.95
) -> Threshold:
    """A threshold that keeps the risk on new data at most `target_risk`, with probability `confidence`.

    The guarantee: over the draw of the N samples, P(risk on new data from the same source > target_risk) is at most
    1 − confidence, whatever the head and the data.

    The method: for each θ of a grid fixed in advance (`GRID`), with n accepted samples and e failures among them, the
    hypothesis "risk(θ) > target_risk" has the exact p-value P(Binomial(n, target_risk) ≤ e). The hypotheses are tested
    from the lowest θ up by the fallback procedure. The first θ from `target_risk` up begins with half of
    1 − confidence: with a good P(failure), the answers below it meet the target. The θ that is 0.75 higher in its logit
    begins with 0.3 of it, since a loss that weights the failures puts P(failure) about so much too high. Thirteen
    others (`STARTS`) share the rest. A rejected hypothesis hands its whole level to the next one, so the level grows
    along a run of rejections. The probability of any false rejection stays at most
    1 − confidence, however the tests depend on each other. The highest rejected θ is returned, which has the largest
    coverage. (Geifman and El-Yaniv bound a binary search that depends on the data by Bonferroni over its steps; a fixed
    grid needs no such argument.)

    Args:
        failure_probability: (N,) in [0, 1], on held-out data.
        correct: (N,) bool.
        target_risk: highest error rate wanted among accepted answers, a fraction in (0, 1).
        confidence: probability of the guarantee, in (0, 1).

    Raises:
        TargetNotMetError: no threshold has the guarantee; the message names the lowest risk that would have one.
        UserError: an option out of range, or arrays that do not fit.

    Reference: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017 (the
    problem and the binomial bound); Wiens & Dmitrienko, "The Fallback Procedure for Evaluating a Single Family
    of Hypotheses", J. Biopharm. Stat. 2005 (the testing); Angelopoulos et al., "Learn then Test", 2021 (tests
    of risks over a grid).

    Example:
        >>> found = guaranteed_risk([0.01] * 300 + [0.9] * 100, [True] * 300 + [False] * 100, 0.05)
        >>> found.coverage, found.risk, found.bound <= 0.05
        (0.75, 0.0, True)
    """
    from scipy.stats import beta

    probability, right = _read(failure_probability, correct)
    for name, value in (("target_risk", target_risk), ("confidence", confidence)):
        _share(name, value)
    accepted, failed = _counts(probability, right)
    place, levels = _rejected(accepted, failed, np.array([target_risk]), 1 - confidence)
    at, level = int(place[0]), float(levels[0])
    if at < 0:
        lowest = _lowest_risk(accepted, failed, 1 - confidence)
        possible = (
            f"no risk below 1 can be promised from these {len(right)} samples"
            if lowest is None
            else f"the lowest that these {len(right)} samples can promise is {lowest:.4f}"
        )
        least = math.ceil(math.log(1 - confidence) / math.log1p(-target_risk))
        raise TargetNotMetError(
            f"risk {target_risk:g} cannot be promised with confidence {confidence:g}: {possible}"
            f" (at least {least} accepted samples without a failure are needed for {target_risk:g})",
            lowest,
        )
    n, e = int(accepted[at]), int(failed[at])
    return _describe(
        "risk", target_risk, float(GRID[at]), probability, right, confidence, float(beta.ppf(1 - level, e + 1, n - e))
    )


@dataclass(frozen=True)
class Outlook:
    """What a target risk would bring without the guarantee, and with more data of the same source.

    observed: the threshold with the largest coverage whose risk on these samples is at most the target, rule
        "observed"; None where there is none. It promises nothing, and on new data its risk is often higher.
    more: by number of samples, the coverage that the guarantee would reach if that many samples had the same
        P(failure) and mistakes in the same shares as these; 0 where the target cannot be promised. An estimate.
    """

    observed: Threshold | None
    more: dict[int, float]


def outlook(
    failure_probability: ArrayLike, correct: ArrayLike, target_risk: float, confidence: float = 0.95
) -> Outlook:
    """What `guaranteed_risk` leaves unsaid; arguments and errors as there, but a target that is not met is no error.

    Example:
        >>> found = outlook([0.01] * 30 + [0.9] * 10, [True] * 30 + [False] * 10, 0.05)
        >>> found.observed.coverage, found.more
        (0.75, {80: 0.0, 160: 0.75, 320: 0.75, 640: 0.75})
    """
    probability, right = _read(failure_probability, correct)
    for name, value in (("target_risk", target_risk), ("confidence", confidence)):
        _share(name, value)
    accepted, failed = _counts(probability, right)
    met = np.flatnonzero((accepted > 0) & (failed <= target_risk * accepted))
    observed = _describe("observed", target_risk, float(GRID[met[-1]]), probability, right) if len(met) else None
    more = {}
    for times in MORE:
        at = int(_rejected(times * accepted, times * failed, np.array([target_risk]), 1 - confidence)[0][0])
        more[times * len(right)] = float(accepted[at] / len(right)) if at >= 0 else 0.0
    return Outlook(observed, more)


def for_coverage(failure_probability: ArrayLike, correct: ArrayLike, coverage: float) -> Threshold:
    """The lowest threshold that accepts at least ceil(coverage · N) of the samples; with ties it can accept more.

    Args:
        failure_probability: (N,) in [0, 1], on held-out data.
        correct: (N,) bool.
        coverage: share of the samples to accept, in (0, 1].

    Raises:
        UserError: an option out of range, or arrays that do not fit.
        TargetNotMetError: too many samples have P(failure) = 1, which no threshold accepts.
    """
    probability, right = _read(failure_probability, correct)
    if not 0 < coverage <= 1:
        raise UserError(f"coverage must be in (0, 1], got {coverage}")
    threshold = _above(probability, np.sort(probability)[kept_samples(coverage, len(right)) - 1])
    if threshold is None:
        most = float((probability < 1).mean())
        raise TargetNotMetError(
            f"coverage {coverage:g} cannot be met: at most {most:.4f} of the samples have P(failure) below 1", most
        )
    return _describe("coverage", coverage, threshold, probability, right)


def for_tpr(failure_probability: ArrayLike, correct: ArrayLike, tpr: float = 0.95) -> Threshold:
    """The lowest threshold that accepts at least a share `tpr` of the right answers.

    Args:
        failure_probability: (N,) in [0, 1], on held-out data.
        correct: (N,) bool.
        tpr: true positive rate in (0, 1].

    Raises:
        UserError: an option out of range, or arrays that do not fit.
        OneSidedError: no answer is right.
        TargetNotMetError: too many right answers have P(failure) = 1, which no threshold accepts.
    """
    probability, right = _read(failure_probability, correct)
    if not 0 < tpr <= 1:
        raise UserError(f"tpr must be in (0, 1], got {tpr}")
    if not right.any():
        raise OneSidedError(f"a threshold by TPR needs right answers: all {len(right)} are wrong")
    of_right = np.sort(probability[right])
    threshold = _above(probability, of_right[kept_samples(tpr, len(of_right)) - 1])
    if threshold is None:
        most = float((of_right < 1).mean())
        raise TargetNotMetError(
            f"TPR {tpr:g} cannot be met: at most {most:.4f} of the right answers have P(failure) below 1", most
        )
    return _describe("tpr", tpr, threshold, probability, right)


@dataclass(frozen=True)
class Calibration:
    """A calibration P' = sigmoid(slope · logit(P) + offset) of P = P(failure); it never changes the order of samples.

    slope: positive.
    offset: any number.
    """

    slope: float
    offset: float = 0.0

    def __call__(self, failure_probability: ArrayLike) -> Floats:
        """The calibrated failure probabilities (N,), float64, from failure probabilities (N,) in [0, 1]."""
        probability = np.asarray(failure_probability, dtype=np.float64)
        if not ((probability >= 0) & (probability <= 1)).all():
            raise UserError("a failure probability is not in [0, 1]")
        return _sigmoid(self.slope * _logit(probability) + self.offset)

    def fold_into(self, head: ViLUHead) -> ViLUHead:
        """A copy of the head whose P(failure) is calibrated: its last layer is scaled and shifted, nothing is added."""
        import torch

        calibrated = copy.deepcopy(head)
        last = calibrated.output_layer
        with torch.no_grad():
            last.weight.mul_(self.slope)
            last.bias.mul_(self.slope).add_(self.offset)
            if calibrated.prior is not None:
                calibrated.prior.mul_(self.slope)
        return calibrated


def temperature(failure_probability: ArrayLike, correct: ArrayLike) -> Calibration:
    """Temperature scaling, sigmoid(logit(P) / T), with the T of least cross-entropy: slope 1 / T, offset 0.

    A P(failure) above 1/2 stays above, and one below stays below. Targets, arguments and errors are as in `platt`.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    return _fit_calibration(failure_probability, correct, shift=False)


def platt(failure_probability: ArrayLike, correct: ArrayLike) -> Calibration:
    """Platt scaling, sigmoid(a · logit(P) + b), with the a > 0 and b of least cross-entropy (a convex problem).

    The targets are Platt's: (n_wrong + 1) / (n_wrong + 2) for failures and 1 / (n_right + 2) for successes in place of
    1 and 0, so that a perfect ranking does not lead to an infinite slope.

    Args:
        failure_probability: (N,) in [0, 1], on held-out data.
        correct: (N,) bool; right and wrong answers are both needed.

    Raises:
        OneSidedError: every answer is right, or every answer is wrong.
        UserError: the best slope is not positive, as P(failure) ranks no better than chance here; or arrays that do
            not fit.

    Reference: Platt, "Probabilistic Outputs for Support Vector Machines", 1999, section 2.2.
    """
    return _fit_calibration(failure_probability, correct, shift=True)


def _fit_calibration(failure_probability: ArrayLike, correct: ArrayLike, shift: bool) -> Calibration:
    from scipy.optimize import minimize

    probability, right = check_probability(failure_probability, correct)
    if right.all() or not right.any():
        side = "right" if right.all() else "wrong"
        raise OneSidedError(f"calibration needs right and wrong answers: all {len(right)} are {side}")
    logit = _logit(probability)
    wrong = ~right
    target = np.where(wrong, (wrong.sum() + 1) / (wrong.sum() + 2), 1 / (right.sum() + 2))

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] * logit + parameters[1]
        residual = _sigmoid(z) - target
        return float(np.mean(np.logaddexp(0, z) - target * z)), np.array([np.mean(residual * logit), residual.mean()])

    least = 1e-6
    bounds = [(least, None), (None, None) if shift else (0.0, 0.0)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = minimize(loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    if found.x[0] <= 2 * least:
        raise UserError(
            "calibration: P(failure) ranks these samples no better than chance; no positive slope improves it"
        )
    return Calibration(float(found.x[0]), float(found.x[1]))


def _counts(probability: Floats, right: Bools) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(G,) numbers of accepted samples, and of failures among them, at each threshold of the grid."""
    accepted, failed = (np.searchsorted(np.sort(p), GRID, side="left") for p in (probability, probability[~right]))
    return accepted, failed


def level_shares(target_risk: Floats) -> Floats:
    """(M, G) the share of the level that each threshold of GRID begins with, for each target risk (M,)."""
    near = [np.searchsorted(GRID, _sigmoid(_logit(target_risk) + above)).clip(max=len(GRID) - 1) for above, _ in NEAR]
    rest = 1 - sum(share for _, share in NEAR)
    shares = np.tile(rest * STARTS / STARTS.sum(), (len(target_risk), 1))
    for place, (_, share) in zip(near, NEAR, strict=True):
        shares[np.arange(len(target_risk)), place] += share
    return shares


def _rejected(
    accepted: NDArray[np.int64], failed: NDArray[np.int64], target_risk: Floats, level: float
) -> tuple[NDArray[np.int64], Floats]:
    """The fallback procedure for each target.

    Args:
        accepted, failed: (G,) numbers of accepted samples, and of failures among them, at each threshold of the grid.
        target_risk: (M,).
        level: probability of a false rejection.

    Returns:
        (M,) the place of the highest threshold at which "risk > target" is rejected, −1 for none, and its level (M,).
    """
    from scipy.special import bdtr

    shares = level * level_shares(target_risk)
    # Between two events the counts and the level stay, and so does the decision. Where nothing is accepted, nothing is
    # rejected.
    changed = (np.diff(accepted, prepend=0) > 0) | (np.diff(failed, prepend=0) > 0) | (shares > 0).any(axis=0)
    events = np.flatnonzero(changed & (accepted > 0))
    highest, highest_level = np.full(len(target_risk), -1), np.zeros(len(target_risk))
    spent = np.zeros(len(target_risk))
    for at, last in zip(events, np.append(events[1:], len(GRID)) - 1, strict=True):
        here = shares[:, at] + spent
        spent = np.where(bdtr(float(failed[at]), accepted[at], target_risk) <= here, here, 0.0)
        highest, highest_level = np.where(spent > 0, last, highest), np.where(spent > 0, here, highest_level)
    return highest, highest_level


def _lowest_risk(accepted: NDArray[np.int64], failed: NDArray[np.int64], level: float) -> float | None:
    """The smallest target risk that is met, in steps of 1e-4; None where not even 0.9999 is."""
    from scipy.special import bdtri

    possible = failed < accepted
    if not possible.any():
        return None
    # No target below the least bound at the whole level is met. Above it, each one is tried: the start at P = target
    # moves with the target, so a higher target can fail where a lower one is met.
    least = bdtri(failed[possible].astype(float), accepted[possible], level).min()
    for first in range(max(1, math.floor(1e4 * least)), 10_000, 50):
        targets = np.arange(first, min(first + 50, 10_000)) / 10_000
        met = _rejected(accepted, failed, targets, level)[0] >= 0
        if met.any():
            return float(targets[met.argmax()])
    return None


def _above(probability: Floats, value: float) -> float | None:
    """The next sample value above `value`, or 1 where there is none; None where `value` is 1 itself."""
    higher = probability[probability > value]
    if len(higher):
        return float(higher.min())
    return 1.0 if value < 1 else None


def _describe(
    rule: str,
    target: float,
    threshold: float,
    probability: Floats,
    right: Bools,
    confidence: float | None = None,
    bound: float | None = None,
) -> Threshold:
    accepted = probability < threshold
    return Threshold(
        rule=rule,
        target=target,
        threshold=threshold,
        coverage=float(accepted.mean()),
        risk=float((~right[accepted]).mean()),
        tpr=float(accepted[right].mean()) if right.any() else 1.0,
        samples=len(right),
        failures=int((~right).sum()),
        confidence=confidence,
        bound=bound,
    )


def _read(failure_probability: ArrayLike, correct: ArrayLike) -> tuple[Floats, Bools]:
    probability, right = check_probability(failure_probability, correct)
    return probability.astype(np.float32).astype(np.float64), right


def _share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} must be in (0, 1), got {value}")


def _logit(probability: Floats) -> Floats:
    inside = np.clip(probability, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    return np.log(inside) - np.log1p(-inside)


def _sigmoid(z: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -z))
