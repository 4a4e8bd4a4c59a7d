"""The fused kernels against the float64 eager head: every layout, type, part and width."""

import math

import pytest
import torch

from tests.kernels.reference import DEVICE, DTYPES, INTERPRETED, assert_equal, check, make_head, runs_kernels
from tests.support.embeddings import unit_rows
from tests.support.public_data import lvis_text_embeddings
from vilu.kernels import fold, fused_head

pytest.importorskip("triton")
pytestmark = runs_kernels

SHAPES = [(1, 111, 100), (3, 63, 64), (11, 100, 100), (70, 67, 64)]


@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("projection", ["identity", "shared", "separate"])
@pytest.mark.parametrize(("B", "K", "D"), SHAPES, ids="B{}".format)
def test_parity(B, K, D, projection, layout):
    head = make_head(D, projection=projection)
    out = check(head, unit_rows(B, D, 1), unit_rows(K, D, 2), dtype=torch.float32, layout=layout)
    if B > 1:
        assert out.failure_probability.std() > 0.02, "a head that answers all alike would hide errors"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("projection", ["identity", "separate"])
@pytest.mark.parametrize(("B", "K", "D"), SHAPES[::2], ids="B{}".format)
def test_parity_in_half_precision(B, K, D, projection, layout, dtype):
    head = make_head(D, projection=projection)
    check(head, unit_rows(B, D, 1), unit_rows(K, D, 2), dtype=dtype, layout=layout)


@pytest.mark.parametrize(
    ("B", "K", "D", "projection", "layout", "hidden"),
    [
        (1, 600, 64, "separate", "folded", (48, 24)),
        (9, 500, 64, "separate", "folded", (48, 24)),
        (9, 500, 64, "identity", "plain", (48, 24)),
        (1, 70, 640, "shared", "folded", (96, 24)),
        (1, 40, 640, "shared", "plain", (96, 24)),
        (9, 40, 640, "identity", "plain", (48, 24)),
        (1, 70, 768, "identity", "plain", (512, 256, 128)),
        (9, 40, 768, "shared", "folded", (512, 256, 128)),
        (1, 33, 1152, "shared", "folded", (96, 24)),
        (9, 33, 1152, "identity", "plain", (48, 24)),
    ],
)
def test_parity_at_real_sizes(B, K, D, projection, layout, hidden):
    head = make_head(D, projection=projection, hidden=hidden)
    check(head, unit_rows(B, D, 3), unit_rows(K, D, 4), dtype=torch.float32, layout=layout)


@pytest.mark.parametrize("B", [2, 9])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("hidden", [(16,), (20, 300), (33, 17, 5, 3)])
def test_hidden_widths(B, layout, hidden):
    check(make_head(64, hidden=hidden), unit_rows(B, 64, 5), unit_rows(50, 64, 6), dtype=torch.float32, layout=layout)


@pytest.mark.parametrize("B", [2, 9])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize(
    "parts",
    [
        ("image",),
        ("predicted",),
        ("attended",),
        ("image", "predicted"),
        ("image", "attended"),
        ("predicted", "attended"),
    ],
    ids="+".join,
)
def test_parts(B, layout, parts):
    check(make_head(64, parts=parts), unit_rows(B, 64, 7), unit_rows(50, 64, 8), dtype=torch.float32, layout=layout)


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_extreme_logits(B, layout, scale):
    # attention_scale stays 100 in one half: p and attention are then two softmaxes of one similarity.
    for attention_scale in (scale, 100.0):
        head = make_head(64, projection="identity", attention_scale=attention_scale)
        check(head, unit_rows(B, 64, 9), unit_rows(100, 64, 10), dtype=torch.float32, layout=layout, scale=scale)


@pytest.mark.parametrize("B", [2, 9])
@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize("parts", [("image",), ("image", "predicted", "attended")], ids="+".join)
def test_prior_stays_exact_where_the_confidence_rounds_to_one(B, layout, parts):
    head = make_head(64, parts=parts, logit_scale=100.0)
    t = unit_rows(120, 64, 26)
    v = torch.nn.functional.normalize(unit_rows(B, 64, 25) + torch.linspace(0, 8, B)[:, None] * t[:B], dim=1)
    with torch.no_grad():
        head.mlp[-1].get_parameter("bias").add_(12)  # else every sure answer has P(failure) 0, however wrong the prior
    out = check(head, v, t, dtype=torch.float32, layout=layout)
    assert (out.confidence > 1 - 1e-6).any()
    check(head, v, t[:1], dtype=torch.float32, layout=layout)


@pytest.mark.parametrize("B", [1, 8, 9])
@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_one_class(B, layout):
    out = check(make_head(64), unit_rows(B, 64, 11), unit_rows(1, 64, 12), dtype=torch.float32, layout=layout)
    assert out.confidence.tolist() == [1.0] * B
    assert out.entropy.tolist() == [0.0] * B
    assert out.doctor.tolist() == [0.0] * B


