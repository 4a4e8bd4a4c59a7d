"""Accuracy against cost: points follow the rule, the cheapest is the cheapest, and a better doubt costs less."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from vilu import UserError
from vilu.evaluation.cascade import Stage, answered_by, mean_cost
from vilu.evaluation.cascade_curve import ALL, METHODS, Cost, cascade_curve
from vilu.evaluation.report import cascade as report

COSTS = [Cost(10e6, 1.0), Cost(80e6, 4.0)]


def stages(samples, seed=0):
    """A small model whose P(failure) knows its mistakes and whose MCM half knows them, and a large one."""
    rng = np.random.default_rng(seed)
    failure = rng.beta(0.3, 1.2, samples)
    small, large = rng.random(samples) > failure, rng.random(samples) > 0.03
    noisy = np.clip(0.5 * failure + 0.5 * rng.random(samples), 0, 1)
    doubts = {"P(failure)": failure, "MCM": noisy, "Entropy": noisy**2, "random": rng.random(samples)}
    return {name: [Stage(doubt, small, 1), Stage(doubt, large, 4)] for name, doubt in doubts.items()}


@pytest.fixture(scope="module")
def curve():
    return cascade_curve("synthetic", ("small", "large"), stages(1500), COSTS, margin=0.01, resamples=99)


def test_points_follow_the_rule(curve):
    by_method = stages(1500)
    assert [line.method for line in curve.lines] == list(METHODS)
    for line in curve.lines:
        pair = by_method[line.method]
        assert line.points[0].reached[1] < 0.02
        assert line.points[-1].threshold == ALL
        assert line.points[-1].reached == (1, 1)
        assert line.points[-1].accuracy == curve.alone[-1].accuracy, "all images on: the last stage alone"
        for point in line.points[::10]:
            of_last = answered_by(pair, point.threshold) == 1
            right = np.where(of_last, pair[1].correct, pair[0].correct)
            assert point.accuracy.value == pytest.approx(right.mean(), abs=1e-12)
            assert point.accuracy.low <= point.accuracy.value <= point.accuracy.high
            assert point.cost.milliseconds == pytest.approx(mean_cost(pair, point.threshold))
            assert point.cost.multiply_adds == pytest.approx(10e6 + 80e6 * of_last.mean())


def test_the_cheapest_point_and_the_comparison(curve):
    wanted = curve.alone[-1].accuracy.value - 0.01
    for line in curve.lines:
        enough = [point.cost.multiply_adds for point in line.points if point.accuracy.value >= wanted]
        assert line.cheapest.cost.multiply_adds == min(enough)
        assert line.share.value == pytest.approx(min(enough) / 80e6)
    ours, mcm, _, chance = curve.lines
    assert ours.against is None
    assert ours.share.value < mcm.share.value < chance.share.value
    for line in (mcm, chance):
        assert line.against.difference == pytest.approx(ours.share.value - line.share.value)
        assert line.against.p_value == 0.02, "no resample has the other sign: the smallest of 99"
    same = stages(300)
    same["MCM"] = same["P(failure)"]
    equal = cascade_curve("same", ("small", "large"), same, COSTS, resamples=49).lines[1].against
    assert (equal.difference, equal.p_value) == (0, 1)


def test_three_stages_and_ties():
    first = Stage([0.5] * 6 + [0.9] * 4, [True] * 6 + [False] * 4, 1)
    second = Stage([0.1] * 6 + [0.2, 0.2, 0.95, 0.95], [True] * 8 + [False] * 2, 1)
    last = Stage([0.0] * 10, [True] * 10, 1)
    costs = [Cost(1, 1), Cost(10, 10), Cost(100, 100)]
    found = cascade_curve("three", "abc", {"P(failure)": [first, second, last]}, costs, margin=0, resamples=9)
    (line,) = found.lines
    assert [point.threshold for point in line.points] == [np.float32(0.9), 0.5, ALL]
    assert line.cheapest.reached == (1, 0.4, 0.2)
    assert line.cheapest.cost.multiply_adds == 1 + 4 + 20


def test_what_is_refused():
    good = stages(50)
    with pytest.raises(UserError, match="at least two stages"):
        cascade_curve("x", ("a",), {"P(failure)": good["MCM"][:1]}, COSTS[:1])
    with pytest.raises(UserError, match="same samples"):
        cascade_curve("x", ("a", "b"), {"P(failure)": [good["MCM"][0], stages(40)["MCM"][1]]}, COSTS)
    with pytest.raises(UserError, match="margin"):
        cascade_curve("x", ("a", "b"), good, COSTS, margin=-0.1)
    with pytest.raises(UserError, match="resamples"):
        cascade_curve("x", ("a", "b"), good, COSTS, resamples=0)


def test_the_report(curve, tmp_path):
    hostile = replace(curve, name="<b>$x^2$", alone=(replace(curve.alone[0], name="<i>"), curve.alone[1]))
    for one in (curve, hostile):  # the second replaces the first
        report.write(one, tmp_path / "out", {"test": one.name})
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["accuracy-against-cost.png", "evaluation.csv", "evaluation.json", "report.html"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "10.0 M" in page
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert document["files"] == files
    assert document["lines"][1]["against"]["p_value"] == 0.02
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open(encoding="utf-8")))
    assert len(rows) == 2 + sum(len(line.points) for line in curve.lines)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="not part of an earlier report"):
        report.write(curve, tmp_path / "mine", {})
