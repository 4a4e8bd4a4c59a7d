"""The real tritonserver process, asked over gRPC and HTTP."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from tests.serving.helpers import BIN, agree, descendants, ports, vilu, wait_for
from vilu import UserError
from vilu.serving import AsyncClient, Client, RequestRefused, Server, ServerUnavailable, find_tritonserver
from vilu.serving.address import free_port
from vilu.serving.repository import check_repository
from vilu.serving.server import _exit_timeout
from vilu.serving.server_log import has_gpu

pytestmark = pytest.mark.server
PROTOCOLS = ["grpc", "http"]


def url_of(server, protocol):
    return server.grpc_url if protocol == "grpc" else server.http_url


def raw(server, protocol):
    """(module, client) of plain tritonclient, which checks nothing of ours."""
    api = grpc if protocol == "grpc" else http
    return api, api.InferenceServerClient(url_of(server, protocol).removeprefix("http://"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_served_answers_are_the_eager_models(server, photos, eager, protocol, batch_size):
    with Client(url_of(server, protocol), batch_size=batch_size) as client:
        agree(client.ask(photos), photos, eager)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_at_once_are_batched_and_still_right(server, photos, eager, protocol):
    async def everybody():
        async with AsyncClient(url_of(server, protocol)) as client:
            return await asyncio.gather(*(client.ask([photo]) for photo in photos * 4))

    answers = [answer for (answer,) in asyncio.run(everybody())]
    agree(answers, photos * 4, eager)


def test_arrays_pillow_images_and_files(server, photos, eager, tmp_path):
    import io

    from PIL import Image

    path = tmp_path / "a.png"
    path.write_bytes(photos[1])
    picture = Image.open(io.BytesIO(photos[1]))
    with Client(server.grpc_url) as client:
        agree(client.ask([path, str(path), picture, np.asarray(picture)]), [photos[1]] * 4, eager)
        assert "uint8" in client.ask([np.zeros((4, 4))])[0].error


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_images_get_one_clear_line_and_cost_the_others_nothing(server, photos, eager, protocol):
    with Client(url_of(server, protocol)) as client:
        good, empty, garbage, cut, missing = client.ask([photos[0], b"", b"garbage", photos[3][:-200], "/absent.jpg"])
        agree([good], photos[:1], eager)
        assert empty.error == "image is empty (0 bytes)"
        assert garbage.error == "not a JPEG, PNG or WEBP image"
        assert cut.error.startswith("image cannot be decoded")
        assert missing.error.startswith("cannot be read")
        with pytest.raises(RequestRefused, match="not a JPEG"):
            garbage.raise_for_error()
        agree(client.ask(photos[:1]), photos[:1], eager)


def bad_request(api, case):
    if case == "dtype":
        tensor = api.InferInput("IMAGE", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1), np.float32))
    else:
        shape = {"shape": (1, 2), "rank": (1,), "too many": (9, 1), "no images": (0, 1)}[case]
        tensor = api.InferInput("IMAGE", list(shape), "BYTES")
        tensor.set_data_from_numpy(np.full(shape, b"x", dtype=np.object_))
    return [tensor]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", ["dtype", "shape", "rank", "too many", "no images", "no input", "model"])
def test_wrong_requests_are_refused_and_the_server_keeps_answering(server, photos, eager, protocol, case):
    api, client = raw(server, protocol)
    inputs = [] if case == "no input" else bad_request(api, "shape" if case == "model" else case)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("absent" if case == "model" else "vilu", inputs)
    expected: tuple[str, ...] = {"model": ("StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE", "404", "400")}.get(
        case, ("StatusCode.INVALID_ARGUMENT", "400")
    )
    if case in ("no input", "no images"):  # the server's own words for these are another class (tritonserver 2.51)
        expected += ("StatusCode.INTERNAL", "500", "StatusCode.UNKNOWN")
    assert str(caught.value.status()) in expected
    assert caught.value.message()
    client.close()
    with Client(url_of(server, protocol)) as good:
        agree(good.ask(photos[:2]), photos[:2], eager)


def test_plain_http_without_any_client_library(server):
    with urllib.request.urlopen(f"{server.http_url}/v2/models/vilu", timeout=10) as reply:
        described = json.load(reply)
    assert [tensor["name"] for tensor in described["inputs"]] == ["IMAGE"]
    assert {tensor["name"]: tensor["datatype"] for tensor in described["outputs"][:5]} == {
        "LABEL": "BYTES",
        "CLASS_INDEX": "INT32",
        "CONFIDENCE": "FP32",
        "FAILURE_PROBABILITY": "FP32",
        "ACCEPT": "BOOL",
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_single_models_of_the_repository(server, clip, checkpoint, photos, eager, protocol):
    from vilu.preprocess.image import decode

    api, client = raw(server, protocol)
    pixels = np.stack([decode(photo, clip.transform) for photo in photos[:3]])
    tensor = api.InferInput("PIXELS", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    result = client.infer("vilu_full", [tensor])
    assert [label.decode() for label in result.as_numpy("LABEL").ravel()] == [eager(p)[0] for p in photos[:3]]
    tokens = clip.tokenize(["a photo of a handwritten three."]).numpy()
    tensor = api.InferInput("TOKENS", list(tokens.shape), "INT64")
    tensor.set_data_from_numpy(tokens)
    row = client.infer("clip_text", [tensor]).as_numpy("TEXT_EMBEDDING")[0]
    np.testing.assert_allclose(row, checkpoint.class_set.text_embeddings[3], atol=1e-4)
    client.close()


def test_no_process_of_the_server_has_torch(server):
    pids = descendants(server.process.pid)
    assert len(pids) > 4  # the server and its stubs
    for pid in pids:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_listens_on_loopback_alone(server):
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {
        line[1].split(":")[0]
        for line in lines
        if line[3] == "0A"
        and int(line[1].split(":")[1], 16) in (server.http_port, server.grpc_port, server.metrics_port)
    }
    assert listening == {"0100007F"}


def test_a_server_that_is_not_there():
    for scheme in ("", "http://"):
        bad = Client(f"{scheme}127.0.0.1:{free_port()}", timeout=2)
        with bad as client, pytest.raises(ServerUnavailable, match="is `vilu serve` running"):
            client.ask([b"x"])
    with pytest.raises(UserError, match="scheme"):
        Client("ftp://127.0.0.1:1")


def test_vilu_ask(server, photos, tmp_path):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    good.write_bytes(photos[0])
    bad.write_bytes(b"no image")
    fine = vilu("ask", good, "--url", server.grpc_url)
    assert (fine.returncode, fine.stderr) == (0, "")
    cells = fine.stdout.rstrip("\n").split("\t")  # no terminal: one line of tab-separated cells
    assert cells[0] == str(good)
    assert cells[1].startswith("handwritten ")
    assert cells[4] in ("accept", "reject")
    mixed = vilu("ask", good, bad, tmp_path / "absent.jpg", "--json", "--url", server.http_url)
    assert mixed.returncode == 1
    rows = json.loads(mixed.stdout)
    assert [("error" in row and row["error"] is not None) for row in rows] == [False, True, True]
    assert len(mixed.stderr.splitlines()) == 2
    nobody = vilu("ask", good, "--url", f"127.0.0.1:{free_port()}", "--timeout", "2")
    assert nobody.returncode == 1
    assert len(nobody.stderr.splitlines()) == 1
    assert "is `vilu serve` running?" in nobody.stderr


def test_vilu_health_as_json(server):
    url = f"127.0.0.1:{free_port()}"
    for where, answers in ((server.grpc_url, True), (url, False)):
        done = vilu("health", "--json", "--url", where, "--timeout", "20" if answers else "1")
        assert (done.returncode, done.stderr) == (0 if answers else 1, "")
        document = json.loads(done.stdout)
        assert (document["url"], document["model"], document["answers"]) == (where, "vilu", answers)
        assert (document["error"] is None) == answers


def test_the_log_of_a_machine_without_a_gpu_has_no_alarm(server):
    text = server.log.read_text()
    assert "CUDA driver" not in text or has_gpu()
    assert "Started GRPCInferenceService" in text


def ours_in_shared_memory():
    """Names in /dev/shm, without those of other processes' clients: tests run side by side."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if not name.startswith("vilu_") or name.startswith(f"vilu_{os.getpid()}_")}


