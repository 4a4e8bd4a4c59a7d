import math

import numpy as np
import pytest
import torch

from tests.support.embeddings import DEVICES, TOLERANCE, unit_rows
from tests.support.public_data import lvis_text_embeddings
from vilu import ViLUHead
from vilu.kernels import fold

FORMS = ["identity", "shared", "separate"]
SUBSETS = [("image", "predicted", "attended"), ("image", "attended"), ("image", "predicted"), ("image",)]


def make_head(dim, projection="shared", parts=SUBSETS[0], scale=100.0, seed=0):
    torch.manual_seed(seed)
    head = ViLUHead(dim, hidden=(48, 32, 16), projection=projection, parts=parts, attention_scale=scale).double()
    for layer in (head.query, head.key, head.value):
        if layer is not None:
            layer.weight.data += 0.3 * torch.randn_like(layer.weight) / math.sqrt(dim)
    return head.eval().requires_grad_(False)


def slow_probability(head, v, t):
    """The definition, one image and one class at a time, in NumPy float64."""
    w_q, w_k, w_v = (w.double().cpu().numpy() for w in head.projections())
    layers = [
        (m.weight.double().cpu().numpy(), m.bias.double().cpu().numpy()) for m in head.mlp if hasattr(m, "weight")
    ]
    v, t = v.double().cpu().numpy(), t.double().cpu().numpy()
    out = []
    for image in v:
        logits = [head.attention_scale * (w_q @ image) @ (w_k @ text) for text in t]
        weights = [math.exp(x - max(logits)) for x in logits]
        attended = sum(a / sum(weights) * (w_v @ text) for a, text in zip(weights, t, strict=True))
        columns = {"image": image, "predicted": t[int(np.argmax(t @ image))], "attended": attended}
        x = np.concatenate([columns[part] for part in head.parts])
        for i, (weight, bias) in enumerate(layers):
            x = weight @ x + bias
            if i < len(layers) - 1:
                x = np.maximum(x, 0)
        out.append(1 / (1 + math.exp(-x[0])))
    return np.array(out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("projection", FORMS)
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
@pytest.mark.parametrize(("batch", "classes", "dim"), [(1, 1, 64), (3, 7, 64), (5, 63, 100)])
def test_eager_and_folded_heads_equal_the_definition(batch, classes, dim, parts, projection, dtype, device):
    head = make_head(dim, projection, parts)
    v, t = unit_rows(batch, dim, 1), unit_rows(classes, dim, 2)
    expected = slow_probability(head, v, t)
    head, v, t = head.to(device, dtype), v.to(device, dtype), t.to(device, dtype)
    eager = head.failure_probability(v, t)
    assert eager.shape == (batch,)
    answers = [eager, *(fold(head, t, layout=layout)(v).failure_probability for layout in ("folded", "plain"))]
    for actual in answers:
        np.testing.assert_allclose(actual.cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_fold_gives_the_training_free_scores():
    v, t = unit_rows(9, 32, 3), unit_rows(11, 32, 4)
    out = fold(make_head(32), t, logit_scale=20.0)(v)
    p = torch.softmax(20.0 * v @ t.T, dim=-1).numpy()
    np.testing.assert_array_equal(out.class_index, p.argmax(axis=1))
    np.testing.assert_allclose(out.confidence, p.max(axis=1), atol=1e-12)
    np.testing.assert_allclose(out.entropy, (p * np.log(p)).sum(axis=1) / math.log(11), atol=1e-12)
    g = (p**2).sum(axis=1)
    np.testing.assert_allclose(out.doctor, -(1 - g) / g, atol=1e-9)


def test_one_class_and_ties():
    head = make_head(16)
    v = torch.full((4, 16), 0.25, dtype=torch.float64)  # sums of powers of two: the ties are exact
    row = torch.full((1, 16), 0.25, dtype=torch.float64)
    assert fold(head, row)(v).entropy.tolist() == [0, 0, 0, 0]
    below = row * torch.tensor([-1.0] * 8 + [1.0] * 8)
    tied = fold(head, torch.cat([below, row, row, below, row]))(v)
    assert tied.class_index.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(tied.confidence, torch.full((4,), 1 / 3, dtype=torch.float64))


def test_a_bad_row_spoils_only_itself():
    head, t, v = make_head(16), unit_rows(6, 16, 7), unit_rows(4, 16, 8)
    clean = fold(head, t)(v).failure_probability
    v[2] = float("nan")
    out = fold(head, t)(v).failure_probability
    assert out.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_real_class_set_full_of_near_ties():
    t = torch.nn.functional.normalize(torch.from_numpy(lvis_text_embeddings()).double(), dim=1)
    v = torch.nn.functional.normalize(t[:64] + 0.02 * unit_rows(64, 512, 9), dim=1)
    head = make_head(512)
    expected = head.failure_probability(v, t).numpy()
    out = fold(head.float(), t.float())(v.float())
    np.testing.assert_allclose(out.failure_probability, expected, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "at least 1"),
        ({"dim": 8, "hidden": ()}, "at least 1"),
        ({"dim": 8, "parts": ("attended", "image")}, "in that order"),
        ({"dim": 8, "projection": "tied"}, "projection must be one of"),
        ({"dim": 8, "attention_scale": float("nan")}, "positive and finite"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViLUHead(**arguments)


def test_wrong_widths_are_refused():
    head = ViLUHead(8)
    with pytest.raises(ValueError, match=r"image_embedding must be \(B, 8\)"):
        head(torch.zeros(2, 9), torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"text_embeddings must be \(K, 8\)"):
        head(torch.zeros(2, 8), torch.zeros(0, 8))
    with pytest.raises(ValueError, match="are needed"):
        head(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"attention_scale": 20.0}, 20.0),
        ({"attention_scale": 20.0, "logit_scale": 30.0}, 30.0),
        ({"attention_scale": 64**-0.5, "projection": "separate", "logit_scale": 30.0}, 30.0),
        ({"attention_scale": 64**-0.5, "projection": "separate"}, 100.0),
        ({"attention_scale": 64**-0.5, "parts": ("image", "predicted")}, 100.0),
    ],
)
def test_folding_takes_the_scale_from_the_head(options, scale):
    head = ViLUHead(64, hidden=(8,), **options).eval().requires_grad_(False)
    v, t = unit_rows(3, 64, 1).float(), unit_rows(7, 64, 2).float()
    p = torch.softmax(scale * v @ t.T, dim=1)
    torch.testing.assert_close(fold(head, t)(v).confidence, p.amax(dim=1))
    torch.testing.assert_close(fold(head, t)(v).failure_probability, head.failure_probability(v, t))
    assert fold(head, t, logit_scale=scale).logit_scale == scale
