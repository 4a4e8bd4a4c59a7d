"""Training: the definitions, both modes, the start from MCM, resuming, several processes."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.embeddings import unit_rows
from vilu import UserError, ViLUHead, load_checkpoint, train_head
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.evaluation import metrics
from vilu.fingerprints import known
from vilu.head import LOWEST_LOG_ODDS, log_odds
from vilu.recipes import RECIPES, Recipe, recipe_named
from vilu.train import fit
from vilu.training import run as runs
from vilu.training.batches import clip_answers, make_batch
from vilu.training.loss import batch_loss, head_logit, weighted_bce
from vilu.training.run import Run

QUICK = Recipe(epochs=3, batch_size=32, min_steps=0, folds=1)


def world(samples=600, classes=6, dim=24, seed=0):
    """Images near their class, except that CLIP reads class 0 as class 1: a failure that the image shows."""
    t = unit_rows(classes, dim, seed).float()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    v = t[labels] + 0.05 * torch.randn(samples, dim, generator=generator)
    v[labels == 0] = t[1] + 0.5 * t[0] + 0.05 * torch.randn(int((labels == 0).sum()), dim, generator=generator)
    return F.normalize(v, dim=1), labels, t


def closed_set(samples=300, seed=0, **options):
    v, labels, t = world(samples, seed=seed, **options)
    return EmbeddedSet("world", Embeddings(v), Embeddings(t), labels)


def captions(samples=300, dim=24, seed=0):
    """Each image's own caption; every fourth image is nearer to a neighbour's."""
    generator = torch.Generator().manual_seed(seed)
    t = F.normalize(torch.randn(samples, dim, generator=generator), dim=1)
    v = t + 0.3 * torch.randn(samples, dim, generator=generator)
    v[::4] = 0.5 * t[::4] + t[torch.arange(0, samples, 4) - 1] + 0.1 * torch.randn(len(v[::4]), dim)
    return EmbeddedSet("pairs", Embeddings(F.normalize(v, dim=1)), Embeddings(t))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loss_is_the_definition():
    logits = torch.tensor([2.0, -1.0, 0.5, -3.0])
    failure = torch.tensor([True, False, False, False])
    plain = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(0.5)), math.log1p(math.exp(-3))]
    for given, weight in ((None, math.log(1 + 3 / 1)), (2.5, 2.5)):
        expected = np.mean([weight * plain[0], *plain[1:]])
        assert float(weighted_bce(logits, failure, given)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("failures", [0, 4])
def test_a_one_sided_batch_has_a_finite_loss(failures):
    failure = torch.arange(4) < failures
    assert torch.isfinite(weighted_bce(torch.zeros(4), failure))


def test_an_mse_is_to_the_probability_of_the_true_class():
    data, recipe = closed_set(40), replace(QUICK, loss="mse", prior=False)
    head = ViLUHead(24)
    batch = make_batch(data, None, torch.arange(40), recipe)
    p = torch.softmax(100 * data.image.normalised.double() @ data.text.normalised.double().T, dim=1)
    wrong = p.argmax(dim=1) != data.labels
    error = 1 - torch.sigmoid(head(data.image.normalised, data.text.normalised)).double() - p[range(40), data.labels]
    weight = torch.where(wrong, math.log(1 + int((~wrong).sum()) / int(wrong.sum())), 1.0)
    with torch.no_grad():
        assert float(batch_loss(head, batch, recipe, 40, 1)) == pytest.approx(
            float((weight * error**2).mean()), rel=1e-4
        )


@pytest.mark.parametrize("projection", ["identity", "shared", "separate"])
@pytest.mark.parametrize("classes", [3, 50])
@pytest.mark.parametrize("prior", [None, 100.0])
def test_the_cheap_order_of_products_gives_the_heads_logit_and_gradient(projection, classes, prior):
    data = closed_set(20, classes=classes)
    head = ViLUHead(24, projection=projection, attention_scale=7.0, logit_scale=prior).double()
    for layer in (head.query, head.key, head.value):
        if layer is not None:
            torch.nn.init.normal_(layer.weight, std=0.3)
    batch = make_batch(data, None, torch.arange(20), replace(QUICK, prior=True))
    v, t = batch.image.double(), batch.text.double()
    batch = batch._replace(image=v, text=t, log_odds=log_odds(100 * v @ t.T))
    cheap, plain = head_logit(head, batch), head(batch.image, batch.text)
    torch.testing.assert_close(cheap, plain, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(logit.sum(), list(head.parameters())) for logit in (cheap, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_what_is_computed_once_is_what_a_step_would_compute(loss):
    data, rows = closed_set(200), torch.arange(0, 200, 3)
    recipe = replace(QUICK, loss=loss)
    kept, plain = (make_batch(data, a, rows, recipe) for a in (clip_answers(data, recipe), None))
    assert kept.attended is not None
    assert torch.equal(kept.predicted, plain.predicted)
    assert torch.equal(kept.wrong, plain.wrong)
    head = ViLUHead(24, projection="identity", logit_scale=100.0).double()
    # Rounding of float32 under a scale of 100.
    torch.testing.assert_close(kept.attended, head.float().attend(plain.image, plain.text), rtol=0, atol=1e-5)
    torch.testing.assert_close(*(head_logit(head, batch) for batch in (kept, plain)), rtol=0, atol=1e-4)
    if loss == "mse":
        torch.testing.assert_close(kept.target, plain.target, rtol=0, atol=1e-5)
    for changed in ({"freeze_steps": 5}, {"form": "paper"}, {"parts": ("image", "predicted")}):
        assert clip_answers(data, replace(recipe, **changed)).attended is None
    assert clip_answers(data, recipe, keep_attention=False).attended is None


def test_without_room_for_the_attention_every_step_computes_it(monkeypatch):
    data = closed_set(200)
    expected = fit(data, QUICK).head

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert clip_answers(data, QUICK).attended is None
    logits = [head(data.image.normalised, data.text.normalised) for head in (expected, fit(data, QUICK).head)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


def test_log_odds_stay_exact_where_the_softmax_saturates():
    logits = torch.tensor([[30.0, 10.0, 9.0], [0.0, 0.0, 0.0], [3.0, 2.0, -5.0]])
    p = torch.softmax(logits.double(), dim=1).amax(dim=1)
    expected = torch.log((1 - p) / p)
    expected[0] = math.log(math.exp(-20) + math.exp(-21))
    torch.testing.assert_close(log_odds(logits).double(), expected, rtol=1e-5, atol=1e-6)
    assert log_odds(torch.ones(2, 1)).tolist() == [LOWEST_LOG_ODDS] * 2


def test_training_learns_a_systematic_failure_and_repeats_itself():
    data = closed_set(600)
    recipe = Recipe(epochs=12, batch_size=64, min_steps=0, folds=2, seed=3)
    trained, again = fit(data, recipe), fit(data, recipe)
    assert same(trained.head, again.head)
    assert same(trained.last, again.last)
    assert not same(trained.head, fit(data, replace(recipe, seed=4)).head)
    fresh_v, fresh_labels, t = world(900)
    wrong = (fresh_v @ t.T).argmax(dim=1) != fresh_labels
    p = trained.head.failure_probability(fresh_v, t)
    assert p[wrong].mean() > p[~wrong].mean() + 0.3
    assert trained.validation is not None
    assert trained.validation.samples == 600
    assert trained.validation.auc > 0.99
    assert trained.history[trained.best_epoch]["validation_loss"] == min(e["validation_loss"] for e in trained.history)


@pytest.mark.parametrize("data", [closed_set(60), captions(60)], ids=["closed", "captions"])
def test_the_start_ranks_as_mcm_does(data):
    """With nothing learned the head is the free score, calibrated: what a small set falls back on."""
    trained = fit(data, replace(QUICK, linear=False, learning_rate=1e-12, batch_size=60))
    with torch.no_grad():
        logit = trained.head(data.image.normalised, data.text.normalised)
    odds = log_odds(data.logit_scale * data.image.normalised @ data.text.normalised.T)
    assert torch.equal(logit.argsort(), odds.argsort())


@pytest.mark.slow
def test_a_small_set_is_never_much_worse_than_no_head():
    """Failures that nothing in the embedding explains: the head must not invent a reason."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        t = unit_rows(10, 32, 0).float()
        noise = 0.4 * torch.rand(2200, 1, generator=generator) * torch.randn(2200, 32, generator=generator)
        labels = torch.randint(10, (2200,), generator=generator)
        v = F.normalize(t[labels] + noise, dim=1)
        head = fit(EmbeddedSet("small", Embeddings(v[:200]), Embeddings(t), labels[:200])).head
        right = ((v[200:] @ t.T).argmax(dim=1) == labels[200:]).numpy()
        with torch.no_grad():
            ours = metrics.auroc(-head(v[200:], t).numpy(), right)
        mcm = metrics.auroc(-log_odds(100 * v[200:] @ t.T).numpy(), right)
        assert ours > mcm - 0.02