def test_vilu_serve_forwards_sigterm_and_leaves_nothing(repository, photos, eager):
    before = ours_in_shared_memory()
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    process = subprocess.Popen(
        [BIN / "vilu", "serve", "--model-repository", repository, *flags, "--log-verbose=0"], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{chosen['http']}", process)
        family = descendants(process.pid)
        with Client(f"127.0.0.1:{chosen['grpc']}") as client:
            agree(client.ask(photos[:2]), photos[:2], eager)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert ours_in_shared_memory() <= before


def test_the_literal_tritonserver_command(repository, photos, eager):
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    process = subprocess.Popen(
        [BIN / "tritonserver", "--model-repository", repository, *flags],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{chosen['http']}", process)
        with Client(f"127.0.0.1:{chosen['grpc']}") as client:
            agree(client.ask(photos[:2]), photos[:2], eager)
        process.terminate()
        process.wait(30)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def broken(repository, tmp_path, change):
    import shutil

    root = tmp_path / "model_repository"
    shutil.copytree(repository, root)
    change(root)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "preprocess" / "1" / "model.py").unlink(), "model.py: missing"),
        (lambda root: (root / "clip_image" / "1" / "model.onnx").unlink(), "model.onnx: missing"),
        (lambda root: (root / "clip_image" / "config.pbtxt").unlink(), "config.pbtxt: missing"),
        (lambda root: (root / "clip_image" / "config.pbtxt").write_text("name: ["), "not a Triton model configuration"),
        (
            lambda root: (root / "vilu" / "1" / ".gitkeep").unlink() or (root / "vilu" / "1").rmdir(),
            "no version folder",
        ),
    ],
)
def test_a_broken_repository_is_refused_before_the_start(repository, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Server(broken(repository, tmp_path, change))


def test_a_model_that_cannot_load_or_answer_never_hangs(repository, tmp_path):
    def raise_in_execute(root):
        (root / "preprocess" / "1" / "image.py").write_text("raise RuntimeError('broken on purpose')\n")

    root = broken(repository, tmp_path, raise_in_execute)
    with pytest.raises(UserError, match="tritonserver"):
        Server(root, startup_seconds=20, stop_seconds=3, log=tmp_path / "log").__enter__()
    with pytest.raises(UserError, match="no such model repository"):
        check_repository(tmp_path / "absent")
    with pytest.raises(UserError, match="not an executable"):
        find_tritonserver(tmp_path / "absent")


def test_a_killed_launcher_leaves_no_server_behind(repository, tmp_path):
    """kill -9 gives the launcher no chance to stop what it started."""
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen([BIN / "vilu", "serve", "--model-repository", repository, *flags], stderr=log)
    wait_for(f"http://127.0.0.1:{chosen['http']}", launcher)
    prefix = f"vilu_{launcher.pid}_"
    assert any(path.name.startswith(prefix) for path in Path("/dev/shm").iterdir())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(path.name.startswith(prefix) for path in Path("/dev/shm").iterdir()):
        assert time.monotonic() < deadline, "the server outlived its launcher"
        time.sleep(0.2)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{chosen['http']}/v2/health/live", timeout=5)


@pytest.mark.parametrize(
    ("flags", "seconds"), [((), 10), (("--exit-timeout-secs=40",), 40), (("--exit-timeout-secs", "7"), 7)]
)
def test_the_users_exit_timeout_is_honoured(flags, seconds):
    assert _exit_timeout(flags, 10) == seconds
