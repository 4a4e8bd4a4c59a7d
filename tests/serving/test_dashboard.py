"""serving/grafana.json against what a running server really exports."""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.serving.helpers import metrics, send
from vilu.serving import Client

pytestmark = pytest.mark.server
BOARD = json.loads((Path(__file__).parents[2] / "serving" / "grafana.json").read_text("utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
SCRAPED = {"instance", "job"}  # labels that Prometheus adds


@pytest.fixture(scope="module")
def scraped(front, cascade_served, photos):
    """Metric name -> label names, after answers, a rejected one among them, and requests that were refused."""
    with Client(front.grpc) as client:
        assert not all(answer.raise_for_error().accept for answer in client.ask(photos))
        client.ask(photos[:1], ["one", "two"])
        assert client.ask([b"no image"])[0].error
        assert client.ask(photos[:1], ["twice", "twice"])[0].error
    assert send(front, "/ask", b"")[0] == 400
    with Client(cascade_served.grpc, model="vilu_cascade") as client:
        assert {answer.stage for answer in client.ask(photos)} == {1, 2}
    found: dict[str, set[str]] = defaultdict(set)
    for line in (metrics(front) + metrics(cascade_served)).decode().splitlines():
        if match := re.match(r"([a-z_]+)(?:\{(.*)\})? ", line):
            found[match[1]] |= set(re.findall(r'(\w+)="', match[2] or ""))
    # Counted where a stage fails, which tests/serving/test_cascade.py brings about.
    found["vilu_escalation_failed_total"] = found["vilu_escalated_total"] | {"reason"}
    return found


QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']}-{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]


@pytest.mark.parametrize(("query", "legend"), QUERIES)
def test_a_panel_reads_what_the_server_exports(scraped, query, legend):
    selectors = re.findall(r"([a-z_]+)\{([^}]*)\}", query)
    assert selectors
    unquoted = re.sub(r'"[^"]*"', "", query)  # a model can be named like a metric
    assert set(re.findall(r"\b(?:nv|vilu)_\w+", unquoted)) == {name for name, _ in selectors}
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r" by \(([^)]*)\)", query))))
    for name, chosen in selectors:
        assert name in scraped or name.startswith("nv_cpu"), f"{name} is not exported"
        labels = scraped.get(name, set()) | SCRAPED
        assert set(re.findall(r'(\w+)=~?"', chosen)) <= labels
        assert grouped <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= grouped | SCRAPED
    assert query.count("(") == query.count(")")


def test_variables_are_labels_that_exist_and_all_that_is_used(scraped):
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for one in variables.values():
        if one["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", one["query"]["query"]).groups()
            assert label in scraped[metric] | SCRAPED
            assert metric in scraped
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(BOARD["panels"])))
    assert used == set(variables)


def test_panels_have_a_place_an_identity_and_the_chosen_data_source():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in PANELS:
        assert panel["description"]
        assert {panel["datasource"]["uid"], *(t["datasource"]["uid"] for t in panel["targets"])} == {"${datasource}"}
    for one, other in itertools.combinations((panel["gridPos"] for panel in BOARD["panels"]), 2):
        apart = [one[a] + one[s] <= other[a] or other[a] + other[s] <= one[a] for a, s in (("x", "w"), ("y", "h"))]
        assert any(apart), (one, other)
        assert one["x"] + one["w"] <= 24
