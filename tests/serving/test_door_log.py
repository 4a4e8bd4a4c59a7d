"""The door's access log: it costs no answer where it cannot be written, it can be rotated, and it holds no label."""

import contextlib
import json
import os

import pytest
from prometheus_client import Counter

from tests.serving.helpers import NOWHERE, metrics, opened, options, send, wait
from vilu.serving.door import Door, access_log
from vilu.serving.door.access_log import AccessLog

pytestmark = pytest.mark.server


def test_a_full_disk_costs_lines_and_no_answer():
    with opened(Door(options(upstreams=NOWHERE, access_log="/dev/full"))) as at:
        assert [send(at, "/healthz")[0] for _ in range(3)] == [200] * 3
        wait(lambda: b"vilu_door_log_lines_dropped_total 3.0" in metrics(at))


@pytest.fixture
def stalled(tmp_path):
    """A pipe that is full and that nobody reads."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    yield path
    os.close(reader)
    os.close(writer)


def test_a_stalled_reader_costs_lines_and_no_answer(stalled, monkeypatch):
    monkeypatch.setattr(access_log, "MOST_LINES", 2)
    with opened(Door(options(upstreams=NOWHERE, access_log=str(stalled)))) as at:
        assert [send(at, "/healthz")[0] for _ in range(8)] == [200] * 8
        wait(lambda: b"vilu_door_log_lines_dropped_total 0.0" not in metrics(at))


def test_lines_are_whole_and_in_order_until_the_end(tmp_path):
    log = AccessLog(str(tmp_path / "log"), Counter("lines", "Lines.", registry=None))
    for i in range(1000):
        log.write(str(i))
    log.close()
    assert (tmp_path / "log").read_text().split() == [str(i) for i in range(1000)]


def test_sighup_opens_the_file_anew(tmp_path):
    door = Door(options(upstreams=NOWHERE, access_log=str(tmp_path / "log")))
    with opened(door) as at:
        send(at, "/healthz")
        wait(lambda: (tmp_path / "log").read_text())
        (tmp_path / "log").rename(tmp_path / "log.1")
        door.hang_up()
        send(at, "/readyz")
        wait(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
    assert [json.loads((tmp_path / name).read_text())["request"] for name in ("log.1", "log")] == [
        "GET /healthz",
        "GET /readyz",
    ]


def test_the_log_holds_no_label(tmp_path):
    with opened(Door(options(upstreams=NOWHERE, access_log=str(tmp_path / "log")))) as at:
        status, _, said = send(at, "/ask?details=my-secret-label", b"x")
        assert (status, "true or false" in said["error"]) == (400, True)
        assert "my-secret-label" in send(at, "/ask?my-secret-label=x", b"x")[2]["error"]
        assert send(at, "/ask?labels=my-secret-label", b"x", {"content-encoding": "gzip"})[0] == 415
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["malformed", "malformed", "unsupported"]
    assert "message" in lines[2]
    assert "my-secret-label" not in (tmp_path / "log").read_text()
