"""The door's HTTP before the real server: /ask, KServe v2 in REST with JSON alone, its description, and its limits."""

import base64
import contextlib
import http.client
import json
import socket
import subprocess
import time

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi
from tritonclient import http as triton_http

from tests.serving.helpers import agree, metrics, opened, options, send
from vilu.serving import Client
from vilu.serving.door import Door, Limits
from vilu.serving.door.openapi import description

pytestmark = pytest.mark.server


def test_curl_asks_about_a_photo(front, photos, eager, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(photos[0])
    command = ["curl", "-sS", "--noproxy", "*", "--data-binary", f"@{tmp_path / 'photo.jpg'}"]
    done = subprocess.run([*command, f"http://{front.http}/ask"], capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    label, confidence, failure = eager(photos[0])
    assert answer["label"] == label
    assert answer["confidence"] == pytest.approx(confidence, abs=1e-4)
    assert answer["failure_probability"] == pytest.approx(failure, abs=1e-4)
    assert set(answer) == {"label", "class_index", "confidence", "failure_probability", "accept"}


def multipart(image, fields):
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + image + b"\r\n"]
    for key, value in fields:
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode())
    return b"".join(parts) + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def test_the_ways_to_ask(front, photos):
    """A raw body, a form and JSON with base64 or a data URL give the answer that the client gives."""
    with Client(front.grpc) as client:
        (plain,) = client.ask(photos[:1])
        (details,) = client.ask(photos[:1], details=True, outlier_score=True)
        (own,) = client.ask(photos[:1], ["a red circle", "zéro, or not"])
    text = base64.b64encode(photos[0]).decode()
    query = "?labels=a%20red%20circle&labels=z%C3%A9ro%2C%20or%20not"
    found = [
        send(front, "/ask", photos[0], {"content-type": "image/jpeg"}),
        send(front, "/ask", photos[0]),
        send(front, "/ask", *multipart(photos[0], [])),
        send(front, "/ask", json.dumps({"image": text}).encode(), {"content-type": "application/json"}),
        send(
            front, "/ask", json.dumps({"image": f"data:image/jpeg;base64,{text}"}).encode(),
            {"content-type": "application/json; charset=utf-8"},
        ),
    ]  # fmt: skip
    for status, _, answer in found:
        assert status == 200, answer
        assert answer["label"] == plain.label
        assert answer["failure_probability"] == pytest.approx(plain.failure_probability, abs=1e-6)
        assert answer["accept"] is plain.accept
    for status, _, answer in (
        send(front, "/ask" + query, photos[0]),
        send(front, "/ask", *multipart(photos[0], [("labels", "a red circle"), ("labels", "zéro, or not")])),
    ):
        assert (status, answer["label"]) == (200, own.label)
    for status, _, answer in (
        send(front, "/ask?details=true", photos[0]),
        send(front, "/ask", *multipart(photos[0], [("details", "1")])),
    ):
        assert (status, answer["class_set"]) == (200, details.class_set)
        assert [(one["label"], pytest.approx(one["probability"])) for one in answer["top"]] == list(details.top)
        assert answer["concepts"][0]["label"] == details.concepts[0][0]
        assert answer["entropy"] == pytest.approx(details.entropy)
    status, _, answer = send(front, "/ask?class_set=default&embedding=true&outlier_score=1", photos[0])
    assert answer["outlier_score"] == pytest.approx(details.outlier_score)
    assert (status, answer["class_set"].partition("@")[0]) == (200, "default")
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/ask", b"", {}, 400, "the body is empty"),
        ("/ask", b"no image", {}, 400, "not a JPEG, PNG or WEBP image"),
        ("/ask?colour=red", b"x", {}, 400, "there is no parameter 'colour'"),
        ("/ask?details=perhaps", b"x", {}, 400, "details: must be true or false"),
        ("/ask?labels=a&class_set=b", b"x", {}, 400, "labels, or one class_set"),
        ("/ask?labels=a", b"x", {}, 400, "labels: needs at least two labels, found only 'a'"),
        ("/ask?labels=A&labels=a", b"x", {}, 400, "is the same to CLIP's tokenizer as label 1"),
        ("/ask?class_set=absent", None, {}, 400, "absent"),
        ("/ask", b"{}", {"content-type": "application/json"}, 400, "`image`"),
        ("/ask", b'{"image": "&"}', {"content-type": "application/json"}, 400, "base64"),
        ("/ask", b"--x--", {"content-type": "multipart/form-data; boundary=x"}, 400, "one file"),
        ("/ask", b"--x--", {"content-type": "multipart/form-data"}, 400, "form"),
        ("/ask", b"x", {"content-encoding": "gzip"}, 415, "compressed"),
        ("/v2/models/vilu/infer", b"no JSON", {}, 400, "not JSON"),
        ("/v2/models/vilu/infer", b"[" * 100_000, {}, 400, "not JSON"),
        ("/v2/models/vilu/infer", b'{"inputs": 3}', {}, 400, "inputs must be a list"),
        ("/v2/models/vilu/infer", b"{}", {"inference-header-content-length": "9"}, 400, "not a length"),
        ("/v2/models/vilu/infer", b"{}", {"inference-header-content-length": "-1"}, 400, "not a number"),
        ("/v2/models/vilu_head/infer", b'{"inputs": []}', {}, 404, "there is no model 'vilu_head'"),
        ("/v2/models/vilu/versions/x/infer", b'{"inputs": []}', {}, 400, "a version is a number"),
        ("/absent", b"", {}, 404, "Not Found"),
        ("/v2/repository/models/vilu/load", b"", {}, 401, "changes are closed"),
    ],
)
def test_a_wrong_request_gets_one_line(front, photos, path, body, headers, status, message):
    found = send(front, path, photos[0] if body is None else body, headers, "POST")
    assert found[0] == status, found[2]
    assert message in found[2]["error"]
    assert "\n" not in found[2]["error"]


