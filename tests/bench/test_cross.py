"""bench/cross.py: cuts of a class set, the linear start across sets, and the table."""

import json

import pytest
import torch
from click.testing import CliRunner

from bench import cross
from tests.support.evaluation import closed, write_npz
from vilu.evaluation.metrics import auroc
from vilu.recipes import Recipe
from vilu.training.batches import clip_answers
from vilu.training.start import initial_head


def test_a_cut_has_disjoint_classes_and_only_their_candidates():
    data = closed(200, classes=7)
    old, new = cross.cut([data], 0)
    assert len(old) + len(new) == 200
    assert set(old.class_names).isdisjoint(new.class_names)
    assert {*old.class_names, *new.class_names} == set(data.class_names)
    for part in (old, new):
        assert len(part.text) == len(part.class_names)
        for i, name in enumerate(part.class_names):
            assert torch.equal(part.text.normalised[i], data.text.normalised[data.class_names.index(name)])
        # An image keeps its class: the rows of the whole set with that name are the rows of the part.
        first = part.class_names[0]
        whole = data.image.normalised[data.labels == data.class_names.index(first)]
        assert torch.equal(part.image.normalised[part.labels == 0], whole)


def test_the_linear_row_is_the_default_recipes_start():
    train, test = closed(200, seed=1), closed(100, seed=2)
    found = cross.confidence(cross.linear([cross.answers_of(train)], 0), cross.answers_of(test))
    recipe = Recipe()
    head = initial_head(train, clip_answers(train, recipe), torch.arange(len(train)), recipe)
    with torch.no_grad():
        logit = head(test.image.normalised, test.text.normalised)
    right = ~cross.answers_of(test).wrong.numpy()
    assert auroc(found, right) == pytest.approx(auroc(-logit.double().numpy(), right), abs=2e-3)


def test_kept_is_a_share_of_the_gain():
    runs = [{"MCM": 0.8, "old, linear": 0.82, "all new, linear": 0.84}, {"MCM": 0.7, "all new, linear": 0.74}]
    rows = {row["row"]: row for row in cross.table(runs)}
    assert rows["MCM"]["kept"] is None
    assert rows["MCM"]["auc"] == pytest.approx(0.75)
    assert rows["old, linear"]["kept"] == pytest.approx(0.5)
    assert rows["all new, linear"]["kept"] == pytest.approx(1)


def test_the_command(tmp_path):
    data = closed(240, classes=8)
    write_npz(tmp_path / "a.npz", data, class_names=data.class_names)
    options = [str(tmp_path / "a.npz"), "--few", "20", "--splits", "2", "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(cross.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    names = [row["row"] for row in rows]
    assert names == ["MCM", "old, linear", "20 new, linear", "old + 20 new", "old + 20 new, even", "all new, linear"]
    assert all(f"| {name} |" in result.output for name in names)
    few = closed(40, classes=3)
    write_npz(tmp_path / "b.npz", few)
    result = CliRunner().invoke(cross.main, [str(tmp_path / "b.npz")])
    assert (result.exit_code, "too few to cut" in result.output) == (1, True)
