"""Statistics of a deployed model that hold at all times at once: bounds on a risk, and a test of drift.

Whoever looks at a stream again and again, and stops when it looks bad, needs statistics whose error is bounded over all
times together. Both classes here bet play money against a hypothesis in a game that is fair if it is true. By Ville's
inequality the money then ever reaches 1 / level times the first stake with probability at most `level`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UserError
from vilu.evaluation.metrics import Floats

# Shares of the money that RiskBound stakes, from 0.71 down to 0.0007; each gets the same part of the money.
STAKES = 2.0 ** -np.arange(0.5, 11)
# How Drift bets: (bins of the p-value, share of the earlier counts that is kept at each block).
HISTOGRAMS = ((2, 1.0), (2, 0.9), (8, 1.0), (8, 0.95), (32, 1.0))
BLOCK = 32  # observations between two changes of a bet


class RiskBound:
    """Bounds on the mean of values in [0, 1], such as the risk among accepted answers, at all times at once.

    Each value may have been looked at with a probability below 1 (its inverse propensity then weighs it). To test
    "the mean is m", the money is multiplied by 1 + s · w · (y - m) / m for each value y that was looked at, where s is
    a stake below 1, w = least_probability / probability is at most 1, and the factor's expectation is 1. The bounds are
    the means that 2 / level times the first stake have not been won against. The money is a mean over STAKES, which
    does not depend on the data ("diversified Kelly betting"), so only the counts of the values matter: labels may come
    late and in any order, as long as neither depends on the outcome.

    The lower bound also holds for a risk that changes: it is above m with probability at most level / 2 unless the
    risk, given what came before, was above m at some time.

    Args:
        least_probability: a lower bound on all the probabilities, fixed before any data are seen.

    Reference: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024 (the bets);
    Podkopaev & Ramdas, "Tracking the risk of a deployed model and detecting harmful distribution shifts", ICLR 2022
    (the use); Horvitz & Thompson, "A generalization of sampling without replacement from a finite universe", JASA 1952
    (the weights).

    Example:
        >>> bound = RiskBound()
        >>> bound.add([0.0] * 95 + [1.0] * 5)
        >>> low, high = bound.interval(0.05)
        >>> bound.estimate, low < 0.05 < high
        (0.05, True)
    """

    def __init__(self, least_probability: float = 1.0) -> None:
        if not 0 < least_probability <= 1:
            raise UserError(f"least_probability must be in (0, 1], got {least_probability}")
        self.least_probability = least_probability
        self.counts: dict[tuple[float, float], int] = {}  # (value, weight) -> how many

    def add(self, values: ArrayLike, probability: ArrayLike = 1.0) -> None:
        """Add values (N,) in [0, 1] that were looked at, each with a probability (N,), or one for all.

        Raises:
            UserError: a value outside [0, 1], or a probability outside [least_probability, 1].
        """
        y = np.atleast_1d(np.asarray(values, dtype=np.float64))
        chance = np.broadcast_to(np.asarray(probability, dtype=np.float64), y.shape)
        if not ((y >= 0) & (y <= 1)).all():
            raise UserError("a value is not in [0, 1]")
        if not ((chance >= self.least_probability * (1 - 1e-6)) & (chance <= 1)).all():
            raise UserError(f"a sampling probability is not in [{self.least_probability:g}, 1]")
        weight = np.minimum(self.least_probability / chance, 1.0)
        pairs, numbers = np.unique(np.stack([y, weight]), axis=1, return_counts=True)
        for value, w, number in zip(*pairs.tolist(), numbers.tolist(), strict=True):
            self.counts[value, w] = self.counts.get((value, w), 0) + number

    @property
    def labelled(self) -> int:
        """Number of values that were looked at."""
        return sum(self.counts.values())

    @property
    def estimate(self) -> float:
        """The weighted mean of the values (Hájek's: each counts 1 / probability times); NaN where there is none.

        Its bias is zero where all probabilities are equal, and else falls as 1 / N.
        """
        value, weight, number = self._table()
        total = float((weight * number).sum())
        return float((value * weight * number).sum()) / total if total else math.nan

    def total(self) -> float:
        """The sum of values / probability, an unbiased estimate of the sum over all, looked at or not."""
        value, weight, number = self._table()
        return float((value * weight * number).sum()) / self.least_probability

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """(low, high): with probability 1 - level, the mean lies within, now and at all other times."""
        if not 0 < level < 1:
            raise UserError(f"level must be in (0, 1), got {level}")
        value, weight, number = self._table()
        needed = math.log(2 / level)
        return _bound(value, weight, number, needed), 1 - _bound(1 - value, weight, number, needed)

    def _table(self) -> tuple[Floats, Floats, Floats]:
        value, weight = np.array(list(self.counts), dtype=np.float64).reshape(-1, 2).T
        return value, weight, np.array(list(self.counts.values()), dtype=np.float64)


def _bound(value: Floats, weight: Floats, number: Floats, needed: float) -> float:
    """The highest m against which log money `needed` has been won; the money falls as m rises."""

    def won(m: float) -> bool:
        gains = np.log1p(STAKES[:, None] * weight * (value - m) / m) @ number
        return bool(np.logaddexp.reduce(gains) - math.log(len(STAKES)) >= needed)

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if won(middle) else (low, middle)
    return low


class Drift:
    """A sequential test that a stream comes from the same source as a reference sample, both given as bins.

    The null hypothesis is that the reference and the stream are exchangeable. Each observation is ranked among the
    reference and all earlier observations, with ties broken at random. Under the null the ranks, divided by their
    number, are independent and uniform, however large the reference. The test bets on them with histograms of the
    earlier ones, of several widths and memories, and moves a share of its money among these and cash at each block
    (1 / block, so that a late change costs only the logarithm of its time). Under the null, `evidence` ever exceeds
    1 / level with probability at most `level`.

    Args:
        reference: (K,) counts of the reference sample in bins that were fixed before the sample was seen.
        seed: of the random tie-breaks.

    Reference: Vovk, "Testing randomness online", Statistical Science 2021 (conformal test martingales); Herbster &
    Warmuth, "Tracking the best expert", Machine Learning 1998 (the shares that move).

    Example:
        >>> drift = Drift([500, 500])
        >>> drift.add([0] * 200)
        >>> drift.evidence > 1e6
        True
    """

    def __init__(self, reference: ArrayLike, seed: int = 0) -> None:
        counts = np.asarray(reference)
        if counts.ndim != 1 or not len(counts) or not (counts >= 0).all() or not counts.sum():
            raise UserError("a reference must be counts of at least one bin, none of them negative")
        self.counts: NDArray[np.int64] = counts.astype(np.int64)
        self.random = np.random.default_rng(seed)
        self.money = np.full(1 + len(HISTOGRAMS), -math.log(1 + len(HISTOGRAMS)))  # logarithms; the first is cash
        self.seen = [np.zeros(bins) for bins, _ in HISTOGRAMS]
        self.blocks = 0
        self.observations = 0
        self.log_evidence = self.highest = 0.0  # now, and the most ever
        self.waiting: list[int] = []  # less than a block

    @property
    def evidence(self) -> float:
        """The most money ever held, of a first stake of 1."""
        return math.exp(min(self.highest, 700.0))

    def add(self, bins: ArrayLike) -> None:
        """Add observations (N,), each by the number of its bin, in the order in which they came.

        They count in whole blocks of BLOCK; the rest wait for the next call.
        """
        new = np.asarray(bins, dtype=np.int64)
        if not ((new >= 0) & (new < len(self.counts))).all():
            raise UserError(f"a bin is not in 0..{len(self.counts) - 1}")
        given = np.concatenate([np.array(self.waiting, np.int64), new])
        whole = len(given) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._bet(self._ranks(given[start : start + BLOCK]))
        self.waiting = given[whole:].tolist()

    def _ranks(self, block: NDArray[np.int64]) -> Floats:
        """The p-values of a block, which joins the counts."""
        earlier = block[None, :] < block[:, None]  # [i, j]: j's bin is below i's
        same = block[None, :] == block[:, None]
        before = np.tri(len(block), k=-1, dtype=bool)
        ends = np.cumsum(self.counts)
        below = (ends - self.counts)[block] + (earlier & before).sum(axis=1)
        ties = self.counts[block] + (same & before).sum(axis=1) + 1
        total = ends[-1] + np.arange(1, len(block) + 1)
        self.counts += np.bincount(block, minlength=len(self.counts))
        ranks: Floats = (below + ties * self.random.random(len(block))) / total
        return ranks

    def _bet(self, ranks: Floats) -> None:
        self.blocks += 1
        self.observations += len(ranks)
        share = 1 / (self.blocks + 1)
        pooled = np.logaddexp.reduce(self.money) - math.log(len(self.money))
        self.money = np.logaddexp(self.money + math.log1p(-share), pooled + math.log(share))
        gains = np.zeros((len(self.money), len(ranks)))
        for i, (bins, kept) in enumerate(HISTOGRAMS):
            place = np.minimum((ranks * bins).astype(np.int64), bins - 1)
            density = (self.seen[i] + 1) * bins / (self.seen[i].sum() + bins)
            gains[i + 1] = np.log(density[place])
            self.seen[i] = self.seen[i] * kept + np.bincount(place, minlength=bins)
        path = np.logaddexp.reduce(self.money[:, None] + np.cumsum(gains, axis=1), axis=0)
        self.money = self.money + gains.sum(axis=1)
        self.log_evidence = float(path[-1])
        self.highest = max(self.highest, float(path.max()))