SLOW_IMAGE = pytest.param(("image",), marks=pytest.mark.slow)
SLOW_ATTENDED = pytest.param(("image", "attended"), marks=pytest.mark.slow)


@pytest.mark.parametrize("parts", [SLOW_IMAGE, ("image", "predicted"), SLOW_ATTENDED, None])
@pytest.mark.parametrize("data", [closed_set(80), captions(80)], ids=["closed", "captions"])
@pytest.mark.parametrize("prior", [False, True])
def test_every_ablation_trains(parts, data, prior):
    head = fit(data, replace(QUICK, parts=parts, prior=prior, epochs=1)).head
    assert head.parts == (parts or ("image", "predicted", "attended"))
    assert torch.isfinite(head(data.image.normalised, data.text.normalised)).all()


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_and_a_checkpoint_can_name_it(name):
    trained = fit(closed_set(80), recipe_named(name, epochs=2, min_steps=0, batch_size=20))
    assert len(trained.history) == 3


def test_projections_stay_the_identity_until_they_are_freed():
    data = closed_set(80)
    frozen = fit(data, replace(QUICK, validation=0, freeze_steps=100)).last
    freed = fit(data, replace(QUICK, validation=0, freeze_steps=2, batch_size=80, epochs=4)).last
    assert torch.equal(frozen.key.weight, torch.eye(24))
    assert not torch.equal(freed.key.weight, torch.eye(24))
    assert fit(data, QUICK).head.projection == "identity"
    paper = fit(data, replace(QUICK, form="paper")).head
    assert paper.projection == "separate"
    assert paper.attention_scale == pytest.approx(24**-0.5)


