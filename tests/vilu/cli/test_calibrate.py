"""`vilu calibrate`: the threshold and what it rests on are stored, or nothing is changed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.support.embeddings import small_world
from vilu import Checkpoint, ClassSet, UserError, load_checkpoint, save_checkpoint
from vilu.cli.calibrate import calibrate_command
from vilu.fingerprints import remembered
from vilu.outlier import fit_outlier


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and held-out embeddings of the same source."""
    folder = tmp_path_factory.mktemp("world")
    v, labels, t, head, names = small_world(3000)
    class_set = ClassSet(names, ("a {}",), t)
    save_checkpoint(Checkpoint(head, None, class_set, samples=remembered(v[:1000])), folder / "head.safetensors")
    save_checkpoint(Checkpoint(head, None, class_set), folder / "old.safetensors")
    for name, rows in (("train", slice(0, 1000)), ("mixed", slice(900, 3000))):
        arrays = {"image_embedding": v[rows].half(), "labels": labels[rows], "text_embeddings": t}
        np.savez(folder / f"{name}.npz", class_names=names, **arrays)
    held = {"image_embedding": v[1000:], "labels": labels[1000:], "text_embeddings": t}
    np.savez(folder / "held.npz", class_names=names, **held)
    np.savez(folder / "other.npz", class_names=[f"thing {i}" for i in range(6)], **held)
    return folder, v[1000:], labels[1000:], t


def calibrate(world, *options, data="held.npz", ckpt="head.safetensors"):
    arguments = ["--ckpt", world[0] / ckpt, "--embeddings", world[0] / data, *options]
    return CliRunner().invoke(
        calibrate_command, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False
    )


def accepted(world, checkpoint):
    _, v, labels, t = world
    chosen = checkpoint.head.failure_probability(v, t) < checkpoint.threshold
    return chosen, (v @ t.T).argmax(dim=1) == labels


def test_a_promised_risk_is_stored_with_its_data(world, tmp_path):
    result = calibrate(world, "--target-risk", 0.1, "--output", tmp_path / "a.safetensors")
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    chosen, right = accepted(world, checkpoint)
    assert float((~right[chosen]).float().mean()) <= 0.1
    note = checkpoint.meta["calibration"]
    assert (note["data"], note["samples"]) == ("held", 2000)
    assert note["threshold"]["bound"] <= 0.1
    assert note["threshold"]["threshold"] == checkpoint.threshold
    assert "promised at 95%" in result.output
    assert "without the guarantee: threshold 1.0000 accepts 100.0% of these samples" in result.output
    assert "% with 32,000 samples" in result.output
    assert load_checkpoint(world[0] / "head.safetensors").threshold == 0.5


def test_the_outlier_score_has_a_threshold_of_its_own(world, tmp_path):
    with pytest.raises(UserError, match="train it with --outlier-score"):
        calibrate(world, "--refuse-outliers", 0.1, "--output", tmp_path / "a.safetensors")
    plain = load_checkpoint(world[0] / "head.safetensors")
    with_score = replace(plain, outlier=fit_outlier(world[1][:200], world[2][:200], world[3]))
    save_checkpoint(with_score, tmp_path / "b.safetensors")
    for options in (["--target-coverage", 0.8], ["--refuse-outliers", 0.1], ["--target-coverage", 0.8]):
        result = calibrate(world, "--ckpt", tmp_path / "b.safetensors", *options)
        assert result.exit_code == 0
    found = load_checkpoint(tmp_path / "b.safetensors")
    assert found.outlier.refused == 0.1
    assert float(found.outlier.refuses(world[1]).float().mean()) == pytest.approx(0.1, abs=2e-3)
    note = found.meta["calibration"]
    assert note["threshold"]["target"] == 0.8
    assert note["outlier"]["threshold"] == found.outlier.threshold


def test_json_has_what_the_checkpoint_has(world, tmp_path):
    result = calibrate(world, "--target-risk", 0.1, "--output", tmp_path / "a.safetensors", "--json")
    document, checkpoint = json.loads(result.stdout), load_checkpoint(tmp_path / "a.safetensors")
    assert document["checkpoint"] == str(tmp_path / "a.safetensors")
    assert document["threshold"] == checkpoint.threshold
    assert document["calibration"] == checkpoint.meta["calibration"]
    assert "promised at 95%" in result.stderr


def test_a_target_that_cannot_be_met_is_a_failure_not_wrong_use(world):
    with pytest.raises(UserError) as caught:
        calibrate(world, "--target-risk", 1e-6)
    assert caught.value.exit_code == 1
    with pytest.raises(UserError) as caught:
        calibrate(world, "--target-risk", 0.1, "--target-tpr", 0.8)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("option", ["--target-coverage", "--target-tpr"])
def test_coverage_and_tpr(world, tmp_path, option):
    calibrate(world, option, 0.8, "--output", tmp_path / "a.safetensors")
    chosen, right = accepted(world, load_checkpoint(tmp_path / "a.safetensors"))
    share = chosen.float().mean() if option == "--target-coverage" else chosen[right].float().mean()
    assert float(share) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_the_probability_and_the_threshold_come_from_different_halves(world, tmp_path, method):
    options = ["--probability", method, "--target-risk", 0.15, "--output", tmp_path / "a.safetensors"]
    calibrate(world, *options)
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    note = checkpoint.meta["calibration"]
    assert note["probability"]["samples"] + note["threshold"]["samples"] == 2000
    before = load_checkpoint(world[0] / "head.safetensors").head.failure_probability(world[1], world[3]).logit()
    after = checkpoint.head.failure_probability(world[1], world[3]).logit()
    torch.testing.assert_close(
        after, note["probability"]["slope"] * before + note["probability"]["offset"], rtol=1e-3, atol=1e-3
    )


