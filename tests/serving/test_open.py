"""Candidates of a request's own: labels through the server's text tower, or embeddings, against the eager model."""

import asyncio
import json
import urllib.request

import numpy as np
import pytest
import torch
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.serving.test_server import agree, vilu
from vilu.image import decode
from vilu.serving import AsyncClient, Client, RequestRefused

pytestmark = pytest.mark.server
TOLERANCE = 1e-4
SETS = (
    ("a cat", "a dog"),
    ("handwritten three", "handwritten eight", "red circle", "blue star", "a cat"),
    ("only one",),
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
    misses, hits = "vilu_text_cache_misses", "vilu_text_cache_hits"
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


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"IMAGE_EMBEDDING": ONE * np.nan}, "IMAGE_EMBEDDING holds a value that is not finite"),
        ({"IMAGE_EMBEDDING": ONE * np.inf}, "IMAGE_EMBEDDING holds a value that is not finite"),
        ({"IMAGE_EMBEDDING": ONE * 0}, "IMAGE_EMBEDDING holds a row of zeros"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": ONE[None] * np.nan}, "TEXT_EMBEDDINGS holds a value"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": np.ones((1, 0, DIM), np.float32)}, "candidate"),
        ({"IMAGE_EMBEDDING": ONE, "TEXT_EMBEDDINGS": np.ones((1, 1001, DIM), np.float32)}, "the limit is 1000"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.full((1, 1001), b"x", object)}, "the limit is 1000"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x" * 257]], object)}, "the limit is 256"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"\xff\xfe"]], object)}, "not UTF-8"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"  ", b"x"]], object)}, "a label is empty"),
        ({"IMAGE_EMBEDDING": ONE, "LABELS": np.array([[b"x", b"y", b"x"]], object)}, "'x' is there twice"),
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
