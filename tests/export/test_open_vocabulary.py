"""The head over each request's own candidates against the eager head asked one image at a time."""

import itertools

import numpy as np
import onnxruntime
import pytest
import torch

from tests.support.embeddings import TOLERANCE, unit_rows
from vilu import ViLUHead
from vilu.export.details import DetailsGraph, write_details
from vilu.export.open_vocabulary import OpenVocabularyGraph, write_open_vocabulary
from vilu.kernels import fold
from vilu.scores import Doctor, Entropy

DIM, SCALE = 24, 100.0


def spread(projection, parts=("image", "predicted", "attended"), prior=None):
    """A head whose answers differ."""
    torch.manual_seed(3)
    head = ViLUHead(DIM, hidden=(16, 8), parts=parts, projection=projection, logit_scale=prior)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if prior:
            head.prior.fill_(0.7)
    return head.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("projection", "parts", "prior"),
    [
        ("identity", ("image", "predicted", "attended"), None),
        ("shared", ("image", "predicted", "attended"), None),
        ("separate", ("image", "predicted", "attended"), SCALE),
        ("shared", ("predicted", "attended"), None),
        ("identity", ("image",), SCALE),
    ],
)
def test_every_image_is_asked_about_its_own_candidates_alone(projection, parts, prior, tmp_path):
    head = spread(projection, parts, prior)
    sets = [unit_rows(k, DIM, seed=k).float() for k in (1, 2, 10, 63)]
    owner = [0, 3, 1, 3, 2, 2, 0, 1]
    images = unit_rows(len(owner), DIM, seed=0).float()
    bounds = [0, *itertools.accumulate(map(len, sets))]
    candidates = torch.tensor([[bounds[own], bounds[own + 1]] for own in owner])
    folded = fold(head, sets[0], logit_scale=SCALE, layout="plain")
    write_open_vocabulary(folded, 0.4, tmp_path / "ragged" / "1" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ragged" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"IMAGE_EMBEDDING": images, "TEXT_EMBEDDINGS": torch.cat(sets), "CANDIDATES": candidates}
    answers = session.run(None, {name: value.numpy() for name, value in feed.items()})
    for mine, theirs in zip(OpenVocabularyGraph(folded, 0.4)(*feed.values()), answers, strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=TOLERANCE[torch.float32])
    index, confidence, failure, accept = map(torch.from_numpy, answers)
    exact = head.double()
    for row, own in enumerate(owner):
        v, t = images[row : row + 1].double(), sets[own].double()
        expected, p = exact.failure_probability(v, t), torch.softmax(SCALE * v @ t.T, dim=1)
        assert index[row, 0] - bounds[own] == (v @ t.T).argmax()
        assert float(confidence[row, 0]) == pytest.approx(float(p.amax()), abs=TOLERANCE[torch.float32])
        assert float(failure[row, 0]) == pytest.approx(float(expected), abs=TOLERANCE[torch.float32])
        assert accept[row, 0] == (failure[row, 0] < 0.4)


def test_candidates_of_others_change_nothing():
    head = spread("shared")
    sets = [unit_rows(5, DIM, seed=1).float(), unit_rows(7, DIM, seed=2).float()]
    images = unit_rows(3, DIM, seed=0).float()
    graph = OpenVocabularyGraph(fold(head, sets[0], logit_scale=SCALE, layout="plain"), threshold=0.4)
    own = torch.tensor([[0, 5]] * 3)
    alone, among = graph(images, sets[0], own), graph(images, torch.cat(sets), own)
    assert torch.equal(alone[0], among[0])
    for mine, theirs in zip(alone[1:3], among[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_bank_of_one_class_set_is_refused():
    folded = fold(spread("shared"), unit_rows(5, DIM, seed=1).float(), logit_scale=SCALE, layout="folded")
    with pytest.raises(ValueError, match="plain"):
        OpenVocabularyGraph(folded, 0.5)
    with pytest.raises(ValueError, match="plain"):
        DetailsGraph(folded)


@pytest.mark.parametrize("rows", [1, 2, 10, 63])
@pytest.mark.parametrize(
    ("projection", "parts"),
    [
        ("identity", ("image", "predicted", "attended")),
        ("shared", ("image", "predicted", "attended")),
        ("separate", ("predicted", "attended")),
        ("identity", ("image",)),
    ],
)
def test_details_are_the_formulas(projection, parts, rows, tmp_path):
    """Against NumPy in float64 from the formulas, and against the scores that `vilu eval` compares."""
    head = spread(projection, parts)
    t, v = unit_rows(rows, DIM, seed=rows).float(), unit_rows(5, DIM, seed=0).float()
    write_details(fold(head, t, logit_scale=SCALE, layout="plain"), tmp_path / "details" / "1" / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "details" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    found = dict(
        zip(names, session.run(names, {"IMAGE_EMBEDDING": v.numpy(), "TEXT_EMBEDDINGS": t.numpy()}), strict=True)
    )

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    exact_v, exact_t = v.double().numpy(), t.double().numpy()
    p = softmax(SCALE * exact_v @ exact_t.T)
    expected = {
        "PROBABILITIES": p,
        "ENTROPY": (p * np.log(p)).sum(axis=1, keepdims=True) / (np.log(rows) if rows > 1 else 1),
        "DOCTOR": 1 - 1 / (p * p).sum(axis=1, keepdims=True),
    }
    if "attended" in parts:
        w_q, w_k, _ = (w.detach().double().numpy() for w in head.projections())
        expected["ATTENTION"] = softmax(head.attention_scale * (exact_v @ w_q.T) @ (exact_t @ w_k.T).T)
    assert set(found) == set(expected)
    tolerance = {"DOCTOR": 5e-5}  # -(1 - g) / g of a small g
    for name, value in expected.items():
        allowed = (
            10 * TOLERANCE[torch.float32] if name == "ATTENTION" else tolerance.get(name, TOLERANCE[torch.float32])
        )
        np.testing.assert_allclose(found[name], value, rtol=allowed, atol=allowed)
    for name, score in (("ENTROPY", Entropy()), ("DOCTOR", Doctor())):
        theirs = score.confidence(v, t, logit_scale=SCALE).numpy()
        np.testing.assert_allclose(found[name][:, 0], theirs, rtol=1e-4, atol=1e-5)
