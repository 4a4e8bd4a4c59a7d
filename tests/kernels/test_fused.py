"""The fused kernel against the float64 eager head: on a GPU, or, with TRITON_INTERPRET=1, interpreted on the CPU.

Without a GPU `test_interpreter.py` runs this file in a process of its own, as Triton reads that variable once.
"""

import copy
import functools
import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import head_forms, head_tuning
from tests.conftest import TOLERANCE, unit_rows
from vilu import ViLUHead
from vilu.kernels import FoldedHead, HeadOutput, fold, fused_head, plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

fused = pytest.importorskip("vilu.kernels.fused")
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# P(failure) from weights and banks rounded to the storage type; CLIP's own scores are held to float32's everywhere.
STORED = TOLERANCE | {torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel reads before it writes it shows as NaN, or as an index far outside."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch, "empty", poisoned)


def make_head(dim: int, seed: int = 0, **options) -> ViLUHead:
    """A head whose answers spread over (0, 1), with projections away from the identity."""
    torch.manual_seed(seed)
    head = ViLUHead(dim, **{"hidden": (48, 40, 24)} | options)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            if (layer := getattr(head, name)) is not None:
                layer.weight += 0.3 * torch.randn(dim, dim) / math.sqrt(dim)
        linears = [layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
        for layer in linears:
            layer.weight.normal_(std=1.4 / math.sqrt(layer.in_features))
        linears[0].weight *= math.sqrt(dim)
    return head


def reference(head: ViLUHead, v: torch.Tensor, t: torch.Tensor, logit_scale: float) -> HeadOutput:
    head, v, t = copy.deepcopy(head).double(), v.double().cpu(), t.double().cpu()
    with torch.no_grad():
        similarity = v @ t.T
        log_p = torch.log_softmax(logit_scale * similarity, dim=1)
        g = log_p.exp().square().sum(1)
        return HeadOutput(
            head.failure_probability(v, t),
            similarity.argmax(1),
            log_p.exp().amax(1),
            (log_p.exp() * log_p).sum(1) / (math.log(len(t)) if len(t) > 1 else 1),
            -(1 - g) / g,
        )


def assert_close(got: HeadOutput, want: HeadOutput, dtype: torch.dtype, scale: float = 100.0) -> None:
    """`scale`: the largest of the logit scales; a float32 logit's own rounding grows with it."""
    slack = max(1.0, scale / 100)
    assert got.class_index.dtype == torch.int64
    assert got.class_index.tolist() == want.class_index.tolist()
    for name, tolerance in {
        "failure_probability": STORED[dtype],
        "confidence": TOLERANCE[torch.float32],
        "entropy": TOLERANCE[torch.float32],
    }.items():
        value = getattr(got, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.cpu().double(), getattr(want, name), rtol=0, atol=tolerance * slack)
    torch.testing.assert_close(got.doctor.cpu().double(), want.doctor, rtol=1e-4 * slack, atol=1e-5 * slack)


def assert_equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def check(head: ViLUHead, v: torch.Tensor, t: torch.Tensor, *, dtype, layout, scale: float = 100.0) -> HeadOutput:
    v, t = v.to(DEVICE, dtype), t.to(DEVICE, dtype)
    folded = fold(copy.deepcopy(head).to(DEVICE), t, logit_scale=scale, layout=layout)
    got = fused_head(v, folded)
    assert_close(got, reference(head, v, t, scale), dtype, max(scale, head.attention_scale))
    return got


def arguments_of(folded: FoldedHead, offsets: torch.Tensor | None = None) -> tuple:
    """What `fused_head` gives the operator after the image embedding."""
    query = folded.keys if folded.layout == "folded" else folded.query_map
    banks = (folded.predicted, folded.attended) if folded.layout == "folded" else (None, None)
    return (
        folded.text_embeddings, query, *banks, folded.packed, offsets, list(folded.widths),
        list(folded.packed_offsets()), ",".join(folded.parts), folded.layout == "folded", 100.0, 100.0, 0.0,
    )  # fmt: skip


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
        head.mlp[-1].bias += 12  # else every sure answer has P(failure) 0, however wrong the prior
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


@pytest.mark.parametrize("layout", ["folded", "plain"])
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((5, 1, 90, 33), torch.float32),
        ((5, 1, 90, 33), torch.bfloat16),
        ((1,) * 9, torch.float32),
        ((100,), torch.float16),
    ],
    ids=str,
)
def test_ragged_class_sets(lengths, dtype, layout):
    head = make_head(64)
    v, t = unit_rows(len(lengths), 64, 17).to(DEVICE, dtype), unit_rows(sum(lengths), 64, 18).to(DEVICE, dtype)
    offsets = [0, *np.cumsum(lengths).tolist()]
    folded = fold(copy.deepcopy(head).to(DEVICE), t, layout=layout)
    got = fused_head(v, folded, offsets=offsets)
    each = [reference(head, v[i : i + 1], t[a:b], 100.0) for i, (a, b) in enumerate(pairwise(offsets))]
    assert_close(got, HeadOutput(*map(torch.cat, zip(*each, strict=True))), dtype)
    assert_equal(got, fused_head(v, folded, offsets=torch.tensor(offsets)))


