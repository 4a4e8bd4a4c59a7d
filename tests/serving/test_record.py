"""The record: what is in it, that it survives kills and a full disk, and that it never costs an answer."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.serving.helpers import metrics, opened, options, question, send, strings, wait
from vilu import atomic
from vilu.errors import UserError
from vilu.serving import Client
from vilu.serving.door import Door
from vilu.serving.monitor import watch
from vilu.serving.record import Feedback, ParquetRecord, open_record, parquet, recorder
from vilu.serving.record.recorder import Recorder, RecordOptions
from vilu.serving.record.table import ANSWER, SCHEMA, table_of
from vilu.serving.server import probe

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


def reply(labels=("cat",), *, class_set="pets@3", dim=0, stages=()):
    """A reply about as many images as there are labels; the even ones are accepted. stages: a cascade's, from 1."""
    n = len(labels)
    out = pb.ModelInferResponse(model_name="vilu", model_version="2")
    columns = {
        "LABEL": ("BYTES", strings(*(label.encode() for label in labels))),
        "CLASS_INDEX": ("INT32", np.arange(n, dtype="<i4").tobytes()),
        "CONFIDENCE": ("FP32", np.full(n, 0.5, "<f4").tobytes()),
        "FAILURE_PROBABILITY": ("FP32", np.full(n, 0.25, "<f4").tobytes()),
        "ACCEPT": ("BOOL", (np.arange(n) % 2 == 0).tobytes()),
        "CLASS_SET": ("BYTES", strings(*[class_set.encode()] * n)),
    }
    if stages:
        columns["STAGE"] = ("INT32", np.array(stages, "<i4").tobytes())
        columns["ESCALATION_FAILED"] = ("BOOL", np.zeros(n, bool).tobytes())
    if dim:
        columns["IMAGE_EMBEDDING"] = ("FP32", np.ones((n, dim), "<f4").tobytes())
    for name, (kind, raw) in columns.items():
        out.outputs.add(name=name, datatype=kind, shape=[n, dim if name == "IMAGE_EMBEDDING" else 1])
        out.raw_output_contents.append(raw)
    return out


def table(*replies, checkpoint="abc"):
    """The rows of (reply, id, time)."""
    made = [(one.SerializeToString(), name, int(at.timestamp() * 1e6), checkpoint, None) for one, name, at in replies]
    return table_of(made, np.random.default_rng(0))


def made_rows(n, start=0, at=NOW):
    return table(*((reply(), f"r{i}", at) for i in range(start, start + n)))


def ids_of(record):
    return [name for table in record.batches(["id"]) for name in table["id"].to_pylist()]


def test_rows_of_replies():
    several, own = reply(("cat", "a\0b"), dim=4), reply(class_set="")
    rows = table((several, "mine", NOW), (own, "other", NOW)).to_pylist()
    assert [row["id"] for row in rows] == ["mine/0", "mine/1", "other"]
    assert [row["label"] for row in rows] == ["cat", "a\ufffdb", "cat"]
    assert [row["accept"] for row in rows] == [True, False, True]
    assert [(row["class_set"], row["class_set_version"]) for row in rows] == [("pets", 3), ("pets", 3), ("", 0)]
    assert {(row["model_version"], row["time"], row["entropy"]) for row in rows} == {(2, NOW, None)}
    assert [row["embedding"] for row in rows] == [[1.0] * 4, [1.0] * 4, None]
    assert table().schema == SCHEMA
    staged = table((own, "a", NOW), (reply(("cat", "dog"), stages=(2, 1)), "b", NOW)).to_pylist()
    assert [(row["stage"], row["escalation_failed"]) for row in staged] == [(None, None), (2, False), (1, False)]


def test_a_record_that_an_older_version_wrote_is_read(tmp_path):
    record = ParquetRecord(tmp_path, create=True)
    record.append(made_rows(2))
    (path,) = tmp_path.glob("answers-*")
    pq.write_table(pq.read_table(path).drop_columns(["stage", "escalation_failed"]), path)
    record.append(table((reply(stages=(2,)), "new", NOW)))
    columns = ["id", "stage", "escalation_failed"]
    found = {row["id"]: row["stage"] for part in record.batches(columns) for row in part.to_pylist()}
    assert found == {"r0": None, "r1": None, "new": 2}
    (part,) = record.find(["r0"], columns)
    assert part.column_names == columns
    assert watch(record).watched[0].answers == 3


def test_small_files_become_large_ones_and_no_row_is_lost_or_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MERGED", 3)
    record = ParquetRecord(tmp_path, create=True)
    for i in range(14):
        record.append(made_rows(2, 2 * i))
        record.tidy(None)
    assert len(list(tmp_path.glob("*.parquet"))) == 1 + 1 + 2  # of nine, of three, and two that wait
    assert ids_of(ParquetRecord(tmp_path)) == [f"r{i}" for i in range(28)]


