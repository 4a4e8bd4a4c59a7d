"""KServe, Compose, systemd and Grafana's provisioning, as far as they can be checked without those programs."""

import re
import shutil
import subprocess

import pytest
from click import Context

from tests.deploy.helpers import ROOT
from vilu.cli import group

yaml = pytest.importorskip("yaml")
DEPLOY = ROOT / "deploy"
OPTIONS = {name for parameter in group.get_command(Context(group), "serve").params for name in parameter.opts}


def options(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.fixture(scope="module")
def kserve():
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kserve" / "vilu.yaml").read_text())}


def test_kserves_runtime_is_a_pod_that_kubernetes_takes(kserve):
    validate = pytest.importorskip("kubernetes_validate").validate
    spec = kserve["ServingRuntime"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "vilu"}}
    pod["spec"] = {"containers": spec["containers"], "volumes": spec["volumes"]}
    for version in ("1.28", "1.37"):
        validate(pod, version, strict=True)
    (container,) = spec["containers"]
    assert container["name"] == "kserve-container"
    assert options(container["args"]) <= OPTIONS
    assert "--model-repository=/mnt/models" in container["args"]  # where KServe puts what storageUri names


def test_kserves_service_uses_the_runtime_and_has_the_ensembles_name(kserve):
    runtime, service = kserve["ServingRuntime"], kserve["InferenceService"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [{key: one[key] for key in ("name", "version")} for one in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    assert service["metadata"]["name"] == "vilu"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_names_files_volumes_and_options_that_exist(compose):
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{[^}]*\}", "$", mount).split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists() or source.endswith("serving/model_repository"), f"{name}: {mount}"
            else:
                assert source in compose["volumes"] or source == "$", f"{name}: {mount}"
        if service["image"].startswith("vilu") and service["command"][0] == "vilu":
            assert options(service["command"]) <= OPTIONS
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
            assert service["read_only"] is True
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_one_name_reaches_all_replicas(compose):
    """Envoy and Prometheus find the replicas by the name that the chart's headless service has, too."""
    alias = "vilu-replicas"
    replicas = [one for one in compose["services"].values() if one.get("command", [])[:2] == ["vilu", "serve"]]
    assert len(replicas) == 2
    assert all(alias in one["networks"]["default"]["aliases"] for one in replicas)
    envoy = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())
    addresses = re.findall(r"'address': '([^']+)', 'port_value': 800[01]", str(envoy["static_resources"]["clusters"]))
    assert addresses == [alias, alias]
    (scraped,) = re.findall(r"envoy:(\d+)", (DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    assert f"'port_value': {scraped}" in str(envoy["static_resources"]["listeners"])
    assert alias in (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    assert alias in (ROOT / "tests" / "deploy" / "golden" / "cpu.yaml").read_text()


def test_grafana_is_provisioned_with_what_compose_mounts(compose):
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose["services"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = compose["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"]) for mount in mounts)


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_prometheus_takes_its_configuration(tmp_path):
    text = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    rules = DEPLOY / "helm" / "vilu" / "files" / "alerts.yaml"
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus/alerts.yaml", str(rules)))
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unit():
    return (DEPLOY / "systemd" / "vilu.service").read_text()


def test_the_unit_uses_options_that_exist():
    (line,) = re.findall(r"^ExecStart=(.*)$", unit(), re.MULTILINE)
    assert options(line.split()) <= OPTIONS


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (Debian: systemd)")
def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path):
    file = tmp_path / "vilu.service"
    file.write_text(unit().replace("/opt/vilu/bin/vilu", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", file]  # of 100: 0 is confined best
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout[-300:]
