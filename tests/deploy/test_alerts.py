"""The alerts, each tried with promtool: it fires where it should, and nothing fires at a service that is well.

Needs Debian's package prometheus (apt-get install prometheus).
"""

import re
import shutil
import subprocess

import pytest

from tests.deploy.helpers import ROOT
from vilu.serving.door.observe import Metrics

yaml = pytest.importorskip("yaml")
promtool = shutil.which("promtool") or ""
pytestmark = pytest.mark.skipif(not promtool, reason="needs promtool: apt-get install prometheus")
RULES = ROOT / "deploy" / "helm" / "vilu" / "files" / "alerts.yaml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
ONE = 'job="vilu", instance="a"'

# A service that is well: series and their values, one a minute.
WELL = {
    f"up{{{ONE}}}": "1",
    f"vilu_door_upstream_well{{{ONE}, url='t'}}": "1",
    f"vilu_door_upstream_restarts_total{{{ONE}}}": "3",
    f"vilu_door_requests_total{{{ONE}, model='vilu', outcome='ok'}}": "0+600",
    f"vilu_door_requests_total{{{ONE}, model='vilu', outcome='INTERNAL'}}": "0+1",
    f"vilu_door_requests_total{{{ONE}, model='', outcome='503'}}": "0+600",  # probes
    f"vilu_door_refusals_total{{{ONE}, reason='busy'}}": "7",
    f"vilu_door_refusals_total{{{ONE}, reason='token'}}": "0+2",
    f"vilu_door_seconds_bucket{{{ONE}, protocol='grpc', le='0.1'}}": "0+599",
    f"vilu_door_seconds_bucket{{{ONE}, protocol='grpc', le='5'}}": "0+600",
    f"vilu_door_seconds_bucket{{{ONE}, protocol='grpc', le='+Inf'}}": "0+600",
    f"nv_inference_queue_duration_us{{{ONE}, model='vilu_head'}}": "0+6000000",
    f"nv_inference_request_success{{{ONE}, model='vilu_head'}}": "0+600",
    f"vilu_answers_total{{{ONE}, class_set='default'}}": "0+600",
    f"vilu_rejected_total{{{ONE}, class_set='default'}}": "0+60",
    f"vilu_escalation_failed_total{{{ONE}, class_set='default', stage='2', reason='timeout'}}": "4",
    f"vilu_decode_errors_total{{{ONE}, model='preprocess'}}": "0+6",
    f"vilu_door_reloads_total{{{ONE}, result='ok'}}": "0+1",
    f"vilu_door_reloads_total{{{ONE}, result='refused'}}": "1",
    f"vilu_door_log_lines_dropped_total{{{ONE}}}": "5",
}
AFTER = 180  # minutes that the service is well before each fault
# For each alert, what is different from then on, and the minutes until it fires.
ILL = {
    "ViluDown": ({f"up{{{ONE}}}": "0x80"}, 3),
    "ViluAbsent": ({f"up{{{ONE}}}": "0x80"}, 6),
    "ViluNoServerAnswers": ({f"vilu_door_upstream_well{{{ONE}, url='t'}}": "0x80"}, 2),
    "ViluRestarts": ({f"vilu_door_upstream_restarts_total{{{ONE}}}": "3+1x80"}, 6),
    "ViluErrors": ({f"vilu_door_requests_total{{{ONE}, model='vilu', outcome='INTERNAL'}}": "180+30x80"}, 10),
    "ViluOverload": ({f"vilu_door_refusals_total{{{ONE}, reason='busy'}}": "7+5x80"}, 8),
    "ViluSlow": ({f"vilu_door_seconds_bucket{{{ONE}, protocol='grpc', le='0.1'}}": "107820+500x80"}, 15),
    "ViluQueueGrows": (
        {f"nv_inference_queue_duration_us{{{ONE}, model='vilu_head'}}": "1080000000+1200000000x80"},
        15,
    ),
    "ViluRejectedShareMoved": ({f"vilu_rejected_total{{{ONE}, class_set='default'}}": "10800+300x80"}, 75),
    "ViluStageFails": (
        {f"vilu_escalation_failed_total{{{ONE}, class_set='default', stage='2', reason='timeout'}}": "4+6x80"},
        8,
    ),
    "ViluDamagedImages": ({f"vilu_decode_errors_total{{{ONE}, model='preprocess'}}": "1080+200x80"}, 30),
    "ViluTokensRefused": ({f"vilu_door_refusals_total{{{ONE}, reason='token'}}": "360+120x80"}, 10),
    "ViluSecretsNotRead": ({f"vilu_door_reloads_total{{{ONE}, result='refused'}}": "2x80"}, 2),
    "ViluLogLinesDropped": ({f"vilu_door_log_lines_dropped_total{{{ONE}}}": "9x80"}, 2),
}
ALSO = {"ViluAbsent": {"ViluDown"}}  # that fire with it


def series(changes):
    """promtool's input: the service is well, then the changes."""
    values = {}
    for name, value in WELL.items():
        first, _, step = value.partition("+")
        then = int(first) + AFTER * int(step or 0)
        values[name] = f"{first}+{step or 0}x{AFTER - 1} {changes.get(name, f'{then}+{step or 0}x80')}"
    return [{"series": name.replace("'", '"'), "values": value} for name, value in values.items()]


def run(tests, folder):
    file = folder / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, timeout=120)


def case(changes, minutes, fired):
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fired]
    expression = 'count by (alertname) (ALERTS{alertstate="firing"})'
    expects = [{"expr": expression, "eval_time": f"{AFTER + minutes}m", "exp_samples": expected}]
    return {"interval": "1m", "input_series": series(changes), "promql_expr_test": expects}


def test_the_rules_are_well_formed_and_each_is_tried():
    assert set(ILL) == set(ALERTS)
    done = subprocess.run([promtool, "check", "rules", "--lint=all", RULES], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_alert_fires_and_no_other_does(tmp_path):
    tests = [case({}, 60, [])]
    tests += [case(changes, minutes, {name, *ALSO.get(name, ())}) for name, (changes, minutes) in ILL.items()]
    done = run(tests, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_that_does_not_fire_is_found(tmp_path):
    assert run([case({}, 60, {"ViluErrors"})], tmp_path).returncode == 1


def test_each_alert_has_a_runbook():
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for name, rule in ALERTS.items():
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (path, anchor) == ("docs/deploy.md", name.lower())
        body = re.search(rf"^### {name}$(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert body, name
        assert all(f"**{word}.**" in body[1] for word in ("Symptom", "Check", "Cure")), name


def test_names_and_units_of_the_doors_metrics():
    metrics = Metrics()
    for one in vars(metrics).values():
        if hasattr(one, "_labelnames") and one._labelnames:
            one.labels(*("x" for _ in one._labelnames))
    done = subprocess.run([promtool, "check", "metrics"], input=metrics.text(), capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
