"""vilu.evaluation.learning_curve: the power law on known curves, and what is said of real and made-up heads."""

import numpy as np
import pytest
import torch

from tests.support.evaluation import captioned, closed, head
from vilu.errors import UserError
from vilu.evaluation import bootstrap, metrics
from vilu.evaluation.evaluate import confidences, correct
from vilu.evaluation.learning_curve import _needed_images, _point, crossing, fit_power_law, learning_curve
from vilu.evaluation.metrics import OneSidedError
from vilu.scores import MCM

SIZES = np.array([200.0, 400, 800, 1600, 3200])
ERRORS = np.full(5, 0.01)


@pytest.mark.parametrize(("a", "b", "c"), [(0.95, 2.0, 0.5), (0.9, 20.0, 1.0), (0.8, 0.5, 0.3)])
def test_an_exact_power_law_is_found(a, b, c):
    law = fit_power_law(SIZES, a - b * SIZES**-c, ERRORS)
    assert law[[0, 2]] == pytest.approx([a, c], rel=0.02)
    target = a - b * 10_000**-c
    assert crossing(law, target) == pytest.approx(10_000, rel=0.05)


def test_a_noisy_power_law_is_found_on_average():
    rng = np.random.default_rng(0)
    truth = 0.95 - 2 * SIZES**-0.5
    laws = fit_power_law(SIZES, truth + rng.normal(scale=0.002, size=(200, 5)), ERRORS / 5)
    at = laws[:, 0] - laws[:, 1] * 6400 ** -laws[:, 2]
    assert np.median(at) == pytest.approx(0.95 - 2 * 6400**-0.5, abs=0.002)


def test_the_law_is_a_least_squares_over_its_grid():
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(1)
    y = 0.9 - 3 * SIZES**-0.6 + rng.normal(scale=0.003, size=5)
    errors = np.array([0.02, 0.01, 0.005, 0.004, 0.003])
    (a, b, c), _ = curve_fit(
        lambda n, a, b, c: a - b * n**-c, SIZES, y, [0.9, 3, 0.6], errors, bounds=([0, 0, 0.05], [1, 1e4, 3])
    )
    law = fit_power_law(SIZES, y, errors)

    def loss(p):
        return float(np.sum(((y - p[0] + p[1] * SIZES ** -p[2]) / errors) ** 2))

    assert loss(law) <= loss((a, b, c)) * 1.02 + 1e-9


def test_a_falling_or_flat_curve_never_crosses():
    for y in (np.full(5, 0.7), 0.9 - SIZES * 1e-5):
        law = fit_power_law(SIZES, y, ERRORS)
        assert law[1] >= 0
        assert np.isinf(crossing(law, 0.95))


def test_the_limit_is_at_most_one():
    law = fit_power_law(SIZES, 0.5 + 0.1 * np.log(SIZES / 200) / np.log(2), ERRORS)
    assert law[0] <= 1


def known_curve(aucs, mcm=0.85, spread=0.002, seeds=3, resamples=200):
    """Points and draws of heads whose AUC at SIZES is known, as `learning_curve` makes them."""
    rng = np.random.default_rng(0)
    whole, columns = {"MCM": mcm}, {"MCM": mcm + rng.normal(scale=spread, size=resamples)}
    points, errors, drawn = [], [], []
    for size, auc in zip(SIZES, aucs, strict=True):
        keys = [f"{size}/{s}" for s in range(seeds)]
        for key, offset in zip(keys, np.linspace(-spread, spread, seeds), strict=True):
            whole[key] = auc + offset
            columns[key] = whole[key] + rng.normal(scale=spread, size=resamples)
        point, error = _point(int(size), keys, whole, columns, "")
        points.append(point)
        errors.append(error)
        drawn.append([columns[key] for key in keys])
    return points, _needed_images(points, np.array(errors), mcm, drawn, columns["MCM"], 0)[0]


