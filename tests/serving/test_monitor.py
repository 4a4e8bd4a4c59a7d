"""Feedback and the monitor over records that are made up: treatments, estimates, alarms, and the service."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from starlette.testclient import TestClient

from tests.serving.browser import Browser, find_chromium, web
from tests.serving.helpers import BIN
from vilu.cli.monitor import monitor_command
from vilu.errors import UserError
from vilu.evaluation.reference import summarise
from vilu.serving.monitor import Watcher, watch
from vilu.serving.monitor_service import Monitor, as_plain
from vilu.serving.record import ParquetRecord, parquet
from vilu.serving.record.feedback import Taken, give_feedback, read_feedback, to_label
from vilu.serving.record.labelled import read_labelled
from vilu.serving.record.table import SCHEMA

START = datetime(2026, 1, 2, tzinfo=timezone.utc)
CHECKPOINT = "a" * 64
WENT_ON = (0.1, 0.2, 0.1, 0.2, 0.4, 0.5)  # shares of the answers of each window of `watching`


def world(random, n, shift=0.0):
    """P(failure), whether wrong, class and embedding of n images. With a shift more are wrong than P(failure) says."""
    logit = random.normal(-2, 1.5, n)
    failure = 1 / (1 + np.exp(-logit))
    wrong = random.random(n) < 1 / (1 + np.exp(-logit - shift))
    return failure, wrong, random.integers(0, 5, n), random.normal(shift, 1, (n, 8))


def fill(
    record, random, n, *, start=0, shift=0.0, policy=(0.2, 1.0), version=1, threshold=0.3, feedback=True, later=None
):
    """Record n answers and the feedback that the policy asks for. later: share of a cascade's that stage 2 gives."""
    failure, wrong, index, embedding = world(random, n, shift)
    rows, lines = [], []
    for i in range(n):
        accept = bool(failure[i] < threshold)
        chance = policy[0] if accept else policy[1]
        chosen = bool(random.random() < chance)
        rows.append(
            {
                "id": f"r{start + i}",
                "time": START + timedelta(seconds=start + i),
                "model": "vilu",
                "model_version": version,
                "checkpoint": CHECKPOINT,
                "class_set": "default",
                "class_set_version": version,
                "class_index": int(index[i]),
                "label": f"c{index[i]}",
                "confidence": 0.9,
                "failure_probability": float(failure[i]),
                "accept": accept,
                "entropy": None,
                "label_probability": chance,
                "chosen": chosen,
                "stage": None if later is None else 1 + (i < later * n),
                "escalation_failed": None if later is None else i == n - 1,
                "embedding": embedding[i].astype(np.float16),
            }
        )
        if chosen and feedback:
            lines.append({"id": f"r{start + i}", "feedback": "wrong" if wrong[i] else "right"})
    record.append(pa.Table.from_pylist(rows, SCHEMA))
    if lines:
        give_feedback(record, read_feedback("\n".join(map(json.dumps, lines))))
    return failure, wrong


@pytest.fixture
def record(tmp_path):
    made = ParquetRecord(tmp_path / "record", create=True)
    random = np.random.default_rng(5)
    failure, wrong, index, embedding = world(random, 2000)
    threshold = failure < 0.3
    known = summarise(failure, index, 5, embedding) | {"target_risk": float(wrong[threshold].mean()) + 0.02}
    made.put_reference(CHECKPOINT, json.dumps(known))
    return made


def test_without_a_shift_all_is_well(record):
    random = np.random.default_rng(1)
    failure, wrong = fill(record, random, 6000)
    (one,) = watch(record, window=1000).watched
    accept = failure < 0.3
    assert one.alarms == ()
    assert (one.answers, one.accepted, len(one.windows)) == (6000, int(accept.sum()), 6)
    assert one.low < wrong[accept].mean() < one.high
    assert one.risk == pytest.approx(wrong[accept].mean(), abs=0.03)
    assert one.expected_risk == pytest.approx(failure[accept].mean(), abs=1e-4)
    assert one.labelled == pytest.approx(0.2 * accept.sum(), rel=0.2)
    assert 0.6 < one.auc < 0.9
    assert set(one.drift) == {"failure_probability", "classes", "embedding"}
    assert sum(w.answers for w in one.windows) == 6000
    assert len(one.rejected) == 20


