"""vilu.evaluation.evaluate: who is right, which rows there are, and that the numbers are vilu.evaluation.metrics'."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.evaluation import captioned, closed, head, quick
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.errors import UserError
from vilu.evaluation import bootstrap
from vilu.evaluation.columns import COLUMNS, INDEX
from vilu.evaluation.evaluate import CANDIDATES, Case, confidences, correct, evaluate, group_sizes, headline
from vilu.scores import MCM, SCORES


def row(result, method):
    return next(row for row in result.rows if row.method == method)


def everything(evaluation):
    for result in (*evaluation.results, *(r for s in evaluation.sweeps.values() for r in s), evaluation.mean):
        yield from result.rows if result else ()


def assert_sound(evaluation):
    """Every number finite; a row has numbers or a reason of one line, never both."""
    for one in everything(evaluation):
        assert bool(one.reason) != bool(one.cells)
        assert "\n" not in one.reason
        for cell in (*one.cells.values(), *one.against.values()):
            assert all(math.isfinite(value) for value in vars(cell).values())


# Few, short vectors of small integers: ties between candidates are common and exact.
grids = st.lists(st.tuples(*[st.integers(-2, 2)] * 6), min_size=2, max_size=14)


@settings(deadline=None)
@given(grids, st.data())
def test_right_answers_among_captions_are_a_loop(rows, data):
    image, text = (Embeddings(torch.tensor(rows, dtype=torch.float32)[:, side]) for side in (slice(3), slice(3, 6)))
    size = data.draw(st.integers(2, len(rows)))
    expected = []
    for start in range(0, len(rows) - size + 1, size):
        for i in range(start, start + size):
            own = sum(a * b for a, b in zip(rows[i][:3], rows[i][3:], strict=True))
            others = [
                sum(a * b for a, b in zip(rows[i][:3], rows[j][3:], strict=True)) for j in range(start, start + size)
            ]
            expected.append(own >= max(others))
    assert correct(EmbeddedSet("s", image, text), size).tolist() == expected


def test_right_answers_of_a_closed_set_and_of_many_blocks(monkeypatch):
    test = closed(300)
    expected = [
        int(np.argmax([float(v @ t) for t in test.text.normalised.double().numpy()])) == int(label)
        for v, label in zip(test.image.normalised.double().numpy(), test.labels, strict=True)
    ]
    assert correct(test).tolist() == expected
    captions = captioned(90)
    whole = correct(captions, 45)
    monkeypatch.setattr("vilu.evaluation.evaluate.BLOCK", 7)
    assert correct(test).tolist() == expected
    assert correct(captions, 45).tolist() == whole.tolist()


def test_equal_captions_are_a_tie_and_right():
    test = captioned(600, distinct=3, noise=0.01)
    assert correct(test, 200).all()


def test_caption_confidences_are_those_of_each_group():
    test, score = captioned(70), MCM()
    found = confidences({"MCM": score}, test, 16)["MCM"]
    assert found.shape == (64,)
    for start in range(0, 64, 16):
        some = slice(start, start + 16)
        alone = score.confidence(test.image[some], test.text[some], test.logit_scale)
        np.testing.assert_array_equal(found[some], alone.double().numpy())


@pytest.mark.parametrize("size", [None, 0, 1, 71])
def test_captions_need_a_group_that_fits(size):
    with pytest.raises(UserError, match="groups of 2 to 70"):
        correct(captioned(70), size)


def test_group_sizes():
    assert group_sizes(closed()) == [None]
    assert group_sizes(captioned(70)) == [70]
    assert group_sizes(captioned(600)) == [128, 256, 512]
    assert headline(list(CANDIDATES)) == 1024
    assert headline([128, 256, 512]) == 512


def test_every_method_side_by_side():
    test, train = (closed(200, seed=seed, projection=True) for seed in (0, 1))
    evaluation = quick([Case(test, train, head(12))])
    assert_sound(evaluation)
    (result,) = evaluation.results
    assert [one.method for one in result.rows] == list(SCORES)
    assert not any(one.reason for one in result.rows)
    assert evaluation.mean is None
    assert not evaluation.sweeps
    stated = {one.method for one in result.rows if "ece" in one.cells}
    assert stated == {"MCM", "class bias", "LVU-BCE", "LVU-MSE", "ConfidNet", "BayesVLM", "ViLU"}
    right = correct(test)
    assert (result.samples, result.failures, result.accuracy) == (200, int((~right).sum()), right.mean())
    mcm = MCM().confidence(test.image, test.text, 100.0).double().numpy()
    for column in COLUMNS:
        expected = bootstrap.bootstrap(column.function, 1 - mcm if column.probability else mcm, right, resamples=20)
        cell = row(result, "MCM").cells[column.key]
        assert (cell.value, cell.low, cell.high) == pytest.approx(
            (expected.value, expected.low, expected.high), abs=1e-12
        )
    ours = 1 - head(12).failure_probability(test.image.normalised, test.text.normalised).detach().double().numpy()
    for key in ("auc", "fpr95"):
        difference = bootstrap.paired_bootstrap(COLUMNS[INDEX[key]].function, ours, mcm, right, resamples=20)
        pair = row(result, "MCM").against[key]
        assert (pair.difference, pair.p_value) == pytest.approx((difference.difference, difference.p_value))
    assert not row(result, "ViLU").against


def test_what_cannot_be_computed_is_a_row_with_the_reason():
    test = closed()
    wholly_right = closed(noise=0.01, seed=2)
    evaluation = quick([Case(test, wholly_right, head(12))])
    assert_sound(evaluation)
    result = evaluation.results[0]
    assert "right on all 80 training samples" in row(result, "LVU-BCE").reason
    assert "inputs and outputs" in row(result, "BayesVLM").reason
    assert row(result, "LVU-MSE").cells
    alone = quick([Case(test)])
    assert_sound(alone)
    for one in alone.results[0].rows:
        needs = one.method == "ViLU" or SCORES[one.method]().needs_fit
        assert bool(one.reason) == needs
        assert not one.against


def test_a_score_that_is_not_finite_is_a_reason():
    class Broken(MCM):
        def _confidence(self, image, text, scale):
            return torch.full((len(image),), math.nan)

    evaluation = evaluate([Case(closed())], ["MCM", "Broken"], factories={**SCORES, "Broken": Broken}, resamples=5)
    assert_sound(evaluation)
    assert row(evaluation.results[0], "Broken").reason == "Broken is not finite on image 0"


@pytest.mark.parametrize(("noise", "side"), [(0.01, "right"), (None, "wrong")])
def test_a_one_sided_test_set_has_a_note_and_what_is_defined(noise, side):
    test = closed(noise=noise or 0.01)
    if noise is None:
        test = replace(test, labels=(test.labels + 1) % 5)
    evaluation = quick([Case(test, closed(seed=1), head(12))])
    assert_sound(evaluation)
    result = evaluation.results[0]
    assert result.note == f"all 80 answers are {side}: AUC, FPR95, AUPR-err are not defined"
    assert set(row(result, "MCM").cells) == {c.key for c in COLUMNS if not c.two_sided}
    assert not row(result, "MCM").against


def test_captions_sweep_the_candidates():
    test, train = captioned(80), captioned(60, seed=1, projection=True)
    evaluation = quick([Case(test, train, head(8))], candidates=(32, 8, 16, 100))
    assert_sound(evaluation)
    sweep = evaluation.sweeps["captions"]
    assert [(r.candidates, r.samples, r.dropped) for r in sweep] == [(8, 80, 0), (16, 80, 0), (32, 64, 16)]
    assert evaluation.results[0] is sweep[-1]
    assert "captions cannot fit it" in row(sweep[0], "Rel-U").reason
    for result in sweep:
        assert result.accuracy == correct(test, result.candidates).mean()
    assert sweep[0].accuracy > sweep[-1].accuracy


def test_the_mean_over_data_sets():
    cases = [Case(closed(seed=i, name=name), closed(seed=9), head(12)) for i, name in enumerate("ab")]
    evaluation = quick(cases, ["MCM", "Rel-U", "ViLU"])
    one, two, mean = *evaluation.results, evaluation.mean
    for method in ("MCM", "ViLU"):
        cell = row(mean, method).cells["auc"]
        assert cell.value == pytest.approx(
            (row(one, method).cells["auc"].value + row(two, method).cells["auc"].value) / 2
        )
        drawn = (one.draws[method][:, 0] + two.draws[method][:, 0]) / 2
        assert (cell.low, cell.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert mean.samples == 160
    cases[1] = replace(cases[1], train=None)
    absent = quick(cases, ["MCM", "Rel-U", "ViLU"]).mean
    assert row(absent, "Rel-U").reason == "not computed on b"
    assert row(absent, "MCM").cells


def test_an_undefined_cell_of_one_set_is_undefined_in_the_mean():
    evaluation = quick([Case(closed(name="a")), Case(closed(noise=0.01, name="b"))], ["MCM"])
    assert_sound(evaluation)
    assert "auc" not in row(evaluation.mean, "MCM").cells
    assert "aurc" in row(evaluation.mean, "MCM").cells
    assert "b: all 80 answers are right" in evaluation.mean.note


def test_a_score_over_other_classes_is_not_carried_over():
    # As many classes, but others: Rel-U's matrix would be read without an error and mean nothing.
    train = closed(seed=1, names=tuple("abcde"), name="letters")
    evaluation = quick([Case(closed(), train, head(12))])
    assert_sound(evaluation)
    result = evaluation.results[0]
    assert row(result, "Rel-U").reason == "Rel-U belongs to the classes it was fitted on, and letters has others"
    assert row(result, "LVU-MSE").cells
    assert result.trained_on == "letters"


def test_a_shared_train_set_is_fitted_on_once():
    fits = []

    class Counting(MCM):
        needs_fit = True

        def _fit(self, image, labels, text, scale):
            fits.append(len(image))

    train = closed(seed=1)
    cases = [Case(closed(), train), Case(closed(seed=2), train), Case(closed(seed=3), closed(seed=4, count=30))]
    found = evaluate(cases, ["C"], factories={"C": Counting}, resamples=2)
    assert fits == [80, 30]
    assert [result.name for result in found.results] == ["world", "world (2)", "world (3)"]


def test_the_same_seed_gives_the_same_evaluation():
    case = Case(closed(), closed(seed=1), head(12))
    assert quick([case]) == quick([case])
    assert quick([case], ["MCM"]) != quick([case], ["MCM"], seed=1)


def test_bad_input():
    case = Case(closed())
    for cases, methods in (([], ["MCM"]), ([case], [])):
        with pytest.raises(UserError, match="nothing to evaluate"):
            evaluate(cases, methods)
    with pytest.raises(UserError, match="unknown method 'MCN'"):
        evaluate([case], ["MCN"])
    with pytest.raises(UserError, match="one class only"):
        evaluate([Case(closed(classes=1))])
    with pytest.raises(UserError, match="12 wide, the checkpoint's head reads 16"):
        evaluate([Case(closed(), head=head(16))])
    with pytest.raises(UserError, match="12 wide, those to fit on"):
        evaluate([Case(closed(), closed(dim=8))])
    for bad in ((), (1, 128)):
        with pytest.raises(UserError, match="candidates"):
            evaluate([Case(captioned())], candidates=bad)
    with pytest.raises(UserError, match="resamples"):
        evaluate([case], ["MCM"], resamples=0)
    with pytest.raises(UserError, match="level"):
        evaluate([case], ["MCM"], level=1)
