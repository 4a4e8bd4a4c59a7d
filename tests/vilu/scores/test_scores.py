"""vilu.scores against slow float64 implementations written from the formulas, one sample at a time."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vilu import ViLUHead
from vilu.errors import UserError
from vilu.evaluation import metrics
from vilu.scores import (
    LVU,
    SCORES,
    BayesVLM,
    ClassBias,
    ConfidNet,
    Embeddings,
    ProbVLM,
    RelU,
    Training,
    TrustVLM,
    ViLU,
)
from vilu.scores.bayes import best_prior_precision, gauss_newton
from vilu.scores.network import Batch
from vilu.scores.per_class import choose_penalty, stratified_folds
from vilu.scores.probvlm import generalised_gaussian_nll

# Absolute error on scores of order 1. float16 inputs are read exactly, so both compute in float32.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5}
FREE = ["MCM", "Entropy", "Doctor"]
TRAINED = ["LVU-BCE", "LVU-MSE", "ConfidNet", "ProbVLM"]
QUICK = Training(epochs=3, batch_size=16, learning_rate=1e-3)


def world(count=60, classes=5, dim=16, noise=0.3, dtype=torch.float32, seed=0):
    """Images around their class's text; some land nearer another."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.nn.functional.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    labels = torch.randint(classes, (count,), generator=generator)
    image = text[labels] + noise * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(image, dim=1).to(dtype), labels, text.to(dtype)


def with_noise():
    return world(noise=0.6)


