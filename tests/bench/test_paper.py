"""bench/paper.py on miniature copies of the sets' layouts: every table, the numbers, and going on after a stop."""

import json
import pickle

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench import paper, paper_published
from tests.support.evaluation import captioned, closed
from vilu import ViLUHead, load_checkpoint
from vilu.data.registry import ON_DISK
from vilu.evaluation import metrics
from vilu.evaluation.evaluate import confidences, correct
from vilu.scores import MCM, SCORES


def save(path, data):
    arrays = {"image_embedding": data.image.normalised.numpy(), "text_embeddings": data.text.normalised.numpy()}
    if not data.captions:
        arrays |= {"labels": data.labels.numpy(), "class_names": np.array(data.class_names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def official(path, dim):
    """A visual-only checkpoint in the authors' layout."""
    torch.manual_seed(0)
    head = ViLUHead(dim, hidden=(8,), parts=("image",))
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": dict(head.state_dict())}, path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """eurosat and cifar10 as images, imagenet and cc12m as embeddings, and a released checkpoint for imagenet."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    folder = root / "eurosat"
    split: dict[str, list[list[object]]] = {}
    for name, count in (("train", 40), ("val", 4), ("test", 24)):
        split[name] = []
        for i in range(count):
            file = f"{name}{i}.png"
            (folder / "2750").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "2750" / file)
            split[name].append([file, i % 2, ("Forest", "River")[i % 2]])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    batches = root / "cifar-10-batches-py"
    batches.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": [i % 2 for i in range(10)]}
        (batches / file).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    save(root / "imagenet" / "train.npz", closed(120, seed=1))
    save(root / "imagenet" / "test.npz", closed(80))
    save(root / "cc12m" / "train.npz", captioned(100, seed=1))
    save(root / "cc12m" / "test.npz", captioned(150))
    official(root / "released" / "imagenet.ckpt", 12)
    return root


def command(root, output, *options):
    arguments = ["--root", root, "--output", output, "--clip", "vilu-tiny", "--pretrained", "", *options]
    return CliRunner().invoke(paper.main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "paper"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILU_CACHE", str(output.parent / "cache"))
        patch.setattr("vilu.training.validation.RESAMPLES", 5)  # the tables do not read it
        result = command(root, output, "--epochs", 1)
    assert result.exit_code == 0
    return output, result, json.loads(output.with_name("paper.json").read_text())


def test_every_table_that_the_data_allow(done, root):
    _, result, document = done
    cells = document["cells"]
    keys = {(cell["table"], cell["dataset"]) for cell in cells.values()}
    sets = {("sets", name) for name in ("imagenet", "eurosat", "cifar10")}
    assert keys == sets | {("amount", name) for _, name in sets} | {
        ("captions", "cc12m"), ("candidates", "cc12m"), ("ablation", "cc12m"), ("ablation", "imagenet"),
        ("ablation", "cifar10"), ("loss", "imagenet"), ("released", "imagenet"),
    }  # fmt: skip
    for _, name in sets:
        rows = [cell["row"] for cell in cells.values() if (cell["table"], cell["dataset"]) == ("sets", name)]
        assert rows == [*(m for m in SCORES if m != "ViLU"), paper.PAPER, paper.DEFAULT]
    test = closed(80)
    right, mcm = correct(test), confidences({"MCM": MCM()}, test)["MCM"]
    assert cells["sets/imagenet/MCM"]["auc"] == pytest.approx(metrics.auroc(mcm, right))
    assert cells["sets/imagenet/MCM"]["fpr95"] == pytest.approx(metrics.fpr_at_tpr(mcm, right))
    head = load_checkpoint(root / "released" / "imagenet.ckpt").head
    ours = -head.failure_probability(test.image.normalised, test.text.normalised).double().numpy()
    assert cells["released/imagenet/released"]["auc"] == pytest.approx(metrics.auroc(ours, right), abs=1e-6)
    # 150 captions allow groups of 128, and no larger ones.
    assert "auc" in cells["candidates/cc12m/MCM, K = 128"]
    assert "fewer than 512" in cells["candidates/cc12m/MCM, K = 512"]["reason"]
    assert "inputs and outputs" in cells["sets/imagenet/BayesVLM"]["reason"]
    assert "auc" in cells["sets/eurosat/BayesVLM"]
    # The published numbers stand beside ours.
    ours = cells["sets/eurosat/MCM"]["auc"]
    assert f"| eurosat | MCM | {100 * ours:.1f} (65.7) |" in result.output
    assert "| mean of 3 | MCM |" in result.output
    assert "(93.2)" in result.output


def test_a_run_goes_on_where_it_stopped(done, root, monkeypatch):
    output, _, document = done
    file = output.with_name("again.json")
    kept = dict(document["cells"])
    taken = kept.pop("loss/imagenet/mse")
    file.write_text(json.dumps({**document, "cells": kept}))
    measured = []
    real = paper.measured

    def counted(cell, *data):
        measured.append(cell.key)
        return real(cell, *data)

    monkeypatch.setattr(paper, "measured", counted)
    assert command(root, output.with_name("again"), "--epochs", 1).exit_code == 0
    assert measured == ["loss/imagenet/mse"]
    again = json.loads(file.read_text())["cells"]
    assert again["loss/imagenet/mse"]["auc"] == taken["auc"]
    assert again.keys() == document["cells"].keys()
    other = command(root, output.with_name("again"), "--epochs", 2)
    assert (other.exit_code, "other settings" in other.output) == (1, True)
    file.write_text("{}")
    other = command(root, output.with_name("again"), "--epochs", 1)
    assert (other.exit_code, "not the results of this script" in other.output) == (1, True)


def test_a_folder_without_data(tmp_path):
    result = command(tmp_path, tmp_path / "out")
    assert (result.exit_code, "holds none of imagenet" in result.output) == (1, True)
    assert "left out: dtd: " in result.output


def test_the_published_numbers_are_of_known_rows():
    rows = {*SCORES, paper.PAPER}
    assert paper_published.MEAN.keys() <= rows
    assert paper_published.SETS.keys() <= ON_DISK.keys()
    for table in (paper_published.SETS, paper_published.CAPTIONS):
        assert all(of.keys() <= rows for of in table.values())
    assert paper.published("candidates", "cc12m", f"{paper.PAPER}, K = 2048") == (94.4, None)
    assert paper.published("ablation", "imagenet", "v, t_pred") == (88.8, None)
    assert paper.published("amount", "imagenet", "anything") == (None, None)