def test_the_published_schedule():
    """Linear from a tenth over five epochs, times a cosine to zero (the authors' warm-up and annealing)."""
    recipe = recipe_named("paper-cifar10")
    run = Run(ViLUHead(4), recipe, 800)
    rates = []
    for _ in range(800):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    for epoch, warm in ((0, 0.1), (2, 0.46), (5, 1), (400, 1), (799, 1)):
        assert rates[epoch] == pytest.approx(0.01 * warm * (1 + math.cos(math.pi * epoch / 800)) / 2, rel=1e-9)
    assert (recipe.momentum, recipe.weight_decay, recipe.batch_size, recipe.freeze_steps) == (0.9, 5e-4, 128, 1000)


def test_early_stop():
    trained = fit(closed_set(80), replace(QUICK, learning_rate=1e-12, epochs=50, patience=2))
    assert len(trained.history) < 50


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(closed_set(100), QUICK)
    assert torch.equal(torch.rand(1), expected)


def test_bad_training_data(tmp_path):
    v, labels, t = world(samples=50)
    with pytest.raises(UserError, match="50 images need as many integer labels"):
        train_head(v, labels[:-1], t)
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.5"):
        train_head(v, labels + 3, t)
    for one_class in ((labels * 0, t), (labels * 0, t[:1])):
        with pytest.raises(UserError, match="are of one class"):
            train_head(v, *one_class)
    with pytest.raises(UserError, match="both kinds are needed"):
        train_head(v, (v @ t.T).argmax(dim=1), t)
    with pytest.raises(UserError, match="too few"):
        train_head(v[:3], None, v[:3])
    for bad in ({"epochs": 0}, {"loss": "hinge"}, {"learning_rate": float("nan")}, {"validation": 1.0}):
        with pytest.raises(UserError, match="recipe: "):
            recipe_named("default", **bad)
    with pytest.raises(UserError, match="recipe: parts"):
        fit(closed_set(50), replace(QUICK, parts=("predicted", "image")))
    with pytest.raises(UserError, match="no recipe 'papers'"):
        recipe_named("papers")
    with pytest.raises(UserError, match="recipe: no setting 'epoch'; there are form, parts"):
        recipe_named("default", epoch=3)
    with pytest.raises(UserError, match="diverged"):
        fit(closed_set(50), replace(QUICK, optimizer="sgd", learning_rate=1e30))
    v[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        train_head(v, labels, t)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, _):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"run\.state: cannot be written \(No space left on device\)"):
        fit(closed_set(60), QUICK, state=tmp_path / "run.state")
    assert not list(tmp_path.iterdir())


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("data", [closed_set(90), captions(90)], ids=["closed", "captions"])
def test_a_stopped_run_continues_to_the_same_weights(tmp_path, data, optimizer):
    recipe = replace(QUICK, epochs=6, optimizer=optimizer, warmup_epochs=2, freeze_steps=4)
    state = tmp_path / "run.state"

    def kill(done, total):
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        fit(data, recipe, state=state, progress=kill)
    for other_data, other_recipe in ((data, replace(recipe, seed=1)), (data[:80], recipe)):
        with pytest.raises(UserError, match="other data or settings"):
            fit(other_data, other_recipe, state=state)
    continued, whole = fit(data, recipe, state=state), fit(data, recipe)
    assert same(continued.head, whole.head)
    assert same(continued.last, whole.last)
    assert continued.history == whole.history
    assert not state.exists()
    assert not list(tmp_path.iterdir())
    state.write_bytes(b"not a state")
    with pytest.raises(UserError, match="not the state of a training run"):
        fit(data, recipe, state=state)