def towers(count=60, classes=5, dim=12, widths=(20, 16), seed=0, noise=0.5):
    """The same with what each projection saw and gave."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    text_code = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    codes = (text_code[labels] + noise * torch.randn(count, dim, generator=generator), text_code)
    for code, width in zip(codes, widths, strict=True):
        lift, projection = torch.randn(dim, width, generator=generator), torch.randn(width, dim, generator=generator)
        activation = code @ lift + 0.1 * torch.randn(len(code), width, generator=generator)
        output = activation @ projection / width
        sides.append(Embeddings(torch.nn.functional.normalize(output, dim=1), activation, output))
    return sides[0], labels, sides[1]


def f64(tensor):
    return tensor.detach().to(torch.float64).cpu().numpy()


def slow_softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return np.array([w / sum(weights) for w in weights])


def slow_probabilities(image, text, scale):
    return [slow_softmax([scale * float(v @ t) for t in f64(text)]) for v in f64(image)]


def slow_closed_form(name, p):
    if name == "MCM":
        return max(p)
    if name == "Entropy":
        return sum(x * math.log(x) for x in p if x > 0) / math.log(len(p)) if len(p) > 1 else 0.0
    g = sum(x * x for x in p)
    return -(1 - g) / g


def slow_rel_u(image, labels, text, scale, lam=0.5):
    k = len(text)
    outer: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for p, v, label in zip(slow_probabilities(image, text, scale), f64(image), labels.tolist(), strict=True):
        outer[int(np.argmax(f64(text) @ v)) != label].append(np.outer(p, p))
    mean = {wrong: np.mean(some, axis=0) if some else np.zeros((k, k)) for wrong, some in outer.items()}
    matrix = np.maximum(lam * mean[True] - (1 - lam) * mean[False], 0)
    np.fill_diagonal(matrix, 0)
    if not matrix.any():
        matrix = np.ones((k, k)) - np.eye(k)
    return matrix / max(np.sqrt((matrix**2).sum()), 1e-300)


def slow_linear(weights, prefix, x):
    return f64(weights[f"{prefix}.weight"]) @ x + f64(weights[f"{prefix}.bias"])


def slow_mlp(weights, x, prefix=""):
    layers = sorted({int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix)})
    for layer in layers[:-1]:
        x = np.maximum(slow_linear(weights, f"{prefix}{layer}", x), 0)
    return slow_linear(weights, f"{prefix}{layers[-1]}", x)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5, 6, 101])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("name", FREE)
def test_closed_form(name, scale, classes, dtype):
    image, _, text = world(40, classes, dtype=dtype)
    expected = [slow_closed_form(name, p) for p in slow_probabilities(image, text, scale)]
    answer = SCORES[name]().confidence(image, text, scale)
    assert answer.shape == (40,)
    assert answer.dtype == torch.float32
    # Doctor runs to 1 − K.
    assert np.allclose(f64(answer), expected, rtol=1e-5, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FREE)
def test_closed_form_extremes(name):
    # Equal candidates: p uniform. Opposite ones at scale 100: p one-hot, and 0 log 0 is 0.
    image = torch.tensor([[1.0, 0.0]])
    same, apart = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    uniform = {"MCM": 0.25, "Entropy": -1, "Doctor": -3}[name]
    assert SCORES[name]().confidence(image, same).item() == pytest.approx(uniform)
    assert SCORES[name]().confidence(image, apart).item() == {"MCM": 1, "Entropy": 0, "Doctor": 0}[name]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5, 6])
@pytest.mark.parametrize("lam", [0.2, 0.5, 0.9])
def test_rel_u(lam, classes, dtype):
    image, labels, text = world(80, classes, noise=0.6, dtype=dtype)
    matrix = slow_rel_u(image, labels, text, 20.0, lam)
    expected = [-(p @ matrix @ p) for p in slow_probabilities(image, text, 20.0)]
    answer = RelU(lam, 1.0).fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    assert np.allclose(f64(answer), expected, atol=TOLERANCE[dtype])
    assert torch.isfinite(answer).all()


def test_rel_u_reads_the_last_of_an_odd_number_of_classes():
    image, labels, text = world(200, 5, noise=0.6)
    matrix = RelU(0.9, 1.0).fit(image, labels, text, 20.0).matrix
    assert matrix.shape == (5, 5)
    assert matrix[4].any()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_rel_u_temperature_divides_the_scale(temperature):
    image, labels, text = world(noise=0.6)
    warm = RelU(0.5, temperature).fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    plain = RelU(0.5, 1.0).fit(image, labels, text, 20.0 / temperature).confidence(image, text, 20.0 / temperature)
    assert torch.allclose(warm, plain)


def test_rel_u_is_cross_validated(monkeypatch):
    """λ and T are those of the highest mean AUC over folds, with each fold's matrix from the other folds."""
    lams, temperatures = (0.1, 0.5, 0.9), (1.0, 4.0)
    monkeypatch.setattr("vilu.scores.closed_form.LAMBDAS", lams)
    monkeypatch.setattr("vilu.scores.closed_form.TEMPERATURES", temperatures)
    image, labels, text = world(150, 4, noise=0.9, seed=3)
    wrong = (image @ text.T).argmax(dim=1) != labels
    place = stratified_folds(wrong, 5, 0)
    assert all(wrong[place == fold].any() and not wrong[place == fold].all() for fold in range(5))
    auc = {}
    for lam in lams:
        for temperature in temperatures:
            parts = []
            for fold in range(5):
                rest, held = place != fold, place == fold
                matrix = slow_rel_u(image[rest], labels[rest], text, 20.0 / temperature, lam)
                confidence = [-(p @ matrix @ p) for p in slow_probabilities(image[held], text, 20.0 / temperature)]
                parts.append(metrics.auroc(confidence, ~wrong[held].numpy()))
            auc[lam, temperature] = np.mean(parts)
    chosen = RelU().fit(image, labels, text, 20.0).chosen
    assert auc[chosen] == pytest.approx(max(auc.values()))
    assert min(auc.values()) < max(auc.values()) - 0.01
    assert RelU(temperature=2.0).fit(image, labels, text, 20.0).chosen[1] == 2


def with_hard_classes(count=400):
    """Two of six classes are nearly always answered wrong, at the same MCM as the others."""
    image, _, text = world(count, 6, noise=0.5)
    predicted = (image @ text.T).argmax(dim=1)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return image, torch.where((predicted < 2) & (draws < 0.8), (predicted + 1) % 6, predicted), text


