"""The linear start: exact inside the MLP, better than MCM where there is something to learn, MCM where there is not."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.embeddings import TOLERANCE, unit_rows
from vilu import ViLUHead
from vilu.embeddings import EmbeddedSet, Embeddings
from vilu.evaluation.metrics import auroc
from vilu.head import log_odds
from vilu.kernels import fold
from vilu.recipes import recipe_named
from vilu.train import fit
from vilu.training.batches import clip_answers
from vilu.training.linear import Classes, Linear, carry, fit_linear
from vilu.training.logistic import Design, average_shares, newton
from vilu.training.start import initial_head

SCALE, CLASSES, DIM = 60.0, 12, 32


def biased(samples: int, seed: int, bias: float, noise: float = 0.11) -> EmbeddedSet:
    """Images around their class's text; those of some classes lie nearer to a neighbour's, by `bias`."""
    generator = torch.Generator().manual_seed(seed)
    text = unit_rows(CLASSES, DIM, 0).float()
    labels = torch.arange(samples) % CLASSES
    towards = torch.where((labels % 3 == 0)[:, None], bias * (text[(labels + 1) % CLASSES] - text[labels]), 0.0)
    spread = noise * torch.randn(samples, DIM, generator=generator)
    image = F.normalize(text[labels] + towards + spread, dim=1)
    return EmbeddedSet("biased", Embeddings(image), Embeddings(text), labels, (), SCALE)


def start_of(data: EmbeddedSet, **settings) -> ViLUHead:
    recipe = recipe_named("default", **settings)
    return initial_head(data, clip_answers(data, recipe), torch.arange(len(data)), recipe)


def against_mcm(head: ViLUHead, data: EmbeddedSet) -> tuple[float, float]:
    """AUC of the head and of MCM."""
    assert data.labels is not None
    similarity = data.image.normalised @ data.text.normalised.T
    right = (similarity.argmax(dim=1) == data.labels).numpy()
    with torch.no_grad():
        logit = head(data.image.normalised, data.text.normalised)
    return auroc(-logit.numpy(), right), auroc(-log_odds(SCALE * similarity).numpy(), right)


@pytest.mark.parametrize("parts", [("image", "predicted", "attended"), ("predicted",), ("image",)])
@pytest.mark.parametrize("hidden", [(512, 256, 128), (8,), (4, 2)])
def test_the_mlp_carries_the_function_exactly(parts, hidden):
    torch.manual_seed(0)
    head = ViLUHead(DIM, hidden=hidden, parts=parts, projection="identity", attention_scale=SCALE, logit_scale=SCALE)
    weight = torch.randn(DIM * len(parts)) * 5
    carry(head, Linear(1.0, weight, -0.7, 1.0))
    v, t = unit_rows(20, DIM, 1), unit_rows(CLASSES, DIM, 2)
    head = head.double()
    columns = {"image": v, "predicted": t[(v @ t.T).argmax(dim=1)], "attended": head.attend(v, t)}
    expected = torch.cat([columns[part] for part in parts], dim=1) @ weight.double() - 0.7 + log_odds(SCALE * v @ t.T)
    torch.testing.assert_close(head(v, t), expected, rtol=0, atol=1e-6)  # the weights are float32's
    folded = fold(head.float(), t.float(), logit_scale=SCALE)(v.float())
    torch.testing.assert_close(
        folded.failure_probability.double(), torch.sigmoid(expected), rtol=0, atol=TOLERANCE[torch.float32]
    )


def test_a_start_learns_which_answers_are_wrong():
    head = start_of(biased(600, seed=1, bias=0.45))
    ours, mcm = against_mcm(head, biased(3000, seed=2, bias=0.45))
    assert ours > mcm + 0.02


def biased_by_class(samples: int, seed: int, classes: int) -> tuple[torch.Tensor, ...]:
    """Log-odds, predicted classes and mistakes; each class has a failure rate of its own, unlike its neighbours'."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(classes, (samples,), generator=generator)
    odds = torch.randn(samples, generator=generator)
    own = 3.0 * torch.randn(classes, generator=torch.Generator().manual_seed(9))
    wrong = torch.rand(samples, generator=generator) < torch.sigmoid(odds + own[predicted])
    return odds, predicted, wrong


