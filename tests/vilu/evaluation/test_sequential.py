"""Bounds and tests that hold at all times at once, by simulation."""

import math

import numpy as np
import pytest

from vilu.errors import UserError
from vilu.evaluation.sequential import BLOCK, Drift, RiskBound

TIMES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def ever_outside(runs, mean, draw, level, seed):
    """Share of runs whose interval misses `mean` at any of TIMES. draw: (random, N) to (values, probabilities)."""
    random = np.random.default_rng(seed)
    missed = 0
    for _ in range(runs):
        bound, at = RiskBound(0.3), 0
        values, chance, looked = draw(random, TIMES[-1])
        for time in TIMES:
            here = np.arange(at, time)[looked[at:time]]
            bound.add(values[here], chance[here])
            at = time
            low, high = bound.interval(level)
            if not low <= mean <= high:
                missed += 1
                break
    return missed / runs


def all_looked_at(risk):
    def draw(random, n):
        return (random.random(n) < risk).astype(float), np.ones(n), np.ones(n, bool)

    return draw


def by_policy(random, n):
    """Half of the answers are looked at always, and fail at 10%; the others at 30%, and fail at 40%: 25% in all."""
    often = random.random(n) < 0.5
    chance = np.where(often, 1.0, 0.3)
    values = (random.random(n) < np.where(often, 0.1, 0.4)).astype(float)
    return values, chance, random.random(n) < chance


def test_the_bounds_by_hand():
    """Without a failure in n values the money against m is the mean of (1 + s m / (1 - m))^n over the stakes."""
    bound = RiskBound()
    assert bound.interval() == pytest.approx((0, 1))
    assert math.isnan(bound.estimate)
    bound.add(np.zeros(100))
    low, high = bound.interval(0.1)
    stakes = 2.0 ** -np.arange(0.5, 11)
    assert low == 0
    assert np.mean((1 + stakes * high / (1 - high)) ** 100) == pytest.approx(20, rel=1e-2)


@pytest.mark.parametrize("risk", [0.02, 0.1, 0.3])
def test_the_bounds_are_about_as_narrow_as_those_of_expectation(risk):
    """PyPI's `expectation` (Python 3.12 and later) has a mixture made for counts, here at its best for 500 labels."""
    bounds = pytest.importorskip("expectation.modules.boundaries")
    for labels, least, most in ((50, 0.75, 1.0), (200, 1.0, 1.2), (1000, 1.0, 1.2), (5000, 1.0, 1.1)):
        widths = []
        for seed in range(30):
            # Theirs fails where no answer is wrong.
            wrong = max(1, int((np.random.default_rng(seed).random(labels) < risk).sum()))
            bound = RiskBound()
            bound.add([1.0] * wrong + [0.0] * (labels - wrong))
            low, high = bound.interval(0.05)
            other = bounds.bernoulli_confidence_interval(wrong, labels, 0.05, t_opt=500)
            assert max(low, other[0]) < min(high, other[1])
            widths.append((high - low, other[1] - other[0]))
        ours, theirs = np.mean(widths, axis=0)
        assert least <= ours / theirs <= most


def test_a_constant_probability_loses_nothing():
    """Labels of 2% of the answers, drawn by chance, bound the risk as well as as many labels of all answers."""
    values = [1.0] * 30 + [0.0] * 470
    whole, sampled = RiskBound(), RiskBound(0.02)
    whole.add(values)
    sampled.add(values, 0.02)
    assert sampled.interval() == pytest.approx(whole.interval())
    assert sampled.estimate == whole.estimate == 0.06
    assert sampled.total() == pytest.approx(1500)


def test_bad_values_and_probabilities_are_refused():
    bound = RiskBound(0.1)
    for values, chance in (([2.0], 1.0), ([1.0], 0.05), ([1.0], 1.5), ([float("nan")], 1.0)):
        with pytest.raises(UserError):
            bound.add(values, chance)
    assert bound.labelled == 0
    with pytest.raises(UserError):
        Drift([0, 0])
    with pytest.raises(UserError):
        Drift([1, 1]).add([2])


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "draw"), [(0.02, all_looked_at(0.02)), (0.3, all_looked_at(0.3)), (0.25, by_policy)])
def test_the_interval_covers_at_all_times_at_once(mean, draw):
    """2,000 runs at level 0.1: with a coverage of just 0.9, more than 0.12 misses have a probability of 2e-3."""
    assert ever_outside(2000, mean, draw, 0.1, seed=1) <= 0.12


def test_the_interval_is_right_for_few_runs_and_not_for_a_wrong_mean():
    assert ever_outside(150, 0.25, by_policy, 0.1, seed=2) <= 0.18
    assert ever_outside(50, 0.4, by_policy, 0.1, seed=2) > 0.9


def test_weighted_estimates_are_unbiased_and_plain_means_are_not():
    random, ratios, totals, plain = np.random.default_rng(3), [], [], []
    for _ in range(1000):
        values, chance, looked = by_policy(random, 200)
        bound = RiskBound(0.3)
        bound.add(values[looked], chance[looked])
        ratios.append(bound.estimate)
        totals.append(bound.total() / 200)
        plain.append(values[looked].mean())
    for estimates in (ratios, totals):
        error = float(np.std(estimates)) / math.sqrt(len(estimates))
        assert np.mean(estimates) == pytest.approx(0.25, abs=4 * error)
    assert np.mean(plain) < 0.2


def stream(random, n, shift=0.0):
    return np.clip((random.normal(shift, 1, n) * 4 + 20), 0, 39).astype(int)


def drift_of(seed, n, shift, start=0, reference=500):
    random = np.random.default_rng(seed)
    drift = Drift(np.bincount(stream(random, reference), minlength=40), seed)
    drift.add(stream(random, start))
    drift.add(stream(random, n, shift))
    return drift


def test_drift_is_found_at_once_and_after_a_long_time():
    assert all(drift_of(seed, 500, 0.7).evidence > 1e3 for seed in range(5))
    assert all(drift_of(seed, 1000, 0.7, start=5000).evidence > 1e3 for seed in range(3))


def test_a_class_that_becomes_frequent_is_found_wherever_it_stands():
    random = np.random.default_rng(0)
    for name in (0, 3, 9):
        drift = Drift(np.bincount(random.integers(0, 10, 1000), minlength=10))
        shifted = np.where(random.random(600) < 0.3, name, random.integers(0, 10, 600))
        drift.add(shifted)
        assert drift.evidence > 100


def test_observations_count_the_same_in_any_portions():
    whole, parts = Drift([50, 50, 20]), Drift([50, 50, 20])
    seen = np.random.default_rng(1).integers(0, 3, 3 * BLOCK + 5)
    whole.add(seen)
    for one in seen:
        parts.add([one])
    assert parts.highest == whole.highest
    assert whole.observations == 3 * BLOCK


def test_without_drift_there_are_few_alarms():
    """Level 0.2, a small reference of 100, all times up to 960: of 100 runs at most 34 (probability 1e-3 at 0.2)."""
    assert sum(drift_of(seed, 960, 0.0, reference=100).evidence > 5 for seed in range(100)) <= 34


@pytest.mark.slow
@pytest.mark.parametrize("reference", [50, 2000])
def test_the_false_alarms_over_all_times_are_bounded(reference):
    """2,000 runs of 3,200 observations at level 0.1: more than 0.12 alarms have a probability of 2e-3."""
    alarms = sum(drift_of(seed, 3200, 0.0, reference=reference).evidence > 10 for seed in range(2000))
    assert alarms / 2000 <= 0.12
