"""CLIP's accuracy beside chance, and claims that are withheld where failures or right answers are few."""

import json

import numpy as np
import pytest
import torch

from tests.support.evaluation import closed, head, quick
from vilu.embeddings import EmbeddedSet
from vilu.evaluation.chance import accuracy
from vilu.evaluation.evaluate import Case
from vilu.evaluation.learning_curve import learning_curve
from vilu.evaluation.report.html import summary
from vilu.evaluation.report.tables import as_csv, as_json
from vilu.evaluation.results import FEW, too_few


def answers(right, wrong):
    return np.arange(right + wrong) < right


def test_chance_is_one_class_of_k_or_the_largest_class():
    even = accuracy(answers(60, 40), np.arange(100) % 10, 10)
    assert (even.chance, even.rule) == (0.1, "1 of 10 classes")
    uneven = accuracy(answers(60, 40), (np.arange(100) < 20).astype(int), 2)
    assert (uneven.chance, uneven.rule) == (0.8, "always the largest class")
    captions = accuracy(answers(60, 40), None, 50)
    assert str(captions) == "right on 60.0% of 100 images; chance is 2.0% (1 of 50 captions)"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (100, 900, "CLIP is at chance"),
        (10, 990, "CLIP is at chance"),
        (500, 500, ""),
        (150, 850, ""),
        (990, 10, "CLIP is nearly always right: 10 failures among 1,000 answers, fewer than 50"),
        (60, 40, "40 failures among 100 answers, fewer than 50; they are too few"),
        (30, 60, "30 right answers among 90 answers"),
    ],
)
def test_answers_that_teach_little_are_warned_of(right, wrong, said):
    labels = np.arange(right + wrong) % 10
    warning = accuracy(answers(right, wrong), labels, 10).warning
    assert warning.startswith(said)
    assert bool(warning) == bool(said)


def test_right_answers_count_as_failures_do():
    assert too_few(FEW, 2 * FEW) == ""
    assert too_few(FEW - 1, 2 * FEW) == "49 failures among 100 answers, fewer than 50"
    assert too_few(FEW, 2 * FEW - 1) == "49 right answers among 99 answers, fewer than 50"
    assert too_few(44, 45) == "1 right answer among 45 answers, fewer than 50"


def with_right(count, right):
    """`count` images of which CLIP answers `right` right: the labels of the others are moved to the next class."""
    data = closed(count, noise=0.1)
    answered = (data.image.normalised @ data.text.normalised.T).argmax(dim=1)
    labels = (answered + (torch.arange(count) >= right)) % 5
    return EmbeddedSet(data.name, data.image, data.text, labels, data.class_names)


@pytest.mark.parametrize("right", [1, 44, FEW + 100])
def test_no_form_of_the_report_claims_on_a_handful(right):
    few = right < FEW
    test = with_right(45 if few else right + FEW, right)
    evaluation = quick([Case(test, None, head(12)), Case(test, None, head(12, seed=1))], ["MCM", "Entropy", "ViLU"])
    for result in (*evaluation.results, evaluation.mean):
        assert all(bool(row.against) == (not few and row.method != "ViLU") for row in result.rows)
    assert ("too few to say which method is better" in evaluation.results[0].note) == few
    assert ("too few to say" in summary(evaluation)) == few
    assert ("p = " in summary(evaluation)) == (not few)
    document = json.loads(json.dumps(as_json(evaluation)))["results"][0]
    assert (document["methods"]["MCM"]["vilu_minus"]["auc"] is None) == few
    assert document["chance_rule"] in ("1 of 5 classes", "always the largest class")
    p_values = [line.split(",")[-2] for line in as_csv(evaluation).splitlines()[1:]]
    assert any(p_values) == (not few)


def test_a_learning_curve_claims_nothing_on_a_handful():
    train, test = closed(120), with_right(60, 55)
    curve = learning_curve(train, test, [40, 80, 120], [0, 1], lambda part, seed: head(12, seed), resamples=20)
    assert curve.needed.kind == "unknown"
    assert "5 failures among 60 answers" in curve.needed.text
    assert [point.p_value for point in curve.points] == [None] * 3
    assert not any(point.better for point in curve.points)