def test_a_shift_is_seen_as_risk_and_as_drift_and_ends_with_a_new_version(record):
    random = np.random.default_rng(2)
    fill(record, random, 2000)
    fill(record, random, 4000, start=2000, shift=1.5)
    fill(record, random, 3000, start=6000, shift=1.5, version=2, threshold=0.02)
    old, new = watch(record, window=1000, target_risk=0.15).watched
    assert old.alarms == ("risk", "drift")
    assert old.drift["embedding"] > 20
    assert old.drift["classes"] < 4
    assert (new.class_set_version, "risk" in new.alarms) == (2, False)
    assert new.risk < 0.15


def test_a_shift_after_a_long_time_shows_in_its_windows_before_it_shows_in_the_whole(record):
    random = np.random.default_rng(3)
    fill(record, random, 12000)
    fill(record, random, 1500, start=12000, shift=2.0)
    (one,) = watch(record, window=1500).watched
    assert one.low <= one.target_risk
    assert "risk" in one.alarms


def test_feedback_is_weighted_by_the_policy(record):
    """AUC over all answers: labels of all rejected answers and of few accepted ones would spoil it unweighted."""
    random = np.random.default_rng(4)
    failure, wrong = fill(record, random, 8000, policy=(0.3, 1.0))
    from vilu.evaluation.metrics import auroc

    (one,) = watch(record).watched
    assert one.auc == pytest.approx(auroc(-failure, ~wrong), abs=0.02)


def test_the_stages_of_a_cascade_are_counted_over_time(record):
    random = np.random.default_rng(18)
    fill(record, random, 100, later=0.2)
    fill(record, random, 100, start=100, later=0.5)
    report = watch(record, window=100)
    (one,) = report.watched
    assert (one.stages, one.escalation_failed) == ({"1": 130, "2": 70}, 2)
    assert [window.escalated for window in one.windows] == [0.21, 0.51]  # a failed one was to go on
    monitor = Monitor(record)
    with TestClient(monitor.app) as client:
        client.portal.call(monitor.read)
        text = client.get("/metrics").text
    labels = 'class_set="default",class_set_version="1",model_version="1"'
    assert f'vilu_monitor_stage_answers{{{labels},stage="2"}} 70.0' in text
    assert f"vilu_monitor_escalation_failed_answers{{{labels}}} 2.0" in text
    table = CliRunner().invoke(monitor_command, ["--once", "--record", str(record.folder)], env={"COLUMNS": "80"})
    assert "35.0%, 1.0% failed" in table.output
    with pytest.raises(UserError, match=r"no answers of this .*; it has 200 of a cascade, whose threshold"):
        read_labelled(record, CHECKPOINT)
    fill(record, random, 50, start=200, policy=(1.0, 1.0))  # of stage 1 alone, served beside the cascade
    assert len(read_labelled(record, CHECKPOINT).failure_probability) == 50
    (one,) = watch(record, window=100).watched
    assert one.windows[-1].escalated != one.windows[-1].escalated  # there is no cascade in this window


def test_answers_of_which_none_is_to_be_labelled_are_counted(record):
    fill(record, np.random.default_rng(3), 500, policy=(1e-9, 1e-9))
    (one,) = watch(record).watched
    assert (one.answers, one.labelled) == (500, 0)


def test_each_kind_of_feedback_has_its_treatment(record):
    fill(record, np.random.default_rng(6), 40, policy=(1.0, 1.0))
    before = watch(record).feedback
    assert before == {"used": 40, "unasked": 0, "changed": 0, "unknown": 0}
    said = {one.id: one for one in record.feedback()}
    same, other = ("right" if said["r0"].right else "wrong"), ("wrong" if said["r1"].right else "right")
    text = f"id,feedback\nr0,{same}\nr1,{other}\nnobody,right\n"
    assert give_feedback(record, read_feedback(text)) == Taken(repeated=1, changed=1, unknown=1)
    assert watch(record).feedback == {"used": 40, "unasked": 0, "changed": 1, "unknown": 1}
    fill(record, np.random.default_rng(7), 40, start=100, policy=(1e-9, 1e-9))
    assert give_feedback(record, read_feedback('{"id": "r100", "label": "c1"}')) == Taken(taken=1)
    assert watch(record).feedback["unasked"] == 1
    assert list(to_label(record)) == []


def rounded(report):
    """A report as JSON, without the last digits: sums depend a little on how the rows were batched."""
    return json.loads(json.dumps(as_plain(report)), parse_float=lambda text: round(float(text), 9))


def give(record, **said):
    return give_feedback(
        record, read_feedback("\n".join(json.dumps({"id": i, "feedback": v}) for i, v in said.items()))
    )


