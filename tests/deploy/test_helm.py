"""The chart, rendered by Helm's own engine, against Kubernetes' schemas and golden files.

`python -m tests.deploy.test_helm` writes the golden files anew.
"""

import functools
import re
from pathlib import Path

import pytest
from click import Context

from tests.deploy.helpers import ROOT
from vilu.cli import group

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate.utils")
yaml = pytest.importorskip("yaml")

CHART = ROOT / "deploy" / "helm" / "vilu"
GOLDEN = Path(__file__).parent / "golden"
VERSIONS = [version for version in kubernetes_validate.all_versions() if tuple(map(int, version.split("."))) >= (1, 28)]
kubernetes_validate.schema_contents = functools.cache(kubernetes_validate.schema_contents)  # megabytes each
# Their definitions come with operators, not with Kubernetes.
OTHERS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
EVERYTHING = {
    "networkPolicy": {"enabled": True, "extraEgress": [{"ports": [{"port": 443}]}]},
    "metrics": {
        "dashboard": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
    },
    "classSets": {"source": "configMap", "configMap": {"files": {"pets.3": "pets@3"}}},
    "auth": {"tokens": {"secretName": "tokens"}},
    "tls": {"secretName": "tls"},
    "serve": {
        "tritonArgs": ["--log-verbose=1"],
        "extraArgs": ["--body-seconds=5"],
        "env": [{"name": "A", "value": "b"}],
    },
    "image": {"pullSecrets": ["one"], "digest": "sha256:" + "0" * 64},
    "model": {"source": "image"},
    "priorityClassName": "high",
    "affinity": {"nodeAffinity": {}},
    "podLabels": {"team": "vision"},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
}


def example(name):
    return yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())


VALUES = {"cpu": {}, "gpu": example("gpu"), "guarded": example("guarded"), "everything": EVERYTHING}


def rendered(values):
    """The chart's objects, in the order of their files, and its notes."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="vilu", namespace="shop")
    notes = files.pop("vilu/templates/NOTES.txt")
    return [one for name in sorted(files) for one in yaml.safe_load_all(files[name]) if one], notes


def text(values):
    return yaml.safe_dump_all(rendered(values)[0], sort_keys=False, width=120)


def only(objects, kind, number=0):
    return [one for one in objects if one["kind"] == kind][number]


def container(objects):
    return only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]


@pytest.fixture(scope="module", params=VALUES)
def objects(request):
    return rendered(VALUES[request.param])[0]


@pytest.mark.parametrize("name", VALUES)
def test_it_lints(name):
    report = helm.lint(CHART, VALUES[name], strict=True, namespace="shop")
    problems = [one for one in report["messages"] if one["severity"] > 1]  # an icon is only advised
    assert not problems
    assert not report["errors"]


@pytest.mark.parametrize("name", ["cpu", "gpu", "guarded"])
def test_it_renders_what_is_written_down(name):
    assert text(VALUES[name]) == (GOLDEN / f"{name}.yaml").read_text(), "run: python -m tests.deploy.test_helm"


def test_every_object_is_what_kubernetes_takes(objects):
    assert len(VERSIONS) >= 9
    for one in objects:
        for version in VERSIONS if one["kind"] not in OTHERS else []:
            kubernetes_validate.validate(one, version, strict=True)


def test_an_object_that_kubernetes_does_not_take_is_found():
    deployment = only(rendered({})[0], "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_volumes_ports_and_selectors_fit(objects):
    pod = only(objects, "Deployment")["spec"]["template"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    containers = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    assert {mount["name"] for one in containers for mount in one["volumeMounts"]} == volumes
    ports = {port["name"] for port in container(objects)["ports"]}
    for one in objects:
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in one["spec"]["ports"]} == ports
            assert one["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        if one["kind"] in ("PodDisruptionBudget", "Deployment"):
            assert one["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        if one["kind"] == "ServiceMonitor":
            service, replicas = (only(objects, "Service", i)["metadata"]["labels"] for i in (0, 1))
            chosen = one["spec"]["selector"]["matchLabels"].items()
            assert chosen <= service.items()
            assert not chosen <= replicas.items()  # or each replica would be scraped twice
            assert service[one["spec"]["jobLabel"]] == "vilu"


def test_options_are_those_of_vilu_serve(objects):
    known = {name for parameter in group.get_command(Context(group), "serve").params for name in parameter.opts}
    words = container(objects)["args"]
    own = words[: words.index("--")] if "--" in words else words
    assert {word.partition("=")[0] for word in own} <= known


def test_replicas_run_without_rights_and_write_nowhere_else(objects):
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    for one in [*spec.get("initContainers", []), *spec["containers"]]:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_what_is_chosen_is_rendered():
    cpu, gpu, guarded = (rendered(VALUES[name])[0] for name in ("cpu", "gpu", "guarded"))
    assert "replicas" in only(cpu, "Deployment")["spec"]
    assert "replicas" not in only(gpu, "Deployment")["spec"]  # the autoscaler's
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert only(gpu, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"] == "vilu_door_in_flight"
    assert "s3://models/vilu/7" in only(gpu, "Deployment")["spec"]["template"]["spec"]["initContainers"][0]["args"]
    assert {"--max-request-bytes=16777216", "--timeout=20", "--in-flight=128"} <= set(container(guarded)["args"])
    assert "grpc" in container(cpu)["livenessProbe"]
    assert "grpc" not in container(guarded)["livenessProbe"]  # the kubelet's gRPC knows no TLS
    assert not any(one["kind"] == "PodDisruptionBudget" for one in rendered({"replicas": 1})[0])


def test_a_configuration_change_starts_new_replicas():
    template = (CHART / "templates" / "deployment.yaml").read_text()
    assert "checksum/config" in template


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 0}, "minimum"),
        ({"replicas": "two"}, "integer"),
        ({"replica": 2}, "replica"),
        ({"image": {"digest": "sha256:1"}}, "pattern"),
        ({"model": {"source": "s3"}}, "source"),
        ({"model": {"source": "uri", "uri": "http://models"}}, "s3://"),
        ({"model": {"path": "/my models"}}, "pattern"),
        ({"classSets": {"source": "configMap"}}, "must name its keys"),
        ({"classSets": {"source": "configMap", "configMap": {"files": {"pets@1": "pets@1"}}}}, "pets@1"),
        ({"auth": {"control": {"secretName": "one"}}}, "which all replicas share"),
        ({"tls": {"clientCA": True}}, "needs tls.secretName"),
        ({"autoscaling": {"kind": "hpa", "minReplicas": 9}}, "below autoscaling.minReplicas"),
        ({"terminationGracePeriodSeconds": 12}, "drainSeconds"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, said):
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        rendered(values)


def test_the_notes_say_what_is_open():
    assert "may ask" in rendered({})[1]
    notes = rendered(VALUES["guarded"])[1]
    assert "may ask" not in notes
    assert "https://localhost" in notes


def test_every_value_has_a_meaning_and_a_schema():
    def leaves(schema, values, path=""):
        for key, value in values.items():
            assert key in schema["properties"], f"{path}{key}"
            if isinstance(value, dict) and value and "properties" in schema["properties"][key]:
                leaves(schema["properties"][key], value, f"{path}{key}.")

    with helm.Chart.load(CHART) as chart:
        leaves(chart.schema, chart.values)
        used = "".join(one["data"] for one in chart.templates)
        for key in chart.values:
            assert f".Values.{key}" in used or f'"{key}"' in used, f"{key} is not used"


if __name__ == "__main__":
    for name in ("cpu", "gpu", "guarded"):
        (GOLDEN / f"{name}.yaml").write_text(text(VALUES[name]))