@pytest.mark.parametrize("inverse_c", [0.3, 10.0])
def test_class_bias_is_the_logistic_regression(inverse_c):
    """scikit-learn on the log-odds, so large that their weight is not shrunk, and a column per class."""
    from sklearn.linear_model import LogisticRegression

    image, labels, text = with_hard_classes()
    p = np.array(slow_probabilities(image, text, 20.0))
    predicted, top = p.argmax(axis=1), p.max(axis=1)
    odds, large = np.log((1 - top) / top), 1e3
    x = np.concatenate([large * odds[:, None], np.eye(6)[predicted]], axis=1)
    other = LogisticRegression(C=1 / inverse_c, tol=1e-10, max_iter=10_000).fit(x, predicted != labels.numpy())
    score = ClassBias(inverse_c).fit(image, labels, text, 20.0)
    logit = -f64(score.confidence(image, text, 20.0).logit())
    np.testing.assert_allclose(logit, x @ other.coef_[0] + other.intercept_[0], atol=2e-2)
    assert score.chosen == inverse_c


def test_class_bias_chooses_c_by_cross_validation():
    image, labels, text = with_hard_classes(1400)
    score = ClassBias().fit(image[:400], labels[:400], text, 20.0)
    assert 0 < score.chosen < math.inf
    fresh = image[400:]
    right = ((fresh @ text.T).argmax(dim=1) == labels[400:]).numpy()
    with_bias = metrics.auroc(score.confidence(fresh, text, 20.0).numpy(), right)
    mcm = metrics.auroc(SCORES["MCM"]().confidence(fresh, text, 20.0).numpy(), right)
    assert with_bias > mcm + 0.05
    # Mistakes that have nothing to do with the class: nearly no class weights, and so nearly MCM's ranking.
    odds = torch.linspace(-3, 3, 2000, dtype=torch.float64)
    wrong = (torch.sigmoid(odds) > torch.rand(2000, generator=torch.Generator().manual_seed(0))).double()
    assert choose_penalty(odds, torch.arange(2000) % 40, wrong, 40, 0) >= 100


def test_class_bias_refuses():
    image, labels, text = world()
    with pytest.raises(UserError, match="captions cannot fit it"):
        ClassBias().fit(image, None, text[labels])
    with pytest.raises(UserError, match="fitted on 5 classes, got 4"):
        ClassBias().fit(*with_noise()).confidence(image, text[:4])
    predicted = (image @ text.T).argmax(dim=1)
    for side, given in (("right", predicted), ("wrong", (predicted + 1) % 5)):
        with pytest.raises(UserError, match=f"CLIP is {side} on all 60"):
            ClassBias().fit(image, given, text)


def test_trustvlm():
    image, labels, text = with_noise()
    labels = torch.where(labels == 3, 2, labels)  # class 3 has no image
    expected = []
    for v, p in zip(f64(image), slow_probabilities(image, text, 20.0), strict=True):
        members = f64(image)[labels.numpy() == p.argmax()] if p.argmax() != 3 else f64(image)
        prototype = members.mean(axis=0)
        expected.append(p.max() + 0.7 * float(v @ prototype) / np.linalg.norm(prototype))
    assert {int(p.argmax()) for p in slow_probabilities(image, text, 20.0)} >= {2, 3}
    answer = TrustVLM(0.7).fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    np.testing.assert_allclose(f64(answer), expected, atol=1e-5)
    with pytest.raises(UserError, match="captions cannot fit it"):
        TrustVLM().fit(image, None, text[labels])
    with pytest.raises(UserError, match="fitted on 5 classes, got 4"):
        TrustVLM().fit(image, labels, text).confidence(image, text[:4])


def test_rel_u_one_sided():
    image, _, text = world()
    right = (image @ text.T).argmax(dim=1)
    p = torch.softmax(20 * image @ text.T, dim=1)
    # Nothing wrong: constant off the diagonal, an increasing function of Σp².
    gini = RelU().fit(image, right, text, 20.0).confidence(image, text, 20.0)
    assert torch.allclose(gini, (p.square().sum(dim=1) - 1) / math.sqrt(20), atol=1e-6)
    # Nothing right: λ E_wrong alone.
    wrong = RelU().fit(image, (right + 1) % 5, text, 20.0)
    assert np.allclose(f64(wrong.matrix), slow_rel_u(image, (right + 1) % 5, text, 20.0), atol=1e-6)


