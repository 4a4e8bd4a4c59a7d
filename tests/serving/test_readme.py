"""What docs/serve.md and docs/operations.md show for pasting, pasted: against the real server."""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vilu.serving.address import free_port, open_directly

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[2]
TOKEN = "token-of-this-test"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def blocks(text: str, heading: str) -> list[str]:
    """The indented blocks of a section."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found if block.strip()]


@pytest.fixture
def snippets(front, photos, tmp_path):
    """The two of docs/serve.md, by what they hold, with this server's ports; the photo lies in tmp_path."""
    (tmp_path / "photo.jpg").write_bytes(photos[0])
    ports = {"127.0.0.1:8001": front.grpc, "http://127.0.0.1:8000": f"http://{front.http}"}
    found = blocks((ROOT / "docs" / "serve.md").read_text("utf-8"), "Ask without our client")
    assert len(found) == 2
    for written, real in ports.items():
        assert sum(written in block for block in found) == 1
        found = [block.replace(written, real) for block in found]
    return found


def test_plain_tritonclient(snippets, photos, eager, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippets[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    label, _, failure = eager(photos[0])
    told, number = done.stdout.strip().rsplit(" ", 1)
    assert told == label
    assert float(number) == pytest.approx(failure, abs=1e-4)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_curl(snippets, photos, eager, tmp_path, shell):
    done = subprocess.run([shell, "-c", snippets[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    label, _, failure = eager(photos[0])
    assert answer["label"] == label
    assert answer["failure_probability"] == pytest.approx(failure, abs=1e-4)
    assert answer["accept"] == (failure < 0.505)


@pytest.fixture
def collector():
    """(port, spans): an OpenTelemetry collector for JSON over HTTP; its spans come in as (trace, name, parent, id)."""
    spans, arrived = [], threading.Condition()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with arrived:
                assert self.path == "/v1/traces"
                for resource in told["resourceSpans"]:
                    names = [one["value"]["stringValue"] for one in resource["resource"]["attributes"]]
                    assert "vilu" in names
                    for scope in resource["scopeSpans"]:
                        spans.extend(scope["spans"])
                arrived.notify_all()
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield listener.server_port, spans, arrived
        listener.shutdown()


def well(probe, ports):
    """Whether a probe of Kubernetes succeeds, over HTTP or gRPC."""
    if "grpc" in probe:
        with grpc.insecure_channel(f"127.0.0.1:{ports[probe['grpc']['port']]}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            return check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
    url = f"http://127.0.0.1:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
    try:
        return open_directly(url, timeout=10).status == 200
    except OSError:
        return False


def test_the_deployment_its_probes_and_its_traces(repository, collector, tmp_path):
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    chart = (ROOT / "tests" / "deploy" / "golden" / "cpu.yaml").read_text("utf-8")  # the chart, rendered
    (manifest,) = (one for one in yaml.safe_load_all(chart) if one["kind"] == "Deployment")
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for probe in (container[kind][key] for key in ("httpGet", "grpc") if key in container[kind]):
            probe["port"] = numbers.get(probe["port"], probe["port"])

    written = next(block for block in blocks(text, "Traces") if block.startswith("vilu serve"))
    port, spans, arrived = collector
    written = written.replace("\\\n", " ").replace("127.0.0.1:4318", f"127.0.0.1:{port}").replace("rate=100", "rate=1")
    traces = shlex.split(written)[2:]
    assert traces[0] == "--"
    http_port, grpc_port, metrics_port = (free_port() for _ in range(3))
    program = [sys.executable, "-m"]
    words = [*container["command"], *container["args"]]
    command = [word.replace("=/models", f"={repository}").replace("0.0.0.0", "127.0.0.1") for word in words]
    command += ["--http-port", http_port, "--grpc-port", grpc_port, "--metrics-port", metrics_port, *traces]
    environment = {**os.environ, "VILU_TOKEN": TOKEN, "VILU_CLASS_SETS": str(tmp_path)}
    log = (tmp_path / "log").open("w+")
    serving = subprocess.Popen([*program, *map(str, command)], env=environment, stdout=log, stderr=log)
    try:
        ports = {8000: http_port, 8001: grpc_port, 8002: metrics_port}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            tries = container[kind].get("failureThreshold", 1)
            while not well(container[kind], ports):
                tries -= 1
                if not tries or serving.poll() is not None:
                    pytest.fail(f"{kind}: {(tmp_path / 'log').read_text()}")
                time.sleep(container[kind]["periodSeconds"])
        ask = {"inputs": [{"name": "NAME", "shape": [1, 1], "datatype": "BYTES", "data": [""]}]}
        headers = {"vilu-token": TOKEN, "traceparent": f"00-{TRACE}-{SPAN}-01"}
        url = f"http://127.0.0.1:{http_port}/v2/models/class_sets/infer"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(ask).encode(), headers)) as reply:
            assert json.load(reply)["outputs"]

        def complete():
            names = {span["name"] for span in spans}
            own = [span for span in spans if span["traceId"].lower() == TRACE]
            return names >= {"InferRequest", "vilu", "preprocess", "clip_image", "vilu_head"} and own

        with arrived:
            assert arrived.wait_for(complete, timeout=30), [span["name"] for span in spans]
        by_id = {span["spanId"]: span for span in spans}
        step = next(span for span in spans if span["name"] == "clip_image")
        assert by_id[step["parentSpanId"]]["name"] == "vilu"
        assert by_id[by_id[step["parentSpanId"]]["parentSpanId"]]["name"] == "InferRequest"
        (joined,) = (span for span in spans if span.get("parentSpanId", "").lower() == SPAN)
        assert joined["name"] == "InferRequest"
    finally:
        serving.terminate()
        serving.wait(30)
        log.close()