@pytest.mark.parametrize(
    ("query", "fields", "message"),
    [
        ("", '"label": ["a", "b"]', "there is no parameter 'label'"),
        ("", '"labels": []', "'labels': the list is empty"),
        ("?labels=a", '"labels": ["b", "c"]', "labels: is in the address and in the body"),
        ("?class_set=a", '"class_set": "b"', "class_set: is in the address and in the body"),
        ("?details=1", '"details": false', "details: is in the address and in the body"),
        ("?details=1&details=0", '"embedding": true', "details: is given twice"),
        ("", '"labels": ["a"], "labels": ["b"]', "a field of the JSON is there twice"),
        ("", r'"labels": ["\ud800", "c"]', "labels: is not UTF-8"),
        ("", r'"class_set": "\ud800"', "class_set: is not UTF-8"),
        ("", r'"\ud800": "a"', "there is no parameter"),
        ("", '"labels": [{"a": 1}]', "must be strings"),
    ],
)
def test_a_question_that_means_another_is_refused(front, photos, query, fields, message):
    body = f'{{"image": "{base64.b64encode(photos[0]).decode()}", {fields}}}'.encode()
    status, _, said = send(front, "/ask" + query, body, {"content-type": "application/json"})
    assert (status, message in said["error"]) == (400, True), said


def test_an_unknown_field_of_a_form_is_refused(front, photos):
    status, _, said = send(front, "/ask", *multipart(photos[0], [("label", "a")]))
    assert (status, "there is no parameter 'label'" in said["error"]) == (400, True), said
    status, _, said = send(front, "/ask?labels=a", *multipart(photos[0], [("labels", "b")]))
    assert (status, said["error"]) == (400, "labels: is in the address and in the body")


def tensor(name, data, shape, kind="BYTES", **more):
    return {"name": name, "datatype": kind, "shape": shape, "data": data, **more}


