"""bench/outside.py: the cut into images inside and outside a class set, and the table."""

import json

import torch
from click.testing import CliRunner

from bench import outside
from tests.support.evaluation import closed, write_npz


def test_no_image_of_a_class_left_out_is_seen_before():
    data = closed(400, classes=10)
    train, held, test, out = outside.cut(data, 0)
    assert len(train) + len(held) + len(test) + len(out) == 400
    assert len(train.class_names) == 7
    for part in (held, test):
        assert part.class_names == train.class_names
    assert set(out.class_names).isdisjoint(train.class_names)
    rows = torch.cat([part.image.normalised for part in (train, held, test, out)])
    assert len(rows.unique(dim=0)) == len(data.image.normalised.unique(dim=0)), "each image is in one part"
    for part in (train, test, out):
        name = part.class_names[0]
        whole = data.image.normalised[data.labels == data.class_names.index(name)]
        ours = part.image.normalised[part.labels == 0]
        assert (ours[:, None] == whole).all(dim=2).any(dim=1).all()


def test_the_command(tmp_path):
    data = closed(400, classes=8)
    write_npz(tmp_path / "a.npz", data, class_names=data.class_names)
    options = [str(tmp_path / "a.npz"), "--cuts", "1", "--refuse", "0.2", "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(outside.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())["sets"]
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["MCM", "energy", "ViLU", "outlier score"]
    assert all(f"| {name} |" in result.output for name in rows)
    assert 0.5 < rows["outlier score"]["inside_accepted"] < 1
    few = closed(40, classes=2)
    write_npz(tmp_path / "b.npz", few)
    result = CliRunner().invoke(outside.main, [str(tmp_path / "b.npz")])
    assert (result.exit_code, "too few to leave some out" in result.output) == (1, True)