def test_the_size_from_which_the_head_is_better():
    points, needed = known_curve([0.7, 0.84, 0.88, 0.9, 0.91])
    assert [point.better for point in points] == [False, False, True, True, True]
    assert (needed.kind, needed.low, needed.size) == ("reached", 400, 800)
    # Better once, then not: the size is the one from which it stays better.
    _, needed = known_curve([0.88, 0.84, 0.84, 0.9, 0.91])
    assert (needed.kind, needed.low, needed.size) == ("reached", 800, 1600)


def test_an_extrapolation_brackets_the_truth():
    # 0.95 − 3 · N^−0.5 passes 0.92 at N = 10,000; significance asks for a little more.
    _, needed = known_curve(0.95 - 3 * SIZES**-0.5, mcm=0.92, spread=0.001)
    assert needed.kind == "extrapolated"
    assert 9_000 < needed.size < 20_000
    assert needed.low <= needed.size
    assert needed.low < 15_000
    assert needed.high is None or needed.high > 9_000
    assert f"about {needed.size:,} training images" in needed.text


def test_what_cannot_be_told_is_said():
    _, needed = known_curve([0.6, 0.61, 0.6, 0.605, 0.6])
    assert needed.kind == "unknown"
    assert needed.text.startswith("cannot tell: not better at 3,200")
    assert needed.size is None


def oracle(accuracy, test, right):
    """A 'head' whose P(failure) is known: right up to a share of the images that grows with training."""

    class Head(torch.nn.Module):
        dim = test.image.normalised.shape[1]

        def failure_probability(self, v, t=None):
            wrong = torch.from_numpy(~right).float()
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(len(wrong), generator=generator)
            return torch.where(torch.rand(len(wrong), generator=generator) < accuracy, wrong, noise)

    return Head()


def test_a_curve_of_heads_that_improve():
    test, train = closed(400, noise=0.6), closed(120, seed=1)
    right = correct(test)
    seen = []

    def fit(part, seed):
        seen.append((len(part), seed, part.labels.tolist()))
        if len(part) == 5:
            raise UserError("CLIP is wrong on 0 of 5 samples")
        return oracle(len(part) / 100, test, right)

    curve = learning_curve(train, test, [100, 5, 30], [0, 1], fit, resamples=50)
    assert [(count, seed) for count, seed, _ in seen] == [(n, s) for n in (5, 30, 100) for s in (0, 1)]
    # A seed's parts are nested, and seeds differ.
    assert seen[4][2][:30] == seen[2][2]
    assert seen[2][2] != seen[3][2]
    failed, middle, last = curve.points
    assert (failed.mean, failed.reason) == (None, "CLIP is wrong on 0 of 5 samples")
    assert middle.mean < last.mean == 1
    assert last.better
    mcm = confidences({"MCM": MCM()}, test)["MCM"]
    expected = bootstrap.bootstrap(metrics.auroc, mcm, right, resamples=50)
    assert tuple(vars(curve.mcm).values()) == pytest.approx(tuple(vars(expected).values()), abs=1e-12)
    assert last.difference == pytest.approx(1 - curve.mcm.value)
    # One seed: no interval over seeds, but a p-value from the test images.
    single = learning_curve(train, test, [30], [0], fit, resamples=50).points[0]
    assert single.low is None
    assert 0 <= single.p_value <= 1


def test_captions_have_curves_too():
    test = captioned(64)
    curve = learning_curve(captioned(40, seed=1), test, [20, 40], [0], lambda part, seed: head(8, seed), candidates=16)
    assert all(point.mean is not None for point in curve.points)
    assert curve.samples == 64
    assert curve.needed.kind == "unknown"


def test_bad_input():
    test, train = closed(), closed(seed=1)
    for sizes, seeds in (([], [0]), ([10], [])):
        with pytest.raises(UserError, match="both are needed"):
            learning_curve(train, test, sizes, seeds, lambda part, seed: head(12))
    for size in (0, 81):
        with pytest.raises(UserError, match=r"1\.\.80"):
            learning_curve(train, test, [size], [0], lambda part, seed: head(12))
    with pytest.raises(OneSidedError, match="all 80 answers are right"):
        learning_curve(train, closed(noise=0.01), [10], [0], lambda part, seed: head(12))