def test_a_threshold_moves_with_the_probability(world, tmp_path):
    """Calibrating P(failure) afterwards must not change which answers a chosen threshold is about."""
    path = tmp_path / "a.safetensors"
    calibrate(world, "--target-coverage", 0.8, "--output", path)
    before = load_checkpoint(path)
    result = CliRunner().invoke(
        calibrate_command,
        ["--ckpt", str(path), "--embeddings", str(world[0] / "held.npz"), "--probability", "platt"],
        catch_exceptions=False,
        standalone_mode=False,
    )
    after = load_checkpoint(path)
    assert "threshold moved from" in result.output
    assert after.threshold != before.threshold
    # One sample in 2,000 may lie within rounding of the threshold.
    assert int((accepted(world, before)[0] != accepted(world, after)[0]).sum()) <= 1
    note = after.meta["calibration"]["threshold"]
    assert (note["rule"], note["data"], note["threshold"]) == ("coverage", "held", after.threshold)


def test_a_probability_alone_leaves_the_default_threshold(world, tmp_path):
    path = tmp_path / "a.safetensors"
    calibrate(world, "--probability", "platt", "--output", path)
    assert load_checkpoint(path).threshold == load_checkpoint(world[0] / "head.safetensors").threshold


def test_what_cannot_be_done_changes_nothing(world):
    before = (world[0] / "head.safetensors").read_bytes()
    for options, message in (
        (["--target-risk", 1e-5], "cannot be promised"),
        ([], "give one of"),
        (["--target-risk", 0.1, "--target-tpr", 0.9], "give one of"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate(world, *options)
    with pytest.raises(UserError, match="class names do not match"):
        calibrate(world, "--target-risk", 0.1, data="other.npz")
    assert (world[0] / "head.safetensors").read_bytes() == before


def test_nothing_is_promised_on_training_samples(world, tmp_path):
    """Half-precision copies of the training embeddings, alone and among held-out ones."""
    output = ["--output", tmp_path / "a.safetensors"]
    before = (world[0] / "head.safetensors").read_bytes()
    for data, said in (("train.npz", "1000 of the 1000 samples of train"), ("mixed.npz", "100 of the 2100 samples")):
        with pytest.raises(UserError, match=f"was trained on {said}.*no risk can be promised"):
            calibrate(world, "--target-risk", 0.2, *output, data=data)
    assert not (tmp_path / "a.safetensors").exists()
    assert (world[0] / "head.safetensors").read_bytes() == before
    # What promises nothing is done, and says so.
    result = calibrate(world, "--target-coverage", 0.8, *output, data="mixed.npz")
    assert "was trained on 100 of the 2100 samples of mixed: its answers there are better" in result.stderr
    assert load_checkpoint(tmp_path / "a.safetensors").meta["calibration"]["trained_on"] == 100


def test_training_samples_can_be_left_out(world, tmp_path):
    for name, data in (("a", "held.npz"), ("b", "mixed.npz")):
        drop = [] if name == "a" else ["--drop-known"]
        result = calibrate(world, "--target-risk", 0.1, *drop, "--output", tmp_path / f"{name}.safetensors", data=data)
    assert "100 of the 2100 samples of mixed; these are left out" in result.stderr
    a, b = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    assert b.meta["calibration"]["samples"] == 2000
    assert a.threshold == pytest.approx(b.threshold, abs=1e-3)
    with pytest.raises(UserError, match="1000 of the 1000 samples of train; none is left"):
        calibrate(world, "--target-risk", 0.1, "--drop-known", data="train.npz")


def test_an_old_checkpoint_cannot_say_what_it_was_trained_on(world, tmp_path):
    output = ["--output", tmp_path / "a.safetensors"]
    result = calibrate(world, "--target-risk", 0.1, *output, ckpt="old.safetensors")
    assert "does not say which samples it was trained on; held must not be among them" in result.stderr
    assert "promised at 95%" in result.output


def test_clip_names_another_place_of_the_same_weights(tmp_path):
    from vilu import ViLUHead, load_clip
    from vilu.data import open_source

    clip = load_clip()
    names = open_source(dataset="digits", split="test").class_names
    moved = replace(clip.spec, name=f"local-dir:{tmp_path / 'moved'}")
    path = tmp_path / "head.safetensors"
    save_checkpoint(Checkpoint(ViLUHead(128), moved, clip.class_set(names)), path)

    def run(*options):
        data = ["--dataset", "digits", "--split", "test", "--cache", tmp_path]
        command = [str(a) for a in ("--ckpt", path, *data, "--target-coverage", 0.5, *options)]
        return CliRunner().invoke(calibrate_command, command, catch_exceptions=False, standalone_mode=False)

    with pytest.raises(UserError, match="moved"):
        run()
    with pytest.raises(UserError, match="not on these"):
        run("--clip", "RN50", "--pretrained", "random")
    assert run("--clip", "vilu-tiny").exit_code == 0
    assert load_checkpoint(path).clip == clip.spec
    with pytest.raises(UserError, match="takes the place of --clip"):
        calibrate((tmp_path,), "--target-tpr", 0.5, "--clip", "vilu-tiny", data="held.npz")
