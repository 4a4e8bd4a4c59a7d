"""Figures of the parity report on hand-made answers, and what passes."""

from dataclasses import replace

import numpy as np
import pytest

from vilu.export import parity, precision, report
from vilu.export.parity import Answers


def answers(failure, index=(0, 1, 0, 1), embedding=None):
    v = np.eye(4, dtype=np.float32) if embedding is None else np.asarray(embedding, np.float32)
    return Answers(v, np.array(index), np.array(failure, np.float32))


EAGER = answers([0.1, 0.9, 0.2, 0.8])


def test_compared_answers_by_hand():
    turned = np.eye(4)
    turned[0] = [0.6, 0.8, 0, 0]
    row = parity.compare_answers(answers([0.1, 0.9, 0.3, 0.8], (0, 1, 1, 1), turned), EAGER, None)
    assert row["cosine"] == pytest.approx({"mean": 0.9, "min": 0.6})
    assert row["argmax_agreement"] == 0.75
    assert row["failure_probability_error"] == pytest.approx({"max": 0.1, "mean": 0.025}, abs=1e-7)
    assert row["ranking"] is None


def test_the_outlier_score_is_compared_where_both_have_one():
    eager = replace(EAGER, outlier_score=np.array([0, 1, 1, 2], np.float32))
    exported = replace(EAGER, outlier_score=np.array([0, 1.2, 1, 2], np.float32))
    row = parity.compare_answers(exported, eager, None)
    assert row["outlier_score_error"] == pytest.approx({"max": 0.2, "mean": 0.05}, abs=1e-7)
    assert "outlier_score_error" not in parity.compare_answers(exported, EAGER, None)
    assert eager.first(2).outlier_score.tolist() == [0, 1]


def test_ranking_by_hand():
    labels = np.array([0, 0, 0, 0])  # the eager answers are right, wrong, right, wrong: perfectly ranked
    row = parity.compare_answers(answers([0.1, 0.15, 0.2, 0.8]), EAGER, labels)
    assert row["ranking"]["eager"] == {"AUC": 1.0, "FPR95": 0.0}
    assert row["ranking"]["change"]["AUC"] == pytest.approx(-0.25)
    assert row["ranking"]["images"] == 4
    assert parity.compare_answers(EAGER, EAGER, np.array([0, -1, 0, -1]))["ranking"] == (
        "AUROC is not defined: all 2 answers are right"
    )


def test_nan_is_an_infinite_error_and_no_cosine():
    broken = np.eye(4)
    broken[2] = np.nan
    row = parity.compare_answers(answers([0.1, np.nan, 0.2, 0.8], embedding=broken), EAGER, None)
    assert row["failure_probability_error"]["max"] == np.inf
    assert row["cosine"]["min"] == 0


@pytest.mark.parametrize(("largest", "sizes"), [(2, (1, 2)), (8, tuple(range(1, 9))), (32, (*range(1, 9), 16, 31, 32))])
def test_batch_sizes(largest, sizes):
    assert parity.batch_sizes(largest) == sizes


@pytest.mark.parametrize(("move", "independent"), [(0.0, True), (5e-7, True), (1e-5, False)])
def test_an_answer_that_depends_on_its_batch_is_reported(move, independent):
    feed = np.arange(7)

    def answer(images, size):
        assert len(images) == size
        failure = 0.5 + move * (size == 3)
        return Answers(np.ones((size, 1)), images % 2, np.full(size, failure))

    row = parity.batch_effect(answer, feed, answer(feed, 7), (1, 3, 7), lambda: None)
    assert row["failure_probability_moves"] == pytest.approx(move)
    assert row["argmax_changes"] == 0
    assert row["independent"] is independent
    assert ("**over**" in report._batch_line("cpu", row)) is not independent


def report_of(precision_, **changes):
    row = {"images": 256, "cosine": {"mean": 1.0, "min": 1.0}, "argmax_agreement": 1.0, "ranking": None}
    row |= {"failure_probability_error": {"max": 0.0, "mean": 0.0}}
    return {"precision": precision_, "graphs": {}, "answers": {"cpu": row | changes}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("float32", {"failure_probability_error": {"max": 2e-4, "mean": 0}}, "P(failure) differs by 2.00e-04"),
        ("float32", {"argmax_agreement": 255 / 256}, "0.39% of the answers differ"),
        ("float16", {"cosine": {"mean": 0.9989, "min": 0.9}}, "mean cosine 0.99890, the limit is 0.999"),
        ("float16", {"argmax_agreement": 0.994}, "0.60% of the answers differ, the limit is 0.5%"),
        ("bfloat16", {"cosine": {"mean": 0.9989, "min": 0.9}}, "mean cosine 0.99890"),
        ("int8", {"cosine": {"mean": 0.989, "min": 0.9}}, "mean cosine 0.98900, the limit is 0.99"),
        ("int8", {"argmax_agreement": 0.984}, "1.60% of the answers differ, the limit is 1.5%"),
        (
            "int8",
            {"ranking": {"images": 9, "change": {"AUC": -0.004, "FPR95": 0}}},
            "9 labelled images): AUC falls by 0.40 points, the limit is 0.3",
        ),
    ],
)
def test_each_budget_refuses(name, changes, message):
    (line,) = parity.over_budget(report_of(name, **changes))
    assert message in line


@pytest.mark.parametrize("name", precision.BUDGETS)
def test_each_budget_lets_the_rest_pass(name):
    loss = {"argmax_agreement": 0.9961, "cosine": {"mean": 0.9991, "min": 0.5}}
    loss["failure_probability_error"] = {"max": 0.2, "mean": 0.1}
    loss["ranking"] = {"change": {"AUC": -0.002, "FPR95": 0.3}}
    assert list(parity.over_budget(report_of(name))) == []
    assert (list(parity.over_budget(report_of(name, **loss))) == []) == (name != "float32")


def test_the_head_is_float32_in_every_precision():
    row = {"max_abs_error": {"FAILURE_PROBABILITY": 2e-4}, "argmax_agreement": 1.0}
    found = report_of("int8") | {"graphs": {"vilu_head": {"cpu": {"8": row}}, "vilu_full": {"cpu": {"8": row}}}}
    assert len(list(parity.over_budget(found))) == 2
