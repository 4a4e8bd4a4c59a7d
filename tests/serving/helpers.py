"""Shared by the tests of this folder: the command, answers against the eager model, ports, processes, certificates."""

import asyncio
import contextlib
import csv
import json
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.access import Access
from vilu.serving.address import free_port, open_directly
from vilu.serving.door import Door, Options, own_server

BIN = Path(sys.executable).parent
ASK, STEER = "inference-token-0123", "control-token-4567"


def agree(answers, photos, eager):
    for answer, photo in zip(answers, photos, strict=True):
        label, confidence, failure = eager(photo)
        assert answer.error is None
        assert answer.label == label
        assert answer.confidence == pytest.approx(confidence, abs=1e-4)
        assert answer.failure_probability == pytest.approx(failure, abs=1e-4)
        assert answer.accept == (answer.failure_probability < 0.505)


def same_bits(rows, answers):
    """Whether a Scorer's rows are the server's answers, to the last bit."""
    for row, answer in zip(rows, answers, strict=True):
        assert answer.error is None
        for name in ("label", "class_index", "confidence", "failure_probability", "accept"):
            assert row[name] == getattr(answer, name), name
        if answer.top:
            assert tuple(zip(row["top_labels"], row["top_probabilities"], strict=True)) == answer.top
            assert tuple(zip(row["concepts"], row["concept_weights"], strict=True)) == answer.concepts
            assert (row["entropy"], row["doctor"]) == (answer.entropy, answer.doctor)
            assert row["class_set"] == answer.class_set
        if answer.stage is not None:
            assert (row["stage"], answer.escalation_failed) == (answer.stage, False)
        if answer.outlier_score is not None:
            assert row["outlier_score"] == answer.outlier_score
        if answer.embedding is not None:
            kept = np.array(row["image_embedding"], np.float16)
            assert np.array_equal(kept, answer.embedding.astype(np.float16))


def descendants(pid):
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def vilu(*arguments, **options):
    return subprocess.run([BIN / "vilu", *arguments], capture_output=True, text=True, timeout=60, **options)


def ports():
    return {kind: free_port() for kind in ("http", "grpc", "metrics")}


def wait_for(url, process, seconds=40):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not come up")


def stub_of(pid: int, model: str) -> int:
    """The process of a Python model's instance."""
    with contextlib.suppress(OSError):  # a process may end since it was listed
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                with contextlib.suppress(OSError):
                    if f"{model}_0" in Path(f"/proc/{child}/cmdline").read_text():
                        return int(child)
                if found := stub_of(int(child), model):
                    return found
    return 0


def tritonserver_of(pid: int) -> int:
    """The tritonserver that a launcher has started; 0 where there is none now."""
    with contextlib.suppress(OSError):  # a process may end since it was listed
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                with contextlib.suppress(OSError):
                    name = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]
                    if name.endswith(b"bin/tritonserver"):
                        return int(child)
    return 0


def certificate(folder: Path, name: str, issuer: str | None = None) -> None:
    """folder/NAME.pem and NAME.key; signed by itself, or by folder/ISSUER."""
    key, request, out = (str(folder / f"{name}.{kind}") for kind in ("key", "csr", "pem"))
    extension = folder / "san"
    extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    subject = ["-newkey", "rsa:2048", "-nodes", "-keyout", key, "-subj", f"/CN={name}"]
    if issuer is None:
        commands = [["req", "-x509", *subject, "-out", out, "-days", "2"]]
    else:
        by = ["-CA", str(folder / f"{issuer}.pem"), "-CAkey", str(folder / f"{issuer}.key"), "-CAcreateserial"]
        commands = [
            ["req", *subject, "-out", request],
            ["x509", "-req", "-in", request, *by, "-out", out, "-days", "2", "-extfile", str(extension)],
        ]
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(newline="")))
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


@contextlib.contextmanager
def opened(door):
    """The ports of a Door that runs on an event loop in a thread of its own."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def run():
        found["stop"], found["loop"] = asyncio.Event(), asyncio.get_running_loop()
        try:
            async with door.serving() as ports:
                found["ports"] = ports
                ready.set()
                await found["stop"].wait()
        except BaseException as error:
            found["error"] = error
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait(120)
    try:
        if "error" in found:
            raise found["error"]
        yield found["ports"]
    finally:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(60)


def options(**given):
    """Options of a door on free ports of loopback."""
    return Options(**{"grpc_port": 0, "http_port": 0, "metrics_port": 0} | given)


@contextlib.contextmanager
def door_over(root, folder, **more):
    """The ports of a door over a repository, which takes the control token STEER, and its tritonserver."""
    server = own_server(root, log=folder / "tritonserver.log")
    with opened(Door(options(access=lambda: Access(control_token=STEER), **more), server)) as ports:
        yield ports, server


def strings(*words):
    """Triton's layout of BYTES."""
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def question(image, model="vilu", **more):
    """A ModelInferRequest about one image."""
    request = pb.ModelInferRequest(model_name=model, **more)
    request.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(strings(image))
    return request


def code_of(ask, request):
    """(name of the status code, message) of a gRPC call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        ask(request, timeout=20)
    return caught.value.code().name, caught.value.details()


def send(ports, path, body=None, headers=None, method=None):
    """(status, headers, JSON or bytes) of a request."""
    request = urllib.request.Request(f"http://{ports.http}{path}", body, headers or {}, method=method)
    try:
        with open_directly(request, timeout=60) as reply:
            status, got, content = reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        status, got, content = error.code, error.headers, error.read()
    return status, got, json.loads(content) if got.get_content_type() == "application/json" else content


def metrics(ports):
    with open_directly(f"http://{ports.metrics}/metrics", timeout=10) as reply:
        return reply.read()


NOWHERE = ["127.0.0.1:1"]  # where no server listens


def wait(for_what):
    """Wait until it holds, for at most 30 s."""
    deadline = time.monotonic() + 30
    while not for_what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