def test_rel_u_refuses_other_classes_and_captions():
    image, labels, text = world()
    with pytest.raises(UserError, match="fitted on 5 classes, got 4"):
        RelU().fit(image, labels, text).confidence(image, text[:4])
    with pytest.raises(UserError, match="captions cannot fit it"):
        RelU().fit(image, None, text[labels])


@pytest.mark.parametrize("parts", [("image",), ("image", "predicted", "attended")])
def test_vilu_is_one_minus_failure_probability(parts):
    image, _, text = world()
    torch.manual_seed(0)
    head = ViLUHead(16, parts=parts)
    head.mlp[-1].bias.data.fill_(-25.0)  # P(failure) near 1e-11
    expected = [1 - sigmoid(x) for x in head.double()(image.double(), text.double()).tolist()]
    answer = ViLU(head.float()).confidence(image, text)
    assert answer.dtype == torch.float64
    assert np.allclose(answer, expected, atol=1e-15)
    assert (answer < 1).all()
    assert len(answer.unique()) > 50


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_lvu_confidence(loss):
    image, labels, text = world(noise=0.6)
    score = LVU(loss, QUICK).fit(image, labels, text, 20.0)
    weights = score.head.state_dict()
    assert [tuple(weights[f"mlp.{i}.weight"].shape) for i in (0, 2, 4, 6)] == [
        (512, 16),
        (256, 512),
        (128, 256),
        (1, 128),
    ]
    expected = [1 - sigmoid(slow_mlp(weights, v, "mlp.").item()) for v in f64(image)]
    assert np.allclose(score.confidence(image, text), expected, atol=TOLERANCE[torch.float32])


def test_confidnet_confidence():
    image, labels, text = world(noise=0.6)
    score = ConfidNet(training=QUICK).fit(image, labels, text, 20.0)
    weights = score.mlp.state_dict()
    assert [len(weights[f"{i}.bias"]) for i in (0, 2, 4, 6, 8)] == [400, 400, 400, 400, 1]
    expected = [sigmoid(slow_mlp(weights, v).item()) for v in f64(image)]
    assert np.allclose(score.confidence(image, text), expected, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("captions", [False, True])
def test_batch_targets(captions):
    image, labels, text = world(30, 5, noise=0.6)
    batch = (
        Batch(image, text[labels], torch.arange(30), 20.0, captions=True)
        if captions
        else Batch(image, text, labels, 20.0, captions=False)
    )
    for i, p in enumerate(slow_probabilities(image, batch.text, 20.0)):
        own = i if captions else int(labels[i])
        assert batch.target_probability()[i].item() == pytest.approx(p[own], abs=1e-5)
        # Captions repeat (30 of 5 classes): sharing the maximum with a copy is right.
        assert bool(batch.wrong()[i]) == bool(p[own] < max(p) - 1e-12)


@pytest.mark.parametrize("name", ["LVU-BCE", "LVU-MSE", "ConfidNet", "ConfidNet, static"])
def test_losses(name):
    image, labels, text = world(noise=0.6)
    batch = Batch(image, text, labels, 20.0, captions=False)
    torch.manual_seed(0)
    head = ViLUHead(16, parts=("image",))
    probabilities = slow_probabilities(image, text, 20.0)
    wrong = [p.argmax() != y for p, y in zip(probabilities, labels.tolist(), strict=True)]
    accuracy = 1 - np.mean(wrong)
    assert 0.2 < accuracy < 0.8
    weight = {
        "LVU-BCE": math.log(1 + accuracy / (1 - accuracy)),
        "LVU-MSE": 1.0,
        "ConfidNet": (1 + math.exp(4 * (accuracy - 0.5))) / 2,
        "ConfidNet, static": 3.0,
    }[name]
    losses = []
    for v, p, y, bad in zip(f64(image), probabilities, labels.tolist(), wrong, strict=True):
        logit = slow_mlp(head.state_dict(), v, "mlp.").item()
        if name == "LVU-BCE":
            losses.append((weight if bad else 1) * -math.log(sigmoid(logit if bad else -logit)))
        else:
            own = sigmoid(-logit) if name == "LVU-MSE" else sigmoid(logit)
            losses.append((weight if bad else 1) * (own - p[y]) ** 2)
    if name.startswith("LVU"):
        value = LVU(name[4:].lower()).loss(head, batch)
    else:
        value = ConfidNet(3.0 if "static" in name else None).loss(head.mlp, batch)
    assert value.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_generalised_gaussian():
    generator = torch.Generator().manual_seed(0)
    z, mu = torch.randn(2, 50, generator=generator)
    alpha, beta = 0.2 + 2 * torch.rand(2, 50, generator=generator)
    value = generalised_gaussian_nll(z, mu, alpha.log(), beta)
    expected = -stats.gennorm.logpdf(f64(z), f64(beta), loc=f64(mu), scale=f64(alpha)) - math.log(2)
    assert np.allclose(f64(value), expected, atol=1e-4)


def test_generalised_gaussian_gradient_is_finite_at_the_extremes():
    z = torch.tensor([0.0, 0.0, 1e3, 1e3])
    mu = torch.zeros(4, requires_grad=True)
    log_alpha = torch.tensor([-7.0, 7.0, -7.0, 7.0], requires_grad=True)
    beta = torch.tensor([0.1, 0.1, 50.0, 50.0], requires_grad=True)
    generalised_gaussian_nll(z, mu, log_alpha, beta).sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (mu, log_alpha, beta))


