"""Thresholds keep what they promise on new data; calibration keeps the ranking."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vilu.errors import UserError
from vilu.evaluation import calibration, metrics
from vilu.evaluation.calibration import GRID, STARTS, Calibration, TargetNotMetError

DELTA = 0.2  # large, so that a few hundred draws can tell a broken guarantee


def overconfident(logit):
    return 0.02 + 0.6 / (1 + np.exp(-(logit + 1)))


def hopeless(logit):
    """Every threshold has a risk just above the target: any promise is a false one."""
    return np.full_like(logit, 0.1000001)


def reversed_below(logit):
    """The lowest P(failure) are the riskiest, as a badly trained head's: risk is not monotone in the threshold."""
    return np.where(logit < -2, 0.3, 0.04) + np.where(logit > 1, 0.3, 0.0)


WORLDS = [overconfident, hopeless, reversed_below]


def draw(rng, error, size):
    logit = rng.normal(-1, 2, size)
    return 1 / (1 + np.exp(-logit)), rng.random(size) >= error(logit)


def true_risk(error, threshold):
    """Risk among accepted answers of the whole population, by integration."""
    logit = np.linspace(-13, 11, 20_001)
    mass = stats.norm.pdf(logit, -1, 2) * (1 / (1 + np.exp(-logit)) < threshold)
    return (mass * error(logit)).sum() / mass.sum()


def naive(probability, correct, target):
    """The largest coverage whose empirical risk meets the target: what the guarantee is there to replace."""
    order = np.sort(probability)
    coverage, risk = metrics.risk_coverage(-probability, correct)
    met = np.flatnonzero(risk <= target)
    return order[met[-1]] if len(met) and coverage[met[-1]] < 1 else None


