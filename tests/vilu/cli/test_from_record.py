"""`vilu calibrate --from-record` and `vilu train --from-record`: recorded answers and feedback as data."""

import math
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from tests.support.embeddings import small_world
from vilu import Checkpoint, ClassSet, UserError, load_checkpoint, save_checkpoint
from vilu.checkpoint import ClipSpec, digest
from vilu.cli import group
from vilu.evaluation.calibration import TargetNotMetError, guaranteed_risk
from vilu.evaluation.labelled import guaranteed_risk_of_labelled
from vilu.serving.record import Feedback, ParquetRecord
from vilu.serving.record.table import SCHEMA

START = datetime(2026, 1, 2, tzinfo=timezone.utc)


def sample(random, n):
    """P(failure), whether right, and the probability of a label: 0.3 below P(failure) 0.4, 1 above."""
    failure = 1 / (1 + np.exp(-random.normal(-2, 1.5, n)))
    return failure, random.random(n) >= failure, np.where(failure < 0.4, 0.3, 1.0)


def test_with_all_labels_it_is_the_exact_test():
    failure, right, _ = sample(np.random.default_rng(0), 3000)
    for n in (150, 3000):
        whole = guaranteed_risk(failure[:n], right[:n], 0.1)
        found = guaranteed_risk_of_labelled(failure[:n], right[:n], np.ones(n), failure[:n], 0.1)
        assert vars(found) == pytest.approx(vars(whole))
    with pytest.raises(TargetNotMetError):
        guaranteed_risk_of_labelled(failure[:20], right[:20], np.ones(20), failure, 0.001)
    with pytest.raises(UserError):
        guaranteed_risk_of_labelled(failure, right, np.zeros(3000), failure, 0.1)
    with pytest.raises(UserError, match="cannot fit"):
        guaranteed_risk_of_labelled(failure, right, np.ones(3000), failure, 0.1, 0.9, np.ones(5))


@pytest.mark.parametrize(("answers", "runs", "least_coverage"), [(300, 200, 0.15), (2000, 60, 0.6)])
def test_the_promise_holds_with_labels_drawn_by_a_policy(answers, runs, least_coverage):
    """The true risk below θ is the mean of P(failure) there, and at 90% a tenth of the runs may miss the target."""
    random = np.random.default_rng(1)
    truth = np.sort(sample(random, 200_000)[0])
    missed, coverage = 0, 0.0
    for _ in range(runs):
        failure, right, chance = sample(random, answers)
        looked = random.random(answers) < chance
        try:
            found = guaranteed_risk_of_labelled(
                failure[looked], right[looked], chance[looked], failure, 0.15, 0.9, chance
            )
        except TargetNotMetError:
            continue
        missed += truth[: np.searchsorted(truth, found.threshold)].mean() > 0.15
        coverage += found.coverage / runs
    assert missed <= 0.1 * runs + 3 * math.sqrt(0.09 * runs)
    assert coverage > least_coverage


