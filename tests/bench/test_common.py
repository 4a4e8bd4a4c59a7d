"""What the benchmarks share: quantiles by their definition, results that are written whole, the authors' head."""

import json
import statistics

import numpy as np
import pytest
import torch

from bench import common
from bench.authors import AuthorsFailureProbability, is_authors_form
from tests.support.embeddings import unit_rows
from vilu import ViLUHead


def test_quantiles_by_hand():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert common.quantiles(values) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    found = common.quantiles(values, unit="_us", scale=1e6, method="weibull")
    cuts = statistics.quantiles(values, n=10)
    assert found == pytest.approx({"median_us": 3.5e6, "q20_us": 1e6 * cuts[1], "q80_us": 1e6 * cuts[7]})


def test_percentiles_are_milliseconds_and_none_without_answers():
    assert common.percentiles([0.001 * i for i in range(101)]) == pytest.approx({"p50": 50.0, "p90": 90.0, "p99": 99.0})
    assert common.percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_results_are_written_beside_each_other_and_replace_older_ones(tmp_path):
    base = tmp_path / "new" / "run-1.5"
    for turn in (1, 2):
        common.write_results(base, {".json": {"turn": turn}, ".md": "é", ".png": b"\x89PNG"})
    assert sorted(path.name for path in base.parent.iterdir()) == ["run-1.5.json", "run-1.5.md", "run-1.5.png"]
    assert json.loads((base.parent / "run-1.5.json").read_text()) == {"turn": 2}
    assert (base.parent / "run-1.5.md").read_text("utf-8") == "é"


def test_what_cannot_be_written_leaves_the_old_results(tmp_path):
    common.write_results(tmp_path / "a", {".json": {"turn": 1}})
    with pytest.raises(TypeError):
        common.write_results(tmp_path / "a", {".json": {"turn": object()}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"turn": 1}


def test_a_markdown_table():
    assert common.markdown_table(("a", "b"), [(1, "x")]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]


def test_the_authors_forward_gives_our_failure_probability():
    torch.manual_seed(0)
    head = ViLUHead(16, hidden=(24, 8))
    with torch.no_grad():
        for layer in (head.query, head.key):
            layer.weight += 0.3 * torch.randn(16, 16)
    v, t = unit_rows(32, 16, 1).float(), unit_rows(9, 16, 2).float()
    with torch.no_grad():
        failure, index = AuthorsFailureProbability(head)(v, t)
    np.testing.assert_allclose(failure, head.failure_probability(v, t).detach(), rtol=0, atol=1e-6)
    assert torch.equal(index, (v @ t.T).argmax(dim=1))


@pytest.mark.parametrize(
    "options", [{"projection": "separate"}, {"parts": ("image",)}, {"logit_scale": 100.0}, {"attention_scale": 10.0}]
)
def test_a_head_of_another_form_is_not_the_authors(options):
    head = ViLUHead(16, hidden=(8,), **options)
    assert not is_authors_form(head)
    with pytest.raises(ValueError, match="not of the authors' form"):
        AuthorsFailureProbability(head)