def test_a_merge_that_was_killed_doubles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MERGED", 3)
    record = ParquetRecord(tmp_path, create=True)
    for i in range(3):
        record.append(made_rows(1, i))
    small = {path: path.read_bytes() for path in tmp_path.glob("answers-*")}
    record.tidy(None)
    for path, content in small.items():  # as if the kill had come before they were removed
        path.write_bytes(content)
    assert len(list(tmp_path.glob("answers-*"))) == 4
    assert ids_of(record) == ["r0", "r1", "r2"]


def test_rows_that_are_merged_while_they_are_read_come_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MERGED", 3)
    record = ParquetRecord(tmp_path, create=True)
    for i in range(3):
        record.append(made_rows(1, i))
    reading = record.batches(["id"])
    first = next(reading)["id"].to_pylist()
    record.tidy(None)
    assert first + [name for table in reading for name in table["id"].to_pylist()] == ["r0", "r1", "r2"]


def test_old_rows_and_their_feedback_are_removed(tmp_path):
    record = ParquetRecord(tmp_path, create=True)
    record.append(made_rows(1))
    now = datetime.now(timezone.utc)
    record.give([Feedback("r0", True, None, now - timedelta(days=9))])
    (old,) = tmp_path.glob("answers-*")
    os.utime(old, (1e9, 1e9))
    record.append(made_rows(1, 1))
    record.give([Feedback("r1", False, None, now)])
    record.tidy(3)
    assert ids_of(record) == ["r1"]
    assert [one.id for one in record.feedback()] == ["r1"]


def test_torn_feedback_is_passed_over(tmp_path):
    record = ParquetRecord(tmp_path, create=True)
    record.give([Feedback("a", True, None, NOW)])
    with open(tmp_path / "feedback.jsonl", "a") as file:
        file.write('{"id": "b", "ri')
    record.give([Feedback("c", None, "Čat", NOW)])
    assert [(one.id, one.label) for one in record.feedback()] == [("a", None), ("c", "Čat")]


WRITER = """
import sys
import threading
import time
from prometheus_client import CollectorRegistry
from tests.serving.test_record import reply
from vilu.serving.record.recorder import Recorder, RecordOptions, Recording
import time
recorder = Recorder(RecordOptions(sys.argv[1]), CollectorRegistry())
for i in range(100000):
    recorder.add(reply().SerializeToString(), Recording(f"r{i}", []), "abc")
    print(i, time.time(), flush=True)
    time.sleep(0.002)
"""


def test_a_kill_loses_the_last_second_and_tears_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if len(lines) > 1 and float(lines[-1][1]) - float(lines[0][1]) > 2.5:
                process.send_signal(signal.SIGKILL)
                break
    found = ids_of(ParquetRecord(tmp_path))
    assert found == [f"r{i}" for i in range(len(found))]
    # The write is every 0.8 seconds; a busy machine may take as long again.
    kept = [i for i, at in lines if float(at) < float(lines[-1][1]) - 1.5]
    assert len(found) >= len(kept) > 50


def test_a_disk_that_is_full_costs_rows_which_are_counted(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(recorder, "MOST_REPLIES", 4)
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.02)
    registry = CollectorRegistry()
    written = Recorder(RecordOptions(str(tmp_path)), registry)

    def full(rows):
        raise OSError(28, "No space left on device")

    working = written.record.append
    monkeypatch.setattr(written.record, "append", full)

    def dropped():
        return sum(
            registry.get_sample_value("vilu_record_rows_dropped_total", {"reason": reason})
            for reason in ("queue_full", "write_failed")
        )

    for i in range(40):
        written.add(reply().SerializeToString(), recorder.Recording(f"r{i}", []), "")
    assert dropped() > 30
    wait(lambda: "No space left" in capfd.readouterr().err)
    monkeypatch.setattr(written.record, "append", working)
    wait(lambda: registry.get_sample_value("vilu_record_rows_total") + dropped() == 40)
    written.add(reply().SerializeToString(), recorder.Recording("last", []), "")
    written.close()
    assert ids_of(ParquetRecord(tmp_path))[-1] == "last"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(path):
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.server
def test_a_real_disk_that_is_full_costs_rows_and_no_answer_until_it_has_room(
    server, small_disk, photos, monkeypatch, capfd
):
    monkeypatch.setattr(recorder, "MOST_REPLIES", 4)
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.05)
    where, filler = small_disk / "record", small_disk / "filler"
    with opened(Door(options(upstreams=[server.grpc_url], record=RecordOptions(str(where))))) as at:

        def counted():
            found = dict(re.findall(r"^(vilu_record_rows\S*_total\S*) (\S+)", metrics(at).decode(), re.M))
            written = float(found.pop("vilu_record_rows_total"))
            return written, sum(map(float, found.values()))

        ids = [send(at, "/ask", photos[0])[2]["id"]]
        wait(lambda: counted() == (1, 0))
        fill_up(filler)
        ids += [send(at, "/ask", photos[i % 4])[2]["id"] for i in range(20)]
        assert "No space left" in capfd.readouterr().err
        assert counted()[1] > 0
        said = [Feedback(ids[0], True, None, NOW), *(Feedback(f"r{i}", None, "x" * 500, NOW) for i in range(20))]
        with pytest.raises(UserError, match="No space left"):
            ParquetRecord(where).give(said)
        assert list(ParquetRecord(where).feedback()) == []
        filler.unlink()
        wait(lambda: sum(counted()) == 21)
        ids.append(send(at, "/ask", photos[0])[2]["id"])
        wait(lambda: sum(counted()) == 22)
        written = int(counted()[0])
    found = ids_of(ParquetRecord(where))
    assert len(found) == written < 22
    assert (found[0], found[-1]) == (ids[0], ids[-1])
    assert not list(where.glob(".*"))


