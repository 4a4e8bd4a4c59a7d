"""Candidates of a request's own: labels through the server's text tower, or embeddings, against the eager model."""

import asyncio
import json
import os
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.serving.helpers import agree, rows_of, stub_of, vilu
from vilu.preprocess.image import decode
from vilu.scores import Doctor, Entropy
from vilu.serving import AsyncClient, Client, RequestRefused

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
SETS = (
    ("a cat", "a dog"),
    ("handwritten three", "handwritten eight", "red circle", "blue star", "a cat"),
    ("only one", "or another"),
    tuple(f"thing number {i}" for i in range(40)),
)


@pytest.fixture(scope="module")
def eager_open(clip, checkpoint):
    """Image bytes and labels to (label, confidence, failure probability) by the eager model."""

    def answer(image: bytes, labels):
        t = clip.class_set(labels, checkpoint.class_set.templates).text_embeddings
        v = clip.embed_images([decode(image, clip.transform)[None]])
        p = torch.softmax(clip.spec.logit_scale * v @ t.T, dim=1)
        return labels[int(p.argmax())], float(p.max()), float(checkpoint.head.failure_probability(v, t))

    return answer


def same(answers, photos, labels, eager_open):
    for answer, photo in zip(answers, photos, strict=True):
        label, confidence, failure = eager_open(photo, labels)
        assert answer.error is None
        assert (answer.label, labels[answer.class_index]) == (label, label)
        assert answer.confidence == pytest.approx(confidence, abs=TOLERANCE)
        assert answer.failure_probability == pytest.approx(failure, abs=TOLERANCE)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("labels", SETS, ids=len)
def test_labels_of_a_request_are_answered_as_the_eager_model_does(server, photos, eager_open, protocol, labels):
    with Client(server.grpc_url if protocol == "grpc" else server.http_url, batch_size=5) as client:
        same(client.ask(photos, labels), photos, labels, eager_open)


def test_requests_with_different_labels_ride_together(server, photos, eager_open, eager):
    """Open and closed questions at once, over and over: none is answered from another's candidates."""

    async def everybody():
        async with AsyncClient(server.grpc_url) as client:
            asked = [client.ask([photo], SETS[i % len(SETS)]) for i, photo in enumerate(photos * 3)]
            return await asyncio.gather(*asked, *(client.ask([photo]) for photo in photos))

    found = [answer for (answer,) in asyncio.run(everybody())]
    for i, photo in enumerate(photos * 3):
        same(found[i : i + 1], [photo], SETS[i % len(SETS)], eager_open)
    agree(found[3 * len(photos) :], photos, eager)
    api = grpc.InferenceServerClient(server.grpc_url)
    (statistics,) = api.get_inference_statistics("vilu_embeddings").model_stats
    assert statistics.execution_count < statistics.inference_count  # some did
    api.close()


def in_numpy(checkpoint, clip, v, t):
    """What is told of an answer when asked for, in float64 from the formulas: top labels' rows and probabilities,
    entropy, Doctor, the attention's top rows and weights."""

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    head = checkpoint.head
    v, t = v.double().numpy(), t.double().numpy()
    w_q, w_k, _ = (w.detach().double().numpy() for w in head.projections())
    p = softmax(clip.spec.logit_scale * t @ v)
    attention = softmax(head.attention_scale * (t @ w_k.T) @ (w_q @ v))
    entropy = (p * np.log(p)).sum() / np.log(max(len(t), 2))
    top, concepts = (np.argsort(-x, kind="stable")[:5] for x in (p, attention))
    return top, p[top], entropy, 1 - 1 / (p * p).sum(), concepts, attention[concepts]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("labels", [None, *SETS], ids=lambda labels: "class set" if labels is None else len(labels))
