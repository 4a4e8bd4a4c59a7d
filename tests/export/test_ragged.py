"""The head over each request's own candidates against the eager head asked one image at a time."""

import itertools

import onnxruntime
import pytest
import torch

from tests.conftest import TOLERANCE, unit_rows
from vilu import ViLUHead
from vilu.export.ragged import RaggedHeadGraph, write_ragged
from vilu.kernels import fold

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
    write_ragged(folded, 0.4, tmp_path / "ragged" / "1" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "ragged" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"IMAGE_EMBEDDING": images, "TEXT_EMBEDDINGS": torch.cat(sets), "CANDIDATES": candidates}
    answers = session.run(None, {name: value.numpy() for name, value in feed.items()})
    for mine, theirs in zip(RaggedHeadGraph(folded, 0.4)(*feed.values()), answers, strict=True):
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
    graph = RaggedHeadGraph(fold(head, sets[0], logit_scale=SCALE, layout="plain"), threshold=0.4)
    own = torch.tensor([[0, 5]] * 3)
    alone, among = graph(images, sets[0], own), graph(images, torch.cat(sets), own)
    assert torch.equal(alone[0], among[0])
    for mine, theirs in zip(alone[1:3], among[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_bank_of_one_class_set_is_refused():
    folded = fold(spread("shared"), unit_rows(5, DIM, seed=1).float(), logit_scale=SCALE, layout="folded")
    with pytest.raises(ValueError, match="plain"):
        RaggedHeadGraph(folded, 0.5)