def test_answers_of_a_kind_without_a_label_are_not_promised():
    """300 right answers below 0.2 are labelled. Of the wrong ones above, one in a thousand was to be, and none is."""
    failure = np.repeat([0.1, 0.3], 300)
    chance = np.where(failure < 0.2, 1.0, 0.001)
    labelled = failure[:300], np.ones(300, bool), chance[:300]
    found = guaranteed_risk_of_labelled(*labelled, failure, 0.05, 0.9, chance)
    assert (found.coverage, found.risk) == (0.5, 0)
    assert 0.1 < found.threshold <= 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, its record with embeddings and feedback, and images of the same source."""
    folder = tmp_path_factory.mktemp("recorded")
    v, labels, t, head, names = small_world(4000)
    made = Checkpoint(head, ClipSpec("vilu-tiny", None, 100.0, "f"), ClassSet(names, ("a {}",), t), threshold=0.3)
    save_checkpoint(made, folder / "head.safetensors")
    record, random = ParquetRecord(folder / "record", create=True), np.random.default_rng(2)
    failure, predicted = head.failure_probability(v, t).numpy(), (v @ t.T).argmax(dim=1).numpy()
    rows, said = [], []
    for i in range(1000, 3500):
        accept = bool(failure[i] < 0.3)
        chosen = bool(random.random() < (0.5 if accept else 1.0))
        row = {"id": f"r{i}", "time": START + timedelta(minutes=i), "model": "vilu", "model_version": 1}
        row |= {"checkpoint": digest(made), "class_set": "default", "class_set_version": 1}
        row |= {"class_index": int(predicted[i]), "label": names[predicted[i]], "confidence": 0.5, "entropy": None}
        row |= {"failure_probability": float(failure[i]), "accept": accept, "chosen": chosen}
        row |= {"label_probability": 0.5 if accept else 1.0, "embedding": v[i].numpy().astype(np.float16)}
        rows.append(row)
        if chosen:
            right = bool(predicted[i] == labels[i])
            kind = {"right": right, "label": None} if i % 2 else {"right": None, "label": names[labels[i]]}
            said.append(Feedback(f"r{i}", time=START, **kind))
    record.append(pa.Table.from_pylist(rows, SCHEMA))
    record.give(said)
    return folder, v, labels, t


def held(world):
    """The checkpoint's folder, and the images that are neither in the training data nor in the record."""
    folder, v, labels, t = world
    return folder, v[3500:], labels[3500:], t


def run(*arguments):
    return CliRunner().invoke(group, [str(a) for a in arguments], standalone_mode=False)


def test_a_threshold_is_chosen_from_a_record(world, tmp_path):
    folder, v, labels, t = held(world)
    options = ["--ckpt", folder / "head.safetensors", "--from-record", folder / "record"]
    done = run("calibrate", *options, "--target-risk", 0.15, "--output", tmp_path / "a.safetensors")
    assert done.exception is None, done.exception
    assert "2500 recorded answers" in done.output
    found = load_checkpoint(tmp_path / "a.safetensors")
    accepted = found.head.failure_probability(v, t) < found.threshold
    wrong = (v @ t.T).argmax(dim=1) != labels
    assert accepted.float().mean() > 0.3
    assert wrong[accepted].float().mean() < 0.2
    note = found.meta["calibration"]
    assert note["threshold"]["bound"] <= 0.15
    assert (note["reference"]["samples"], note["reference"]["target_risk"]) == (2500, 0.15)
    assert digest(found) == digest(load_checkpoint(folder / "head.safetensors"))
    for more, said in (
        (["--since", "2030-01-01"], "no answers of this checkpoint"),
        (["--probability-calibration", "platt"], "no other target"),
    ):
        done = run("calibrate", *options, "--target-risk", 0.15, *more)
        assert isinstance(done.exception, UserError)
        assert said in str(done.exception)


def test_a_head_is_trained_on_a_record(world, tmp_path):
    folder, v, labels, t = held(world)
    options = ["--from-record", folder / "record", "--output", tmp_path / "new.safetensors", "--epochs", 3]
    done = run("train", *options, "--ckpt", folder / "head.safetensors", "--no-estimate-images")
    assert done.exception is None, done.exception
    found = load_checkpoint(tmp_path / "new.safetensors")
    assert found.class_set.names == load_checkpoint(folder / "head.safetensors").class_set.names
    from vilu.evaluation.metrics import auroc

    right = ((v @ t.T).argmax(dim=1) == labels).numpy()
    assert auroc(-found.head.failure_probability(v, t).numpy(), right) > 0.7
    assert found.samples is not None
    assert len(found.samples) > 1000
    recorded = folder / "recorded.npz"  # what it was trained on, as a service would have it from elsewhere
    arrays = {"image_embedding": world[1][1000:3500].half(), "labels": world[2][1000:3500], "text_embeddings": t}
    np.savez(recorded, class_names=found.class_set.names, **arrays)
    done = run("calibrate", "--ckpt", tmp_path / "new.safetensors", "--embeddings", recorded, "--target-risk", 0.2)
    assert "no risk can be promised" in str(done.exception)
    done = run("train", *options)
    assert "needs --ckpt" in str(done.exception)
