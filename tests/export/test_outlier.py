"""The outlier score's graph: its folding, its part in ACCEPT, and repositories with and without it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from tritonclient.grpc import model_config_pb2 as pb

from tests.support.embeddings import unit_rows
from vilu import Checkpoint, ClassSet, UserError, ViLUHead
from vilu.cli.export import _over
from vilu.export import export_head
from vilu.export.graphs import ANSWER, HeadGraph, write_graph, write_outlier
from vilu.export.outlier import OUTLIER_SCORE, OutlierGraph
from vilu.export.threshold import _set_threshold
from vilu.kernels import fold
from vilu.outlier import Outlier, fit_outlier
from vilu.serving.backends.onnxruntime import session

DIM, CLASSES = 24, 6
TEXTS = unit_rows(CLASSES, DIM, 1).float()


def images(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(samples) % CLASSES
    noise = torch.randn(samples, DIM, generator=torch.Generator().manual_seed(seed))
    return F.normalize(TEXTS[labels] + noise / 8, dim=1), labels


@pytest.fixture(scope="module")
def outlier() -> Outlier:
    return fit_outlier(*images(120, 0), TEXTS).calibrated(images(99, 1)[0], 0.3)


@pytest.fixture(scope="module")
def checkpoint(outlier) -> Checkpoint:
    torch.manual_seed(0)
    head = ViLUHead(DIM, hidden=(16, 8), attention_scale=30.0, logit_scale=30.0).eval().requires_grad_(False)
    for parameter in head.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    names = tuple(f"thing {i}" for i in range(CLASSES))
    failure = head.failure_probability(images(60, 2)[0], TEXTS)
    return Checkpoint(head, None, ClassSet(names, ("{}",), TEXTS), float(failure.median()), outlier=outlier)


@settings(max_examples=40, deadline=None)
@given(
    dim=st.integers(1, 40),
    classes=st.integers(1, 30),
    spread=st.floats(0, 3),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 2**16),
)
def test_the_fold_is_the_definition(dim, classes, spread, scale, seed):
    """For any width, number of classes, condition of the factor (10 to the spread) and scale of it."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    factor = scale * torch.logspace(0, spread, dim, dtype=torch.float64)[:, None] * axes
    prototypes = F.normalize(torch.randn(classes, dim, generator=generator, dtype=torch.float64), dim=1)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64) / (2 * dim**0.5)
    rows = F.normalize(torch.randn(9, dim, generator=generator), dim=1)
    found = OutlierGraph(Outlier(mean.float(), factor.float(), prototypes.float()))(rows)
    white = F.normalize((rows.double() - mean.float().double()) @ factor.float().double().T, dim=1)
    exact = 1 - (white @ prototypes.float().double().T).amax(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    assert found.min() > -1e-5
    assert found.max() < 2 + 1e-5


def test_an_image_at_the_mean_has_no_direction(outlier):
    for score in (OutlierGraph(outlier)(outlier.mean[None])[:, 0], outlier.score(outlier.mean[None])):
        assert score.tolist() == [1.0]


def test_accept_needs_both_thresholds(checkpoint, outlier, tmp_path):
    """The graph with the score, as vilu_full has it, and the same graph after another threshold was set."""
    folded = fold(checkpoint.head, TEXTS)
    v = torch.cat([images(60, 2)[0], unit_rows(60, DIM, 5).float()])
    outputs: dict[str, list[int | str]] = {name: [1] for name in ANSWER if name != "LABEL"}
    path = tmp_path / "graph" / "1" / "model.onnx"
    failure, score = folded(v).failure_probability.numpy(), outlier.score(v).numpy()
    middle = float(np.median(failure[score <= outlier.threshold]))
    for scored in (outlier, replace(outlier, threshold=None, refused=None)):
        graph = HeadGraph(folded, middle, OutlierGraph(scored))
        write_graph(graph, v[:2], path, "IMAGE_EMBEDDING", outputs | {OUTLIER_SCORE: [1]})
        for threshold in (middle, middle + 0.02):
            if threshold != middle:
                _set_threshold(path, threshold)
            opened = session.open_session(path, threads=1)
            accept, found = opened.run(["ACCEPT", OUTLIER_SCORE], {"IMAGE_EMBEDDING": v.numpy()})
            np.testing.assert_allclose(found[:, 0], score, atol=1e-5)
            sure, inside = failure < threshold, score <= (scored.threshold or 2)
            clear = (abs(failure - threshold) > 1e-5) & (abs(score - (scored.threshold or 9)) > 1e-5)
            assert (accept[:, 0] == (sure & inside))[clear].all()
            if scored.threshold is not None and threshold == middle:
                assert {(True, True), (True, False), (False, True), (False, False)} == set(
                    zip(sure.tolist(), inside.tolist(), strict=True)
                )
            broken = v[:3].numpy().copy()
            broken[1, 0] = np.nan
            assert not opened.run(["ACCEPT"], {"IMAGE_EMBEDDING": broken})[0][1, 0]


def test_a_head_alone_is_exported_with_the_score_or_as_before(checkpoint, outlier, tmp_path):
    """Without a score nothing of it is written; with one there is a graph, an output and a parameter more."""
    found = {}
    for name, scored in (
        ("none", None),
        ("uncalibrated", replace(outlier, threshold=None, refused=None)),
        ("all", outlier),
    ):
        root = tmp_path / name
        report = export_head(replace(checkpoint, outlier=scored), root, max_batch_size=2)
        assert report["over_budget"] == []
        config = text_format.Parse((root / "vilu_embeddings" / "config.pbtxt").read_text(), pb.ModelConfig())
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        found[name] = files, {one.name for one in config.output}, dict(config.parameters), report
    plain = found["none"]
    assert "outlier" not in plain[3]
    for name, (files, outputs, parameters, report) in found.items():
        if name == "none":
            continue
        assert set(files) - set(plain[0]) == {"vilu_embeddings/1/outlier.onnx"}
        assert outputs - plain[1] == {OUTLIER_SCORE}
        assert set(parameters) - set(plain[2]) == ({"outlier_threshold"} if name == "all" else set())
        assert {one for one in plain[0] if files[one] != plain[0][one]} == {
            "parity.json", "parity.md", "vilu_embeddings/config.pbtxt",
        }  # fmt: skip
        (row,) = report["graphs"]["vilu_embeddings (outlier score)"]["cpu"].values()
        assert row["max_abs_error"][OUTLIER_SCORE] < 1e-5
        assert report["outlier"] == {
            "threshold": 0.3 and (outlier.threshold if name == "all" else None),
            "refused": 0.3 if name == "all" else None,
        }
    assert "OUTLIER" not in json.dumps(plain[3])


def test_a_score_that_overflows_is_not_exported(checkpoint, outlier, tmp_path):
    huge = replace(outlier, factor=outlier.factor * 1e37)
    with pytest.raises(UserError, match=r"refused: vilu_embeddings \(outlier score\).* OUTLIER_SCORE (differs|holds)"):
        export_head(replace(checkpoint, outlier=huge), tmp_path / "r", max_batch_size=2)
    assert not (tmp_path / "r").exists()


def test_over_other_classes_it_is_left_out(checkpoint, capsys):
    names = checkpoint.class_set.names
    turned = ClassSet(names[::-1], ("a {}",), TEXTS.flip(0))
    assert _over(checkpoint, turned, None).outlier is checkpoint.outlier
    assert capsys.readouterr().err == ""
    for other in (ClassSet((*names[:-1], "else"), ("{}",), TEXTS), ClassSet(names[:-1], ("{}",), TEXTS[:-1])):
        exported = _over(checkpoint, other, 0.25)
        assert (exported.outlier, exported.threshold, exported.class_set) == (None, 0.25, other)
        assert "trained on other classes" in capsys.readouterr().err


def test_the_graph_takes_any_batch(outlier, tmp_path: Path):
    write_outlier(OutlierGraph(outlier), tmp_path / "m" / "1" / "outlier.onnx")
    opened = session.open_session(tmp_path / "m" / "1" / "outlier.onnx", threads=1)
    for rows in (1, 2, 7):
        v = images(rows, 3)[0]
        found = opened.run(opened.outputs, {"IMAGE_EMBEDDING": v.numpy()})[0]
        np.testing.assert_allclose(found, outlier.score(v)[:, None].numpy(), atol=1e-5)
