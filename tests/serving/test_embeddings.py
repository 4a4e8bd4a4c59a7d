"""A head alone, for the embeddings of any model: exported, served behind the door, asked; against the eager head."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.serving.helpers import opened, options, rows_of, send
from tests.support.embeddings import unit_rows
from vilu import Checkpoint, ClassSet, ViLUHead, save_checkpoint
from vilu.cli import group
from vilu.errors import UserError
from vilu.export import export_head, versions
from vilu.export.head_only import clip_scale
from vilu.outlier import fit_outlier
from vilu.scores import Doctor, Entropy
from vilu.serving import Access, Client, RequestRefused
from vilu.serving.about import about_repository
from vilu.serving.classes import list_sets, put_set, remove_set
from vilu.serving.door import Door, own_server
from vilu.serving.server import probe

pytestmark = pytest.mark.server
DIM, SCALE, NAMES = 24, 30.0, tuple(f"thing {i}" for i in range(7))
CONTROL = "control-token-4567"


def vilu(*arguments):
    """(exit code, what was printed or the error that the command ended with) of a command in this process."""
    done = CliRunner().invoke(group, [str(one) for one in arguments], standalone_mode=False)
    if done.exception is not None:
        return 2, str(getattr(done.exception, "message", done.exception))
    return done.return_value or 0, done.output


def spread_head(seed=0):
    torch.manual_seed(seed)
    head = ViLUHead(DIM, hidden=(16, 8), attention_scale=SCALE, logit_scale=SCALE)
    for parameter in head.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return head.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def black_box():
    """A checkpoint that names no CLIP, as `vilu train --embeddings --outlier-score` and `vilu calibrate` write it."""
    rows = unit_rows(len(NAMES), DIM, 3).float()
    labels = torch.arange(70) % len(NAMES)
    images = torch.nn.functional.normalize(rows[labels] + unit_rows(70, DIM, 4).float(), dim=1)
    outlier = fit_outlier(images, labels, rows).calibrated(unit_rows(30, DIM, 9).float(), 0.5)
    return Checkpoint(spread_head(), None, ClassSet(NAMES, ("{}",), rows), threshold=0.5, outlier=outlier)


@pytest.fixture(scope="module")
def world(black_box, tmp_path_factory):
    """The folder with head.safetensors and the repository that the command writes from it."""
    root = tmp_path_factory.mktemp("head")
    save_checkpoint(black_box, root / "head.safetensors")
    code, said = vilu(
        "export", "--ckpt", root / "head.safetensors", "--output", root / "repository", "--max-batch-size", 8
    )
    assert code == 0, said
    assert "the head alone, 100.00% of the answers" in said
    return root


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """The ports of a door before a tritonserver that has the head alone."""
    server = own_server(world / "repository", log=tmp_path_factory.mktemp("served") / "tritonserver.log")
    with opened(Door(options(access=lambda: Access(control_token=CONTROL)), server)) as ports:
        yield ports


def eager(head, t, v):
    """(class indices, confidences, failure probabilities) of embeddings of any norm, by the eager head."""
    v, t = (torch.nn.functional.normalize(torch.as_tensor(rows).double(), dim=1) for rows in (v, t))
    p = torch.softmax(SCALE * v @ t.T, dim=1)
    failure = head.double().failure_probability(v, t)
    head.float()
    return p.argmax(1).tolist(), p.amax(1).numpy(), failure.numpy()


def check(answers, names, expected, threshold=0.5, inside=None):
    """inside: whether each row is no outlier; None: the outlier score does not know these candidates."""
    index, confidence, failure = expected
    assert [a.error for a in answers] == [None] * len(index)
    assert [a.source for a in answers] == [f"row {i}" for i in range(len(index))]
    assert [a.class_index for a in answers] == index
    assert [a.label for a in answers] == [names[i] for i in index]
    np.testing.assert_allclose([a.confidence for a in answers], confidence, atol=1e-4)
    np.testing.assert_allclose([a.failure_probability for a in answers], failure, atol=1e-4)
    sure = [a.failure_probability < threshold for a in answers]
    assert [a.accept for a in answers] == (
        sure if inside is None else [a and b for a, b in zip(sure, inside, strict=True)]
    )


@pytest.fixture(scope="module")
def asked():
    """30 embeddings of any norm."""
    return 5 * unit_rows(30, DIM, 9).float().numpy()


def test_the_repository_holds_the_head_alone(world, black_box):
    about = about_repository(world / "repository")
    assert [model["name"] for model in about["models"]] == ["class_sets", "vilu_embeddings"]
    assert about["clip"] is None
    assert about["class_set"]["names"] == list(NAMES)
    report = json.loads((world / "repository" / "parity.json").read_text())
    assert report["answers"]["cpu"]["argmax_agreement"] == 1
    assert report["answers"]["cpu"]["failure_probability_error"]["max"] < 1e-4
    assert "vilu_embeddings" in (world / "repository" / "parity.md").read_text()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_answers_are_the_eager_heads(served, black_box, asked, protocol):
    url = served.grpc if protocol == "grpc" else f"http://{served.http}"
    t = black_box.class_set.text_embeddings
    with Client(url, batch_size=8) as client:
        answers = client.ask_embeddings(asked, details=True, embedding=True, outlier_score=True)
        v = torch.nn.functional.normalize(torch.from_numpy(asked), dim=1)
        # One of the 30 rows is at the threshold itself.
        score = np.array([a.outlier_score for a in answers], np.float32)
        inside = (score <= np.float32(black_box.outlier.threshold)).tolist()
        assert 14 <= sum(inside) <= 16
        np.testing.assert_allclose(score, black_box.outlier.score(v), atol=1e-5)
        check(answers, NAMES, eager(black_box.head, t, asked), inside=inside)
        plain = client.ask_embeddings(asked)
        assert [a.accept for a in plain] == [a.accept for a in answers]
        assert {a.outlier_score for a in plain} == {None}
        sure = [a.failure_probability < 0.5 for a in answers]
        assert {(True, True), (True, False)} <= set(zip(sure, inside, strict=True)), (
            "only the outlier score refuses some"
        )
        np.testing.assert_allclose(np.array([a.embedding for a in answers], float), v, atol=1e-5)
        np.testing.assert_allclose(
            np.array([a.entropy for a in answers], float), Entropy().confidence(v, t, SCALE), atol=1e-4
        )
        np.testing.assert_allclose(
            np.array([a.doctor for a in answers], float), Doctor().confidence(v, t, SCALE), rtol=1e-3, atol=1e-4
        )
        assert all(a.top[0][0] == a.label and a.class_set == "default@1" for a in answers)
        own = 0.1 * unit_rows(4, DIM, 21).float().numpy()
        expected = eager(black_box.head, own, asked)
        others = client.ask_embeddings(asked, text_embeddings=own, outlier_score=True)
        check(others, [""] * 4, expected)
        assert [a.outlier_score for a in others] == [a.outlier_score for a in answers]
        check(client.ask_embeddings(asked, list("abcd"), text_embeddings=own), list("abcd"), expected)


def test_class_sets_are_put_as_embeddings(served, black_box, asked):
    own = unit_rows(5, DIM, 31).float().numpy()
    names = [f"pet {i}" for i in range(5)]
    with Client(served.grpc, batch_size=8) as client:
        client.run(put_set, "pets", names, text_embeddings=own, threshold=0.9, fingerprint="any", control_token=CONTROL)
        assert [one.name for one in client.run(list_sets)] == ["default", "pets"]
        check(client.ask_embeddings(asked, class_set="pets"), names, eager(black_box.head, own, asked), 0.9)
        with pytest.raises(RequestRefused, match="no text tower"):
            client.run(put_set, "names", ["cat", "dog"], control_token=CONTROL)
        client.run(remove_set, "pets", control_token=CONTROL)
        assert "not served" in client.ask_embeddings(asked[:1], class_set="pets")[0].error


def test_a_bad_row_costs_the_others_nothing(served, black_box, asked):
    rows = asked[:6].copy()
    rows[1, 3], rows[4] = np.nan, 0
    with Client(served.grpc, batch_size=4) as client:
        answers = client.ask_embeddings(rows)
        assert [a.error is None for a in answers] == [True, False, True, True, False, True]
        assert "not finite" in answers[1].error
        assert "zeros" in answers[4].error
        (wrong,) = client.ask_embeddings(np.ones((1, DIM + 1)))
        assert "shape" in wrong.error
        assert "LABELS" in client.ask_embeddings(rows[:1], ["cat", "dog"])[0].error
        for bad in (np.ones(DIM), np.array([["a"]])):
            with pytest.raises(UserError, match="must be numbers"):
                client.ask_embeddings(bad)
        with pytest.raises(UserError, match="not finite"):
            client.ask_embeddings(rows, text_embeddings=np.full((2, DIM), np.inf))


def test_it_is_ready_and_healthy(served):
    assert send(served, "/readyz")[0] == 200
    for url in (served.grpc, f"http://{served.http}"):
        probe(url, timeout=10)
        assert vilu("health", "--url", url)[0] == 0
    with pytest.raises(RequestRefused):
        probe(served.grpc, model="vilu_open", timeout=10)


def test_the_command_asks_about_a_file(served, black_box, asked, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    np.savez(tmp_path / "a.npz", image_embedding=asked, labels=np.zeros(30, int))
    save_file({"image_embedding": asked}, tmp_path / "a.safetensors")
    pq.write_table(pa.table({"image_embedding": list(asked)}), tmp_path / "a.parquet")
    index, _, failure = eager(black_box.head, black_box.class_set.text_embeddings, asked)
    for name in ("a.npz", "a.safetensors", "a.parquet"):
        out = tmp_path / f"{name}.jsonl"
        code, said = vilu(
            "ask",
            "--embeddings",
            tmp_path / name,
            "--url",
            served.grpc,
            "--batch-size",
            8,
            "--output",
            out,
            "--outlier-score",
        )
        assert code == 0, said
        assert "30 embeddings, 0 without an answer" in said
        rows = rows_of(out)
        assert [row["source"] for row in rows] == [f"row {i}" for i in range(30)]
        assert [row["class_index"] for row in rows] == index
        np.testing.assert_allclose([row["failure_probability"] for row in rows], failure, atol=1e-4)
        v = torch.nn.functional.normalize(torch.from_numpy(asked), dim=1)
        np.testing.assert_allclose([row["outlier_score"] for row in rows], black_box.outlier.score(v), atol=1e-5)


def test_an_interrupted_file_of_answers_goes_on(served, asked, tmp_path):
    np.savez(tmp_path / "a.npz", image_embedding=asked)
    options = ["ask", "--embeddings", tmp_path / "a.npz", "--url", served.grpc, "--output", tmp_path / "a.jsonl"]
    assert vilu(*options)[0] == 0
    whole = rows_of(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.part.jsonl").write_text("".join(lines[:11]))
    code, said = vilu(*options, "--resume")
    assert code == 0
    assert "11 answers are there, 19 embeddings are left to ask" in said
    found = rows_of(tmp_path / "a.jsonl")
    assert [row["source"] for row in found] == [row["source"] for row in whole]
    kept, fresh = ([row["failure_probability"] for row in rows] for rows in (found, whole))
    np.testing.assert_allclose(kept, fresh, atol=1e-6)
    assert vilu(*options, "--resume")[0] == 0


def test_what_would_be_refused_for_every_row_is_one_line(served, asked, tmp_path):
    np.savez(tmp_path / "wide.npz", image_embedding=np.ones((9, DIM + 1)))
    code, said = vilu("ask", "--embeddings", tmp_path / "wide.npz", "--url", served.grpc)
    assert code == 2  # what `vilu` gives here for any error that ends a command
    assert said.startswith("row 0: input IMAGE_EMBEDDING: shape")
    rows = asked[:3].copy()
    rows[0] = np.nan
    np.savez(tmp_path / "nan.npz", image_embedding=rows)
    code, said = vilu("ask", "--embeddings", tmp_path / "nan.npz", "--url", served.grpc)
    assert (code, said.count("accept") + said.count("reject"), said.count("not finite")) == (1, 2, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.txt", "are read from .npz"), ("absent.npz", "no such file"), ("bad.npz", "cannot be read"),
     ("other.npz", "holds no image_embedding"), ("flat.npz", "must be numbers")],
)  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path, name, said):
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", v=np.ones(3))
    np.savez(tmp_path / "flat.npz", image_embedding=np.ones(3))
    code, line = vilu("ask", "--embeddings", tmp_path / name)
    assert code == 2
    assert said in line
    assert "\n" not in line


def test_the_scale_is_what_the_training_noted():
    """A head of the paper's form without the prior does not know the model's factor on v · t itself."""
    paper = ViLUHead(DIM, hidden=(8,), projection="separate", attention_scale=DIM**-0.5)
    assert clip_scale(Checkpoint(paper, meta={"logit_scale": 14.0})) == 14
    assert clip_scale(Checkpoint(paper, meta={"logit_scale": "x"})) == 100
    assert clip_scale(Checkpoint(spread_head(), meta={"logit_scale": 14.0})) == SCALE


def test_another_version_stands_beside_it(world, black_box, tmp_path):
    import shutil

    copy = tmp_path / "repository"
    shutil.copytree(world / "repository", copy)
    other = Checkpoint(spread_head(1), None, black_box.class_set, threshold=0.3)
    export_head(other, copy, max_batch_size=8, version=2)
    assert versions.versions(copy) == [1, 2]
    assert versions.served(copy) == 2
    assert json.loads((copy / "parity.json").read_text())["threshold"] == 0.3
    versions.use(copy, 1)
    assert versions.served(copy) == 1
    assert json.loads((copy / "parity.json").read_text())["threshold"] == 0.5


def test_an_export_of_a_head_alone_that_cannot_be_is_one_line(black_box, tmp_path):
    save_checkpoint(black_box, tmp_path / "head.safetensors")
    save_checkpoint(Checkpoint(black_box.head), tmp_path / "nameless.safetensors")
    np.savez(tmp_path / "wide.npz", image_embedding=np.eye(5), text_embeddings=np.eye(5)[:2], labels=np.zeros(5, int))
    for given, expected in (
        (["head.safetensors", "--precision", "int8"], "--precision: is for CLIP's towers"),
        (["head.safetensors", "--embeddings", tmp_path / "wide.npz"], "24 wide"),
        (["nameless.safetensors"], "names no CLIP; give --clip and --pretrained, or"),
        (["nameless.safetensors", "--embeddings", tmp_path / "wide.npz"], "holds no class names"),
    ):
        code, said = vilu("export", "--output", tmp_path / "out", "--ckpt", tmp_path / given[0], *given[1:])
        assert code == 2
        assert expected in said
        assert "\n" not in said
        assert not (tmp_path / "out").exists()


def test_the_class_set_comes_from_a_file_where_the_checkpoint_has_none(black_box, tmp_path):
    save_checkpoint(Checkpoint(black_box.head), tmp_path / "nameless.safetensors")
    rows = 3 * black_box.class_set.text_embeddings.numpy()
    np.savez(tmp_path / "classes.npz", text_embeddings=rows, class_names=np.array(NAMES))
    out = tmp_path / "repository"
    code, said = vilu(
        "export", "--ckpt", tmp_path / "nameless.safetensors", "--classes", tmp_path / "classes.npz", "--output", out
    )
    assert code == 0, said
    np.testing.assert_allclose(np.load(out / "vilu_embeddings" / "1" / "text_embeddings.npy"), rows / 3, atol=1e-6)