def test_json_alone_is_enough_for_every_model(front, photos, checkpoint):
    """KServe v2 without a byte of binary data: an image in base64, text and numbers, as any HTTP client can send."""
    text = base64.b64encode(photos[0]).decode()
    image = tensor("IMAGE", [text], [1, 1])
    with Client(front.grpc) as client:
        (direct,) = client.ask(photos[:1])
    status, _, found = send(front, "/v2/models/vilu/infer", json.dumps({"id": "7", "inputs": [image]}).encode())
    outputs = {one["name"]: one["data"] for one in found["outputs"]}
    assert (status, found["id"], outputs["LABEL"]) == (200, "7", [direct.label])
    assert outputs["FAILURE_PROBABILITY"] == pytest.approx([direct.failure_probability], abs=1e-6)
    image["data"] = [f"data:image/jpeg;base64,{text}"]
    image["parameters"] = {"content_type": "base64"}
    body = {"inputs": [image, tensor("LABELS", [["zéro", "one"]], [1, 2])], "outputs": [{"name": "LABEL"}]}
    status, _, found = send(front, "/v2/models/vilu_open/infer", json.dumps(body).encode())
    assert status == 200, found
    assert found["outputs"][0]["data"][0] in ("zéro", "one")
    embedding = [0.1] * checkpoint.head.dim
    body = {"inputs": [tensor("IMAGE_EMBEDDING", [embedding], [1, len(embedding)], "FP32")]}
    status, _, found = send(front, "/v2/models/vilu_embeddings/infer", json.dumps(body).encode())
    assert status == 200, found
    status, _, found = send(front, "/v2/models/vilu/infer", photos[0], {"inference-header-content-length": "0"})
    assert {one["name"]: one["data"] for one in found["outputs"]}["LABEL"] == [direct.label]


def generated(front, model, fields):
    return send(front, f"/v2/models/{model}/generate", json.dumps(fields).encode())


def test_a_flat_object_is_enough(front, photos, checkpoint):
    text = [base64.b64encode(photo).decode() for photo in photos[:2]]
    with Client(front.grpc) as client:
        both = client.ask(photos[:2])
        (own,) = client.ask(photos[:1], ["zéro", "one"])
    status, _, found = generated(front, "vilu", {"IMAGE": text[0], "id": "7", "class_set": "default"})
    assert (status, found["id"], found["LABEL"]) == (200, "7", both[0].label)
    assert found["FAILURE_PROBABILITY"] == pytest.approx(both[0].failure_probability, abs=1e-6)
    assert generated(front, "vilu", {"IMAGE": text})[2]["LABEL"] == [answer.label for answer in both]
    assert generated(front, "vilu_open", {"IMAGE": text[0], "LABELS": ["zéro", "one"]})[2]["LABEL"] == own.label
    numbers = {"IMAGE_EMBEDDING": [0.1] * checkpoint.head.dim}
    assert 0 <= generated(front, "vilu_embeddings", numbers)[2]["FAILURE_PROBABILITY"] <= 1


@pytest.mark.parametrize(
    ("model", "fields", "status", "message"),
    [
        ("vilu", {}, 400, "input IMAGE is missing"),
        ("vilu", [], 400, "the body must be a JSON object"),
        ("vilu", {"IMAGE": "?"}, 400, "base64"),
        ("vilu", {"IMAGE": []}, 400, "1 to 8 rows"),
        ("vilu", {"IMAGE": "aGk=", "temperature": 1}, 400, "only class_set"),
        ("vilu_embeddings", {"IMAGE_EMBEDDING": [0.1] * 3}, 400, "3 values do not fill the shape"),
        ("vilu_embeddings", {"IMAGE_EMBEDDING": {"a": 1}}, 400, "1 values do not fill the shape"),
        ("vilu_open", {"IMAGE": "aGk=", "LABELS": [1, 2]}, 400, "its data must be strings"),
        ("absent", {"IMAGE": "aGk="}, 404, "there is no model 'absent' here"),
    ],
)
def test_a_wrong_flat_object_gets_one_line(front, model, fields, status, message):
    found, _, answer = generated(front, model, fields)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_own_client_is_answered(front, photos, eager, binary):
    client = triton_http.InferenceServerClient(front.http)
    image = triton_http.InferInput("IMAGE", [3, 1], "BYTES")
    image.set_data_from_numpy(np.array(photos[:3], dtype=object).reshape(3, 1))
    outputs = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in ("LABEL", "CONFIDENCE")]
    for asked in (outputs, None):
        result = client.infer("vilu", [image], outputs=asked, request_id="one")
        labels = [one.decode() if isinstance(one, bytes) else one for one in result.as_numpy("LABEL").ravel()]
        assert labels == [eager(photo)[0] for photo in photos[:3]]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("vilu")
    assert client.get_model_metadata("vilu")["inputs"][0]["name"] == "IMAGE"
    assert int(client.get_model_config("vilu")["max_batch_size"]) == 8
    client.close()