@pytest.mark.parametrize("B", [2, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_ties_take_the_lowest_index(B, dtype, layout):
    # Sixteenths, so that every product and sum is exact and a tie is one in any order of summation.
    generator = torch.Generator().manual_seed(13)
    rows = torch.randint(-4, 5, (B + 10, 64), generator=generator) / 16
    t = rows[B:].repeat(12, 1)  # every row twelve times, across tiles and splits
    out = check(make_head(64), rows[:B], t, dtype=dtype, layout=layout)
    assert out.class_index.max() < 10


@pytest.mark.parametrize(
    ("B", "layout", "projection"),
    [(4, "folded", "shared"), (4, "plain", "identity"), (20, "folded", "identity"), (20, "plain", "shared")],
)
def test_rows_that_are_not_finite_stay_alone(B, layout, projection):
    v, t = unit_rows(B, 64, 15).float().to(DEVICE), unit_rows(60, 64, 16).float().to(DEVICE)
    folded = fold(make_head(64, projection=projection).to(DEVICE), t, layout=layout)
    clean = fused_head(v, folded)
    bad = v.clone()
    bad[1, 3], bad[2, 63], bad[3] = math.nan, math.inf, -math.inf
    out = fused_head(bad, folded)
    rest = [i for i in range(B) if i not in (1, 2, 3)]
    for name in ("failure_probability", "confidence", "entropy", "doctor"):
        assert getattr(out, name)[1:4].isnan().all(), name
    assert out.class_index[1:4].tolist() == [0, 0, 0]
    assert_equal([column[rest] for column in out], [column[rest] for column in clean])


@pytest.mark.parametrize(("B", "layout"), [(3, "plain"), (9, "folded")])
def test_real_text_embeddings(B, layout):
    """LVIS through CLIP ViT-B/32: near-synonyms, so that the top two are often close. Every GPU runs all 1,203."""
    t = torch.nn.functional.normalize(torch.from_numpy(lvis_text_embeddings()).double(), dim=1).float()
    t = t[:200] if INTERPRETED else t
    v = torch.nn.functional.normalize(t[:B] + 0.5 * t[100 : 100 + B], dim=1)
    check(make_head(512), v, t, dtype=torch.float32, layout=layout)


SMALL_TILES = {
    "score_tile": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 32, "STAGES": 2, "waves": 4, "images": 2, "classes": 2},
    "sum_tile": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16, "STAGES": 2},
}


@pytest.fixture
def large_batches(monkeypatch):
    """Every batch runs as `score_tile` and `sum_tile`; the plans that were made."""
    from vilu.kernels import fused, plan

    made = []

    def tuned(arch, variant):
        others = [entry for entry in plan.tuned(arch, variant) if entry[0] not in SMALL_TILES]
        tiles = {role: tuple((values | {"num_warps": 4}).items()) for role, values in SMALL_TILES.items()}
        return (*others, *tiles.items())

    def plan_launches(*args, **kwargs):
        made.append(plan.plan_launches(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(fused, "tuned", tuned)
    monkeypatch.setattr(fused, "plan_launches", plan_launches)
    yield made
    assert all("score_tile" in [kernel.name for kernel in one.kernels] for one in made), "another kernel ran"


@pytest.mark.parametrize(
    ("B", "K", "D", "projection", "layout", "dtype"),
    [
        (20, 200, 64, "shared", "plain", torch.bfloat16),
        (33, 63, 100, "separate", "plain", torch.float16),
        (2, 128, 64, "identity", "plain", torch.bfloat16),
        (18, 100, 64, "separate", "folded", torch.float16),
        (40, 33, 100, "identity", "folded", torch.float16),
        (20, 2, 64, "shared", "plain", torch.float16),
    ],
)
def test_large_batches(B, K, D, projection, layout, dtype, large_batches):
    head = make_head(D, projection=projection)
    check(head, unit_rows(B, D, 1), unit_rows(K, D, 2), dtype=dtype, layout=layout)
    assert large_batches


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_large_batches_with_extreme_logits(scale, large_batches):
    head = make_head(64, projection="identity", attention_scale=100.0)
    check(head, unit_rows(9, 64, 9), unit_rows(200, 64, 10), dtype=torch.float16, layout="plain", scale=scale)


def test_large_batches_take_the_lowest_index_on_ties(large_batches):
    rows = torch.randint(-4, 5, (30, 64), generator=torch.Generator().manual_seed(13)) / 16
    out = check(make_head(64), rows[:20], rows[20:].repeat(12, 1), dtype=torch.bfloat16, layout="plain")
    assert out.class_index.max() < 10
    assert large_batches[0].splits > 1


def test_large_batches_keep_a_row_that_is_not_finite_alone(large_batches):
    v, t = unit_rows(20, 64, 15).half().to(DEVICE), unit_rows(100, 64, 16).half().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t, layout="plain")
    clean = fused_head(v, folded)
    bad = v.clone()
    bad[1, 3], bad[2, 63] = math.nan, math.inf
    out = fused_head(bad, folded)
    assert out.failure_probability[1:3].isnan().all()
    assert out.class_index[1:3].tolist() == [0, 0]
    rest = [0, *range(3, 20)]
    assert_equal([column[rest] for column in out], [column[rest] for column in clean])
