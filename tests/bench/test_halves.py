"""bench/halves.py: the halves, the rows, and what is counted."""

import json

import pytest
import torch
from click.testing import CliRunner

from bench import halves
from tests.support.evaluation import closed, write_npz


def test_train_and_test_share_no_image():
    data = closed(101, classes=5)
    train, test = halves.split(data, None, 0)
    few, same = halves.split(data, 20, 0)
    assert (len(train), len(test), len(few)) == (50, 51, 20)
    assert train.rows is not None
    assert test.rows is not None
    assert few.rows is not None
    assert same.rows is not None
    assert torch.equal(torch.cat([train.rows, test.rows]).sort().values, torch.arange(101))
    assert torch.equal(few.rows, train.rows[:20])
    assert torch.equal(same.rows, test.rows)


def test_the_rows_and_what_differs_significantly():
    train, test = halves.split(closed(240, classes=8), None, 0)
    found = halves.run(train, test, 0, ("MCM", "class bias"))
    assert [*found] == ["MCM", "class bias"]
    assert found["MCM"]["p_value"] == 1
    row = {"fpr95": 0.5, "seconds": 1.0}
    mcm = {**row, "auc": 0.8, "p_value": 1.0}
    runs = [
        {"MCM": mcm, "default": {**row, "auc": auc, "p_value": p}} for auc, p in ((0.9, 0.01), (0.7, 0.03), (0.7, 0.3))
    ]
    summary = {row["row"]: row for row in halves.summary(runs)}
    assert (summary["default"]["worse"], summary["default"]["better"]) == (1, 1)
    assert (summary["MCM"]["worse"], summary["MCM"]["better"]) == (0, 0)
    assert summary["default"]["auc"] == pytest.approx(0.7667, abs=1e-4)


def test_the_command(tmp_path):
    data = closed(200, classes=8)
    write_npz(tmp_path / "a.npz", data, class_names=data.class_names)
    options = [str(tmp_path / "a.npz"), "--rows", "class bias", "--sizes", "half", "--splits", "2", "--first-seed", "1"]
    result = CliRunner().invoke(halves.main, [*options, "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "100 images to train, 2 of 2 splits" in result.output
    written = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert [row["row"] for row in written["means"]] == ["MCM", "class bias"]
    assert len(written["runs"]) == 2
    assert "no row" in CliRunner().invoke(halves.main, [str(tmp_path / "a.npz"), "--rows", "x"]).output