@pytest.mark.parametrize("waiting", [100_000, 3])
def test_a_monitor_that_reads_again_and_again_finds_what_one_that_reads_all_finds(record, monkeypatch, waiting):
    """With feedback that is late, changed, unknown at first, or about answers that were not drawn, and with merges."""
    monkeypatch.setattr("vilu.serving.monitor.WAITING", waiting)
    monkeypatch.setattr(parquet, "MERGED", 3)
    random, watcher = np.random.default_rng(14), Watcher(record, window=200)

    def same():
        record.tidy(None)
        report = watcher.read()
        assert rounded(report) == rounded(watch(record, window=200))
        return report.feedback

    for start in range(0, 700, 100):
        fill(record, random, 100, start=start, policy=(0.5, 1.0))
        same()
    batches = [table.select(["id", "chosen"]) for table in record.batches()]
    drawn = {row["id"]: row["chosen"] for table in batches for row in table.to_pylist()}
    unasked = next(name for name, chosen in drawn.items() if not chosen)
    right = [one.id for one in record.feedback() if one.right]
    give(record, **{right[0]: "wrong", right[1]: "wrong", unasked: "wrong", "r900": "right", "nobody": "right"})
    assert same() == {"used": sum(drawn.values()), "unasked": 1, "changed": 2, "unknown": 2}
    fill(record, random, 3, start=900, policy=(1.0, 1.0), feedback=False)
    assert same()["unknown"] == 1
    give(record, r902="wrong", r901="right")
    assert same() == {"used": sum(drawn.values()) + 3, "unasked": 1, "changed": 2, "unknown": 1}
    give(record, r902="right")
    assert same()["changed"] == 3


def test_a_monitor_reads_a_record_anew_after_a_failure(record, monkeypatch):
    fill(record, np.random.default_rng(15), 50)
    watcher = Watcher(record)
    batches = record.batches

    def failing(*arguments):
        yield from batches(*arguments)
        raise UserError("gone")

    monkeypatch.setattr(record, "batches", failing)
    with pytest.raises(UserError, match="gone"):
        watcher.read()
    monkeypatch.setattr(record, "batches", batches)
    assert watcher.read() == watch(record)


def test_a_monitor_reads_what_is_new_alone(record, monkeypatch):
    fill(record, np.random.default_rng(16), 50)
    watcher, opened, real = Watcher(record), [], parquet.pq.ParquetFile
    watcher.read()

    def counted(path):
        opened.append(path)
        return real(path)

    monkeypatch.setattr(parquet.pq, "ParquetFile", counted)
    watcher.read()
    assert opened == []
    fill(record, np.random.default_rng(17), 50, start=50)
    opened.clear()
    assert watcher.read().watched[0].answers == 100
    assert len(set(opened)) == 1


def test_a_true_label_says_whether_the_answer_was_right(record):
    fill(record, np.random.default_rng(8), 1, policy=(1.0, 1.0))
    (row,) = next(iter(record.batches(["id", "label", "accept"]))).to_pylist()
    for label, risk in ((row["label"], 0.0), ("another", 1.0), (f" {row['label'].upper()}", 0.0)):
        give_feedback(record, read_feedback(json.dumps({"id": "r0", "label": label})))
        (one,) = watch(record).watched
        assert one.risk == risk or not row["accept"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "column names"),
        ("id\na\n", "column names"),
        ("id,feedback\na,maybe\n", "line 2: feedback must be right or wrong, not 'maybe'"),
        ("id,feedback,label\na,right,cat\n", "either"),
        ("id,label\na,cat\nb,cat, big\n", "line 3: has more fields than the header"),
        ("id,feedback\n,right\n", "id is missing"),
        ('{"id": 3, "feedback": "right"}', "id must be text"),
        ('{"id": "\\ud800", "feedback": "right"}', "id must be text"),
        ('{"id": "a", "label": "\\u0000"}', "label must be text"),
        ("id," + "x" * 200_000 + "\na,right\n", "line 0: field larger"),
        ('{"id": "a", "feedback": "right"}\n{"id"', "line 2: is not JSON"),
        ("[1]", "must be an object"),
    ],
)
def test_bad_feedback_is_one_line_and_nothing_is_taken(text, said):
    with pytest.raises(UserError, match=said):
        read_feedback(text)


@pytest.mark.parametrize("text", ['id,label\r\na,"cat, big"\r\n', '{"id": "a", "label": "cat, big"}\n'])
def test_feedback_may_begin_with_a_byte_order_mark(text):
    (one,) = read_feedback(f"\ufeff{text}")
    assert (one.id, one.label) == ("a", "cat, big")