def test_details_are_right(server, photos, clip, checkpoint, protocol, labels):
    names, templates = labels or checkpoint.class_set.names, checkpoint.class_set.templates
    t = clip.class_set(names, templates).text_embeddings
    with Client(server.grpc_url if protocol == "grpc" else server.http_url, batch_size=5) as client:
        plain = client.ask(photos, labels)
        answers = client.ask(photos, labels, details=True, embedding=True, outlier_score=True)
    for answer, without, photo in zip(answers, plain, photos, strict=True):
        v = clip.embed_images([decode(photo, clip.transform)[None]])[0]
        top, p, entropy, doctor, concepts, weights = in_numpy(checkpoint, clip, v, t)
        assert [label for label, _ in answer.top] == [names[i] for i in top]
        assert [label for label, _ in answer.concepts] == [names[i] for i in concepts]
        np.testing.assert_allclose([value for _, value in answer.top], p, atol=TOLERANCE)
        np.testing.assert_allclose([value for _, value in answer.concepts], weights, atol=TOLERANCE)
        assert answer.entropy == pytest.approx(entropy, abs=TOLERANCE)
        assert answer.doctor == pytest.approx(doctor, abs=TOLERANCE, rel=TOLERANCE)
        assert answer.embedding is not None
        np.testing.assert_allclose(answer.embedding, v.numpy(), atol=TOLERANCE)
        scores = {"entropy": Entropy(), "doctor": Doctor()}
        for name, score in scores.items():
            theirs = float(score.confidence(v[None], t, logit_scale=clip.spec.logit_scale))
            assert getattr(answer, name) == pytest.approx(theirs, abs=TOLERANCE, rel=1e-3)
        assert answer.outlier_score == pytest.approx(float(checkpoint.outlier.score(v[None])), abs=TOLERANCE)
        assert without.outlier_score is None
        assert answer.class_set == ("default@1" if labels is None else "")
        assert (answer.label, answer.failure_probability) == (without.label, pytest.approx(without.failure_probability))
        assert (without.class_set, without.top, without.concepts, without.embedding) == (None, (), (), None)


def executed(api, model):
    """Images that a model has run for; the server counts them just after it answers."""
    counts = [-1]
    while len(counts) < 3 or counts[-1] != counts[-2]:
        (statistics,) = api.get_inference_statistics(model).model_stats
        counts.append(statistics.inference_count)
        time.sleep(0.02)
    return counts[-1]


ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")
DETAILS = ("TOP_LABELS", "TOP_PROBABILITIES", "ENTROPY", "DOCTOR", "CONCEPTS", "CONCEPT_WEIGHTS")
OPTIONAL = (*DETAILS, "IMAGE_EMBEDDING", "OUTLIER_SCORE")


@pytest.mark.parametrize(
    ("model", "counted", "plain"), [("vilu", "vilu_details", 0), ("vilu_open", "vilu_embeddings", 1)]
)
def test_details_are_computed_for_who_asks_alone(server, photos, model, counted, plain):
    """They are a step of their own, and an ensemble runs the steps that an output needs: every choice is answered."""
    api = grpc.InferenceServerClient(server.grpc_url)
    image = grpc.InferInput("IMAGE", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[photos[0]]], dtype=object))
    labels = grpc.InferInput("LABELS", [1, 2], "BYTES")
    labels.set_data_from_numpy(np.array([[b"a cat", b"a dog"]], dtype=object))
    given = [image, labels] if model == "vilu_open" else [image]

    def runs(names):
        before = executed(api, counted)
        result = api.infer(model, given, outputs=[grpc.InferRequestedOutput(name) for name in names])
        assert {output.name for output in result.get_response().outputs} == set(names)
        return executed(api, counted) - before

    for names in (ANSWER, *((name,) for name in ANSWER), ("CLASS_SET",), (*ANSWER, "CLASS_SET")):
        assert runs(names) == plain
    for name in OPTIONAL:
        assert runs((*ANSWER, name)) == plain + 1
        assert runs((name,)) == plain + 1
    api.close()


@pytest.mark.parametrize("names", [*((name,) for name in (*ANSWER, *OPTIONAL, "CLASS_SET")), (*ANSWER, *OPTIONAL)])
def test_embeddings_have_the_outputs_that_are_asked_for(server, embedded, names):
    api = grpc.InferenceServerClient(server.grpc_url)
    rows = grpc.InferInput("IMAGE_EMBEDDING", list(embedded.shape), "FP32")
    rows.set_data_from_numpy(3 * embedded.numpy())
    result = api.infer("vilu_embeddings", [rows], outputs=[grpc.InferRequestedOutput(name) for name in names])
    assert {output.name for output in result.get_response().outputs} == set(names)
    if "IMAGE_EMBEDDING" in names:
        np.testing.assert_allclose(result.as_numpy("IMAGE_EMBEDDING"), embedded.numpy(), atol=1e-6)
    api.close()


