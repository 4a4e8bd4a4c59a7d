"""The parts of a report that are about single images: the table by class, galleries, and the file of scores."""

import base64
import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.support.evaluation import captioned, closed, head, quick
from vilu.evaluation.evaluate import Case
from vilu.evaluation.metrics import auroc
from vilu.evaluation.report import tables as report
from vilu.evaluation.report.samples import SHOWN, SIDE, as_file, by_class, galleries, samples_of
from vilu.preprocess.image import ImageError

HOSTILE = tuple(f"<b>class {i}</b>" + " long" * 30 for i in range(5))


class Images:
    """Grey images whose shade is their place; every seventh cannot be read."""

    def read(self, i):
        if i % 7 == 0:
            raise ImageError("damaged")
        if i % 2:
            return np.full((40, 60, 3), i, np.uint8)
        content = io.BytesIO()
        Image.new("RGB", (30, 50), (i, i, i)).save(content, "PNG")
        return content.getvalue()

    def where(self, i):
        return f"<i>{i}</i>.png"


@pytest.fixture(scope="module")
def case():
    test = closed(200, name="world", names=HOSTILE)[torch.arange(199, -1, -1)]
    return test, quick([Case(test, None, head(12))], ["MCM", "Entropy", "ViLU"])


@pytest.fixture(scope="module")
def samples(case):
    test, evaluation = case
    threshold = float(np.median(evaluation.results[0].failure_probabilities["ViLU"]))
    return samples_of(test, evaluation.results[0], threshold, Images())


def test_the_answers_are_clips(case, samples):
    result = case[1].results[0]
    assert samples.rows.tolist() == list(range(199, -1, -1))
    assert ((samples.answers == samples.labels) == result.correct).all()


def test_a_row_a_class(case, samples):
    result = case[1].results[0]
    rows = by_class(result, samples)
    assert {row.name for row in rows} == set(HOSTILE)
    assert sum(row.samples for row in rows) == 200
    assert sum(row.right for row in rows) == int(result.correct.sum())
    failures = [row.samples - row.right for row in rows]
    assert failures == sorted(failures, reverse=True)
    of = samples.labels == HOSTILE.index(rows[0].name)
    failure = result.failure_probabilities["ViLU"][of]
    assert rows[0].failure_probability == pytest.approx(failure.mean())
    assert rows[0].auc == pytest.approx(auroc(-failure, result.correct[of]))
    wrong = samples.answers[of & ~result.correct]
    assert rows[0].mistakes == np.bincount(wrong).max()
    assert rows[0].mistaken_for == HOSTILE[int(np.bincount(wrong).argmax())]


def test_the_galleries_hold_what_they_say(case, samples):
    result = case[1].results[0]
    failure = result.failure_probabilities["ViLU"]
    (first, mistakes), (second, rejected) = galleries(result, samples)
    assert first.startswith("The most confident mistakes, of ")
    assert second.startswith("Right answers that are rejected at ")
    assert 0 < len(mistakes) <= SHOWN
    lowest = np.sort(failure[~result.correct])[:SHOWN]
    assert {shot.failure_probability for shot in mistakes} <= set(lowest.tolist())
    assert all(shot.label != shot.answer for shot in mistakes)
    assert all(shot.label == shot.answer for shot in rejected)
    assert all(shot.failure_probability >= samples.threshold for shot in rejected)
    assert rejected[0].failure_probability == max(shot.failure_probability for shot in rejected)
    for shot in (*mistakes, *rejected):
        place = int(shot.where.removeprefix("<i>").removesuffix("</i>.png"))
        assert place % 7, "an image that cannot be read is left out"
        picture = Image.open(io.BytesIO(base64.b64decode(shot.picture)))
        assert picture.size == (SIDE, SIDE)
        assert picture.getpixel((SIDE // 2, SIDE // 2)) == (place,) * 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_file_has_every_image_with_its_scores(case, samples, kind):
    result = case[1].results[0]
    content = io.BytesIO(as_file(result, samples, kind))
    if kind == "parquet":
        rows = pq.read_table(content).to_pylist()
    else:
        rows = list(csv.DictReader(io.TextIOWrapper(content, "utf-8")))
    assert len(rows) == 200
    assert list(rows[0]) == [
        "row", "source", "label", "answer", "correct", "failure_probability MCM", "failure_probability ViLU",
        "confidence MCM", "confidence Entropy", "confidence ViLU",
    ]  # fmt: skip
    for i in (0, 77, 199):
        assert int(rows[i]["row"]) == 199 - i
        assert rows[i]["source"] == f"<i>{199 - i}</i>.png"
        assert (rows[i]["label"] == rows[i]["answer"]) == (str(rows[i]["correct"]) == "True")
        assert float(rows[i]["confidence MCM"]) == result.confidences["MCM"][i]


def test_captions_have_scores_but_no_classes():
    test = captioned(60, dim=12)
    result = quick([Case(test, None, head(12))], ["MCM", "ViLU"], candidates=(16,)).results[0]
    found = samples_of(test, result, 0.5)
    assert (by_class(result, found), galleries(result, found)) == ([], [])
    lines = as_file(result, found, "csv").decode().splitlines()
    assert len(lines) == 1 + 48
    assert lines[0].startswith("row,correct,failure_probability MCM")


def test_the_report_has_them_and_escapes_them(case, samples, tmp_path):
    _, evaluation = case
    report.write(evaluation, tmp_path / "out", samples={"world": samples}, kind="parquet")
    text = (tmp_path / "out" / report.HTML).read_text("utf-8")
    assert "<b>class" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;class 0&lt;/b&gt;" in text
    for said in ("By class", "The most confident mistakes", "Right answers that are rejected", "chance: 20.0%"):
        assert said in text
    assert "1-world-samples.parquet" in text
    document = json.loads((tmp_path / "out" / report.JSON).read_text())
    assert "1-world-samples.parquet" in document["files"]
    assert [row["samples"] for row in document["classes"]["world"]] == [
        row.samples for row in by_class(evaluation.results[0], samples)
    ]
    tables, scrolling = text.count("<table"), text.count('<div class="wide"><table')
    assert tables == scrolling, "every table scrolls inside its section"
    report.write(evaluation, tmp_path / "out", samples={"world": samples}, kind="none")
    assert not list((tmp_path / "out").glob("*samples*"))
