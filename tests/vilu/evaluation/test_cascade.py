"""Cascades: routing by the rule, an exact paired test, and the guarantee in simulations."""

import numpy as np
import pytest

from vilu import UserError
from vilu.evaluation.calibration import TargetNotMetError
from vilu.evaluation.cascade import (
    Stage,
    answered_by,
    loss_p_value,
    mean_cost,
    reached,
    within_margin,
    within_risk,
)


def drawn(samples, seed, informative=True):
    """A small model that is right where it doubts little, and a large one that is right more often."""
    rng = np.random.default_rng(seed)
    doubt = rng.beta(0.4, 1.2, samples)
    small = rng.random(samples) > (doubt if informative else doubt.mean())
    large = np.where(small, rng.random(samples) > 0.01, rng.random(samples) < 0.8)
    return [Stage(doubt, small, 1.0), Stage(rng.beta(0.3, 3, samples), large, 8.0)]


def test_routing_follows_the_rule_at_its_edge():
    stages = [
        Stage([0.2, 0.5, 0.6, 0.9], [True, False, True, False], 1),
        Stage([0.9, 0.9, 0.5, 0.7], [True] * 4, 10),
        Stage([0.0] * 4, [True] * 4, 100),
    ]
    assert answered_by(stages, 0.5).tolist() == [0, 0, 1, 2], "P(failure) equal to the threshold stays"
    assert reached(stages, 0.5) == (1.0, 0.5, 0.25)
    assert mean_cost(stages, 0.5) == 1 + 5 + 25
    assert answered_by(stages, 1.0).tolist() == [0] * 4
    assert answered_by(stages[:2], 0.0).tolist() == [1] * 4


def test_the_p_value_is_valid_for_every_nuisance_on_the_edge_of_the_hypothesis():
    rng = np.random.default_rng(0)
    margin, level, samples = 0.01, 0.05, 800
    for q in (0.0, 0.002, 0.02, 0.1, 0.3):
        draws = rng.multinomial(samples, [margin + q, q, 1 - margin - 2 * q], size=1500)
        rejected = np.mean([loss_p_value(lost, won, samples, margin, level) <= level for lost, won, _ in draws])
        assert rejected <= level + 3 * np.sqrt(level * (1 - level) / 1500)


def test_the_p_value_proves_what_it_can():
    assert loss_p_value(0, 0, 1058, 0.005, 0.05) <= 0.005 * (1 + 1e-9)
    assert loss_p_value(0, 0, 900, 0.005, 0.05) > 0.05
    assert loss_p_value(50, 50, 5000, 0.005, 0.05) < 0.05
    assert loss_p_value(75, 50, 5000, 0.005, 0.05) > 0.05
    values = [loss_p_value(lost, 20, 3000, 0.01, 0.05) for lost in range(0, 80, 5)]
    assert values == sorted(values)
    assert loss_p_value(7, 3, 10, 0.01, 0.05) <= 1


def test_the_margin_holds_on_new_data():
    """Each of 60 calibrations is judged on the same large sample."""
    truth = drawn(200_000, 999)
    broken = 0
    for seed in range(60):
        found = within_margin(drawn(2500, seed), 0.02, 0.9)
        assert found.bound <= 0.02
        right = np.where(answered_by(truth, found.threshold) == 0, truth[0].correct, truth[1].correct)
        broken += truth[1].correct.mean() - right.mean() > 0.02
    assert broken <= 60 * 0.1 + 3 * np.sqrt(60 * 0.1 * 0.9)


def test_a_doubt_that_knows_more_costs_less():
    stages = drawn(6000, 3)
    rng = np.random.default_rng(1)
    blind = [Stage(rng.random(6000), stages[0].correct, 1.0), stages[1]]
    known, guessed = within_margin(stages, 0.02), within_margin(blind, 0.02)
    assert known.cost < 0.7 * guessed.cost
    assert known.reached[1] < 0.6
    assert known.cost == pytest.approx(1 + 8 * known.reached[1])
    assert known.accuracy >= known.last_accuracy - 0.02


def test_the_risk_of_accepted_answers():
    rng = np.random.default_rng(5)
    doubt = rng.beta(0.4, 1.2, 4000)
    small = Stage(doubt, rng.random(4000) > doubt, 1.0, doubt < 0.15)
    later = rng.beta(0.3, 3, 4000)
    large = Stage(later, rng.random(4000) > 0.5 * later, 5.0, later < 0.3)
    found = within_risk([small, large], 0.08)
    assert found.rule == "risk"
    assert found.bound <= 0.08
    assert found.reached[1] < 1
    with pytest.raises(TargetNotMetError, match="calibrate its own threshold"):
        within_risk([small, large], 0.001)


def test_what_cannot_be_promised_is_refused():
    with pytest.raises(TargetNotMetError, match="at least 1058 are needed"):
        within_margin(drawn(300, 0), 0.005)
    better, worse = drawn(2000, 0)
    with pytest.raises(UserError, match="no better than stage 1"):
        within_margin([worse, better])
    with pytest.raises(UserError, match="at least two"):
        within_margin([better])
    with pytest.raises(UserError, match="same samples, got 2000 and 3000"):
        within_margin([better, drawn(3000, 0)[1]])
    with pytest.raises(UserError, match="confidence"):
        within_margin([better, worse], 0.01, 1.0)
    with pytest.raises(UserError, match="cost"):
        Stage([0.5], [True], 0.0)
