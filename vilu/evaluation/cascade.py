"""Cascades: a small CLIP answers every image, and a larger one is asked where P(failure) is above a threshold.

An image that stage s answers with P(failure) > θ goes on to stage s + 1; the last stage's answer is final. θ is one
number for all stages. `within_margin` chooses the cheapest θ whose accuracy is within a margin of the last stage
alone, `within_risk` the cheapest whose accepted answers are wrong at most so often; both with a guarantee that holds
for any number of samples. Any other doubt can take the place of P(failure): one minus MCM, an entropy, a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError
from vilu.evaluation.calibration import GRID, TargetNotMetError
from vilu.evaluation.metrics import Bools, Floats, check_probability

# The part of the level that bounds how often two models disagree; the rest tests which of them is right then.
DISAGREEMENT = 0.1


class Stage:
    """One model of a cascade on N samples.

    doubt: (N,) in [0, 1]: P(failure), or what takes its place. It is rounded to float32, as a server answers.
    correct: (N,) bool: whether this stage's answer is right.
    cost: of one image, in any unit that all stages share.
    accepted: (N,) bool: whether this stage's answer would be accepted.

    Raises:
        UserError: arrays that do not fit, a doubt out of range, or a cost that is not positive.
    """

    def __init__(self, doubt: ArrayLike, correct: ArrayLike, cost: float, accepted: ArrayLike | None = None) -> None:
        probability, self.correct = check_probability(doubt, correct)
        self.doubt: Floats = probability.astype(np.float32).astype(np.float64)
        if not (math.isfinite(cost) and cost > 0):
            raise UserError(f"the cost of a stage must be positive, got {cost}")
        self.cost = cost
        self.accepted = np.ones(len(self.correct), bool) if accepted is None else np.asarray(accepted, bool)
        if self.accepted.shape != self.correct.shape:
            raise UserError(f"{len(self.correct)} answers, but {len(self.accepted)} of them are accepted or not")


@dataclass(frozen=True)
class CascadeThreshold:
    """A cascade's threshold, the rule that chose it, and its effect on the samples it was chosen on.

    rule: "margin" or "risk".
    target: the margin of accuracy or the risk that was asked for, a fraction.
    confidence: probability of the guarantee.
    threshold: an answer goes on where P(failure) > threshold.
    bound: upper bound on the loss of accuracy, or on the risk, at most the target.
    accuracy: share of right answers.
    last_accuracy: share of right answers of the last stage alone.
    reached: share of the samples that reach each stage; the first is 1.
    cost: mean cost of an image.
    samples: number N of samples.
    """

    rule: str
    target: float
    confidence: float
    threshold: float
    bound: float
    accuracy: float
    last_accuracy: float
    reached: tuple[float, ...]
    cost: float
    samples: int


def answered_by(stages: Sequence[Stage], threshold: float) -> NDArray[np.intp]:
    """The stage, counted from 0, whose answer each of the N samples gets."""
    last = np.zeros(len(stages[0].doubt), np.intp)
    on = np.ones(len(last), bool)
    for stage in stages[:-1]:
        on &= stage.doubt > threshold
        last += on
    return last


def reached(stages: Sequence[Stage], threshold: float) -> tuple[float, ...]:
    """The share of the samples that each stage has to answer; the first is 1."""
    last = answered_by(stages, threshold)
    return tuple(float((last >= number).mean()) for number in range(len(stages)))


def mean_cost(stages: Sequence[Stage], threshold: float) -> float:
    """The mean cost of an image."""
    return sum(share * stage.cost for share, stage in zip(reached(stages, threshold), stages, strict=True))


def within_margin(stages: Sequence[Stage], margin: float = 0.005, confidence: float = 0.95) -> CascadeThreshold:
    """The cheapest threshold that costs at most `margin` of the last stage's accuracy.

    The guarantee: over the draw of the N samples, P(accuracy of the last stage alone − accuracy of the cascade > margin
    on new data from the same source) is at most 1 − confidence, whatever the models.

    The method: the thresholds of `calibration.GRID`, fixed in advance, are tested from the lowest, which asks the last
    stage always, up, and the first that is not proven ends it; so every test has the whole level 1 − confidence
    (fixed-sequence testing). Each test is `loss_p_value`.

    Args:
        stages: at least two, on the same held-out samples.
        margin: in (0, 1).
        confidence: in (0, 1).

    Raises:
        TargetNotMetError: no threshold has the guarantee.
        UserError: fewer than two stages, stages of different samples, an option out of range, or a last stage that is
            no better than an earlier one, so that a cascade has nothing to gain.

    Reference: Angelopoulos et al., "Learn then Test", 2021 (fixed-sequence testing of thresholds); McNemar, 1947
    (paired answers: only the samples on which two models differ count).

    Example:
        >>> small = Stage([0.01] * 900 + [0.9] * 600, [True] * 900 + [False] * 600, cost=1)
        >>> large = Stage([0.01] * 1500, [True] * 1500, cost=10)
        >>> found = within_margin([small, large])
        >>> found.reached, found.cost, found.bound <= 0.005
        ((1.0, 0.4), 5.0, True)
    """
    _check(stages, margin, confidence)
    last = stages[-1].correct
    best = max(range(len(stages) - 1), key=lambda number: stages[number].correct.mean())
    if last.mean() <= stages[best].correct.mean():
        raise UserError(
            f"the last stage is no better than stage {best + 1}: it is right on {last.mean():.2%} of these samples, "
            f"stage {best + 1} on {stages[best].correct.mean():.2%}; a cascade has nothing to gain"
        )

    def lost(correct: Bools) -> tuple[int, int]:
        return int((last & ~correct).sum()), int((~last & correct).sum())

    level = 1 - confidence
    found = None
    for threshold in GRID:
        if loss_p_value(*lost(_correct(stages, threshold)), len(last), margin, level) > level:
            break
        found = float(threshold)
    if found is None:
        least = math.ceil(math.log(DISAGREEMENT * level) / math.log1p(-margin))
        few = f": at least {least} are needed" if len(last) < least else ""
        raise TargetNotMetError(
            f"a loss of at most {margin:g} cannot be promised with confidence {confidence:g} from {len(last)} "
            f"samples{few}",
            None,
        )
    counts = lost(_correct(stages, found))
    return _describe(stages, "margin", margin, confidence, found, _loss_bound(*counts, len(last), level))


def within_risk(stages: Sequence[Stage], target_risk: float, confidence: float = 0.95) -> CascadeThreshold:
    """The cheapest threshold at which accepted answers are wrong at most a share `target_risk` of the time.

    The guarantee and the order of the tests are those of `within_margin`; each test is the exact binomial test of the
    accepted answers. Arguments and errors are `within_margin`'s, and an answer is accepted where its stage accepts it.
    """
    from scipy.stats import beta, binom

    _check(stages, target_risk, confidence)
    found, counts = None, (0, 0)
    for threshold in GRID:
        accepted = _of_last(stages, threshold, [stage.accepted for stage in stages])
        wrong = int((accepted & ~_correct(stages, threshold)).sum())
        if not accepted.any() or binom.cdf(wrong, accepted.sum(), target_risk) > 1 - confidence:
            break
        found, counts = float(threshold), (wrong, int(accepted.sum()))
    if found is None:
        raise TargetNotMetError(
            f"risk {target_risk:g} cannot be promised with confidence {confidence:g} on these {len(stages[0].doubt)} "
            "samples, even where the last stage answers all: calibrate its own threshold to this risk first",
            None,
        )
    wrong, total = counts
    bound = float(beta.ppf(confidence, wrong + 1, total - wrong)) if wrong < total else 1.0
    return _describe(stages, "risk", target_risk, confidence, found, bound)


def loss_p_value(lost: int, won: int, samples: int, margin: float, level: float) -> float:
    """An exact p-value, valid at `level`, of the hypothesis that a model loses more than `margin` against another.

    With p = P(only the other is right), q = P(only this one is right), the hypothesis is p − q > margin. Given the
    number D of samples on which exactly one is right, `lost` is Binomial(D, p / (p + q)), and the hypothesis says
    p / (p + q) > (1 + margin / (p + q)) / 2. D itself bounds p + q: above the Clopper-Pearson limit with probability
    at most γ = 0.1 · level. So P(Binomial(D, (1 + margin / limit) / 2) ≤ lost) + γ is a p-value; where the limit is
    below the margin the hypothesis is impossible, and it is γ.

    Args:
        lost: samples on which the other model alone is right.
        won: samples on which this model alone is right.
        samples: number N of samples.

    Reference: Berger & Boos, "P Values Maximized Over a Confidence Set for the Nuisance Parameter", JASA 1994.
    """
    from scipy.stats import beta, binom

    differ = lost + won
    share = DISAGREEMENT * level
    limit = float(beta.ppf(1 - share, differ + 1, samples - differ)) if differ < samples else 1.0
    if limit < margin:
        return share
    return min(1.0, float(binom.cdf(lost, differ, (1 + margin / limit) / 2)) + share)


def _loss_bound(lost: int, won: int, samples: int, level: float) -> float:
    """The least margin, in steps of 1e-5, that `loss_p_value` proves."""
    low, high = 0, 100_000
    while high - low > 1:
        middle = (low + high) // 2
        if loss_p_value(lost, won, samples, middle / 100_000, level) <= level:
            high = middle
        else:
            low = middle
    return high / 100_000


def _of_last(stages: Sequence[Stage], threshold: float, values: Sequence[Bools]) -> Bools:
    return np.choose(answered_by(stages, threshold), values).astype(bool)


def _correct(stages: Sequence[Stage], threshold: float) -> Bools:
    return _of_last(stages, threshold, [stage.correct for stage in stages])


def _describe(
    stages: Sequence[Stage], rule: str, target: float, confidence: float, threshold: float, bound: float
) -> CascadeThreshold:
    return CascadeThreshold(
        rule=rule,
        target=target,
        confidence=confidence,
        threshold=threshold,
        bound=bound,
        accuracy=float(_correct(stages, threshold).mean()),
        last_accuracy=float(stages[-1].correct.mean()),
        reached=reached(stages, threshold),
        cost=mean_cost(stages, threshold),
        samples=len(stages[0].doubt),
    )


def _check(stages: Sequence[Stage], target: float, confidence: float) -> None:
    if len(stages) < 2:
        raise UserError(f"a cascade needs at least two stages, got {len(stages)}")
    sizes = {len(stage.doubt) for stage in stages}
    if len(sizes) > 1:
        raise UserError(f"the stages of a cascade need the same samples, got {' and '.join(map(str, sorted(sizes)))}")
    for name, value in (("the target", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} must be in (0, 1), got {value}")
