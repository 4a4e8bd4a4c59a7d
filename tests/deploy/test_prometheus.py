"""Prometheus scrapes a running `vilu serve`: the panels' queries have values, the alerts' are evaluated.

Needs Debian's package prometheus (apt-get install prometheus).
"""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlencode

import pytest

from tests.deploy.helpers import ROOT, program, serving, until
from tests.deploy.test_alerts import ALERTS, RULES
from vilu.serving import Client
from vilu.serving.address import free_port, open_directly

yaml = pytest.importorskip("yaml")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus: apt-get install prometheus"),
]
BOARD = json.loads((ROOT / "serving" / "grafana.json").read_text("utf-8"))
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in BOARD["panels"]
    for target in panel.get("targets", [])
]


# Counters of a cascade, which the served repository is not, by what each gains in a second. The labels are those that
# tests/serving/test_dashboard.py finds on a real cascade.
CASCADE = {
    'vilu_answers_total{model="vilu_router",class_set="default"}': 80,
    'vilu_escalated_total{stage="2",class_set="default"}': 20,
    'vilu_escalated_total{stage="3",class_set="default"}': 8,
    'vilu_escalation_failed_total{stage="2",reason="overloaded",class_set="default"}': 2,
}
SHARES = {"Share of each stage-A": 0.75, "Share of each stage-B": 0.25, "Share of each stage-C": 0.1}


@contextmanager
def cascade_counters() -> Iterator[int]:
    """A page of the CASCADE counters; gives its port."""
    start = time.monotonic()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = time.monotonic() - start
            page = "".join(f"{name} {rate * seconds}\n" for name, rate in CASCADE.items()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class Prometheus:
    """A running Prometheus.

    page: what it scraped. slowest: seconds of the slowest request that was sent.
    """

    def __init__(self, port: int) -> None:
        self.port, self.page, self.slowest = port, b"", 0.0

    def get(self, path, **query):
        with open_directly(f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(query)}", timeout=10) as reply:
            return json.load(reply)["data"]

    def values(self, query):
        """What a query gives, without the means of what nobody asked (NaN)."""
        found = [float(one["value"][1]) for one in self.get("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]


@pytest.fixture(scope="module")
def prometheus(repository, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    with serving(repository, folder) as replica, cascade_counters() as counters:
        config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES)]
        target = {"targets": [f"127.0.0.1:{replica.metrics}"], "labels": {"namespace": "shop", "pod": "vilu-0"}}
        other = {"targets": [f"127.0.0.1:{counters}"]}
        config["scrape_configs"] = [{"job_name": "vilu", "static_configs": [target, other]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(["promtool", "check", "config", folder / "prometheus.yaml"], check=True, timeout=30)
        words = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
        words.append(f"--web.listen-address=127.0.0.1:{port}")
        with program(*words, log=folder / "prometheus.log", url=f"http://127.0.0.1:{port}/-/ready"):
            found = Prometheus(port)
            until(lambda: found.values("up"), "the first scrape")  # counters begin at 0 for it

            def ask(number):
                start = time.monotonic()
                with Client(f"127.0.0.1:{replica.grpc}", timeout=60) as client:
                    client.ask(photos, *([["one", f"two {number}"]] if number % 4 == 0 else []))
                return time.monotonic() - start

            with ThreadPoolExecutor(8) as pool:
                for turn in range(3):
                    found.slowest = max(found.slowest, *pool.map(ask, range(8 * turn, 8 * turn + 8)))
                    with Client(f"127.0.0.1:{replica.grpc}") as client:
                        assert client.ask([b"no image"])[0].error
                        assert client.ask(photos[:1], ["twice", "twice"])[0].error
                        client.ask(photos[:1], ["one", "two 0"])
                    time.sleep(1.5)
            assert Client(f"127.0.0.1:{replica.grpc}").ask(photos[:1])[0].error is None
            time.sleep(2.5)
            with open_directly(f"http://127.0.0.1:{replica.metrics}/metrics", timeout=10) as reply:
                found.page = reply.read()
            yield found


@pytest.mark.parametrize("query", QUERIES)
def test_a_panel_shows_values(prometheus, query, request):
    asked = re.sub(r"\$(instance|model|class_set)", ".*", query).replace("$__rate_interval", "30s")
    values = prometheus.values(asked)
    assert values, asked
    assert min(values) >= 0, (asked, values)
    if known := SHARES.get(request.node.callspec.id):
        assert values == [pytest.approx(known, rel=0.1)]


def test_the_compute_time_is_one_runs(prometheus):
    """Whatever the batches were, no mean of runs is longer than the slowest request."""
    (query,) = (target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])
                if panel["title"] == "Compute time, mean")  # fmt: skip
    query = re.sub(r"\$(instance|model)", ".*", query).replace("$__rate_interval", "30s")
    assert max(prometheus.values(query)) < 1e6 * prometheus.slowest
    sizes = (
        "sum by (model) (increase(nv_inference_count[30s])) / sum by (model) (increase(nv_inference_exec_count[30s]))"
    )
    assert max(prometheus.values(sizes)) > 1  # else the test would say nothing


def test_every_alert_is_evaluated_and_none_fires(prometheus):
    rules = {rule["name"]: rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert rules.keys() == ALERTS.keys()
    assert {rule["health"] for rule in rules.values()} == {"ok"}
    # Two images of the test cannot be decoded, which is many of so few; the alert waits 15 minutes.
    assert not [name for name, rule in rules.items() if rule["state"] == "firing"]


def test_every_metric_that_an_alert_reads_is_there(prometheus):
    names = set(prometheus.get("label/__name__/values"))
    page = prometheus.page.decode()
    cascade = (ROOT / "export" / "templates" / "vilu_router" / "model.py").read_text("utf-8")  # not served here
    for name, rule in ALERTS.items():
        for metric in re.findall(r"\b(?:vilu|nv)_\w+", rule["expr"]):
            there = metric in names or f"# TYPE {metric.removesuffix('_total')}" in page or f"# TYPE {metric} " in page
            assert there or f'"{metric}"' in cascade, name


def test_the_autoscalers_metric(prometheus):
    (rule,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter-values.yaml").read_text())["rules"]["custom"]
    assert prometheus.get("series", **{"match[]": rule["seriesQuery"]})
    query = rule["metricsQuery"].replace("<<.Series>>", "vilu_door_in_flight").replace("<<.GroupBy>>", "pod")
    assert prometheus.values(query.replace("<<.LabelMatchers>>", 'namespace="shop",pod=~"vilu-0"')) == [0.0]
    keda = 'sum(vilu_door_in_flight{namespace="shop", pod=~"vilu-.*"})'
    assert prometheus.values(keda) == [0.0]


def test_our_names_and_units(prometheus):
    ours = [line for line in prometheus.page.splitlines() if re.match(rb"(# \w+ )?vilu_", line)]
    assert len(ours) > 50
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=b"\n".join(ours) + b"\n", capture_output=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, b"")