@pytest.mark.parametrize("at", [3, 8, 14], ids=["first fold", "second fold", "last run"])
def test_a_stopped_cross_validation_goes_on_in_its_fold_and_epoch(tmp_path, monkeypatch, at):
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    data, state = closed_set(90), tmp_path / "run.state"
    recipe = replace(QUICK, epochs=5, folds=2, prior=False)

    def kill(done, total):
        assert total == 15
        if done == at:
            raise KilledError

    whole = []
    expected = fit(data, recipe, progress=lambda done, total: whole.append(done))
    if at > len(whole):
        pytest.skip("the folds chose an earlier epoch to stop at")
    with pytest.raises(KilledError):
        fit(data, recipe, state=state, progress=kill)
    again = []
    continued = fit(data, recipe, state=state, progress=lambda done, total: again.append(done))
    assert len(again) == len(whole) - at
    assert same(continued.head, expected.head)
    assert same(continued.last, expected.last)
    assert continued.history == expected.history
    assert continued.validation == expected.validation
    assert not list(tmp_path.iterdir())


def test_a_number_of_epochs_is_obeyed():
    recipe = recipe_named("default", epochs=3, batch_size=32)
    assert len(fit(closed_set(90), recipe).history) == 4
    assert recipe_named("default").min_steps == Recipe().min_steps > 0
    assert recipe_named("default", epochs=3, min_steps=40).min_steps == 40


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "vilu", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Embeddings made elsewhere, as a file."""
    v, labels, t = world(400)
    path = tmp_path_factory.mktemp("data") / "world.npz"
    np.savez(path, image_embedding=v, labels=labels, text_embeddings=t, class_names=[f"class {i}" for i in range(6)])
    return path


# `vilu train` that writes its state after every epoch, not every few seconds.
_TRAIN = "import vilu.training.run as run; run.SAVE_SECONDS = 0; from vilu.cli import main; main()"


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(prepared, tmp_path):
    arguments = ["train", "--embeddings", prepared, "--epochs", 40, "--output", tmp_path / "a.safetensors"]
    line = [sys.executable, "-c", _TRAIN, *map(str, arguments)]
    state = tmp_path / ".a.safetensors.state"
    process = subprocess.Popen(line)
    deadline = time.monotonic() + 120
    while not state.exists() or torch.load(state, weights_only=True)["folds"] < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    other = command(*arguments[:3], "--epochs", 5, *arguments[5:])
    assert other.returncode == 2
    assert "other data or settings" in other.stderr
    assert "Traceback" not in other.stderr
    assert command(*arguments).returncode == 0
    assert not state.exists()
    assert command(*arguments[:-1], tmp_path / "b.safetensors").returncode == 0
    continued, whole = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    assert same(continued.head, whole.head)
    assert continued.meta == whole.meta


def test_the_command_writes_best_and_last_and_says_what_the_head_is_worth(prepared, tmp_path):
    done = command("train", "--embeddings", prepared, "--epochs", 5, "--output", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert "MCM" in done.stdout
    best, last = (load_checkpoint(tmp_path / name) for name in ("a.safetensors", "a.last.safetensors"))
    assert best.class_set.names[0] == "class 0"
    assert best.meta["recipe"]["name"] == "default"
    assert best.meta["samples"] == 400
    assert best.samples is not None
    assert last.samples is not None
    assert known(F.normalize(torch.as_tensor(world(400)[0]), dim=1), best.samples).all()
    assert torch.equal(best.samples, last.samples)
    assert best.head.config() == last.head.config()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.last.safetensors", "a.safetensors"]


def test_a_head_that_does_not_help_is_not_handed_over_silently(tmp_path):
    generator = torch.Generator().manual_seed(0)
    t = unit_rows(10, 32, 0).float()
    labels = torch.randint(10, (120,), generator=generator)
    noise = 0.4 * torch.rand(120, 1, generator=generator) * torch.randn(120, 32, generator=generator)
    v = F.normalize(t[labels] + noise, dim=1)
    np.savez(tmp_path / "small.npz", image_embedding=v, labels=labels, text_embeddings=t)
    arguments = ["--embeddings", tmp_path / "small.npz", "--recipe", "plain", "--epochs", 3]
    done = command("train", *arguments, "--output", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert "than the free MCM score" in done.stdout
    assert "how many it takes, by a learning curve over parts of this data: " in done.stdout


@pytest.mark.slow
def test_several_processes_give_the_weights_of_one(prepared, tmp_path):
    arguments = ["train", "--embeddings", prepared, "--epochs", 2, "--batch-size", 64, "--weight-decay", 0]
    assert command(*arguments, "--output", tmp_path / "one.safetensors").returncode == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vilu"]
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, arguments), "--output", str(tmp_path / "two.safetensors")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(tmp_path / f"{name}.safetensors").head for name in ("one", "two"))
    data = closed_set(400)
    with torch.no_grad():
        logits = [head(data.image.normalised, data.text.normalised) for head in (one, two)]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_augmented_images_train(tmp_path):
    arguments = ["--dataset", "digits", "--no-cache", "--epochs", 1, "--recipe", "plain", "--cache", tmp_path / "cache"]
    done = command("train", *arguments, "--output", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "a.safetensors").meta["samples"] == 682
