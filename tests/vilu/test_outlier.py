"""The outlier score: its definition, its threshold, and images that show none of the classes."""

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.covariance import ledoit_wolf
from torch.nn import functional as F

from tests.support.embeddings import unit_rows
from vilu import load_checkpoint
from vilu.cli.train import train_command
from vilu.errors import UserError
from vilu.evaluation.metrics import auroc
from vilu.outlier import PULL, TEXT, Outlier, fit_outlier

TEXTS = unit_rows(10, 24, 1).float()


def images(samples, classes=range(6), seed=0):
    """Images of some of ten classes, whose noise is ten times larger in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(classes))[torch.randint(len(classes), (samples,), generator=generator)]
    spread = torch.logspace(-2, -1, 24)
    noise = spread * torch.randn(samples, 24, generator=generator)
    return F.normalize(TEXTS[labels] + noise, dim=1), labels


def fitted(samples=300, seed=0):
    v, labels = images(samples, seed=seed)
    return fit_outlier(v, labels, TEXTS[:6])


def test_it_is_its_definition():
    v, labels = images(120)
    labels[labels == 5] = 4  # no image shows class 5
    x, t = v.double().numpy(), TEXTS[:6].double().numpy()
    mean, counts = x.mean(axis=0), np.bincount(labels, minlength=6)
    sums = np.stack([x[labels == c].sum(axis=0) for c in range(6)])
    shrunk = (sums + PULL * mean) / (counts + PULL)[:, None]
    precision = np.linalg.inv(ledoit_wolf(x - shrunk[labels], assume_centered=True)[0])
    texts = t - t.mean(axis=0)
    length = np.mean([np.linalg.norm(shrunk[c] - mean) for c in range(5)]) / np.linalg.norm(texts, axis=1).mean()
    found = fit_outlier(v, labels, TEXTS[:6])
    fresh = images(30, seed=1)[0]
    for row, answer in zip(fresh.double().numpy(), found.score(fresh), strict=True):
        cosines = []
        for c in range(6):
            prototype = (sums[c] + TEXT * (mean + length * texts[c])) / (counts[c] + TEXT) - mean
            a = row - mean
            scale = np.sqrt((a @ precision @ a) * (prototype @ precision @ prototype))
            cosines.append(a @ precision @ prototype / scale)
        assert float(answer) == pytest.approx(1 - max(cosines), abs=1e-3)


def test_it_tells_other_classes_apart():
    score = fitted()
    inside, outside = images(200, seed=1)[0], images(200, range(6, 10), seed=1)[0]
    answer = score.score(torch.cat([inside, outside]))
    assert auroc(-answer.numpy(), np.arange(400) < 200) > 0.95
    assert score.calibrated(inside, 0.05).refuses(outside).float().mean() > 0.5


def test_the_threshold_refuses_the_share_on_average():
    score = fitted(200)
    fresh = images(4000, seed=2)[0]
    shares = []
    for seed in range(60):
        threshold = score.calibrated(images(39, seed=100 + seed)[0], 0.1)
        assert threshold.refused == 0.1
        shares.append(float(threshold.refuses(fresh).float().mean()))
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / math.sqrt(60)
    assert np.mean(shares) > 0.05
    # 39 images: the 36th smallest, ceil(0.9 · 40), is the threshold, so that 3 of them lie above it.
    drawn = images(39, seed=100)[0]
    assert int(score.calibrated(drawn, 0.1).refuses(drawn).sum()) == 3


def test_blocks_do_not_matter(monkeypatch):
    score, (v, _) = fitted(100), images(50, seed=1)
    whole = score.score(v)
    monkeypatch.setattr("vilu.outlier.BLOCK", 7)
    torch.testing.assert_close(whole, score.score(v))
    assert score.score(v[:0]).shape == (0,)


def test_images_that_are_all_alike_are_no_error():
    score = fit_outlier(unit_rows(1, 16, 0).repeat(30, 1), torch.arange(30) % 2, unit_rows(2, 16, 2))
    assert torch.isfinite(score.score(unit_rows(5, 16, 1))).all()


def test_a_score_that_is_no_number_is_refused():
    score = fitted().calibrated(images(100, seed=1)[0], 0.1)
    rows = images(3, seed=2)[0]
    rows[1, 4], rows[2, 0] = math.nan, math.inf
    assert score.refuses(rows).tolist()[1:] == [True, True]


def test_it_refuses_what_it_cannot_do():
    v, labels = images(30)
    score = fit_outlier(v, labels, TEXTS[:6])
    for build, message in (
        (lambda: fit_outlier(v[:19], labels[:19], TEXTS[:6]), "19 training images are too few"),
        (lambda: fit_outlier(v, labels[:5], TEXTS[:6]), "do not fit"),
        (lambda: fit_outlier(v, None, TEXTS[:6]), "captions have no class set"),
        (lambda: fit_outlier(v, torch.full((30,), 3), TEXTS[:6]), "show one class"),
        (lambda: score.score(v[:, :5]), r"reads \(N, 24\), got \(30, 5\)"),
        (lambda: score.refuses(v), "has no threshold"),
        (lambda: score.calibrated(v, 0.01), "30 images are too few to refuse at most 0.01 of them: 99 needed"),
        (lambda: score.calibrated(v, 0), "must be in"),
        (lambda: Outlier(torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 3)), "shapes"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.zeros(1, 2)), "shapes"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.zeros(0, 3)), "shapes"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.zeros(1, 3), threshold=1.0), "belong together"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.zeros(1, 3), math.inf, 0.1), r"in \[0, 2\]"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.zeros(1, 3), 1.0, 1.0), r"\[0, 1\)"),
        (lambda: Outlier(torch.zeros(3), torch.eye(3), torch.ones(1, 3)), "the longest has 1.73"),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_training_stores_it_when_asked(tmp_path):
    v, labels = images(60)
    noisy = F.normalize(v + 0.2 * torch.randn(60, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    names = [f"class {i}" for i in range(6)]
    np.savez(tmp_path / "a.npz", image_embedding=noisy, labels=labels, text_embeddings=TEXTS[:6], class_names=names)
    options = ["--embeddings", str(tmp_path / "a.npz"), "--output", str(tmp_path / "head.safetensors"), "--epochs", "1"]
    for more, expected in ((["--outlier-score"], True), ([], False)):
        result = CliRunner().invoke(train_command, [*options, *more, "--no-estimate-images"], catch_exceptions=False)
        assert result.exit_code == 0
        found = load_checkpoint(tmp_path / "head.safetensors").outlier
        assert (found is not None) == expected
        if found is not None:
            torch.testing.assert_close(
                found.score(v), fit_outlier(noisy, labels, TEXTS[:6]).score(v), rtol=0, atol=1e-2
            )