def crowded(classes: int) -> torch.Tensor:
    """Text embeddings in pairs that are nearly one."""
    pairs = unit_rows(-(-classes // 2), DIM, 0).repeat_interleave(2, dim=0)[:classes]
    return F.normalize(pairs + 0.05 * unit_rows(classes, DIM, 1), dim=1).float()


@pytest.mark.parametrize("classes", [20, 80])
def test_a_start_holds_a_weight_for_each_class(classes):
    """As good as the class bias where there are no more classes than dimensions; else still above MCM."""
    text = crowded(classes)
    odds, predicted, wrong = biased_by_class(3000, 1, classes)
    mass = torch.bincount(predicted, minlength=classes) + 1
    start = fit_linear(odds, {"predicted": text[predicted]}, wrong, torch.ones(3000), 0, Classes(predicted, text, mass))
    odds, predicted, wrong = biased_by_class(3000, 2, classes)
    logit = start.slope * odds + text[predicted] @ start.weight + start.bias
    mcm, ours = (auroc(-score.double().numpy(), ~wrong.numpy()) for score in (odds, logit))
    own = 3.0 * torch.randn(classes, generator=torch.Generator().manual_seed(9))
    best = auroc(-(odds + own[predicted]).double().numpy(), ~wrong.numpy())
    assert ours > (best - 0.01 if classes < DIM else mcm + 0.1)
    assert start.weight.abs().max() < 1000  # what float32 and bfloat16 can carry


def test_a_weight_for_each_class_is_a_column_for_each_class():
    odds, predicted, wrong = biased_by_class(200, 3, 7)
    x = torch.stack([odds, torch.ones(200), torch.randn(200, generator=torch.Generator().manual_seed(0))], 1).double()
    y, w = wrong.double(), 0.5 + wrong.double()
    ours = newton(Design(x, predicted, 7), y, w, 0.5, None)
    wide = newton(Design(torch.cat([x, F.one_hot(predicted, 7).double()], dim=1)), y, w, 0.5, None)
    torch.testing.assert_close(ours, wide, rtol=0, atol=1e-3)


def test_shares_go_to_the_least_loss_and_with_doubt_to_the_first():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(400, generator=generator).double().repeat(3, 1)
    torch.testing.assert_close(average_shares(losses, 0.5, 50, 0), torch.full((3,), 1 / 3).double())
    noise = torch.randn(400, generator=generator).double()
    losses[1] -= 0.3
    losses[2] += 0.3
    assert average_shares(losses, 0.5, 50, 0)[1] > 0.99
    losses[1] = losses[0] + noise - noise.mean()  # as good on average, by large gains and losses
    assert average_shares(losses, 2.0, 50, 0)[0] > average_shares(losses, 0.0, 50, 0)[0] + 0.1


def test_a_start_serves_classes_in_another_order():
    data = biased(600, seed=1, bias=0.45)
    head = start_of(data)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one, other = (head(data.image.normalised, text) for text in (data.text.normalised, data.text.normalised[order]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_where_nothing_can_be_learned_the_start_ranks_as_mcm():
    """Mistakes that depend on nothing but the log-odds: most starts keep MCM's ranking, none loses much."""
    differences = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        data, test = (biased(n, seed=n + seed, bias=0.0, noise=0.3) for n in (80, 2000))
        shuffled = []
        for one in (data, test):
            p = torch.softmax(SCALE * one.image.normalised @ one.text.normalised.T, dim=1)
            drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)  # CLIP is calibrated: MCM is the best score
            shuffled.append(EmbeddedSet("calibrated", one.image, one.text, drawn, (), SCALE))
        ours, mcm = against_mcm(start_of(shuffled[0]), shuffled[1])
        differences.append(ours - mcm)
    assert np.median(differences) == pytest.approx(0, abs=2e-3)
    assert min(differences) > -0.05


def test_a_head_that_ranks_as_mcm_is_told_from_it_by_nothing():
    """Each fold's head has its own slope and offset, which must not look like a loss (or a gain) against MCM."""
    data = biased(120, seed=5, bias=0.45)
    trained = fit(data, recipe_named("default", linear=False, epochs=1, min_steps=1, learning_rate=1e-12))
    assert trained.best_epoch == 0
    assert trained.validation is not None
    assert trained.validation.auc == trained.validation.mcm_auc
    assert trained.validation.p_value == 1
    assert not trained.validation.worse


def test_few_failures_are_no_ground_for_a_claim():
    data = biased(160, seed=5, bias=0.45)
    validation = fit(data, recipe_named("default", epochs=1, min_steps=1)).validation
    assert validation is not None
    assert validation.failures < 50
    assert validation.too_few
    assert not validation.better
    assert not validation.worse


def test_captions_have_a_linear_start_too():
    data = biased(400, seed=1, bias=0.45)
    text = F.normalize(data.text.normalised[data.labels] + 0.05 * unit_rows(400, DIM, 4).float(), dim=1)
    captions = EmbeddedSet("captions", data.image, Embeddings(text), None, (), SCALE)
    recipe = recipe_named("default", batch_size=64)
    head = initial_head(captions, None, torch.arange(400), recipe)
    assert math.isfinite(float(head.prior.detach()))
    assert torch.isfinite(head(data.image.normalised, text)).all()