def test_the_service_takes_feedback_and_shows_what_it_found(record):
    fill(record, np.random.default_rng(9), 200, policy=(1.0, 1.0))
    monitor = Monitor(record, token="a-token-of-the-monitor", target_risk=0.001)
    with TestClient(monitor.app) as client:
        client.portal.call(monitor.read)
        (one,) = client.get("/report.json").json()["watched"]
        assert one["alarms"] == ["risk"]
        assert client.post("/feedback", content="id,feedback\nr0,right\n").status_code == 401
        headers = {"authorization": "Bearer a-token-of-the-monitor"}
        assert client.post("/feedback", content="id,feedback\nr0,maybe\n", headers=headers).status_code == 400
        assert client.post("/feedback", content=b"\xff", headers=headers).status_code == 400
        assert sum(client.post("/feedback", content="id,feedback\nr0,right\n", headers=headers).json().values()) == 1
        assert client.post("/feedback", content="x" * (5 << 20), headers=headers).status_code == 413
        text = client.get("/metrics").text
    labels = 'class_set="default",class_set_version="1",model_version="1"'
    assert f'vilu_monitor_alarm{{{labels},reason="risk"}} 1.0' in text
    assert f"vilu_monitor_answers{{{labels}}} 200.0" in text
    assert 'vilu_monitor_feedback_total{result="refused"} 2.0' in text
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_commands(record):
    fill(record, np.random.default_rng(10), 300, policy=(0.5, 1.0))
    environment = os.environ | {"VILU_RECORD": str(record.folder)}

    def run(*arguments, **more):
        return subprocess.run([BIN / "vilu", *arguments], capture_output=True, text=True, env=environment, **more)

    done = run("feedback", "-", "--json", input="id,feedback\nmissing,right\n")
    assert json.loads(done.stdout) == {"taken": 0, "repeated": 0, "changed": 0, "unknown": 1}
    waiting = json.loads(run("feedback", "--to-label", "--json").stdout)
    assert [row["id"] for row in waiting] == [row["id"] for row in to_label(record)]
    done = run("monitor", "--once", "--json", "--target-risk", "0.9", "--level", "0.001")
    assert done.returncode == 0
    assert json.loads(done.stdout) == as_plain(watch(record, target_risk=0.9, level=0.001))
    done = run("monitor", "--once", "--target-risk", "0.0001")
    assert (done.returncode, "risk" in done.stdout) == (1, True)
    done = run("feedback", "no-such-file")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def most_memory(record):
    """(answers, bytes of memory at most) of `vilu monitor --once`."""
    command = [sys.executable, "-m", "vilu", "monitor", "--once", "--json", "--record", str(record.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        (one,) = json.loads(process.stdout.read())["watched"]
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    return one["answers"], used.ru_maxrss << 10


@pytest.mark.slow
def test_a_million_rows_in_bounded_memory(record):
    fill(record, np.random.default_rng(11), 8192, policy=(1e-6, 1e-6))
    (small,) = record.folder.glob("answers-*")
    answers, few = most_memory(record)
    assert answers == 8192
    for i in range(122):  # other writers' files
        shutil.copyfile(small, record.folder / small.name.replace(record.writer, f"{i:016x}"))
    answers, many = most_memory(record)
    assert answers == 123 * 8192
    assert many - few < 100 << 20


SERVING = Path(__file__).parents[2] / "serving"


def test_the_dashboard_and_the_alert_rules_name_metrics_and_labels_that_exist(record):
    fill(record, np.random.default_rng(12), 100, policy=(1.0, 1.0))
    monitor = Monitor(record)
    with TestClient(monitor.app) as client:
        client.portal.call(monitor.read)
        client.post("/feedback", content="id,feedback\nr0,right\n")
        text = client.get("/metrics").text
    labels = {
        name: set(re.findall(r'(\w+)="', given or "")) for name, given in re.findall(r"^(\w+)(\{.*\})? ", text, re.M)
    }
    labels["vilu_record_rows_dropped_total"] = {"reason"}
    board = json.loads((SERVING / "grafana_monitor.json").read_text("utf-8"))
    rules = (SERVING / "monitor_alerts.yaml").read_text("utf-8")
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += re.findall(r"expr: (.*)", rules)
    assert len(queries) > 10
    for query in queries:
        (by,) = set(re.findall(r" by \(([^)]*)\)", query)) or {""}
        for name, chosen in re.findall(r"(vilu_\w+)(?:\{([^}]*)\})?", query):
            asked = {*re.findall(r"\w+", by), *re.findall(r'(\w+)=~?"', chosen)} - {"instance"}
            assert asked <= labels[name], query


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_the_alert_rules_are_right(tmp_path):
    done = subprocess.run(
        ["promtool", "check", "rules", SERVING / "monitor_alerts.yaml"], capture_output=True, text=True
    )
    assert (done.returncode, "4 rules found" in done.stdout) == (0, True), done.stderr
    labels = 'class_set="default", class_set_version="1", model_version="1"'
    expected = {"class_set": "default", "class_set_version": "1", "model_version": "1", "severity": "critical"}
    alert = {"eval_time": "2m", "alertname": "ViluRiskAboveTarget", "exp_alerts": [{"exp_labels": expected}]}
    quiet = {"eval_time": "2m", "alertname": "ViluDrift", "exp_alerts": []}
    rules: dict[str, Any] = json.loads(json.dumps(alert))
    summary = "default: accepted answers are wrong more often than promised"
    text = "The lower bound of the risk is above the target. Choose a new threshold with vilu calibrate --from-record."
    rules["exp_alerts"][0]["exp_annotations"] = {"summary": summary, "description": text}
    series = [
        {"series": f'vilu_monitor_alarm{{{labels}, reason="{reason}"}}', "values": f"{value}x5"}
        for reason, value in (("risk", 1), ("drift", 0))
    ]
    given: dict[str, Any] = {"rule_files": [str(SERVING / "monitor_alerts.yaml")], "evaluation_interval": "1m"}
    given["tests"] = [{"interval": "1m", "input_series": series, "alert_rule_test": [rules, quiet]}]
    (tmp_path / "test.yaml").write_text(json.dumps(given))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def watching(record):
    """The URL of `vilu monitor`, as a process of its own, over a cascade's record with a shift at its end."""
    random = np.random.default_rng(13)
    for number, share in enumerate(WENT_ON):
        shift = 0.0 if number < 4 else 2.0
        fill(record, random, 500, start=500 * number, shift=shift, policy=(0.5, 1.0), later=share)
    command = [
        sys.executable,
        "-m",
        "vilu",
        "monitor",
        "--record",
        str(record.folder),
        "--port",
        "0",
        "--window",
        "500",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield re.search(r"http://[^/]+", process.stderr.readline())[0]
        process.send_signal(signal.SIGTERM)
        assert (process.wait(20), process.stderr.read()) == (0, "")


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_the_risk_the_drift_and_what_was_rejected(watching, tmp_path):
    with web("127.0.0.1:1", "--monitor", watching) as (_, url), Browser(find_chromium()) as browser:
        browser.go(f"{url}monitor")
        browser.wait("document.querySelector('svg .target') !== null")
        assert "alarm: risk and drift" in browser.text(".badge")
        assert browser.run("document.querySelectorAll('svg').length") == 3
        assert browser.run("document.querySelectorAll('svg .dot').length") == 18  # six windows, three charts
        stages = "document.querySelector('svg[aria-label=\"Went on to a later stage\"]')"
        titles = browser.run(f"[...{stages}.querySelectorAll('.dot title')].map((title) => title.textContent)")
        assert [float(title.split(": ")[1][:-1]) for title in titles] == [100 * share + 0.2 for share in WENT_ON]
        heights = browser.run(f"[...{stages}.querySelectorAll('.dot')].map((dot) => dot.getBoundingClientRect().y)")
        assert sorted(WENT_ON) == [share for _, share in sorted(zip(heights, WENT_ON, strict=True), reverse=True)]
        assert browser.run(f"{stages}.querySelector('.curve').getBoundingClientRect().width") > 200
        assert "failure probability" in browser.text("table")
        assert len(browser.run("[...document.querySelectorAll('table')].pop().innerText").splitlines()) == 9
        browser.screenshot(tmp_path / "page.png")
        box = browser.run(f"(({{x, y, right, bottom}}) => [x, y, right, bottom])({stages}.getBoundingClientRect())")
        drawn = np.asarray(Image.open(tmp_path / "page.png").convert("RGB").crop(box), int)
        accent = (np.abs(drawn - (0x35, 0x57, 0xD6)).max(axis=2) < 40).sum()
        assert accent > 300, "the curve and its dots are seen"
        assert browser.complaints == []
        assert all(one.startswith((url, "data:")) for one in browser.requests)
    with web("127.0.0.1:1", "--monitor", "http://127.0.0.1:1") as (_, url), Browser(find_chromium()) as browser:
        browser.go(f"{url}monitor")
        browser.wait("document.querySelector('.error') !== null")
        assert "the monitor does not answer" in browser.text(".error")