def test_new_labels_hold_up_no_closed_question(server, photos):
    """While the model of open questions waits for the text tower, closed ones are answered, with all that is asked."""
    with Client(server.grpc_url, timeout=60) as client:
        asked = [[f"new to the server {i} {j}" for j in range(1000)] for i in range(2)]
        waiting = [threading.Thread(target=client.ask, args=(photos[:1], labels)) for labels in asked]
        before = metrics(server)["vilu_text_cache_misses_total"]
        for thread in waiting:
            thread.start()
        while metrics(server)["vilu_text_cache_misses_total"] == before:
            time.sleep(0.01)
        assert all(answer.error is None for answer in client.ask(photos[:1], details=True))
        assert any(thread.is_alive() for thread in waiting)
        for thread in waiting:
            thread.join()


def metrics(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    values = (line.rsplit(" ", 1) for line in lines if line.startswith("vilu_"))
    return {name.partition("{")[0]: float(value) for name, value in values}


def test_a_label_is_read_by_the_text_tower_once(server, photos):
    with Client(server.grpc_url) as client:
        before = metrics(server)
        first = client.ask(photos[:1], ["never asked before", "nor this"])
        between = metrics(server)
        second = client.ask(photos[:1], ["nor this", "never asked before"])
        after = metrics(server)
    misses, hits = "vilu_text_cache_misses_total", "vilu_text_cache_hits_total"
    assert between[misses] - before[misses] == 2
    assert after[misses] == between[misses]
    assert after[hits] - between[hits] == 2
    assert second[0].label == first[0].label
    assert second[0].class_index == 1 - first[0].class_index


def ask(server, **tensors):
    """vilu_embeddings through plain tritonclient."""
    client = grpc.InferenceServerClient(server.grpc_url)
    inputs = []
    for name, value in tensors.items():
        kind = "BYTES" if value.dtype == object else {"f": "FP32", "i": "INT32"}[value.dtype.kind]
        inputs.append(grpc.InferInput(name, list(value.shape), kind))
        inputs[-1].set_data_from_numpy(value)
    try:
        return client.infer("vilu_embeddings", inputs)
    finally:
        client.close()


@pytest.fixture(scope="module")
def embedded(clip, photos):
    return clip.embed_images([decode(photo, clip.transform)[None] for photo in photos[:4]])


def test_embeddings_over_the_class_set_and_over_rows_of_ones_own(server, checkpoint, embedded, clip):
    t = checkpoint.class_set.text_embeddings
    closed = ask(server, IMAGE_EMBEDDING=embedded.numpy())
    expected = checkpoint.head.failure_probability(embedded, t)
    np.testing.assert_allclose(closed.as_numpy("FAILURE_PROBABILITY")[:, 0], expected.numpy(), atol=TOLERANCE)
    names = [name.encode() for name in checkpoint.class_set.names]
    index = (embedded @ t.T).argmax(dim=1)
    assert closed.as_numpy("LABEL")[:, 0].tolist() == [names[i] for i in index]
    # Each image brings its own rows; lengths do not matter, directions do.
    own = torch.stack([t[i : i + 3] * (i + 1) for i in range(4)])
    found = ask(server, IMAGE_EMBEDDING=5 * embedded.numpy(), TEXT_EMBEDDINGS=own.numpy())
    for i in range(4):
        v, rows = embedded[i : i + 1], t[i : i + 3]
        assert found.as_numpy("CLASS_INDEX")[i, 0] == (v @ rows.T).argmax()
        failure = float(checkpoint.head.failure_probability(v, rows))
        assert found.as_numpy("FAILURE_PROBABILITY")[i, 0] == pytest.approx(failure, abs=TOLERANCE)


DIM = 128
ONE = np.ones((1, DIM), np.float32)
TWO = np.ones((1, 2, DIM), np.float32)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"IMAGE_EMBEDDING": ONE * np.nan}, "IMAGE_EMBEDDING holds a value that is not finite"),
        ({"IMAGE_EMBEDDING": ONE * np.inf}, "IMAGE_EMBEDDING holds a value that is not finite"),
        ({"IMAGE_EMBEDDING": ONE * 0}, "IMAGE_EMBEDDING holds a row of zeros"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": TWO * np.nan}, "TEXT_EMBEDDINGS holds a value"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": np.ones((1, 0, DIM), np.float32)}, "candidate"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": np.ones((1, 1001, DIM), np.float32)}, "the limit is 1000"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.full((1, 1001), b"x", object)}, "the limit is 1000"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x" * 257]], object)}, "the limit is 256"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"\xff\xfe"]], object)}, "not UTF-8"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"  ", b"x"]], object)}, "label 1 is empty"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x"]], object)}, "at least two labels, found only 'x'"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"X", b" x"]], object)}, "the same to CLIP's tokenizer"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"a " * 90 + b"x", b"a " * 90]], object)}, "text embedding"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": ONE[None]}, "at least two candidates, found 1"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x", b"y", b"x"]], object)}, "repeats label 1"),
        (
            {"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x"]], object), "TEXT_EMBEDDINGS": ONE[None]},
            "not both",
        ),
        ({"IMAGE_EMBEDDING": ONE[:, :7]}, "shape"),
        ({"IMAGE_EMBEDDING": ONE.astype(np.int32)}, "data-type|data type|datatype"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_costs_the_others_nothing(server, photos, eager, tensors, told):
    with pytest.raises(InferenceServerException, match=told) as caught:
        ask(server, **tensors)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with Client(server.grpc_url) as client:
        agree(client.ask(photos[:1]), photos[:1], eager)


def test_an_empty_list_of_labels_is_refused(server, photos):
    with Client(server.grpc_url, timeout=10) as client:
        (answer,) = client.ask(photos[:1], [])
    assert answer.error
    with pytest.raises(RequestRefused):
        answer.raise_for_error()


def test_extremes_have_a_direction(server):
    """Squares of these overflow or vanish in float32."""
    plain = ask(server, IMAGE_EMBEDDING=ONE).as_numpy("FAILURE_PROBABILITY")
    for scale in (1e-30, 1e30):
        found = ask(server, IMAGE_EMBEDDING=ONE * np.float32(scale)).as_numpy("FAILURE_PROBABILITY")
        np.testing.assert_allclose(found, plain, atol=TOLERANCE)


def test_vilu_ask_with_labels(server, photos, tmp_path, eager_open):
    (tmp_path / "a.jpg").write_bytes(photos[0])
    given = [part for label in SETS[1] for part in ("--label", label)]
    done = vilu("ask", tmp_path / "a.jpg", *given, "--json", "--url", server.grpc_url)
    assert json.loads(done.stdout)[0]["label"] == eager_open(photos[0], SETS[1])[0]


def test_vilu_ask_with_details(server, photos, tmp_path, checkpoint):
    (tmp_path / "a.jpg").write_bytes(photos[0])
    url = ("--details", "--url", server.grpc_url)
    (answer,) = json.loads(vilu("ask", tmp_path / "a.jpg", "--json", *url).stdout)
    assert answer["class_set"] == "default@1"
    assert answer["top"][0] == [answer["label"], pytest.approx(answer["confidence"])]
    assert len(answer["concepts"]) == 5
    doubt = vilu("ask", tmp_path / "a.jpg", *url).stdout.rstrip("\n").split("\t")[-1]
    assert doubt.startswith(f"{answer['concepts'][0][0]} {answer['concepts'][0][1]:.0%}, ")
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert vilu("ask", tmp_path / "a.jpg", *url, "--output", tmp_path / f"out{suffix}").returncode == 0
        (row,) = rows_of(tmp_path / f"out{suffix}")
        top = json.loads(row["top"]) if suffix == ".csv" else row["top"]
        first = (top[0]["label"], top[0]["weight"]) if suffix == ".parquet" else tuple(top[0])
        assert first == (answer["label"], pytest.approx(answer["confidence"]))
    wrong = vilu("ask", tmp_path / "a.jpg", "--label", "a", "--class-set", "b", *url)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_the_text_tower_gives_way_to_images(server):
    towers = "clip_image", "clip_text"
    nice = {model: os.getpriority(os.PRIO_PROCESS, stub_of(server.process.pid, model)) for model in towers}
    assert nice["clip_text"] == nice["clip_image"] + 5