def test_our_client_is_answered(front, photos, eager):
    with Client(f"http://{front.http}") as client:
        agree(client.ask(photos), photos, eager)
        mixed = client.ask([photos[0], b"no image"], details=True)
        assert [answer.error for answer in mixed] == [None, "not a JPEG, PNG or WEBP image"]


def test_probes_and_descriptions(front):
    assert send(front, "/healthz")[0] == 200
    assert send(front, "/readyz")[0] == 200
    assert send(front, "/v2")[2]["name"] == "triton"
    assert b"/ask" in send(front, "/docs")[2]
    paths = send(front, "/openapi.json")[2]["paths"]
    assert {"/ask", "/readyz", "/v2/models/{model}/infer"} <= set(paths)
    assert send(front, "/ask")[0] == 405
    assert send(front, "/healthz/", headers={"host": "elsewhere"})[0] == 404, "no redirection to a host of the client's"


CHECKS = [
    checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(description(Limits()))
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_the_description_is_kept(front, label, mode):
    """Requests that the OpenAPI description allows, and ones it does not, are answered as it says."""
    assert send(front, "/openapi.json")[2] == SCHEMA.raw_schema

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def keeps(case):
        case.validate_response(case.call(base_url=f"http://{front.http}"), checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a path without parameters
        keeps()


@pytest.fixture
def guarded(server):
    """Ports of a door with small limits."""
    limits = Limits(body_bytes=1 << 20, body_seconds=1, header_seconds=1, idle_seconds=2, header_bytes=4096)
    with opened(Door(options(upstreams=[server.grpc_url], limits=limits))) as ports:
        yield ports


def test_a_large_body_is_refused_before_it_is_read(guarded, photos):
    for headers in ({"content-length": str(2 << 30)}, {"transfer-encoding": "chunked"}):
        connection = http.client.HTTPConnection(guarded.http, timeout=60)
        connection.putrequest("POST", "/ask")
        for key, value in headers.items():
            connection.putheader(key, value)
        connection.endheaders()
        if "transfer-encoding" in headers:
            for _ in range(40):
                try:
                    connection.send(b"10000\r\n" + bytes(65536) + b"\r\n")
                except OSError:
                    break  # refused already
        reply = connection.getresponse()
        assert (reply.status, json.load(reply)["error"]) == (413, "the body is larger than 1048576 bytes")
        connection.close()
    assert send(guarded, "/ask", photos[0])[0] == 200


def raw(ports, *parts, pause=0.0):
    """What the door says to bytes sent over a connection, until it closes it."""
    host, _, port = ports.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        said = b""
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        try:
            while piece := connection.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
        return said


def test_slow_senders_and_endless_headers_are_ended(guarded, photos):
    assert raw(guarded, b"POST /ask HT") == b""  # headers that never end: closed after a second
    assert raw(guarded, b"") == b""
    said = raw(guarded, b"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive in 1 s" in said
    assert raw(guarded, b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    header = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 900) for i in range(9))
    assert raw(guarded, header + b"\r\n").startswith(b"HTTP/1.1 431 ")
    piecemeal = raw(guarded, *(header[i : i + 500] for i in range(0, len(header), 500)), pause=0.01)
    assert piecemeal.startswith(b"HTTP/1.1 400 ")
    idle = raw(guarded, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")  # kept alive for two seconds, then closed
    assert idle.startswith(b"HTTP/1.1 200 ")
    assert send(guarded, "/ask", photos[0])[0] == 200


def test_a_client_that_leaves_is_forgotten(server, photos):
    """Its question is dropped while it waits; the next ones are answered."""
    with opened(Door(options(upstreams=[server.grpc_url], limits=Limits(sent=1)))) as ports:
        head = f"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photos[0])}\r\n\r\n".encode()
        host, _, port = ports.http.rpartition(":")
        for _ in range(60):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + photos[0])
        assert send(ports, "/ask", photos[0])[0] == 200
        deadline = time.monotonic() + 30
        while b'vilu_door_in_flight{model="vilu"} 0.0' not in metrics(ports):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_page_of_grafana_has_the_servers_metrics_too(front, photos):
    send(front, "/ask", photos[0])
    text = metrics(front).decode()
    assert 'vilu_door_requests_total{model="vilu",outcome="ok",protocol="http"}' in text
    assert "nv_inference_request_success" in text
    assert "vilu_failure_probability" in text
