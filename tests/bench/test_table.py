"""bench/table.py on tiny data: rows are vilu.evaluation.metrics', means are over seeds, words follow the numbers."""

import json

import numpy as np
import pytest

from bench import table, table_report
from bench.common import write_results
from tests.support.evaluation import captioned, closed
from vilu.evaluation import metrics
from vilu.evaluation.evaluate import CLASS_BOUND
from vilu.scores import SCORES

METHODS = [*SCORES, *table_report.PARTS]
FREE = ("MCM", "Entropy", "Doctor", "Rel-U", "TrustVLM", "class bias", "BayesVLM")
SETS = {
    "closed": (closed(120, projection=True), closed(90, seed=1, projection=True)),
    "captions": (captioned(120, projection=True), captioned(90, seed=1, projection=True)),
}


@pytest.fixture(scope="module", params=SETS)
def evaluations(request):
    train, test = SETS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vilu.training.validation.RESAMPLES", 5)  # the table does not read it
        return [table.run_seed(train, test, seed, candidates=(16, 32), resamples=30, quick=True) for seed in range(2)]


def test_rows_are_the_metrics_of_each_seed(evaluations):
    rows = [row for seed, evaluation in enumerate(evaluations) for row in table.rows(evaluation, seed)]
    captions = evaluations[0].results[0].captions
    assert [row["method"] for row in rows] == METHODS * (4 if captions else 2)
    functions = {
        "auc": metrics.auroc,
        "fpr95": metrics.fpr_at_tpr,
        "aupr_error": metrics.aupr_error,
        "aurc": metrics.aurc,
    }
    for row in rows:
        result = next(r for r in table.swept(evaluations[row["seed"]]) if r.candidates == row["candidates"])
        if captions and row["method"] in CLASS_BOUND:
            assert "captions cannot fit it" in row["reason"]
            continue
        for key, function in functions.items():
            value = function(result.confidences[row["method"]], result.correct)
            assert row[key]["value"] == pytest.approx(value, abs=1e-12)
            assert row[key]["low"] <= row[key]["high"]


def test_a_seed_changes_what_is_trained_and_nothing_else(evaluations):
    first, second = (evaluation.results[0].confidences for evaluation in evaluations)
    for method in first.keys() - {"ViLU"}:  # which is MCM's answer where four epochs gain nothing, whatever the seed
        assert np.array_equal(first[method], second[method]) == (method in FREE), method


def test_means_are_over_seeds_and_leads_over_shared_draws(evaluations):
    results = [evaluation.results[0] for evaluation in evaluations]
    means = {row["method"]: row for row in table.means(evaluations) if row["candidates"] == results[0].candidates}
    assert list(means) == [method for method in METHODS if method in results[0].confidences]
    for method, row in means.items():
        rival = table_report.WHOLE if method in table_report.PARTS else "ViLU"
        values = np.array([metrics.auroc(r.confidences[method], r.correct) for r in results])
        rivals = np.array([metrics.auroc(r.confidences[rival], r.correct) for r in results])
        assert row["auc"]["mean"] == pytest.approx(values.mean())
        assert row["auc"]["sd"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        if method == rival:
            assert "lead" not in row["auc"]
            continue
        assert row["auc"]["lead"]["difference"] == pytest.approx((rivals - values).mean())
        drawn = np.mean([r.draws[rival][:, 0] - r.draws[method][:, 0] for r in results], axis=0)
        drawn = np.round(drawn, 12)  # sums in another order
        tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
        assert row["auc"]["lead"]["p_value"] == pytest.approx(min(1, 2 * (1 + tail) / 31))


def part(auc, fpr95, p=0.01, captions=False):
    """A data set's part of the JSON with these means, MCM and the whole head leading by what they are above."""
    rows = []
    for method, values in {m: (auc[m], fpr95[m]) for m in auc}.items():
        rival = table_report.WHOLE if method in table_report.PARTS else "ViLU"
        row = {"method": method, "candidates": 5, "seeds": 3}
        for key, own, of in (("auc", values[0], auc), ("fpr95", values[1], fpr95)):
            lead = {"difference": of[rival] - own, "low": 0, "high": 0, "p_value": p}
            row[key] = {"mean": own, "sd": 0.01, "low": own, "high": own} | ({"lead": lead} if method != rival else {})
        for key in ("aupr_error", "aurc"):
            row[key] = {"mean": 0.5, "sd": 0.0, "low": 0.5, "high": 0.5}
        rows.append(row)
    told = {"commit": "c", "torch": "t", "machine": "m", "seconds": 1, "train": 9, "test": 9, "failures": 3}
    return told | {"captions": captions, "candidates": 5, "resamples": 30, "means": rows, "rows": []}


def crafted(ours, whole=0.9, p=0.01):
    auc = {"MCM": 0.8, "LVU-BCE": 0.7, "LVU-MSE": 0.85, "ViLU": ours}
    auc |= {"v": 0.7, "v, t_pred": 0.8, "v, z_attn": 0.85, table_report.WHOLE: whole}
    return {"set": part(auc, {m: 1 - a for m, a in auc.items()}, p, captions=True)}


def test_findings_follow_the_numbers():
    text = " ".join(table_report.findings(crafted(0.9)))
    assert "set, AUC: ViLU is ahead of the best baseline, LVU-MSE, by 5.0 points" in text
    assert "set, FPR95: ViLU is ahead of the best baseline, LVU-MSE, by 5.0 points" in text
    assert text.count("significantly ahead of 3 of 3") == 2
    assert "the whole head is above each part" in text
    assert "AUC 90.0 with it, 90.0 without (what the paper describes), where MCM has 80.0, from 9 training" in text
    assert "LVU-BCE is below MCM, -10.0" in text
    assert "LVU-MSE is above MCM, +5.0" in text
    text = " ".join(table_report.findings(crafted(0.82, whole=0.83)))
    assert "set, AUC: ViLU is behind the best baseline, LVU-MSE, by 3.0 points" in text
    assert text.count("significantly ahead of 2 of 3") == 2
    assert "the whole head is not above v, z_attn in AUC" in text
    assert "significantly ahead of 0 of 3" in " ".join(table_report.findings(crafted(0.9, p=0.2)))


def test_it_is_written_as_json_markdown_and_a_picture(evaluations, tmp_path):
    result = evaluations[0].results[0]
    made = {
        "tiny": {
            **part({}, {}),
            "captions": result.captions,
            "candidates": result.candidates,
            "means": table.means(evaluations),
            "rows": table.rows(evaluations[0], 0),
        }
    }
    json.dumps(made, allow_nan=False)
    text = table_report.markdown(made)
    for method in METHODS:
        assert f"\n| {method} |" in text or f"\n{method}: " in text
    assert "nan" not in text.lower().split()
    write_results(tmp_path / "table", {".png": table_report.draw(made), ".md": text})
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.md", "table.png"]