@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_offsets_on_the_gpu_are_not_trusted(layout):
    """They are not read on the host: a set that is empty, falls back or leaves the bank is NaN, or cut to the bank."""
    head = make_head(64)
    v, t = unit_rows(5, 64, 27).float().to(DEVICE), unit_rows(20, 64, 28).float().to(DEVICE)
    folded = fold(copy.deepcopy(head).to(DEVICE), t, layout=layout)
    offsets = torch.tensor([0, 7, 7, 3, 20, 99], device=DEVICE)  # 7 rows, none, less than none, 17, none
    scores, index = torch.ops.vilu.fused_head(v, *arguments_of(folded, offsets))
    assert scores.isnan().tolist() == [[False, True, True, False, True]] * 4
    assert index[[1, 2, 4]].tolist() == [0, 0, 0]
    for i, rows in ((0, slice(0, 7)), (3, slice(3, 20))):
        want = reference(head, v[i : i + 1], t[rows], 100.0)
        failure, confidence, entropy, doctor = scores[:, i : i + 1]
        assert_close(HeadOutput(failure, index[i : i + 1], confidence, entropy, doctor), want, torch.float32)
    every_second = torch.tensor([0, 9, 4, 9, 9, 9, 12, 9, 15, 9, 20, 9])[::2]
    assert_equal(fused_head(v, folded, offsets=every_second), fused_head(v, folded, offsets=[0, 4, 9, 12, 15, 20]))


