"""Records in a real PostgreSQL, which the tests start: several servers share one, and its death costs no answer."""

import glob
import os
import shutil
import subprocess
import tempfile
import threading
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from tests.serving.helpers import wait
from tests.serving.test_record import NOW, made_rows, reply, table
from vilu.errors import UserError
from vilu.serving.address import free_port
from vilu.serving.monitor import watch
from vilu.serving.record import Feedback, open_record, recorder
from vilu.serving.record.feedback import Taken, give_feedback, read_feedback
from vilu.serving.record.postgres import PostgresRecord
from vilu.serving.record.recorder import Recorder, RecordOptions
from vilu.serving.record.table import SCHEMA


def binary(name):
    """PostgreSQL's program, where Debian's package puts it or on the path; None where there is none."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else shutil.which(name)


pytestmark = pytest.mark.skipif(not binary("initdb"), reason="PostgreSQL is not installed (Debian: postgresql)")


class Database:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"postgresql://vilu@127.0.0.1:{self.port}/postgres"
        # PostgreSQL does not run as root.
        self.user = ["setpriv", "--reuid=nobody", "--clear-groups", "--"] if os.getuid() == 0 else []
        self._run("initdb", "-D", str(folder / "data"), "-U", "vilu", "-A", "trust", "--no-sync")

    def _run(self, name, *arguments):
        done = subprocess.run([*self.user, binary(name), *arguments], capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "start", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", options)

    def stop(self):
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self.folder / "data"))


@pytest.fixture(scope="module")
def database():
    folder = Path(tempfile.mkdtemp(prefix="vilu-postgres-"))
    if os.getuid() == 0:
        shutil.chown(folder, "nobody")
    made = Database(folder)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture
def url(database):
    import psycopg

    with psycopg.connect(database.url) as connection:
        connection.execute("DROP TABLE IF EXISTS vilu_answers, vilu_feedback, vilu_references, vilu_writers")
    return database.url


def rows_in(url):
    return [row for table in open_record(url).batches(SCHEMA.names) for row in table.to_pylist()]


def test_two_servers_share_a_database(url):
    """They make the tables at once, and write at once."""

    def write(name):
        written = Recorder(RecordOptions(url, embeddings=True), CollectorRegistry())
        data = reply(dim=4).SerializeToString()
        for i in range(50):
            written.add(data, recorder.Recording(f"{name}{i}", []), "c" * 64, '{"samples": 3}')
        written.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rows_in(url)
    assert sorted(row["id"] for row in rows) == sorted(f"{name}{i}" for name in "ab" for i in range(50))
    assert np.array_equal(np.array(rows[0]["embedding"]), np.ones(4))
    assert open_record(url).reference("c" * 64) == '{"samples": 3}'


def test_feedback_and_the_monitor(url):
    record = open_record(url, create=True)
    record.append(made_rows(3))
    said = read_feedback("id,feedback\nr0,right\nr1,wrong\nnobody,right\n")
    assert give_feedback(record, said) == Taken(taken=2, unknown=1)
    assert give_feedback(record, said[:1]) == Taken(repeated=1)
    (one,) = watch(record).watched
    assert (one.answers, one.labelled, one.risk) == (3, 2, 0.5)


def test_a_table_that_an_older_version_made_is_read_and_gets_its_new_columns_from_a_server(url):
    open_record(url, create=True).append(made_rows(1))
    import psycopg

    new = "stage", "escalation_failed"
    with psycopg.connect(url) as connection:
        for name in new:
            connection.execute(f"ALTER TABLE vilu_answers DROP COLUMN {name}")
    (row,) = rows_in(url)
    assert [row[name] for name in new] == [None, None]
    assert watch(open_record(url)).watched[0].answers == 1
    open_record(url, create=True).append(table((reply(stages=(2,)), "new", NOW)))
    assert {row["id"]: row["stage"] for row in rows_in(url)} == {"r0": None, "new": 2}


def test_a_reader_that_comes_again_gets_what_came_since_from_every_server(url):
    one, other, reader = open_record(url, create=True), open_record(url, create=True), open_record(url)
    done: dict[str, int] = {}

    def read():
        return sorted(name for table in reader.batches(["id"], done) for name in table["id"].to_pylist())

    one.append(made_rows(2))
    assert read() == ["r0", "r1"]
    other.append(made_rows(1, 2))
    one.append(made_rows(1, 3))
    assert read() == ["r2", "r3"]
    assert read() == []
    assert len(rows_in(url)) == 4
    assert [t.to_pylist() for t in reader.find(["r3", "nobody"], ["id", "label"])] == [[{"id": "r3", "label": "cat"}]]


def test_rows_that_were_committed_before_the_connection_broke_are_not_written_twice(url):
    record = PostgresRecord(url, create=True)
    record.append(made_rows(2))
    record.written -= 1  # as if the answer to the commit had not come
    record.append(made_rows(2))
    record.append(made_rows(1, 2))
    assert [row["id"] for row in rows_in(url)] == ["r0", "r1", "r2"]


def test_old_rows_are_removed(url):
    record = open_record(url, create=True)
    record.append(made_rows(1))
    record.append(made_rows(1, 1, datetime.now(timezone.utc)))
    record.give([Feedback("r0", True, None, datetime(2020, 1, 1, tzinfo=timezone.utc))])
    record.tidy(3)
    assert [row["id"] for row in rows_in(url)] == ["r1"]
    assert list(record.feedback()) == []


def test_a_database_that_dies_costs_rows_which_are_counted_and_is_used_again(url, database, monkeypatch, capfd):
    monkeypatch.setattr(recorder, "MOST_REPLIES", 8)
    monkeypatch.setattr(recorder, "WRITE_SECONDS", 0.02)
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.1)
    registry = CollectorRegistry()
    written = Recorder(RecordOptions(url), registry)
    written.add(reply().SerializeToString(), recorder.Recording("before", []), "")
    wait(lambda: registry.get_sample_value("vilu_record_rows_total") == 1)
    database.stop()
    for i in range(20):
        written.add(reply().SerializeToString(), recorder.Recording(f"r{i}", []), "")
    wait(lambda: "postgresql:" in capfd.readouterr().err)
    with pytest.raises(UserError, match="postgresql:"):
        open_record(url)
    database.start()

    def counted():
        dropped = ("queue_full", "write_failed")
        lost = [
            registry.get_sample_value("vilu_record_rows_dropped_total", {"reason": reason}) or 0 for reason in dropped
        ]
        return registry.get_sample_value("vilu_record_rows_total") + sum(lost), sum(lost)

    wait(lambda: counted()[0] == 21)
    assert 0 < counted()[1] < 20
    written.add(reply().SerializeToString(), recorder.Recording("after", []), "")
    written.close()
    assert {"before", "after"} < {row["id"] for row in rows_in(url)}


def test_a_database_without_a_record_is_one_line(url):
    with pytest.raises(UserError, match="has no record"):
        open_record(url)
