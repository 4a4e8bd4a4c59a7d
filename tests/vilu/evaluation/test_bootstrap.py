"""vilu.evaluation.bootstrap against vilu.evaluation.metrics on the repeated samples of each draw."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilu.errors import UserError
from vilu.evaluation import bootstrap, metrics
from vilu.evaluation.columns import BINS, COLUMNS, INDEX

# Small integers make ties common; probabilities stand on the edges of the bins.
drawn = st.lists(st.tuples(st.integers(0, 6), st.integers(0, BINS), st.booleans()), min_size=2, max_size=30)


def slow(confidence, probability, correct, times):
    """Each column by its definition in vilu.evaluation.metrics, on samples repeated as drawn."""
    picked = np.repeat(np.arange(len(correct)), times)
    row = []
    for column in COLUMNS:
        source = probability if column.probability else confidence
        try:
            row.append(column.function(source[picked], correct[picked]))
        except metrics.OneSidedError:
            row.append(np.nan)
    return row


def counts(size, resamples, seed, correct):
    """The draws that vilu.evaluation.metrics.bootstrap makes, one-sided ones made again unless all are."""
    rng = np.random.default_rng(seed)
    out: list[np.ndarray] = []
    while len(out) < resamples:
        times = np.bincount(rng.integers(size, size=size), minlength=size)
        right = times[correct].sum()
        if correct.all() or not correct.any() or 0 < right < size:
            out.append(times)
    return out


@settings(deadline=None, max_examples=150)
@given(drawn, st.integers(0, 2**32 - 1))
def test_every_draw_is_the_metric_on_the_drawn_samples(samples, seed):
    confidence, level, correct = (np.array(column) for column in zip(*samples, strict=True))
    confidence, probability = confidence.astype(float), np.linspace(0, 1, BINS + 1)[level]
    found = bootstrap.resampled_metrics({"a": confidence}, {"a": probability}, correct, resamples=5, seed=seed)["a"]
    expected = [slow(confidence, probability, correct, times) for times in counts(len(correct), 5, seed, correct)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.fpr_at_tpr])
def test_the_fast_metrics_are_those_that_are_called(metric):
    rng = np.random.default_rng(0)
    correct = rng.random(150) < 0.8
    a, b = (rng.normal(size=150).round(1) + weight * correct for weight in (1.0, 0.8))
    fast = bootstrap.paired_bootstrap(metric, a, b, correct, resamples=60, seed=3)
    called = bootstrap.paired_bootstrap(lambda c, r: metric(c, r), a, b, correct, resamples=60, seed=3)
    assert (fast.difference, fast.low, fast.high) == pytest.approx((called.difference, called.low, called.high))
    assert fast.p_value == called.p_value
    for function in (metric, lambda c, r: metric(c, r)):
        with pytest.raises(metrics.OneSidedError):
            bootstrap.paired_bootstrap(function, a, b, np.full(150, True), resamples=5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_intervals_are_those_of_the_metrics_bootstrap(tied):
    rng = np.random.default_rng(0)
    correct = rng.random(237) < 0.7
    confidence = 1 / (1 + np.exp(-rng.normal(size=237) - correct))
    if tied:
        confidence = confidence.round(1)
    found = bootstrap.resampled_metrics({"a": confidence}, {"a": 1 - confidence}, correct, resamples=40, seed=3)["a"]
    whole = bootstrap.metric_values(confidence, 1.0 - confidence, correct)
    for i, column in enumerate(COLUMNS):
        source = 1 - confidence if column.probability else confidence
        expected = bootstrap.bootstrap(column.function, source, correct, resamples=40, seed=3)
        mine = bootstrap.interval(whole[i], found[:, i], 0.95)
        assert (mine.value, mine.low, mine.high) == pytest.approx(
            (expected.value, expected.low, expected.high), abs=1e-12
        )


def test_a_comparison_is_the_metrics_paired_bootstrap():
    rng = np.random.default_rng(1)
    correct = rng.random(150) < 0.6
    scores = {name: rng.normal(size=150) + gap * correct for name, gap in (("a", 1.0), ("b", 0.8))}
    found = bootstrap.resampled_metrics(scores, {}, correct, resamples=60)
    for key in ("auc", "fpr95"):
        i = INDEX[key]
        whole = {name: bootstrap.metric_values(score, None, correct)[i] for name, score in scores.items()}
        mine = bootstrap.comparison(whole["a"] - whole["b"], found["a"][:, i] - found["b"][:, i], 0.95)
        expected = bootstrap.paired_bootstrap(COLUMNS[i].function, scores["a"], scores["b"], correct, resamples=60)
        assert mine.p_value == expected.p_value
        assert (mine.difference, mine.low, mine.high) == pytest.approx(
            (expected.difference, expected.low, expected.high), abs=1e-12
        )


def test_equal_rankings_have_exactly_equal_draws():
    rng = np.random.default_rng(2)
    correct, confidence = rng.random(500) < 0.7, rng.integers(0, 50, 500) / 50
    found = bootstrap.resampled_metrics({"a": confidence, "b": np.exp(3 * confidence)}, {}, correct, resamples=30)
    np.testing.assert_array_equal(found["a"], found["b"])  # NaN equal here: ECE and Brier of neither


@pytest.mark.parametrize("side", [True, False])
def test_a_one_sided_sample_keeps_what_is_defined(side):
    confidence, correct = np.array([0.1, 0.5, 0.5, 0.9]), np.full(4, side)
    whole = bootstrap.metric_values(confidence, 1.0 - confidence, correct)
    found = bootstrap.resampled_metrics({"a": confidence}, {"a": 1.0 - confidence}, correct, resamples=8)["a"]
    for i, column in enumerate(COLUMNS):
        assert np.isnan(whole[i]) == column.two_sided
        assert np.isnan(found[:, i]).all() == column.two_sided
        assert (bootstrap.interval(whole[i], found[:, i], 0.95) is None) == column.two_sided


def test_a_score_without_a_probability_has_no_calibration():
    correct = np.array([True, False, True, False])
    whole = bootstrap.metric_values(np.arange(4.0), None, correct)
    found = bootstrap.resampled_metrics({"a": np.arange(4.0)}, {}, correct, resamples=4)["a"]
    for i, column in enumerate(COLUMNS):
        assert np.isnan(whole[i]) == np.isnan(found[:, i]).all() == column.probability


def test_bad_input():
    with pytest.raises(UserError, match="resamples"):
        bootstrap.resampled_metrics({}, {}, np.array([True, False]), resamples=0)
    with pytest.raises(UserError, match="nan at index 1"):
        bootstrap.resampled_metrics({"a": np.array([1, np.nan])}, {}, np.array([True, False]))
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        bootstrap.resampled_metrics({"a": np.ones(2)}, {"a": np.array([0.5, 1.5])}, np.array([True, False]))