@pytest.mark.skipif(INTERPRETED, reason="no CUDA graphs here")
@pytest.mark.parametrize("B", [1, 9])
def test_graphs_replay_on_any_stream_at_once(B):
    """Two graphs captured on one stream and replayed on two, besides plain launches: each counts its own arrivals."""
    t = unit_rows(5000, 64, 29).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    inputs = [unit_rows(B, 64, seed).float().to(DEVICE) for seed in (30, 31)]
    want = [fused_head(v, folded) for v in inputs]
    graphs, outputs = [], []
    for v in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(fused_head(v, folded))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(200):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        plain = fused_head(inputs[0], folded)
    torch.cuda.synchronize()
    assert_equal(plain, want[0])
    for mine, theirs in zip(outputs, want, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("B", [3, 20])
def test_same_bits_every_run_and_in_every_small_batch(B):
    v, t = unit_rows(B, 64, 19).float().to(DEVICE), unit_rows(150, 64, 20).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    first = fused_head(v, folded)
    assert_equal(first, fused_head(v, folded))
    if B <= 8:
        assert_equal([column[1:2] for column in first], fused_head(v[1:2], folded))


@pytest.mark.parametrize(("B", "layout"), [(3, "plain"), (9, "folded")])
def test_real_text_embeddings(B, layout, shared_data):
    """LVIS through CLIP ViT-B/32: near-synonyms, so that the top two are often close. Every GPU runs all 1,203."""
    t = torch.from_numpy(np.load(shared_data / "clip_text" / "lvis_v1_vit_b32.npy")).double()
    t = torch.nn.functional.normalize(t if t.shape[1] == 512 else t.T, dim=1).float()
    t = t[:200] if INTERPRETED else t
    v = torch.nn.functional.normalize(t[:B] + 0.5 * t[100 : 100 + B], dim=1)
    check(make_head(512), v, t, dtype=torch.float32, layout=layout)


@settings(max_examples=10 if INTERPRETED else 100, deadline=None)
@given(
    B=st.integers(1, 20),
    K=st.integers(1, 100),
    D=st.integers(64, 130),
    first=st.integers(1, 70),
    layout=st.sampled_from(["folded", "plain"]),
    projection=st.sampled_from(["identity", "shared", "separate"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(B, K, D, first, layout, projection, seed):
    head = make_head(D, seed, projection=projection, hidden=(first, 8))
    check(head, unit_rows(B, D, seed), unit_rows(K, D, seed + 1), dtype=torch.float32, layout=layout)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("single", {"TILE": 512, "waves": 2}), ("scan", {"BLOCK_N": 64, "RESIDENT": 1}), ("tail", {"BLOCK_N": 64})],
)
def test_tuning_takes_the_fastest_settings_that_pass_the_gate(name, chosen, tmp_path, monkeypatch):
    """The search that `bench/head.py --tune` makes, on the real kernels; only the clock is ours."""
    condition = {"bytes": 4, "width": 64, "projected": True, "folded": False}
    old = [condition | {"TILE": 1}, {"bytes": 2, "TILE": 2}]
    monkeypatch.setattr(
        head_tuning,
        "CANDIDATES",
        {name: {key: [*([0] if "BLOCK" in key else []), value] for key, value in chosen.items()}},
    )
    monkeypatch.setattr(head_tuning, "TUNED_CLASSES", {"plain": 40})
    monkeypatch.setattr(head_tuning, "TUNED_IMAGES", {name: 2 if name == "single" else 9})
    monkeypatch.setattr(head_forms, "ViLUHead", functools.partial(ViLUHead, hidden=(24, 8)))

    def clock(run, *, cold):
        """Each of the wished settings saves a second; a block of 0 compiles nowhere."""
        current = dict(dict(fused.tuned(0, None))[name])
        return [20.0 - sum(current[key] == value for key, value in chosen.items())]

    monkeypatch.setattr(head_tuning, "gpu", clock)
    arch = str(fused._device(0)[0])
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({arch: {name: old}}))
    head_tuning.tune(DEVICE, [name], [64], [torch.float32], path)
    best, kept = json.loads(path.read_text())[arch][name]
    assert {key: best[key] for key in (*condition, *chosen)} == condition | chosen
    assert kept == old[1], "an entry for other conditions stays"

    before = path.read_text()
    monkeypatch.setattr(head_forms.Exact, "error", lambda self, run, v: math.inf)
    head_tuning.tune(DEVICE, [name], [64], [torch.float32], path)
    assert path.read_text() == before, "where nothing passes the gate, nothing is written"
    assert fused.tuned is plan.tuned


def test_the_committed_table_is_written_as_it_is_read():
    text = Path(plan.__file__).with_name("tuning.json").read_text()
    assert head_tuning.one_line_an_entry(json.loads(text)) == text


@pytest.mark.parametrize("B", [2, 9])
def test_operator(B):
    """Schema, fake implementation and functional behaviour, as torch.compile and torch.export rely on them."""
    v, t = unit_rows(B, 64, 21).float().to(DEVICE), unit_rows(30, 64, 22).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vilu.fused_head.default, (v, *arguments_of(folded)), test_utils=tests)

    compiled = torch.compile(lambda x: fused_head(x, folded), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(v), fused_head(v, folded))


class Wrapped(torch.nn.Module):
    def __init__(self, folded: FoldedHead) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(fused_head(v, self.folded))


def test_export_keeps_one_call_and_a_free_batch():
    v, t = unit_rows(12, 64, 23).float().to(DEVICE), unit_rows(30, 64, 24).float().to(DEVICE)
    module = Wrapped(fold(make_head(64).to(DEVICE), t))
    program = torch.export.export(module, (v[:9],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    calls = [str(n.target) for n in program.graph.nodes if "vilu" in str(n.target)]
    assert calls == ["vilu.fused_head.default"]
    assert_equal(program.module()(v), module(v))