@pytest.mark.parametrize("sure", [False, True], ids=["aleatoric", "epistemic"])
def test_probvlm_confidence(sure):
    image, labels, text = world(noise=0.6)
    score = ProbVLM(4, QUICK).fit(image, labels, text, 20.0)
    if sure:  # alpha near 2e-3: what is left is the spread over the passes
        score.adapter.inverse_alpha[2].bias.data.fill_(500.0)
    weights, softplus = score.adapter.state_dict(), lambda x: np.log1p(np.exp(x))
    assert set(np.unique(score.masks.numpy())) == {0, np.float32(1 / 0.9)}
    expected = []
    for v in f64(image):
        means, variances = [], []
        for mask in f64(score.masks):
            hidden = np.maximum(slow_linear(weights, "down", v), 0)
            hidden = np.maximum(slow_linear(weights, "middle", hidden), 0) * mask
            h = v + slow_linear(weights, "up", hidden)
            means.append(slow_mlp(weights, h, "mu."))
            alpha = 1 / (softplus(slow_mlp(weights, h, "inverse_alpha.")) + 1e-3)
            beta = softplus(slow_mlp(weights, h, "beta.")) + 0.1
            variances.append(np.mean([stats.gennorm.var(b, scale=a) for a, b in zip(alpha, beta, strict=True)]))
        expected.append(-(np.mean(variances) + np.mean(np.var(means, axis=0))))
    assert np.allclose(f64(score.confidence(image, text)), expected, rtol=1e-4)


def slow_gauss_newton(outputs, directions, scale):
    """InfoNCE's Gauss-Newton blocks, with the Jacobian of x / |x| by central differences."""
    total = np.zeros((outputs.shape[1],) * 2)
    for x in outputs:
        jacobian = np.zeros_like(total)
        for j in range(len(x)):
            step = np.zeros_like(x)
            step[j] = 1e-6
            up, down = x + step, x - step
            jacobian[:, j] = (up / np.linalg.norm(up) - down / np.linalg.norm(down)) / 2e-6
        p = slow_softmax(list(scale * directions @ (x / np.linalg.norm(x))))
        by_logit = scale * directions @ jacobian
        total += by_logit.T @ (np.diag(p) - np.outer(p, p)) @ by_logit
    return total