@pytest.mark.parametrize("error", WORLDS)
@pytest.mark.parametrize("size", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_the_guarantee_holds(error, size):
    rng = np.random.default_rng(0)
    draws, broken, broken_naive = 300, 0, 0
    for _ in range(draws):
        probability, correct = draw(rng, error, size)
        try:
            found = calibration.guaranteed_risk(probability, correct, 0.1, 1 - DELTA)
        except TargetNotMetError:
            pass
        else:
            broken += true_risk(error, found.threshold) > 0.1
            assert found.risk <= found.bound <= 0.1
        without = naive(probability, correct, 0.1)
        broken_naive += without is not None and true_risk(error, without) > 0.1
    allowed = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    assert broken / draws <= allowed
    # The same count over the same draws does catch a rule without a guarantee.
    assert broken_naive / draws > allowed


def test_the_guarantee_is_of_use():
    rng = np.random.default_rng(0)
    probability, correct = draw(rng, lambda z: 1 / (1 + np.exp(-z)), 5000)
    found = calibration.guaranteed_risk(probability, correct, 0.1, 0.95)
    best = np.linspace(0.01, 0.99, 99)
    best = best[[true_risk(lambda z: 1 / (1 + np.exp(-z)), x) <= 0.1 for x in best]].max()
    assert found.coverage > 0.85 * (probability < best).mean()
    assert found.confidence == 0.95
    assert (found.rule, found.target, found.samples, found.failures) == ("risk", 0.1, 5000, (~correct).sum())


def slow_guaranteed_risk(probability, correct, target, delta, near=((0.0, 0.5), (0.75, 0.3))):
    """The fallback procedure, threshold by threshold, with binomial sums written out."""
    chosen, carried = None, 0.0
    rounded = np.asarray(probability, np.float32)
    shares = (1 - sum(share for _, share in near)) * STARTS / STARTS.sum()
    for above, share in near:
        start = 1 / (1 + math.exp(-(math.log(target / (1 - target)) + above)))
        shares[next(i for i, theta in enumerate(GRID) if theta >= start)] += share
    for theta, share in zip(GRID, shares, strict=True):
        accepted = [bool(right) for p, right in zip(rounded, correct, strict=True) if p < theta]
        n, failed = len(accepted), accepted.count(False)
        p_value = sum(math.comb(n, k) * target**k * (1 - target) ** (n - k) for k in range(failed + 1))
        level = carried + delta * share
        carried = level if n and p_value <= level else 0.0
        chosen = theta if carried else chosen
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_the_procedure(seed):
    probability, correct = draw(np.random.default_rng(seed), overconfident, 90)
    expected = slow_guaranteed_risk(probability, correct, 0.25, DELTA)
    if expected is None:
        with pytest.raises(TargetNotMetError):
            calibration.guaranteed_risk(probability, correct, 0.25, 1 - DELTA)
    else:
        found = calibration.guaranteed_risk(probability, correct, 0.25, 1 - DELTA)
        assert found.threshold == expected
        assert found.coverage == (probability < expected).mean()
        assert found.risk == (~correct[probability < expected]).mean()
        assert found.tpr == (probability < expected)[correct].mean()


def test_the_bound_is_clopper_pearson():
    # All right, so every threshold above P(failure) = 0.001 is rejected. Its logit is −6.9: of the 13 starts, −8
    # and −7 accept nothing and their share is lost, so the last test has 0.8 + 0.2 · 11/13 of δ. With no failure
    # among n the upper bound b solves (1 − b)^n = level.
    found = calibration.guaranteed_risk([0.001] * 200, [True] * 200, 0.1, 0.95)
    assert (found.threshold, found.coverage, found.risk, found.tpr) == (1, 1, 0, 1)
    assert found.bound == pytest.approx(1 - (0.05 * (0.8 + 0.2 * 11 / 13)) ** (1 / 200))


def test_the_start_at_the_target_is_of_use_with_few_samples():
    rng = np.random.default_rng(0)
    ours, even = 0.0, 0.0
    for _ in range(12):
        probability, correct = draw(rng, lambda z: 1 / (1 + np.exp(-z)), 150)
        with_starts = slow_guaranteed_risk(probability, correct, 0.1, 0.05)
        without = slow_guaranteed_risk(probability, correct, 0.1, 0.05, near=())
        ours += 0 if with_starts is None else (probability < with_starts).mean() / 12
        even += 0 if without is None else (probability < without).mean() / 12
    assert ours > 0.1 > 2 * even


def test_the_outlook():
    # 30 right answers at 0.01. At half the level the target needs ln 0.025 / ln 0.95 = 71.9 samples without a failure.
    found = calibration.outlook([0.01] * 30 + [0.9] * 10, [True] * 30 + [False] * 10, 0.05)
    assert found.more == {80: 0, 160: 0.75, 320: 0.75, 640: 0.75}
    assert found.observed is not None
    assert (found.observed.rule, found.observed.coverage, found.observed.risk) == ("observed", 0.75, 0)
    assert found.observed.bound is None
    hopeless = calibration.outlook([0.01] * 30, [False] * 30, 0.05)
    assert (hopeless.observed, set(hopeless.more.values())) == (None, {0.0})


def test_a_sample_at_the_threshold_is_not_accepted():
    # Failures at 1/2, a point of the grid: it is the highest threshold that leaves all of them out.
    found = calibration.guaranteed_risk([0.01] * 300 + [0.5] * 100, [True] * 300 + [False] * 100, 0.05)
    assert (found.threshold, found.coverage, found.risk) == (0.5, 0.75, 0)


def test_what_cannot_be_met_says_what_can():
    probability, correct = draw(np.random.default_rng(0), overconfident, 400)
    with pytest.raises(TargetNotMetError, match=r"lowest that these 400 samples can promise is 0\.\d+") as caught:
        calibration.guaranteed_risk(probability, correct, 0.01)
    lowest = caught.value.attainable
    assert lowest is not None
    assert calibration.guaranteed_risk(probability, correct, lowest).bound <= lowest
    with pytest.raises(TargetNotMetError):
        calibration.guaranteed_risk(probability, correct, lowest - 1e-4)
    # ln 0.05 / ln 0.99 = 298.07: no fewer samples can promise 1% with 95%.
    assert "at least 299 accepted samples" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_can_be_promised_where_all_is_wrong():
    with pytest.raises(TargetNotMetError, match="no risk below 1") as caught:
        calibration.guaranteed_risk(np.linspace(0, 1, 50), np.zeros(50, dtype=bool), 0.5)
    assert caught.value.attainable is None


def test_the_grid_is_what_the_guarantee_needs():
    assert (np.diff(GRID) > 0).all()
    assert (GRID.astype(np.float32) == GRID).all()
    assert STARTS.sum() == 13
    assert GRID[-1] == 1


@given(
    st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
def test_coverage_and_tpr_are_met_by_the_lowest_threshold(drawn, share):
    level, correct = (np.array(column) for column in zip(*drawn, strict=True))
    probability = level / 10
    for rule, among in ((calibration.for_coverage, np.full(len(level), True)), (calibration.for_tpr, correct)):
        if not among.any():
            with pytest.raises(metrics.OneSidedError):
                rule(probability, correct, share)
            continue
        needed = metrics.kept_samples(share, among.sum())
        if (probability[among] < 1).sum() < needed:
            with pytest.raises(TargetNotMetError) as caught:
                rule(probability, correct, share)
            assert caught.value.attainable == pytest.approx((probability[among] < 1).mean())
            continue
        found = rule(probability, correct, share)
        rounded = probability.astype(np.float32)
        accepted = rounded < found.threshold
        assert found.threshold == np.float32(found.threshold) <= 1
        assert accepted[among].sum() >= needed
        lower = rounded[accepted].max()  # any lower threshold loses these
        assert (rounded[among] < lower).sum() < needed
        assert found.coverage == pytest.approx(accepted.mean())
        assert found.risk == pytest.approx((~correct[accepted]).mean())
        assert found.bound is None


def test_thresholds_compare_alike_in_float32():
    rng = np.random.default_rng(0)
    probability, correct = rng.random(1000), rng.random(1000) < 0.9
    for found in (
        calibration.for_coverage(probability, correct, 0.8),
        calibration.for_tpr(probability, correct, 0.8),
        calibration.guaranteed_risk(probability, correct, 0.2),
    ):
        served = probability.astype(np.float32) < np.float32(found.threshold)
        assert served.mean() == found.coverage


def distorted(size=20_000, slope=0.5, offset=1.0):
    """P(failure) whose logit must be halved and raised by one to be right."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 3, size)
    wrong = rng.random(size) < 1 / (1 + np.exp(-(slope * logit + offset)))
    return 1 / (1 + np.exp(-logit)), ~wrong


def test_platt_finds_the_distortion():
    probability, correct = distorted()
    found = calibration.platt(probability, correct)
    assert (found.slope, found.offset) == pytest.approx((0.5, 1.0), abs=0.05)
    assert metrics.ece(found(probability), correct) < 0.02 < metrics.ece(probability, correct)
    assert metrics.brier(found(probability), correct) < metrics.brier(probability, correct)


def test_temperature_finds_the_distortion():
    probability, correct = distorted(offset=0.0)
    found = calibration.temperature(probability, correct)
    assert (found.slope, found.offset) == (pytest.approx(0.5, abs=0.03), 0.0)


@pytest.mark.parametrize("fit", [calibration.platt, calibration.temperature])
@pytest.mark.parametrize("size", [30, 3000])
def test_calibration_is_the_logistic_regression(fit, size):
    """scikit-learn on every sample twice, as a failure and as a success, weighted by Platt's targets."""
    from sklearn.linear_model import LogisticRegression

    probability, correct = distorted(size)
    logit = np.log(probability / (1 - probability))
    wrong, right = (~correct).sum(), correct.sum()
    target = np.where(correct, 1 / (right + 2), (wrong + 1) / (wrong + 2))
    other = LogisticRegression(C=np.inf, fit_intercept=fit is calibration.platt, tol=1e-10, max_iter=10_000)
    other.fit(np.tile(logit, 2)[:, None], np.repeat([1, 0], size), sample_weight=np.concatenate([target, 1 - target]))
    found = fit(probability, correct)
    expected = (other.coef_.item(), float(np.ravel(other.intercept_)[0]))
    assert (found.slope, found.offset) == pytest.approx(expected, abs=1e-3)


@given(st.floats(1e-3, 100), st.floats(-20, 20), st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20))
def test_calibration_keeps_the_ranking(slope, offset, probability):
    answer = Calibration(slope, offset)(probability)
    assert ((answer >= 0) & (answer <= 1)).all()
    assert (np.diff(answer[np.argsort(probability)]) >= 0).all()


def test_perfect_ranking_has_a_finite_calibration():
    found = calibration.platt([0.1, 0.2, 0.3, 0.7, 0.8, 1.0], [True, True, True, False, False, False])
    assert 0 < found.slope < 100
    assert math.isfinite(found.offset)


def test_calibration_folds_into_the_head():
    torch = pytest.importorskip("torch")
    from vilu import ViLUHead

    torch.manual_seed(0)
    head = ViLUHead(8).eval().requires_grad_(False)
    image = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    text = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    before = head.failure_probability(image, text)
    calibration = Calibration(3.0, -0.7)
    answer = calibration.fold_into(head).failure_probability(image, text)
    assert np.allclose(answer, calibration(before.numpy()), atol=1e-5)
    assert torch.equal(head.failure_probability(image, text), before)


def test_calibration_refuses():
    with pytest.raises(metrics.OneSidedError, match="all 2 are right"):
        calibration.platt([0.1, 0.2], [True, True])
    with pytest.raises(metrics.OneSidedError, match="all 2 are wrong"):
        calibration.temperature([0.1, 0.2], [False, False])
    backwards = [0.01, 0.02, 0.98, 0.99] * 10, [False, False, True, True] * 10
    for fit in (calibration.platt, calibration.temperature):
        with pytest.raises(UserError, match="no better than chance"):
            fit(*backwards)
    with pytest.raises(UserError, match=r"not in \[0, 1\]"):
        Calibration(1.0)([float("nan")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_risk": 0.0}, "target_risk"),
        ({"target_risk": 1.0}, "target_risk"),
        ({"target_risk": float("nan")}, "target_risk"),
        ({"confidence": 1.0}, "confidence"),
        ({"failure_probability": [0.5, 1.5]}, "index 1 is outside"),
        ({"failure_probability": [0.5, float("nan")]}, "nan at index 1"),
        ({"failure_probability": [0.5]}, "one length"),
        ({"failure_probability": [], "correct": []}, "empty"),
    ],
)
def test_bad_input_is_one_line(change, said):
    with pytest.raises(UserError, match=said) as caught:
        calibration.guaranteed_risk(
            **{"failure_probability": [0.5, 0.1], "correct": [True, False], "target_risk": 0.1, **change}
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_shares_are_checked(share):
    with pytest.raises(UserError, match="coverage must be"):
        calibration.for_coverage([0.5], [True], share)
    with pytest.raises(UserError, match="tpr must be"):
        calibration.for_tpr([0.5], [True], share)
