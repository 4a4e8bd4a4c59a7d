"""`vilu eval` on embeddings and on the embedded data, and its one-line errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.evaluation import captioned, closed, head
from tests.support.files import jpeg, put
from vilu.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vilu.class_set import ClassSet
from vilu.cli.eval import choose_methods, eval_command, one_each, whole_numbers
from vilu.errors import UserError
from vilu.evaluation import metrics
from vilu.fingerprints import remembered
from vilu.outlier import fit_outlier
from vilu.scores import SCORES


@pytest.fixture
def vilu(command_line):
    return command_line(eval_command, "vilu eval")


def save(path, data):
    arrays = {"image_embedding": data.image.normalised.numpy(), "text_embeddings": data.text.normalised.numpy()}
    if not data.captions:
        arrays |= {"labels": data.labels.numpy(), "class_names": np.array(data.class_names)}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def files(tmp_path):
    """A checkpoint of five classes, a test and a train set of them, letters, and captions."""
    test, train = closed(), closed(seed=1)
    class_set = ClassSet(test.class_names, ("a {}",), test.text.normalised)
    save_checkpoint(Checkpoint(head(12), None, class_set), tmp_path / "head.safetensors")
    seen = remembered(test.image.normalised[:30])
    save_checkpoint(Checkpoint(head(12), None, class_set, samples=seen), tmp_path / "seen.safetensors")
    save_checkpoint(Checkpoint(head(16)), tmp_path / "wide.safetensors")
    save(tmp_path / "test.npz", test)
    save(tmp_path / "train.npz", train)
    save(tmp_path / "letters.npz", closed(seed=2, names=tuple("abcde")))
    save(tmp_path / "captions.npz", captioned(60, dim=12))
    return tmp_path


def test_a_table_and_a_report(vilu, files):
    code, out, err = vilu(
        "--ckpt", files / "head.safetensors", "--embeddings", files / "test.npz",
        "--train-embeddings", files / "train.npz", "--methods", "mcm,rel-u,vilu", "--resamples", 30,
        "--output", files / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "80 images, classes: 5" in out
    assert "Acc@95" in out
    document = json.loads((files / "out" / "evaluation.json").read_text())
    assert document["settings"]["resamples"] == 30
    assert list(document["results"][0]["methods"]) == ["MCM", "Rel-U", "ViLU"]
    assert str(files / "out" / "report.html") in out.replace("\n", "")


def test_images_outside_the_class_set(vilu, files):
    inside, outside = closed(), closed(seed=4, noise=3.0)
    save(files / "outside.npz", outside)
    save(files / "narrow.npz", closed(dim=8))
    checkpoint = load_checkpoint(files / "head.safetensors")
    train = closed(seed=1)
    score = fit_outlier(train.image.normalised, train.labels, train.text.normalised)
    score = score.calibrated(closed(seed=3).image.normalised, 0.1)
    save_checkpoint(replace(checkpoint, outlier=score, threshold=0.6), files / "with_score.safetensors")
    options = (
        "--ckpt", files / "with_score.safetensors", "--embeddings", files / "test.npz",
        "--outside-embeddings", files / "outside.npz", "--methods", "mcm", "--resamples", 20,
    )  # fmt: skip
    code, out, err = vilu(*options, "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["outside"]
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["MCM", "energy", "ViLU", "outlier score"]
    assert (found["inside"], found["outside"], found["samples"]) == ("test", "outside", [80, 80])
    both = torch.cat([inside.image.normalised, outside.image.normalised])
    is_inside = np.arange(160) < 80
    logits = 100 * both @ inside.text.normalised.T
    failure = checkpoint.head.failure_probability(both, inside.text.normalised).numpy()
    expected = {
        "MCM": torch.softmax(logits, dim=1).amax(dim=1),
        "energy": logits.double().exp().sum(dim=1).log(),
        "ViLU": 1 - failure,
        "outlier score": -score.score(both),
    }
    for name, confidence in expected.items():
        assert rows[name]["auc"]["value"] == pytest.approx(metrics.auroc(np.asarray(confidence), is_inside), abs=1e-3)
    kept = {"ViLU": failure < 0.6, "outlier score": ~score.refuses(both).numpy()}
    for name, mask in kept.items():
        shares = rows[name]["inside_accepted"], rows[name]["outside_accepted"]
        assert shares == pytest.approx((mask[:80].mean(), mask[80:].mean()))
    accepted = kept["ViLU"] & kept["outlier score"]
    assert found["both"] == pytest.approx([accepted[:80].mean(), accepted[80:].mean()])
    code, out, err = vilu(*options)
    assert (code, err) == (0, "")
    assert "test against outside, outside the class set" in out
    code, _, err = vilu(*options[:4], "--outside-embeddings", files / "narrow.npz")
    assert (code, err.count("\n")) == (2, 1)


def test_json_goes_to_standard_output_alone(vilu, files):
    code, out, err = vilu(
        "--ckpt", files / "head.safetensors", "--embeddings", files / "test.npz", "--embeddings",
        files / "captions.npz", "--methods", "all", "--candidates", "10,20", "--resamples", 10, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    document = json.loads(out)
    closed_set, captions = document["results"]
    assert captions["candidates"] == 20
    assert [result["candidates"] for result in document["sweeps"]["captions"]] == [10, 20]
    assert closed_set["methods"]["LVU-BCE"]["reason"] == "needs training data to be fitted on"
    test = closed()
    similarity = test.image.normalised @ test.text.normalised.T
    expected = metrics.auroc(
        torch.softmax(100 * similarity, dim=1).amax(dim=1).numpy(), (similarity.argmax(dim=1) == test.labels).numpy()
    )
    assert closed_set["methods"]["MCM"]["metrics"]["auc"]["value"] == pytest.approx(expected, abs=1e-12)


def test_the_embedded_data_through_a_real_clip(vilu, tmp_path, monkeypatch):
    from vilu.clip import load_clip
    from vilu.data import open_source
    from vilu.data.source import ArraySource

    def small(dataset=None, *, root=None, split="train", **_):
        whole = open_source(dataset=dataset, split=split)
        assert isinstance(whole, ArraySource)
        return ArraySource(
            name=dataset, images=whole.images[:60], labels=whole.labels[:60], class_names=whole.class_names
        )

    monkeypatch.setattr("vilu.data.open_source", small)
    clip = load_clip()
    class_set = clip.class_set(open_source(dataset="digits").class_names)
    path = tmp_path / "head.safetensors"
    save_checkpoint(Checkpoint(head(class_set.text_embeddings.shape[1]), clip.spec, class_set), path)
    code, out, err = vilu(
        "--ckpt", path, "--dataset", "digits", "--methods", "mcm,rel-u,bayesvlm,vilu", "--resamples", 10, "--json",
        "--cache", tmp_path / "cache", "--learning-curve", "--sizes", "40,60", "--curve-seeds", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert not any(row["reason"] for row in document["results"][0]["methods"].values())
    assert document["results"][0]["trained_on"] == "digits"
    assert document["settings"]["CLIP"] == "vilu-tiny"
    assert [point["size"] for point in document["learning_curves"]["digits"]["points"]] == [40, 60]
    lines = (tmp_path / "out" / "1-digits-samples.csv").read_text().splitlines()
    assert len(lines) == 61
    assert lines[1].startswith("0,digits[0],handwritten ")
    assert "The most confident mistakes, of " in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to test on"),
        (["--embeddings", "{d}/missing.npz"], "no such file or folder"),
        (["--embeddings", "{d}/test.npz", "--methods", "mcn"], "unknown method 'mcn'; near: MCM"),
        (["--embeddings", "{d}/test.npz", "--methods", "zzz"], "unknown method 'zzz'; known: MCM"),
        (["--embeddings", "{d}/test.npz", "--methods", " , "], "names no method"),
        (["--embeddings", "{d}/test.npz", "--candidates", "1,2"], "whole numbers from 2 up"),
        (["--embeddings", "{d}/test.npz", "--output", "{d}/test.npz"], "is not a folder"),
        (["--embeddings", "{d}/test.npz", "--output", "{d}"], "part of an earlier report"),
        (["--embeddings", "{d}/letters.npz"], "10 differ, e.g. 'a' only in letters; give --cross-dataset"),
        (["--embeddings", "{d}/test.npz", "--learning-curve"], "has no train data"),
        (["--embeddings", "{d}/test.npz", "--learning-curve", "--recipe", "none"], "no recipe 'none'"),
        (["--embeddings", "{d}/test.npz"] * 3 + ["--train-embeddings", "{d}/train.npz"] * 2, "2 given for 3 test sets"),
        (["--dataset", "digits"], "names no CLIP; give --clip"),
        (["--embeddings", "{d}/test.npz", "--ckpt", "{d}/missing"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(vilu, files, arguments, said):
    arguments = [str(argument).format(d=files) for argument in arguments]
    if "--ckpt" not in arguments:
        arguments = ["--ckpt", files / "head.safetensors", *arguments]
    code, out, err = vilu(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("vilu eval: ")
    assert err.count("\n") == 1
    assert not list(files.glob(".*"))


def test_the_checkpoint_must_fit(vilu, files):
    code, _, err = vilu("--ckpt", files / "wide.safetensors", "--embeddings", files / "test.npz")
    assert code == 2
    assert "its head reads embeddings 16 wide, those of test are 12" in err
    # The right names with embeddings of another CLIP of the same width.
    test = closed()
    np.savez(
        files / "other.npz",
        image_embedding=test.image.normalised.numpy(),
        text_embeddings=-test.text.normalised.numpy(),
        labels=test.labels.numpy(),
        class_names=np.array(test.class_names),
    )
    code, _, err = vilu("--ckpt", files / "head.safetensors", "--embeddings", files / "other.npz")
    assert code == 2
    assert "not those of the CLIP" in err
    assert "median cosine -1.00" in err


def test_another_data_set_where_it_is_meant(vilu, files):
    arguments = [
        "--ckpt",
        files / "head.safetensors",
        "--embeddings",
        files / "letters.npz",
        "--methods",
        "mcm,rel-u,vilu",
    ]
    arguments += ["--resamples", 5, "--json"]
    for extra in (["--cross-dataset"], ["--train-embeddings", files / "train.npz"]):
        code, out, _ = vilu(*arguments, *extra)
        assert code == 0
        assert json.loads(out)["results"][0]["methods"]["ViLU"]["metrics"]["auc"] is not None
    assert "belongs to the classes" in json.loads(out)["results"][0]["methods"]["Rel-U"]["reason"]


def test_no_method_is_called_better_on_training_samples(vilu, files):
    test = ["--embeddings", files / "test.npz", "--methods", "MCM,ViLU", "--resamples", 20]
    code, out, err = vilu("--ckpt", files / "seen.safetensors", *test, "--json")
    assert (code, len(err.splitlines())) == (0, 1)
    assert "was trained on 30 of the 80 samples of test: no method is called better" in err
    (result,) = json.loads(out)["results"]
    assert "trained on 30 of these images" in result["note"]
    assert result["methods"]["MCM"]["vilu_minus"] == {"auc": None, "fpr95": None}
    assert result["methods"]["MCM"]["metrics"]["auc"]["value"] > 0
    # The report says it, too.
    code, out, _ = vilu("--ckpt", files / "seen.safetensors", *test, "--output", files / "out")
    assert "could not be compared" in (files / "out" / "report.html").read_text()
    assert "so no method is compared" in out.replace("\n", " ")
    code, out, err = vilu("--ckpt", files / "seen.safetensors", *test, "--json", "--drop-known")
    (result,) = json.loads(out)["results"]
    assert (result["samples"], "trained on" in result["note"]) == (50, False)
    assert "21 right answers among 50 answers" in result["note"]  # the other reason to compare nothing
    assert "30 of the 80 samples of test; these are left out" in err


def test_a_baseline_may_not_be_fitted_on_the_test_set(vilu, files):
    test = ["--embeddings", files / "test.npz", "--train-embeddings", files / "test.npz", "--resamples", 20]
    code, out, err = vilu("--ckpt", files / "head.safetensors", *test, "--methods", "MCM,ViLU", "--json")
    assert "the baselines are fitted on 80 of the 80 samples of test" in err
    assert json.loads(out)["results"][0]["methods"]["MCM"]["vilu_minus"]["auc"] is None
    code, _, err = vilu("--ckpt", files / "head.safetensors", *test, "--methods", "MCM", "--learning-curve")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--learning-curve: the baselines are fitted on 80 of the 80 samples" in err


def test_splits_of_a_folder_are_tested_apart(vilu, tmp_path):
    """The head's own training split is known again, the validation split is not."""
    from vilu.clip import load_clip
    from vilu.data import embed, open_source

    for number, split in enumerate(("train", "Valid")):
        for i in range(12):
            put(
                tmp_path / "robo" / split / ("red_star", "blue_star")[i % 2] / f"{i}.jpg",
                jpeg((20 * i, 90 * number, 50)),
            )
    clip = load_clip()
    train = embed(open_source(str(tmp_path / "robo")), clip)
    class_set = clip.class_set(train.class_names)
    samples = remembered(train.image.normalised)
    checkpoint = Checkpoint(head(train.image.normalised.shape[1]), clip.spec, class_set, samples=samples)
    save_checkpoint(checkpoint, tmp_path / "head.safetensors")
    ask = [
        "--ckpt",
        tmp_path / "head.safetensors",
        "--data",
        tmp_path / "robo",
        "--methods",
        "MCM,ViLU",
        "--resamples",
        5,
    ]
    code, out, err = vilu(*ask, "--json", "--split", "validation")
    assert (code, err) == (0, "")
    assert json.loads(out)["results"][0]["samples"] == 12
    assert "was trained on 12 of the 12 samples of robo" in vilu(*ask, "--json", "--split", "training")[2]
    code, _, err = vilu(*ask)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "has no split 'test', only train, val" in err


def test_names_of_methods():
    assert choose_methods("all", tuple(SCORES)) == tuple(SCORES)
    assert choose_methods(" vilu, MCM,mcm", tuple(SCORES)) == ("ViLU", "MCM")
    assert whole_numbers("--x", None, 1) == ()
    assert whole_numbers("--x", "8, 16", 1) == (8, 16)
    assert one_each([1], 3, "x") == [1, 1, 1]
    for text in ("", "1.5", "-3", "8;9", "9" * 30):
        with pytest.raises(UserError, match="whole numbers"):
            whole_numbers("--x", text, 1)