def test_gauss_newton():
    image, _, text = towers(20, 7)
    value = gauss_newton(image.output.double(), text.normalised.double(), 20.0)
    expected = slow_gauss_newton(f64(image.output), f64(text.normalised), 20.0)
    assert np.allclose(value, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def slow_bayes(image, labels, text, query, candidates, scale, tau, prior, group):
    """Posterior as a full Kronecker product, one pair of image and class at a time."""
    pairs = Embeddings(*(getattr(text, name)[labels] for name in ("normalised", "activation", "output")))
    covariances = []
    for source, target in ((image, pairs), (pairs, image)):
        n = len(source)
        a = sum(np.outer(x, x) for x in f64(source.activation)) / math.sqrt(n)
        b = sum(
            slow_gauss_newton(f64(source.output)[i : i + group], f64(target.normalised)[i : i + group], scale)
            for i in range(0, n, group)
        ) / math.sqrt(n)
        a = math.sqrt(tau) * a + math.sqrt(prior) * np.eye(source.activation.shape[1])
        b = math.sqrt(tau) * b + math.sqrt(prior) * np.eye(source.output.shape[1])
        covariances.append((np.linalg.inv(a), np.linalg.inv(b)))

    def variance(side, activation):
        a_inv, b_inv = covariances[side]
        return (activation @ a_inv @ activation) * np.diag(b_inv)

    confidences = []
    for v, a, mu in zip(f64(query.normalised), f64(query.activation), f64(query.output), strict=True):
        s, logits, cosines = variance(0, a), [], []
        for t, c, nu in zip(
            f64(candidates.normalised), f64(candidates.activation), f64(candidates.output), strict=True
        ):
            tt = variance(1, c)
            norm = (mu**2 + s).sum() * (nu**2 + tt).sum()
            mean = scale * (mu * nu).sum() / math.sqrt(norm)
            var = scale**2 * ((mu**2 + s) * tt + s * nu**2).sum() / norm
            logits.append(mean / math.sqrt(1 + math.pi / 8 * var))
            cosines.append(v @ t)
        confidences.append(slow_softmax(logits)[int(np.argmax(cosines))])
    return confidences


@pytest.mark.parametrize("classes", [1, 5, 6])
@pytest.mark.parametrize("group", [9, 1000])
def test_bayesvlm(group, classes):
    image, labels, text = towers(30, classes)
    score = BayesVLM(pseudo_data=3.0, prior_precision=50.0, candidates=group).fit(image, labels, text, 20.0)
    expected = slow_bayes(image, labels, text, image, text, 20.0, 3.0, 50.0, group)
    assert np.allclose(f64(score.confidence(image, text, 20.0)), expected, atol=TOLERANCE[torch.float32])


def test_prob_cosine_is_the_mean_and_variance_of_sampled_projections():
    """Projections drawn from the posterior; their cosine's moments, to the approximation of a fixed norm."""
    image, labels, text = towers(30, 4)
    score = BayesVLM(pseudo_data=50.0, prior_precision=3000.0).fit(image, labels, text, 20.0)
    mean, variance = score.prob_cosine(image[slice(0, 1)], text, 20.0)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for posterior, side in ((score.image_posterior, image[slice(0, 1)]), (score.text_posterior, text)):
        spread = posterior.variance(side.activation).sqrt()
        samples.append(side.output + spread * torch.randn(4000, *spread.shape, generator=generator))
    norms = [
        (side.output.square() + posterior.variance(side.activation)).sum(dim=1).sqrt()
        for posterior, side in ((score.image_posterior, image[slice(0, 1)]), (score.text_posterior, text))
    ]
    drawn = 20.0 * (samples[0] * samples[1]).sum(dim=2) / (norms[0] * norms[1])
    assert torch.allclose(drawn.mean(dim=0), mean[0], atol=5 * float((variance / 4000).sqrt().max()))
    assert torch.allclose(drawn.var(dim=0), variance[0], rtol=0.15)


def test_bayesvlm_captions_and_labels_agree():
    image, labels, text = towers(30, 5)
    pairs = text[labels]
    closed = BayesVLM().fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    captions = BayesVLM().fit(image, None, pairs, 20.0).confidence(image, text, 20.0)
    assert torch.equal(closed, captions)


def test_bayesvlm_needs_activations():
    image, labels, text = towers()
    with pytest.raises(UserError, match="image projection's inputs and outputs"):
        BayesVLM().fit(image.normalised, labels, text)
    score = BayesVLM().fit(image, labels, text)
    with pytest.raises(UserError, match="text projection's inputs and outputs"):
        score.confidence(image, text.normalised)
    swapped = Embeddings(image.normalised, image.activation[:, :3], image.output)
    with pytest.raises(UserError, match="activations 20 wide, got 3"):
        score.confidence(swapped, text)


def test_prior_precision_is_the_best():
    rng = np.random.default_rng(0)
    a, b = torch.tensor(rng.random(6)) * 50, torch.tensor(rng.random(4)) * 50
    found = best_prior_precision(a, b, weight_norm=0.3, pseudo_data=10.0)

    def evidence(prior):
        full = np.kron(np.diag(math.sqrt(10) * a + math.sqrt(prior)), np.diag(math.sqrt(10) * b + math.sqrt(prior)))
        return 24 * math.log(prior) - prior * 0.3 - np.linalg.slogdet(full)[1]

    grid = np.geomspace(1e-4, 1e6, 2000)
    assert evidence(found) >= max(evidence(x) for x in grid) - 1e-6


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("captions", [False, True])
def test_trained_scores_are_deterministic_by_seed(name, captions):
    image, labels, text = world(noise=0.6)
    labels, text = (None, text[labels]) if captions else (labels, text)

    def once(seed):
        training = Training(epochs=2, batch_size=16, seed=seed)
        return SCORES[name](training=training).fit(image, labels, text, 20.0).confidence(image, text, 20.0)

    torch.manual_seed(7)
    first = once(0)
    state = torch.get_rng_state()
    assert torch.equal(first, once(0))
    assert not torch.equal(first, once(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", ["LVU-BCE", "LVU-MSE", "ConfidNet"])
def test_training_learns(name):
    """Two clusters, one always right and one always wrong: every trained visual score must tell them apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(2, 16, generator=generator), dim=1)
    side = torch.arange(400) % 2
    image = torch.nn.functional.normalize(centres[side] + 0.05 * torch.randn(400, 16, generator=generator), dim=1)
    labels = torch.zeros(400, dtype=torch.long)  # images at centre 1 are answered 1: wrong
    training = Training(epochs=40, batch_size=32, learning_rate=1e-3)
    score = SCORES[name](training=training).fit(image, labels, centres, 100.0)
    assert metrics.auroc(score.confidence(image, centres).numpy(), (side == 0).numpy()) > 0.99


def test_probvlm_trusts_what_it_has_seen():
    image, labels, text = world(400, 3, noise=0.05)
    training = Training(epochs=60, batch_size=32, learning_rate=1e-3)
    score = ProbVLM(training=training).fit(image, labels, text, 100.0)
    near, _, _ = world(100, 3, noise=0.05, seed=0)
    far = torch.nn.functional.normalize(torch.randn(100, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    both = score.confidence(torch.cat([near, far]), text)
    assert metrics.auroc(both.numpy(), np.arange(200) < 100) > 0.8


def test_probvlm_states_the_error_that_it_makes():
    """At its own settings and on few images: an adapter that stops too early states some hundred times the error."""
    image, labels, text = world(500, 3, dim=64, noise=0.05)
    score = ProbVLM().fit(image, labels, text, 100.0)
    error = (score.adapter(image, torch.ones(256))[0] - image).square().mean()
    stated = -score.confidence(image, text).mean()
    assert error / 4 < stated < error * 4


@pytest.mark.parametrize("side", ["right", "wrong"])
def test_one_sided_training(side):
    image, _, text = world()
    labels = (image @ text.T).argmax(dim=1)
    labels = labels if side == "right" else (labels + 1) % 5
    with pytest.raises(UserError, match=f"CLIP is {side} on all 60 training samples"):
        LVU("bce", QUICK).fit(image, labels, text)
    for name in ("LVU-MSE", "ConfidNet", "ProbVLM"):
        answer = SCORES[name](training=QUICK).fit(image, labels, text).confidence(image, text)
        assert torch.isfinite(answer).all()
    image, _, text = towers()
    labels = (image.normalised @ text.normalised.T).argmax(dim=1)
    labels = labels if side == "right" else (labels + 1) % 5
    assert torch.isfinite(BayesVLM().fit(image, labels, text).confidence(image, text)).all()


@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("ViLU", "BayesVLM")])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_inputs_are_read_in_float32(name, dtype):
    image, labels, text = world(noise=0.6, dtype=dtype)
    options = {"training": QUICK} if name in TRAINED else {}
    half = SCORES[name](**options).fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    image, text = image.float(), text.float()
    full = SCORES[name](**options).fit(image, labels, text, 20.0).confidence(image, text, 20.0)
    assert torch.equal(half, full)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "ViLU"])
def test_scores_do_not_depend_on_the_batch(name, monkeypatch):
    image, labels, text = towers()
    options = {"training": QUICK} if name in TRAINED else {}
    score = SCORES[name](**options).fit(image, labels, text, 20.0)
    whole = score.confidence(image, text, 20.0)
    monkeypatch.setattr("vilu.scores.base.BLOCK", 7)
    assert torch.allclose(whole, score.confidence(image, text, 20.0), rtol=1e-5, atol=1e-6)
    one = torch.cat([score.confidence(image[slice(i, i + 1)], text, 20.0) for i in range(3)])
    assert torch.allclose(whole[:3], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "ViLU"])
def test_names_and_fit_order(name):
    image, _, text = towers()
    score = SCORES[name]()
    assert score.name == name
    if score.needs_fit:
        with pytest.raises(UserError, match=f"{name} must be fitted"):
            score.confidence(image, text)
    else:
        assert score.confidence(image, text).shape == (60,)


def bad(change):
    image, labels, text = world()
    change = dict(change)
    image = change.pop("image", image)
    return {"image": image, "labels": labels, "text": text, "scale": 100.0, **change}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": torch.full((60, 16), float("nan"))}, "not finite"),
        ({"image": torch.ones(60, 15)}, "15 wide, text embeddings 16"),
        ({"image": torch.ones(60)}, "two-dimensional"),
        ({"image": torch.ones(60, 16, dtype=torch.int64)}, "floating"),
        ({"image": torch.ones(0, 16)}, "0 image embeddings"),
        ({"text": torch.ones(0, 16)}, "0 text embeddings"),
        ({"labels": torch.zeros(59, dtype=torch.int64)}, "60 integers"),
        ({"labels": torch.zeros(60)}, "60 integers"),
        ({"labels": torch.full((60,), 5)}, r"0\.\.4, got 5\.\.5"),
        ({"labels": torch.full((60,), -1)}, r"0\.\.4, got -1"),
        ({"labels": None}, "must come in pairs"),
        ({"scale": 0.0}, "logit_scale"),
        ({"scale": float("nan")}, "logit_scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(change, said):
    given = bad(change)
    with pytest.raises(UserError, match=said) as caught:
        RelU().fit(given["image"], given["labels"], given["text"], given["scale"])
    assert "\n" not in str(caught.value)


def test_bad_options():
    for build in (
        lambda: RelU(lam=1.5),
        lambda: RelU(temperature=0),
        lambda: ClassBias(inverse_c=0),
        lambda: TrustVLM(weight=0),
        lambda: LVU("hinge"),
        lambda: ConfidNet(failure_weight=0),
        lambda: ProbVLM(passes=1),
        lambda: BayesVLM(pseudo_data=0),
        lambda: BayesVLM(prior_precision=float("inf")),
        lambda: BayesVLM(candidates=1),
    ):
        with pytest.raises(UserError):
            build()
    image, labels, text = world(3)
    with pytest.raises(UserError, match="at least 4 samples"):
        LVU("mse").fit(image, labels, text)
    image, labels, text = world()
    with pytest.raises(UserError, match="epochs"):
        LVU("mse", Training(epochs=0)).fit(image, labels, text)
    score = LVU("mse", QUICK).fit(image, labels, text)
    with pytest.raises(UserError, match="reads embeddings 16 wide, got 8"):
        score.confidence(image[:, :8], text[:, :8])
    with pytest.raises(UserError, match="output is"):
        Embeddings(image, image, image[:, :8])
    with pytest.raises(UserError, match="activation has 2 rows"):
        Embeddings(image, image[:2])


def test_diverged_training_says_so():
    image, labels, text = world(noise=0.6)
    with pytest.raises(UserError, match="diverged"):
        ProbVLM(training=Training(epochs=20, batch_size=16, learning_rate=1e30)).fit(image, labels, text)
