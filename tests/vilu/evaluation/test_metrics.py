"""vilu.evaluation.metrics against values worked out by hand, slow definitions, and their properties."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vilu
from vilu.errors import UserError
from vilu.evaluation import bootstrap, metrics
from vilu.scores import MCM

RANKING: list[Callable[..., float]] = [
    metrics.auroc,
    metrics.fpr_at_tpr,
    metrics.aupr_error,
    metrics.aurc,
    partial(metrics.accuracy_at_coverage, coverage=0.8),
]
TWO_SIDED = RANKING[:3]
CALIBRATION: list[Callable[..., float]] = [metrics.ece, metrics.brier]
EVERY = [*RANKING, *CALIBRATION]


def names(functions):
    return [getattr(f, "func", f).__name__ for f in functions]


# Small integers make ties common and every increasing map of them exact.
samples = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40)


def arrays(drawn):
    confidence, correct = zip(*drawn, strict=True)
    return np.array(confidence, dtype=float), np.array(correct)


# Confidences 5 > 4 > 3 > 2 > 1 with outcomes right, right, wrong, right, wrong:
#   pairs: of 3 · 2 (right, wrong) pairs only (2, 3) is out of order: AUC 5/6
#   ROC vertices (fpr, tpr): (0, 0) (0, 2/3) (1/2, 2/3) (1/2, 1) (1, 1): FPR at TPR 0.95 is on the vertical
#     edge at fpr 1/2
#   AUPR-err, failures from the lowest up: precision 1/1 at the first, 2/3 at the second: (1 + 2/3) / 2
#   risks: 0, 0, 1/3, 1/4, 2/5
CONFIDENCE = np.array([3, 5, 1, 4, 2])
CORRECT = np.array([False, True, False, True, True])


def test_ranking_metrics_by_hand():
    assert metrics.auroc(CONFIDENCE, CORRECT) == pytest.approx(5 / 6)
    assert metrics.fpr_at_tpr(CONFIDENCE, CORRECT) == pytest.approx(0.5)
    assert metrics.aupr_error(CONFIDENCE, CORRECT) == pytest.approx(5 / 6)
    assert metrics.aurc(CONFIDENCE, CORRECT) == pytest.approx((1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert metrics.accuracy_at_coverage(CONFIDENCE, CORRECT, 0.4) == 1
    assert metrics.accuracy_at_coverage(CONFIDENCE, CORRECT, 0.41) == pytest.approx(2 / 3)
    assert metrics.accuracy_at_coverage(CONFIDENCE, CORRECT, 1.0) == pytest.approx(3 / 5)


def test_fpr_interpolates_between_vertices():
    # One tie of two right and two wrong, below one right: vertices (0, 0) (0, 1/3) (1, 1); at TPR 0.95 the
    # line from (0, 1/3) to (1, 1) gives (0.95 − 1/3) / (2/3). The first threshold with TPR ≥ 0.95 gives 1.
    value = metrics.fpr_at_tpr([2, 1, 1, 1, 1], [True, True, True, False, False])
    assert value == pytest.approx((0.95 - 1 / 3) * 1.5)


def test_ties_share_their_risk():
    # A tie of one right and one wrong: the first of the two fails with probability 1/2.
    coverage, risk = metrics.risk_coverage([1, 1], [False, True])
    assert coverage.tolist() == [0.5, 1]
    assert risk.tolist() == [0.5, 0.5]
    assert metrics.auroc([1, 1], [False, True]) == 0.5


def test_calibration_metrics_by_hand():
    # Bins [0, .5) and [.5, 1]: (.1, .3) mean .2, one failure of two; (.5, 1) mean .75, both fail.
    probability, correct = [0.1, 0.3, 0.5, 1.0], [True, False, False, False]
    assert metrics.ece(probability, correct, bins=2) == pytest.approx((abs(0.5 - 0.2) * 2 + abs(1 - 0.75) * 2) / 4)
    assert metrics.brier(probability, correct) == pytest.approx((0.01 + 0.49 + 0.25 + 0) / 4)
    mean, rate, count = metrics.reliability(probability, correct, bins=4)
    assert count.tolist() == [1, 1, 1, 1]
    assert np.allclose(mean, probability)
    assert rate.tolist() == [0, 1, 1, 1]


def test_empty_bins_are_not_counted():
    mean, rate, count = metrics.reliability([0.95, 1.0], [False, False], bins=10)
    assert count.tolist() == [0] * 9 + [2]
    assert np.isnan(mean[:9]).all()
    assert np.isnan(rate[:9]).all()
    assert metrics.ece([0.95, 1.0], [False, False], bins=10) == pytest.approx(0.025)


@given(samples)
def test_auroc_and_aurc_match_their_definitions(drawn):
    confidence, correct = arrays(drawn)
    risks = []
    for accepted in range(1, len(correct) + 1):
        # Expected failures among the first `accepted`, ties taken uniformly.
        cut = np.sort(confidence)[::-1][accepted - 1]
        above, level = confidence > cut, confidence == cut
        failed = (~correct[above]).sum() + (accepted - above.sum()) * (~correct[level]).mean()
        risks.append(failed / accepted)
    assert np.allclose(metrics.risk_coverage(confidence, correct)[1], risks)
    assert metrics.aurc(confidence, correct) == pytest.approx(np.mean(risks))
    if correct.all() or not correct.any():
        return
    right, wrong = confidence[correct][:, None], confidence[~correct]
    assert metrics.auroc(confidence, correct) == pytest.approx(((right > wrong) + (right == wrong) / 2).mean())


@pytest.mark.parametrize("metric", RANKING, ids=names(RANKING))
@given(drawn=samples, data=st.data())
def test_ranking_ignores_order_and_increasing_maps(metric, drawn, data):
    confidence, correct = arrays(drawn)
    assume(metric not in TWO_SIDED or 0 < correct.sum() < len(correct))
    value = metric(confidence, correct)
    assert 0 <= value <= 1
    order = data.draw(st.permutations(range(len(correct))))
    assert metric(confidence[order], correct[order]) == pytest.approx(value)
    assert metric(np.exp(confidence) * 3 - 100, correct) == pytest.approx(value)


@given(drawn=samples, data=st.data())
def test_calibration_ignores_order(drawn, data):
    level, correct = arrays(drawn)
    order = data.draw(st.permutations(range(len(correct))))
    for metric in CALIBRATION:
        value = metric(level / 8, correct)
        assert 0 <= value <= 1
        assert metric(level[order] / 8, correct[order]) == pytest.approx(value)


def test_perfect_and_reversed():
    confidence, correct = np.arange(20), np.arange(20) >= 8
    assert metrics.auroc(confidence, correct) == 1
    assert metrics.fpr_at_tpr(confidence, correct) == 0
    assert metrics.aupr_error(confidence, correct) == 1
    assert metrics.auroc(-confidence, correct) == 0
    assert metrics.fpr_at_tpr(-confidence, correct) == 1


@pytest.mark.parametrize("right", [True, False])
def test_one_sided(right):
    confidence, correct = np.array([0.2, 0.7, 0.7]), np.full(3, right)
    for metric in TWO_SIDED:
        with pytest.raises(metrics.OneSidedError, match=f"all 3 answers are {'right' if right else 'wrong'}"):
            metric(confidence, correct)
    assert metrics.aurc(confidence, correct) == float(not right)
    assert metrics.accuracy_at_coverage(confidence, correct, 0.5) == float(right)
    assert metrics.brier(confidence, correct) == pytest.approx(((confidence - (not right)) ** 2).mean())
    assert metrics.ece(confidence, correct) == pytest.approx(abs(confidence - (not right)).mean())


@pytest.mark.parametrize("metric", EVERY, ids=names(EVERY))
@pytest.mark.parametrize(
    ("confidence", "correct", "said"),
    [
        ([], [], "empty"),
        ([0.5, 0.5], [True], "one length"),
        ([[0.5], [0.5]], [[True], [False]], "one-dimensional"),
        ([0.5, np.nan], [True, False], "nan at index 1"),
        ([0.5, np.inf], [True, False], "inf at index 1"),
        ([0.5, 0.4], [1, 2], "0 and 1"),
        (["a", "b"], [True, False], "numbers"),
    ],
)
def test_bad_input_is_one_line(metric, confidence, correct, said):
    with pytest.raises(UserError, match=said) as caught:
        metric(confidence, correct)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_probabilities_must_be_probabilities(value):
    for metric in CALIBRATION:
        with pytest.raises(UserError, match=r"index 1 is outside \[0, 1\]"):
            metric([0.5, value], [True, False])


def test_bad_options():
    for tpr in (0, 1.1, float("nan")):
        with pytest.raises(UserError, match="tpr"):
            metrics.fpr_at_tpr(CONFIDENCE, CORRECT, tpr)
    for coverage in (0, 1.1, float("nan")):
        with pytest.raises(UserError, match="coverage"):
            metrics.accuracy_at_coverage(CONFIDENCE, CORRECT, coverage)
    with pytest.raises(UserError, match="bins"):
        metrics.ece([0.5], [True], bins=0)
    with pytest.raises(UserError, match="resamples"):
        bootstrap.bootstrap(metrics.auroc, CONFIDENCE, CORRECT, resamples=0)
    with pytest.raises(UserError, match="level"):
        bootstrap.bootstrap(metrics.auroc, CONFIDENCE, CORRECT, level=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
def test_dtypes(dtype):
    assert metrics.auroc(CONFIDENCE.astype(dtype), CORRECT.astype(np.int8)) == pytest.approx(5 / 6)


def test_coverage_counts_are_not_pushed_up_by_rounding():
    assert 0.07 * 100 > 7
    assert metrics.kept_samples(0.07, 100) == 7
    assert metrics.kept_samples(0.0701, 100) == 8
    assert metrics.kept_samples(1e-12, 10) == 1


def normal_scores(gap, size=400, seed=0):
    rng = np.random.default_rng(seed)
    correct = rng.random(size) < 0.7
    return rng.normal(size=size) + gap * correct, correct


def test_bootstrap_is_deterministic_and_brackets():
    confidence, correct = normal_scores(1.0)
    interval = bootstrap.bootstrap(metrics.auroc, confidence, correct, resamples=200)
    assert interval == bootstrap.bootstrap(metrics.auroc, confidence, correct, resamples=200)
    assert interval != bootstrap.bootstrap(metrics.auroc, confidence, correct, resamples=200, seed=1)
    assert interval.low < interval.value < interval.high
    narrow = bootstrap.bootstrap(metrics.auroc, confidence, correct, resamples=200, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_bootstrap_width_is_the_standard_error():
    # Brier of constant 0.2 over n answers with failure rate q is .04 + .6 · failures / n: binomial.
    correct = np.arange(1000) >= 300
    interval = bootstrap.bootstrap(metrics.brier, np.full(1000, 0.2), correct, resamples=2000)
    error = 0.6 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.value == pytest.approx(0.04 + 0.6 * 0.3)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_bootstrap_draws_again_what_is_one_sided():
    # With one failure in five, a third of the draws has none.
    interval = bootstrap.bootstrap(metrics.auroc, [1, 2, 3, 4, 5], [False, True, True, True, True], resamples=50)
    assert (interval.low, interval.high) == (1, 1)
    with pytest.raises(metrics.OneSidedError):
        bootstrap.bootstrap(metrics.auroc, [1, 2], [True, True])


def test_paired_bootstrap():
    better, correct = normal_scores(2.0)
    worse, _ = normal_scores(0.5, seed=0)
    won = bootstrap.paired_bootstrap(metrics.auroc, better, worse, correct, resamples=200)
    assert won.low > 0
    assert won.p_value == pytest.approx(2 / 201)
    assert won.difference == metrics.auroc(better, correct) - metrics.auroc(worse, correct)
    lost = bootstrap.paired_bootstrap(metrics.auroc, worse, better, correct, resamples=200)
    assert (lost.low, lost.high, lost.p_value) == pytest.approx((-won.high, -won.low, won.p_value))
    same = bootstrap.paired_bootstrap(metrics.auroc, better, better * 2, correct, resamples=50)
    assert (same.difference, same.p_value) == (0, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_paired_bootstrap_draws_the_same_samples(seed):
    # b is a, reversed, where the metric is a mean: differences vanish only if both see the same draws.
    a = np.random.default_rng(seed).random(30)
    correct = np.arange(30) % 2 == 0
    pair = bootstrap.paired_bootstrap(lambda c, _: float(c.mean()), a, 1 - a, correct, resamples=20, seed=seed)
    total = bootstrap.bootstrap(lambda c, _: float(2 * c.mean() - 1), a, correct, resamples=20, seed=seed)
    assert (pair.low, pair.high) == pytest.approx((total.low, total.high))


@pytest.mark.slow
def test_p_value_is_uniform_without_a_difference():
    rng = np.random.default_rng(0)
    values = []
    for _ in range(60):
        correct = rng.random(200) < 0.6
        signal = correct + rng.normal(size=200)
        a, b = signal + rng.normal(size=200), signal + rng.normal(size=200)
        values.append(bootstrap.paired_bootstrap(metrics.auroc, a, b, correct, resamples=59).p_value)
    # Of 60 tests at 10%, more than 15 rejections happen with probability 0.0002.
    assert sum(value <= 0.1 for value in values) <= 15


def test_the_modules_that_vilu_offers_are_found():
    assert vilu.metrics is metrics
    assert vilu.scores.SCORES["MCM"] is MCM