def test_what_cannot_be_a_record_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for where in ("", str(tmp_path / "file"), "@" + str(tmp_path / "missing"), str(tmp_path / "nothing")):
        with pytest.raises(UserError):
            open_record(where)
    with pytest.raises(UserError, match="cannot be made"):
        open_record(str(tmp_path / "file" / "below"), create=True)
    with pytest.raises(UserError, match="share"):
        RecordOptions("x", share=0)


@pytest.mark.server
def test_the_door_records_what_it_answers(server, tmp_path, photos):
    """Over gRPC and HTTP, whichever outputs are asked for; what is served stays as it was."""
    door = Door(options(upstreams=[server.grpc_url], record=RecordOptions(str(tmp_path), embeddings=True)))
    with opened(door) as at:
        with grpc.insecure_channel(at.grpc) as channel, grpc.insecure_channel(server.grpc_url) as direct:
            asked = question(photos[0], id="mine")
            asked.outputs.add(name="LABEL")
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            got, call = stub.ModelInfer.with_call(asked)
            assert got == service_pb2_grpc.GRPCInferenceServiceStub(direct).ModelInfer(asked)
            assert (got.id, "vilu-answer-id" in dict(call.trailing_metadata())) == ("mine", False)
            every = stub.ModelInfer(question(photos[1]))  # all outputs
            odd, call = stub.ModelInfer.with_call(question(photos[1], id="Žluť"))
            assert odd.id == "Žluť"
            told = [every.id, dict(call.trailing_metadata())["vilu-answer-id"]]
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(question(b"no image", id="bad"))
        with Client(at.grpc) as client:
            asked_ids = [a.id for a in client.ask(photos[:2])]
        probe(at.grpc)  # of a health check: no row
        status, headers, answer = send(at, "/ask", photos[2])
        assert (status, headers["vilu-answer-id"]) == (200, answer["id"])
        body = {"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}]}
        assert "vilu-answer-id" not in send(at, "/v2/models/vilu/infer", json.dumps(body).encode())[1]
        wait(lambda: b"vilu_record_rows_total 6.0" in metrics(at))
    rows = [row for table in ParquetRecord(tmp_path).batches() for row in table.to_pylist()]
    assert [row["id"] for row in rows] == ["mine", *told, *asked_ids, answer["id"]]
    assert len({row["id"] for row in rows}) == len(rows) == 6
    assert {(row["class_set"], row["class_set_version"], row["model"]) for row in rows} == {("default", 1, "vilu")}
    assert {len(row["checkpoint"]) for row in rows} == {64}
    assert all(np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-2) for row in rows)
    assert all(-1 <= row["entropy"] <= 0 for row in rows)
    assert rows[5]["failure_probability"] == pytest.approx(answer["failure_probability"])
    assert set(ANSWER) >= {output.name for output in got.outputs}


@pytest.mark.server
def test_a_share_is_recorded_and_the_rest_has_no_id(server, tmp_path, photos):
    door = Door(options(upstreams=[server.grpc_url], record=RecordOptions(str(tmp_path), share=0.4)))
    with opened(door) as at:
        named = ["id" in send(at, "/ask", photos[i % 4])[2] for i in range(20)]
    assert 0 < sum(named) < 20
    assert len(ids_of(ParquetRecord(tmp_path))) == sum(named)


def test_feedback_that_comes_while_old_feedback_is_removed_is_kept(tmp_path, monkeypatch):
    record, now = ParquetRecord(tmp_path, create=True), datetime.now(timezone.utc)
    record.give([Feedback("old", True, None, now - timedelta(days=9))])
    threads = []
    write = atomic.write

    def slow(*arguments):
        threads.append(threading.Thread(target=record.give, args=([Feedback("new", True, None, now)],)))
        threads[0].start()  # it waits for the lock, of a file that is then replaced
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(atomic, "write", slow)
    record.tidy(3)
    threads[0].join()
    assert [one.id for one in record.feedback()] == ["new"]
