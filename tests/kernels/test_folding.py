"""Folding in plain PyTorch, the path of every machine without a GPU, against the float64 eager head."""

import copy
import os

import pytest
import torch

from tests.support.embeddings import TOLERANCE, unit_rows
from vilu import ViLUHead
from vilu.kernels import HeadOutput, fold, folding, fused_head

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the place of this path"
)


@pytest.fixture(autouse=True, params=[folding.BLOCK_ROWS, 7], ids="block{}".format)
def _block_rows(request, monkeypatch):
    """Every test with the class set in one block, and cut into several."""
    monkeypatch.setattr(folding, "BLOCK_ROWS", request.param)


def make_head(dim: int, **options) -> ViLUHead:
    torch.manual_seed(0)
    head = ViLUHead(dim, **{"hidden": (48, 24)} | options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        head.mlp[0].weight *= dim**0.5
    return head


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("projection", ["identity", "shared", "separate"])
@pytest.mark.parametrize("parts", [("image",), ("image", "attended"), ("image", "predicted", "attended")], ids="+".join)
@pytest.mark.parametrize("K", [1, 100])
def test_folding_changes_nothing(K, parts, projection, layout, dtype):
    head = make_head(96, parts=parts, projection=projection)
    v, t = unit_rows(7, 96, 1), unit_rows(K, 96, 2)
    want = copy.deepcopy(head).double().failure_probability(v, t)
    out = fused_head(v.to(dtype), fold(head.to(dtype), t.to(dtype), layout=layout))
    torch.testing.assert_close(out.failure_probability.double(), want, rtol=0, atol=10 * TOLERANCE[dtype])
    p = torch.softmax(100 * v @ t.T, 1)
    torch.testing.assert_close(out.confidence.double(), p.amax(1), rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(out.class_index, (v @ t.T).argmax(1))


def test_folding_leaves_the_head_alone():
    head = make_head(64)
    before = copy.deepcopy(head.state_dict())
    fold(head, unit_rows(5, 64, 3).half())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in head.parameters())
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_low_precision_banks_keep_float32_logits():
    v, t = unit_rows(5, 64, 4).half(), unit_rows(50, 64, 5).half()
    out = fused_head(v, fold(make_head(64), t))
    want = torch.softmax(100 * v.double() @ t.double().T, 1).amax(1)
    torch.testing.assert_close(out.confidence.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_ragged_class_sets(layout):
    head, v, t = make_head(64), unit_rows(3, 64, 6).float(), unit_rows(10, 64, 7).float()
    got = fused_head(v, fold(head, t, layout=layout), offsets=[0, 1, 6, 10])
    parts = [(0, 1), (1, 6), (6, 10)]
    each = [fold(head, t[a:b], layout=layout)(v[i : i + 1]) for i, (a, b) in enumerate(parts)]
    for mine, theirs in zip(got, HeadOutput(*map(torch.cat, zip(*each, strict=True))), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_with_text_is_a_fold_over_other_rows():
    head, v = make_head(64), unit_rows(3, 64, 8).float()
    t, other = unit_rows(10, 64, 9).float(), unit_rows(4, 64, 10).float()
    plain = fold(head, t, layout="plain")
    assert torch.equal(plain.with_text(other)(v).failure_probability, fold(head, other, layout="plain")(v)[0])
    assert plain.text_embeddings.shape == (10, 64)
    with pytest.raises(ValueError, match="folded bank belongs to one class set"):
        fold(head, t, layout="folded").with_text(other)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (torch.zeros(2, 65), {}, r"must be \(B, 64\), got \(2, 65\)"),
        (torch.zeros(64), {}, r"must be \(B, 64\), got \(64,\)"),
        (torch.zeros(0, 64), {}, r"got \(0, 64\)"),
        (torch.zeros(2, 64), {"offsets": [0, 10]}, "3 integers for 2 images"),
        (torch.zeros(2, 64), {"offsets": [0, 5, 9]}, "rise from 0 to 10"),
        (torch.zeros(2, 64), {"offsets": [0, 10, 10]}, "every class set with a row"),
        (torch.zeros(2, 64), {"offsets": [0.0, 5.0, 10.0]}, "3 integers"),
    ],
)
def test_bad_input_is_named(rows, options, message):
    folded = fold(make_head(64), unit_rows(10, 64, 11).float())
    with pytest.raises(ValueError, match=message):
        fused_head(rows, folded, **options)


@pytest.mark.parametrize("parts", [("image",), ("image", "predicted", "attended")], ids="+".join)
def test_rows_that_are_not_finite_stay_alone(parts):
    folded = fold(make_head(64, parts=parts), unit_rows(30, 64, 14).float())
    v = unit_rows(5, 64, 15).float()
    clean = fused_head(v, folded)
    v[1, 3], v[2, 63], v[3] = float("nan"), float("inf"), -float("inf")
    out = fused_head(v, folded)
    assert out.class_index[1:4].tolist() == [0, 0, 0]
    for name in ("failure_probability", "confidence", "entropy", "doctor"):
        assert getattr(out, name)[1:4].isnan().all(), name
    for mine, theirs in zip(out, clean, strict=True):
        torch.testing.assert_close(mine[[0, 4]], theirs[[0, 4]])


@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_ties_take_the_lowest_index(layout):
    # Sixteenths: every product is exact, whatever the order of the sum.
    generator = torch.Generator().manual_seed(16)
    rows = torch.randint(-4, 5, (15, 64), generator=generator) / 16
    out = fused_head(rows[:5], fold(make_head(64), rows[5:].repeat(6, 1), layout=layout))
    assert out.class_index.tolist() == (rows[:5] @ rows[5:].T).argmax(1).tolist()


def test_the_blocks_give_what_the_traced_form_gives():
    """`forward`, which the ONNX graph is made from, and `answer`, which runs on the CPU."""
    for layout, projection in (("folded", "shared"), ("plain", "separate"), ("plain", "identity")):
        folded = fold(make_head(64, projection=projection), unit_rows(100, 64, 17).float(), layout=layout)
        v = unit_rows(9, 64, 18).float()
        for mine, theirs in zip(folded.answer(v), folded(v), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_compile_and_export_on_the_cpu():
    v = unit_rows(9, 64, 12).float()
    folded = fold(make_head(64), unit_rows(30, 64, 13).float())
    compiled = torch.compile(lambda x: fused_head(x, folded), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(v), fused_head(v, folded), strict=True):
        torch.testing.assert_close(mine, theirs)
    program = torch.export.export(folded, (v,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert torch.equal(program.module()(v[:4]).class_index, folded(v[:4]).class_index)


@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("classes", [1, 2, 50])
def test_the_prior_is_folded_and_belongs_to_its_logit_scale(layout, classes):
    head = make_head(16, hidden=(8,), logit_scale=100.0).double().requires_grad_(False)
    t, v = unit_rows(classes, 16, 0), unit_rows(5, 16, 1)
    out = fused_head(v, fold(head, t, layout=layout))
    expected = head.failure_probability(v, t)
    torch.testing.assert_close(out.failure_probability, expected, rtol=0, atol=TOLERANCE[torch.float64])
    with pytest.raises(ValueError, match="prior was trained at logit_scale 100"):
        fold(head, t, logit_scale=50.0, layout=layout)
