"""A threshold with a guarantee from answers of which only some, drawn by known probabilities, have a label."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vilu.errors import UserError
from vilu.evaluation.calibration import GRID, TargetNotMetError, Threshold, level_shares
from vilu.evaluation.sequential import STAKES, RiskBound


def guaranteed_risk_of_labelled(
    failure_probability: ArrayLike,
    correct: ArrayLike,
    probability: ArrayLike,
    all_failure_probabilities: ArrayLike,
    target_risk: float,
    confidence: float = 0.95,
    all_probabilities: ArrayLike | None = None,
) -> Threshold:
    """`vilu.evaluation.calibration.guaranteed_risk` where each label was drawn with a probability.

    The probability may depend on P(failure), and on nothing else that tells whether the answer is right. For each θ of
    the same grid, the hypothesis "risk(θ) > target_risk" is tested with the accepted answers that have a label. Where
    all accepted answers have one probability, the test is the exact binomial one. Otherwise money is bet as in
    `vilu.evaluation.sequential.RiskBound`, and 1 / money is a p-value (Markov's inequality). The thresholds are tested
    from the lowest up by the fallback procedure with the same shares of 1 - confidence to begin with: half of it at
    the first θ from `target_risk` up.

    Args:
        failure_probability: (N,) of the labelled answers.
        correct: (N,) bool.
        probability: (N,) in (0, 1] with which each was drawn.
        all_failure_probabilities: (M,) of all answers, for the coverage.
        target_risk, confidence: as there.
        all_probabilities: (M,) with which a label was drawn for each of all answers, so that a kind of answers of which
            none happens to have a label is not left out of the promise. None: those of the labelled answers, which
            must then have every probability that there is.

    Raises:
        TargetNotMetError: no threshold has the guarantee.
        UserError: arrays that do not fit, or a number out of range.
    """
    from scipy.stats import beta, binom

    failure = np.asarray(failure_probability, np.float32).astype(np.float64)
    everyone = np.asarray(all_failure_probabilities, np.float32).astype(np.float64)
    wrong, chance = ~np.asarray(correct, bool), np.asarray(probability, np.float64)
    if not 0 < target_risk < 1 or not 0 < confidence < 1:
        raise UserError("target_risk and confidence must be in (0, 1)")
    if not len(failure) or not len(failure) == len(wrong) == len(chance):
        raise UserError(
            f"{len(failure)} labelled answers, {len(wrong)} labels, {len(chance)} probabilities: cannot fit"
        )
    policy = (failure, chance)
    if all_probabilities is not None:
        policy = (everyone, np.asarray(all_probabilities, np.float64))
        if len(policy[1]) != len(everyone):
            raise UserError(f"{len(everyone)} answers, {len(policy[1])} probabilities: cannot fit")
    if not all(((some > 0) & (some <= 1)).all() for some in (chance, policy[1])):
        raise UserError("a sampling probability is not in (0, 1]")

    def test(theta: float) -> tuple[float, bool]:
        """(p-value, whether it is the binomial one)."""
        mine = failure < theta
        if not mine.any():
            return 1.0, True
        here = policy[1][policy[0] < theta]
        if here.min() == here.max():
            return float(binom.cdf(wrong[mine].sum(), mine.sum(), target_risk)), True
        weight = here.min() / chance[mine]
        gains = np.where(wrong[mine], -weight, weight * target_risk / (1 - target_risk))
        money = np.logaddexp.reduce(np.log1p(STAKES[:, None] * gains).sum(axis=1)) - np.log(len(STAKES))
        return float(np.exp(-max(money, 0.0))), False

    found, level, spent, exact = -1, 0.0, 0.0, True
    for at, share in enumerate((1 - confidence) * level_shares(np.array([target_risk]))[0]):
        p_value, binomial = test(GRID[at])
        here = share + spent
        spent = here if p_value <= here else 0.0
        if spent:
            found, level, exact = at, here, binomial
    if found < 0:
        raise TargetNotMetError(
            f"risk {target_risk:g} cannot be promised with confidence {confidence:g} from {len(failure)} labelled "
            "answers: wait for more labels, or label a larger share of the accepted answers",
            None,
        )
    theta = float(GRID[found])
    mine = failure < theta
    bound = RiskBound(float(policy[1][policy[0] < theta].min()))
    bound.add(wrong[mine], chance[mine])
    n, e = int(mine.sum()), int(wrong[mine].sum())
    # One-sided: `interval` spends half of its level on each side.
    upper = float(beta.ppf(1 - level, e + 1, n - e)) if exact else bound.interval(min(2 * level, 0.999))[1]
    right = RiskBound(float(chance.min()))
    right.add(failure[~wrong] < theta, chance[~wrong])
    return Threshold(
        rule="risk",
        target=target_risk,
        threshold=theta,
        coverage=float((everyone < theta).mean()),
        risk=bound.estimate,
        tpr=right.estimate if right.labelled else 1.0,
        samples=len(failure),
        failures=int(wrong.sum()),
        confidence=confidence,
        bound=upper,
    )
